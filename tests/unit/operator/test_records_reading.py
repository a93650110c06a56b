"""`python -m outrider_operator.records` beside a file sink: filters, follows, ends in order."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from outrider_proto import batches, records, stored
from outrider_proto.lines import Folder, Wanted, from_json, lines_of, to_line
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD, EncodedRecord
from outrider_proto.v1.sink_pb2 import StoredBatch

NOW = time.time()


def frame(seq: int, *, node: str = "n1", types: tuple[int, ...] = (1000,), at: float = 0) -> bytes:
    made = [records.payload(t, 60, {"seq": str(seq), "type": str(t)}) for t in types]
    batch = batches.encode(made, epoch=1, seq=seq, codec=CODEC_ZSTD, created_unix_nanos=1)
    nanos = int((at or NOW) * 1e9)
    item = StoredBatch(agent_id=f"id-{node}", node=node, server_unix_nanos=nanos, batch=batch)
    return stored.frame(item)


def pack(*frames: bytes) -> bytes:
    return zstandard.ZstdCompressor(1, write_checksum=True).compress(b"".join(frames))


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> "subprocess.Popen[str]":
        environ = {**os.environ, "OUTRIDER_SINK_FILE_DIRECTORY": str(tmp_path / "records")}
        program = subprocess.Popen(
            [sys.executable, "-m", "outrider_operator.records", *words],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(program)
        return program

    (tmp_path / "records").mkdir()
    yield begin
    for program in started:
        program.kill()
        program.communicate()


def told(program: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    out, err = program.communicate(timeout=30)
    assert program.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def seqs(found: list[dict[str, Any]]) -> list[int]:
    return [line["seq"] for line in found if "seq" in line]


def test_both_forms_in_order_without_repeats(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    (folder / "1.records").write_bytes(frame(1) + frame(2))
    (folder / "2.records.zst").write_bytes(pack(frame(2), frame(3)) + pack(frame(4))[:-3])
    found = told(start())
    assert found[0] == {"begin": True, "sink": "file"}
    assert found[-1] == {"end": True, "sink": "file"}
    assert seqs(found)[:3] == [1, 2, 3]
    assert from_json(found[1]).fields == {"seq": "1", "type": "1000"}


def test_filters(start: Start, tmp_path: Path) -> None:
    (tmp_path / "records" / "1.records").write_bytes(
        frame(1, at=NOW - 500)
        + frame(2, node="n2")
        + frame(3, types=(1000, 20000))
        + frame(4, types=(20000,))
    )
    found = told(start("--node", "n1", "--type", "20000", "--last", "400"))
    assert [(line["seq"], line["type"]) for line in found[1:-1]] == [(3, 20000), (4, 20000)]
    assert seqs(told(start("--since", str(NOW - 1)))) == [2, 3, 3, 4]


def test_damage_is_told_and_the_rest_is_read(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    poison = StoredBatch(agent_id="a", node="n1", server_unix_nanos=int(NOW * 1e9))
    poison.batch.epoch = poison.batch.seq = 7
    (folder / "1.records").write_bytes(b"\x05wrong!")
    (folder / "2.records").write_bytes(stored.frame(poison) + frame(8))
    found = told(start())
    assert seqs(found) == [8]
    problems = [line["problem"] for line in found if "problem" in line]
    assert [problem.partition(":")[0] for problem in problems] == ["1.records", "2.records"]
    assert "batch 7/7 of n1" in problems[1]


def test_follows_files_as_they_grow_and_ends_with_its_reader(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    (folder / "1.records.zst").write_bytes(pack(frame(1)))
    program = start("--follow")
    assert program.stdout is not None
    lines = (json.loads(line) for line in program.stdout)
    assert next(lines)["sink"] == "file"
    assert next(lines)["seq"] == 1
    part = pack(frame(2))
    with (folder / "1.records.zst").open("ab") as file:
        file.write(part[:20])
        file.flush()
        time.sleep(0.5)
        file.write(part[20:])
    assert next(lines)["seq"] == 2
    (folder / "2.records").write_bytes(frame(3))
    assert next(lines)["seq"] == 3
    program.stdout.close()
    assert program.wait(timeout=10) == 0


def test_says_that_it_is_still_there(start: Start) -> None:
    program = start("--follow")
    assert program.stdout is not None
    assert json.loads(program.stdout.readline())["begin"]
    assert json.loads(program.stdout.readline()) == {"alive": True}


def test_a_record_that_is_no_payload_keeps_its_bytes() -> None:
    made = records.Decoded("a", "n", 1, 2, 3, [EncodedRecord(data_type=5, data=b"\xff\x00")])
    (line,) = lines_of(made, Wanted())
    assert line.fields is None
    assert from_json(json.loads(to_line(line))) == line


def read(folder: Folder, problems: list[str]) -> list[int]:
    return [line.seq for line in folder.read(problems) if line is not None]


def test_a_folder_is_read_on_and_not_again(tmp_path: Path) -> None:
    path = tmp_path / "1.records"
    path.write_bytes(frame(1))
    folder, problems = Folder(tmp_path, Wanted()), list[str]()
    assert read(folder, problems) == [1]
    assert read(folder, problems) == []
    with path.open("ab") as file:
        file.write(frame(2))
    (tmp_path / "2.records").write_bytes(frame(3))
    assert read(folder, problems) == [2, 3]
    path.unlink()
    assert read(folder, problems) == []
    folder.close()
    assert problems == []


def test_a_file_that_is_deleted_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    first, last = tmp_path / "1.records", tmp_path / "3.records"
    first.write_bytes(frame(1))
    folder, problems = Folder(tmp_path, Wanted()), list[str]()
    assert [line.seq for line in folder.read(problems) if line] == [1]
    with first.open("ab") as file:
        file.write(frame(2))
    first.unlink()
    last.write_bytes(frame(4))
    assert [line.seq for line in folder.read(problems) if line] == [2, 4]
    (problem,) = problems
    assert "1.records was deleted before it was read" in problem
    # Where all of it was read there is nothing to tell.
    problems.clear()
    last.unlink()
    assert list(folder.read(problems)) == []
    assert problems == []
    folder.close()
