"""What is skipped before parsing is exactly the content of batches, for any message at all."""

import itertools

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.batch import message_of
from outrider_operator.gateway.glance import Glance, besides_records
from outrider_proto import batches, limits
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD, Heartbeat, PackagedData, RecordBatch
from outrider_proto.wire import _fields

sizes = st.lists(st.integers(0, 70_000), max_size=5)


def message(sizes: list[int]) -> PackagedData:
    made = PackagedData()
    for seq, size in enumerate(sizes, 1):
        made.batches.add(
            epoch=2**63 + seq,
            seq=seq,
            codec=CODEC_ZSTD,
            records=bytes(size),
            count=1,
            data_types=[9],
        )
    return made


@given(sizes)
def test_counts_all_but_records(sizes: list[int]) -> None:
    data = message(sizes).SerializeToString()
    # Once one has no records, which is refused later, all that follows counts.
    known = list(itertools.takewhile(bool, sizes))
    assert besides_records(data) == len(data) - sum(known)


@given(sizes, st.binary(max_size=300))
def test_what_follows_counts_in_full(sizes: list[int], tail: bytes) -> None:
    data = message([size + 1 for size in sizes]).SerializeToString()
    rest = PackagedData(heartbeat=Heartbeat(unix_nanos=1)).SerializeToString() + tail
    assert besides_records(data + rest) >= besides_records(data)
    assert besides_records(rest) == len(rest)


@given(st.binary(max_size=400) | sizes.map(lambda s: message(s).SerializeToString()), st.data())
def test_never_hides_what_would_be_parsed(data: bytes, source: st.DataObject) -> None:
    if data:
        at = source.draw(st.integers(0, len(data) - 1))
        data = data[:at] + source.draw(st.binary(max_size=3)) + data[at + 1 :]
    try:
        PackagedData.FromString(data)
    except DecodeError:
        return
    # Skipped is at most what stands in field 4 of field 17, as it is parsed.
    batches = [content for number, content in _fields(memoryview(data)) if number == 17]
    most = sum(len(c) for batch in batches for number, c in _fields(batch) if number == 4)
    assert besides_records(data) >= len(data) - most


good = st.builds(
    RecordBatch,
    epoch=st.integers(1, 2**64 - 1),
    seq=st.integers(1, 2**40),
    codec=st.integers(1, 3),
    records=st.binary(min_size=1, max_size=300),
    count=st.integers(1, limits.BATCH_RECORDS),
    decompressed_bytes=st.integers(1, limits.BATCH_DECOMPRESSED_BYTES),
    data_types=st.lists(st.integers(1, 30_000), max_size=40),
    created_unix_nanos=st.integers(0, 2**62),
)


@given(st.lists(good, min_size=1, max_size=5))
def test_sees_what_agents_send(made: list[RecordBatch]) -> None:
    seen = Glance().batches(PackagedData(batches=made).SerializeToString())
    assert seen is not None
    assert [message_of(batch) for batch, _ in seen] == made
    assert [size for _, size in seen] == [batch.ByteSize() for batch in made]
    for (batch, _), message in zip(seen, made, strict=True):
        assert (batch.epoch, batch.seq, batch.codec) == (message.epoch, message.seq, message.codec)
        assert (batch.records, batch.count) == (message.records, message.count)
        assert batch.decompressed_bytes == message.decompressed_bytes
        assert list(batch.data_types) == list(message.data_types)


@given(st.lists(good, min_size=1, max_size=3), st.data())
def test_sees_nothing_that_is_not_there(made: list[RecordBatch], source: st.DataObject) -> None:
    data = PackagedData(batches=made).SerializeToString()
    for _ in range(source.draw(st.integers(1, 3))):
        at = source.draw(st.integers(0, len(data) - 1))
        data = data[:at] + source.draw(st.binary(max_size=3)) + data[at + 1 :]
    seen = Glance().batches(data)
    if seen is None:
        return
    parsed = PackagedData.FromString(data)
    assert [message_of(batch) for batch, _ in seen] == list(parsed.batches)
    assert [size for _, size in seen] == [batch.ByteSize() for batch in parsed.batches]
    assert not any(batches.check(message_of(batch)) for batch, _ in seen)
    parsed.ClearField("batches")
    assert parsed == PackagedData()


BATCH = RecordBatch(epoch=1, seq=1, codec=CODEC_ZSTD, records=b"x", count=1, decompressed_bytes=9)


@pytest.mark.parametrize(
    "more",
    [
        {"epoch": 0},
        {"seq": 0},
        {"codec": 4},
        {"records": b""},
        {"records": bytes(limits.BATCH_BYTES + 1)},
        {"count": 0},
        {"count": limits.BATCH_RECORDS + 1},
        {"decompressed_bytes": limits.BATCH_DECOMPRESSED_BYTES + 1},
        {"data_types": range(limits.BATCH_DATA_TYPES + 1)},
    ],
)
def test_leaves_what_is_wrong_to_those_who_say_why(more: dict[str, object]) -> None:
    wrong = RecordBatch()
    wrong.CopyFrom(BATCH)
    wrong.MergeFrom(RecordBatch(**more))  # type: ignore[arg-type]
    for name, value in more.items():
        if not value:
            wrong.ClearField(name)  # type: ignore[arg-type]
    assert Glance().batches(PackagedData(batches=[BATCH]).SerializeToString())
    assert Glance().batches(PackagedData(batches=[BATCH, wrong]).SerializeToString()) is None


def test_sees_no_more_batches_than_a_message_may_have() -> None:
    most = [BATCH] * limits.BATCHES_PER_MESSAGE
    assert len(Glance().batches(PackagedData(batches=most).SerializeToString()) or ()) == len(most)
    assert Glance().batches(PackagedData(batches=[*most, BATCH]).SerializeToString()) is None


@pytest.mark.parametrize(
    "message",
    [
        PackagedData(),
        PackagedData(agent_id="a", batches=[BATCH]),
        PackagedData(heartbeat=Heartbeat(unix_nanos=1), batches=[BATCH]),
    ],
)
def test_sees_only_batches(message: PackagedData) -> None:
    assert Glance().batches(message.SerializeToString()) is None
