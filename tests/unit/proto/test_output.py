"""Output put together again: any order, repeats, overlaps, gaps, damaged files."""

import base64
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_proto import batches, records
from outrider_proto.output import (
    Piece,
    Wanted,
    from_line,
    join,
    pieces_of,
    read_directory,
    to_line,
)
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD, EncodedRecord
from outrider_proto.v1.sink_pb2 import StoredBatch

WANTED = Wanted("uid", "node", attempt=1)


@st.composite
def cut_output(draw: st.DrawFn) -> tuple[bytes, list[Piece]]:
    """An output and pieces of it that cover it, in any order, some twice or overlapping."""
    data = draw(st.binary(max_size=60))
    cuts = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=8))})
    pieces = [Piece(1, a, data[a:b]) for a, b in pairwise(cuts)]
    for begin in draw(st.lists(st.integers(0, len(data)), max_size=4)):
        end = draw(st.integers(begin, len(data)))
        pieces.append(Piece(1, begin, data[begin:end]))
    return data, draw(st.permutations(pieces))


@given(cut_output())
def test_what_covers_the_output_gives_the_output(case: tuple[bytes, list[Piece]]) -> None:
    data, pieces = case
    joined = join(pieces)
    assert joined.data == data
    assert joined.missing(len(data)) == []


@given(cut_output(), st.data())
def test_gaps_are_exactly_the_bytes_that_no_piece_has(
    case: tuple[bytes, list[Piece]], choice: st.DataObject
) -> None:
    data, pieces = case
    kept = [piece for piece in pieces if choice.draw(st.booleans())]
    there = {at for piece in kept for at in range(piece.offset, piece.end)}
    joined = join(kept)
    gone = {at for begin, end in joined.missing(len(data)) for at in range(begin, end)}
    assert gone == set(range(len(data))) - there
    assert joined.data == bytes(data[at] for at in sorted(there))
    assert [data[offset : offset + len(part)] for offset, part in joined.parts] == [
        part for _, part in joined.parts
    ]


@given(st.integers(0, 10), st.integers(0, 2**40), st.binary(max_size=40))
def test_a_piece_survives_its_line(attempt: int, offset: int, data: bytes) -> None:
    piece = Piece(attempt, offset, data)
    line = to_line(piece)
    assert "\n" not in line
    assert from_line(line) == piece


@pytest.mark.parametrize(
    "line", ["", "x", "3", "{}", '{"attempt": 1, "offset": 0, "data": "?"}', '{"end": true}']
)
def test_what_is_no_piece_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="no piece"):
        from_line(line)


def output_record(text: str = "a", **changes: str) -> EncodedRecord:
    fields = {"task_uid": "uid", "attempt": "1", "offset": "0", "output": text}
    return records.payload(records.TASK_OUTPUT, 1, {**fields, "encoding": "utf-8", **changes})


def stored(*made: EncodedRecord, node: str = "node", seq: int = 1) -> StoredBatch:
    batch = batches.encode(made, epoch=1, seq=seq, codec=CODEC_ZSTD, created_unix_nanos=1)
    return StoredBatch(agent_id="agent", node=node, server_unix_nanos=1, batch=batch)


def test_only_the_wanted_output_is_taken() -> None:
    batch = records.decode_stored(
        stored(
            records.payload(records.HOST_METRICS, 1, {"task_uid": "uid"}),
            output_record("mine"),
            output_record("of another task", task_uid="other"),
            output_record("of another attempt", attempt="2"),
            output_record(base64.b64encode(b"\xff").decode(), offset="4", encoding="base64"),
        )
    )
    assert list(pieces_of(batch, WANTED)) == [Piece(1, 0, b"mine"), Piece(1, 4, b"\xff")]
    assert len(list(pieces_of(batch, Wanted("uid", "node")))) == 3
    assert list(pieces_of(batch, Wanted("uid", "elsewhere", 1))) == []


@pytest.mark.parametrize(
    "changes", [{"offset": "x"}, {"attempt": ""}, {"output": "?", "encoding": "base64"}]
)
def test_a_damaged_record_is_told(changes: dict[str, str]) -> None:
    batch = records.decode_stored(stored(output_record(**changes)))
    with pytest.raises(batches.BatchError, match="damaged"):
        list(pieces_of(batch, WANTED))


def test_a_folder_is_read_on_past_what_is_damaged(tmp_path: Path) -> None:
    good = records.frame(stored(output_record("one")))
    more = records.frame(stored(output_record("two", offset="3"), seq=2))
    (tmp_path / "1.records").write_bytes(good + b"\x07torn")
    (tmp_path / "2.records").write_bytes(b"\x05wrong!" + good)
    (tmp_path / "3.records").write_bytes(
        more + records.frame(stored(output_record("no"), node="other"))
    )
    (tmp_path / "notes.txt").write_bytes(b"not of the sink")
    problems: list[str] = []
    pieces = list(read_directory(tmp_path, WANTED, problems))
    assert join(pieces).data == b"onetwo"
    (problem,) = problems
    assert problem.startswith("2.records: ")


def test_a_batch_of_too_many_types_to_name_is_opened_too(tmp_path: Path) -> None:
    many = [records.payload(number, 1, {}) for number in range(1, 80)]
    batch = stored(*many, output_record("one"))
    assert records.TASK_OUTPUT not in batch.batch.data_types
    (tmp_path / "1.records").write_bytes(records.frame(batch))
    assert [piece.data for piece in read_directory(tmp_path, WANTED, [])] == [b"one"]


def test_files_from_before_the_task_are_not_opened(tmp_path: Path) -> None:
    old, new = tmp_path / "1.records", tmp_path / "2.records"
    old.write_bytes(records.frame(stored(output_record("old"))))
    new.write_bytes(records.frame(stored(output_record("new", offset="3"))))
    os.utime(old, (1000, 1000))
    os.utime(new, (9500, 9500))
    wanted = Wanted("uid", "node", 1, since=10_000)
    assert [piece.data for piece in read_directory(tmp_path, wanted, [])] == [b"new"]
    everything = Wanted("uid", "node", 1)
    assert len(list(read_directory(tmp_path, everything, []))) == 2
