"""Reading back: Kafka messages and files."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_proto import batches, records
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD, EncodedRecord
from outrider_proto.v1.sink_pb2 import StoredBatch


def batch(seq=1, values=("v",)):
    made = [records.payload(records.AGENT_HEARTBEAT, 60, {"k": v}) for v in values]
    return batches.encode(made, epoch=9, seq=seq, codec=CODEC_ZSTD, created_unix_nanos=1)


def stored(seq=1, values=("v",)) -> StoredBatch:
    return StoredBatch(agent_id="id", node="n1", server_unix_nanos=3, batch=batch(seq, values))


def test_message_round_trip() -> None:
    made = batch(values=["a", "ü"])
    headers = records.headers("id", "n1", made, 77)
    got = records.decode_message(headers, made.records)
    assert (got.agent_id, got.node, got.epoch, got.seq, got.server_unix_nanos) == (
        "id",
        "n1",
        9,
        1,
        77,
    )
    assert [records.fields_of(r) for r in got.records] == [{"k": "a"}, {"k": "ü"}]


@pytest.mark.parametrize(
    "name",
    [
        h
        for h, _ in records.headers("i", "n", batch(), 1)
        if h not in (records.HEADER_TYPES, records.HEADER_CONTENT_TYPE)
    ],
)
def test_missing_header_is_named(name) -> None:
    made = batch()
    kept = [(h, v) for h, v in records.headers("i", "n", made, 1) if h != name]
    with pytest.raises(batches.BatchError, match=name):
        records.decode_message(kept, made.records)


def test_file_round_trip_and_repeats(tmp_path, capsys) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"".join(map(records.frame, [stored(1), stored(2), stored(1)])))
    assert records.main([str(file)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (
        lines
        == [{"agent": "id", "node": "n1", "type": 1000, "timestamp": 60, "fields": {"k": "v"}}] * 2
    )


def test_unreadable_file_is_an_exit_code(tmp_path, capsys) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"\xff" * 20)
    assert records.main([str(file), str(tmp_path / "none")]) == 1
    assert "a frame has no length" in capsys.readouterr().err


def test_what_an_agent_made_wrong_hides_nothing_of_others(tmp_path, capsys) -> None:
    """Batches are stored unopened."""
    wrong = stored(2)
    wrong.batch.records = b"rubbish"
    file = tmp_path / "f"
    file.write_bytes(b"".join(map(records.frame, [stored(1), wrong, stored(3), stored(1)])))
    assert records.main([str(file)]) == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert "batch 9/2 of n1" in printed.err


@given(st.integers(0, 400))
def test_torn_tail_ends_the_file(cut) -> None:
    """Whatever was cut off the end: all frames before it come out whole, and nothing else."""
    frames = [records.frame(stored(seq, ["x" * seq])) for seq in range(1, 6)]
    whole = b"".join(frames)
    kept = whole[: max(0, len(whole) - cut)]
    got = [s.batch.seq for s in records.read_stored(io.BytesIO(kept))]
    ends = [len(b"".join(frames[: n + 1])) for n in range(5)]
    assert got == [n + 1 for n, end in enumerate(ends) if end <= len(kept)]


@given(st.binary(max_size=300))
def test_rubbish_is_a_batch_error_or_nothing(rubbish) -> None:
    try:
        for found in records.read_stored(io.BytesIO(rubbish)):
            records.decode_stored(found)
    except batches.BatchError:
        pass


def test_not_a_payload() -> None:
    with pytest.raises(batches.BatchError, match="type 5 holds no payload"):
        records.fields_of(EncodedRecord(data_type=5, data=b"\xff"))
