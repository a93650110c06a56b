"""`python -m outrider_operator.output` beside a file sink: what it prints, and how it ends."""

import json
from pathlib import Path

import pytest
import yaml
from outrider_operator import output
from outrider_proto import batches, records
from outrider_proto.output import from_line, join
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD
from outrider_proto.v1.sink_pb2 import StoredBatch


def frame(seq: int, *texts: tuple[int, str], attempt: int = 1) -> bytes:
    made = [
        records.payload(
            records.TASK_OUTPUT,
            1,
            {
                "task_uid": "uid",
                "attempt": str(attempt),
                "offset": str(offset),
                "output": text,
                "encoding": "utf-8",
            },
        )
        for offset, text in texts
    ]
    batch = batches.encode(made, epoch=1, seq=seq, codec=CODEC_ZSTD, created_unix_nanos=1)
    return records.frame(
        StoredBatch(agent_id="agent", node="node", server_unix_nanos=1, batch=batch)
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    settings = tmp_path / "settings.yaml"
    folder = tmp_path / "records"
    sink = {"kind": "file", "file": {"directory": str(folder)}}
    settings.write_text(yaml.safe_dump({"sink": sink}))
    monkeypatch.setenv("OUTRIDER_CONFIG", str(settings))
    return folder


WANTED = ["--task-uid", "uid", "--node", "node"]


def test_each_piece_is_printed_once_and_the_end_last(folder, capsys) -> None:
    folder.mkdir()
    first = frame(1, (0, "one"), (3, "two"))
    # The second batch was stored twice, as after a broken connection.
    (folder / "1.records").write_bytes(first + frame(2, (6, "three")))
    (folder / "2.records").write_bytes(frame(2, (6, "three")) + frame(3, (0, "x"), attempt=2))
    assert output.main([*WANTED, "--attempt", "1"]) == 0
    *lines, end = capsys.readouterr().out.splitlines()
    pieces = [from_line(line) for line in lines]
    assert [(piece.offset, piece.data) for piece in pieces] == [
        (0, b"one"),
        (3, b"two"),
        (6, b"three"),
    ]
    assert join(pieces).data == b"onetwothree"
    assert json.loads(end) == {"end": True, "sink": "file", "problems": []}


def test_a_replica_that_never_stored_anything_says_so(folder, capsys) -> None:
    assert output.main(WANTED) == 0
    assert json.loads(capsys.readouterr().out) == {"end": True, "sink": "file", "problems": []}


def test_damaged_files_are_named_and_the_rest_is_read(folder, capsys) -> None:
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.records").write_bytes(b"\x05wrong!")
    (folder / "good.records").write_bytes(frame(1, (0, "one")))
    assert output.main(WANTED) == 0
    piece, end = capsys.readouterr().out.splitlines()
    assert from_line(piece).data == b"one"
    assert len(json.loads(end)["problems"]) == output.MAX_PROBLEMS


def test_wrong_settings_are_an_error_in_words(folder, capsys, monkeypatch) -> None:
    monkeypatch.setenv("OUTRIDER_SINK_KIND", "redis")
    assert output.main(WANTED) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert "sink.kind" in printed.err
