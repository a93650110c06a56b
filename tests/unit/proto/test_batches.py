"""Batches: what goes in comes out, and nothing else does harm."""

import lz4.frame
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from outrider_proto import batches, limits
from outrider_proto.v1.agent_pb2 import (
    CODEC_LZ4,
    CODEC_NONE,
    CODEC_ZSTD,
    EncodedRecord,
    RecordBatch,
    RecordList,
)

CODECS = st.sampled_from([CODEC_NONE, CODEC_ZSTD, CODEC_LZ4])

RECORDS = st.lists(
    st.builds(
        EncodedRecord,
        data_type=st.integers(0, 2**31 - 1),
        timestamp=st.integers(-(2**63), 2**63 - 1),
        data=st.binary(max_size=200),
    ),
    min_size=1,
    max_size=80,
)


def make(records, codec=CODEC_ZSTD) -> RecordBatch:
    return batches.encode(records, epoch=7, seq=1, codec=codec, created_unix_nanos=5)


@given(RECORDS, CODECS)
def test_round_trip(records, codec) -> None:
    batch = make(records, codec)
    assert batches.check(batch) is None
    assert batches.decode(batch) == records
    assert batch.count == len(records)
    assert len(batch.data_types) <= limits.BATCH_DATA_TYPES


@given(RECORDS)
def test_entries_one_after_the_other_are_a_list(records) -> None:
    joined = b"".join(map(batches.entry, records))
    assert joined == RecordList(records=records).SerializeToString()


@pytest.mark.parametrize("size", [0, 100, 120, 130, 16_000, 16_380, 16_400, 70_000])
def test_entries_of_any_length(size) -> None:
    records = [EncodedRecord(data=bytes(size))]
    assert batches.entry(records[0]) == RecordList(records=records).SerializeToString()


@given(RECORDS, CODECS, st.data())
def test_damage_is_an_error_or_the_same_size(records, codec, data) -> None:
    """Any bytes give records or BatchError, never another error and never beyond the limits."""
    batch = make(records, codec)
    raw = bytearray(batch.records)
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    batch.records = bytes(raw)
    try:
        got = batches.decode(batch)
    except batches.BatchError:
        return
    assert len(got) == batch.count


def test_bomb_is_refused_before_it_is_opened() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 * limits.MIB))
    batch = RecordBatch(
        epoch=1, seq=1, codec=CODEC_ZSTD, records=bomb, count=1, decompressed_bytes=100
    )
    with pytest.raises(batches.BatchError, match="states 67108864 bytes"):
        batches.decode(batch)


def test_an_lz4_bomb_is_refused_before_it_is_opened() -> None:
    bomb = lz4.frame.compress(bytes(64 * limits.MIB), store_size=True)
    batch = RecordBatch(
        epoch=1, seq=1, codec=CODEC_LZ4, records=bomb, count=1, decompressed_bytes=100
    )
    with pytest.raises(batches.BatchError, match="states 67108864 bytes"):
        batches.decode(batch)


@pytest.mark.parametrize(
    "packed",
    [
        lz4.frame.compress(b"x" * 9, store_size=False),
        lz4.frame.compress(b"x" * 9, store_size=True) + b"y",
        lz4.frame.compress(b"x" * 9, store_size=True)[:-1],
        lz4.frame.compress(b"x" * 9, store_size=True) * 2,
        b"rubbish",
    ],
)
def test_what_is_not_one_lz4_frame_is_refused(packed) -> None:
    batch = RecordBatch(
        epoch=1, seq=1, codec=CODEC_LZ4, records=packed, count=1, decompressed_bytes=9
    )
    with pytest.raises(batches.BatchError, match="lz4 frame"):
        batches.decode(batch)


def test_what_follows_a_zstd_frame_is_refused() -> None:
    batch = make([EncodedRecord(data=b"x")])
    batch.records += b"y"
    with pytest.raises(batches.BatchError, match="zstd frame"):
        batches.decode(batch)


def test_frame_without_content_size_is_refused() -> None:
    packer = zstandard.ZstdCompressor(write_content_size=False)
    batch = RecordBatch(
        epoch=1,
        seq=1,
        codec=CODEC_ZSTD,
        records=packer.compress(b"x" * 9),
        count=1,
        decompressed_bytes=9,
    )
    with pytest.raises(batches.BatchError, match="its zstd frame states"):
        batches.decode(batch)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epoch": 0}, "above 0"),
        ({"seq": 0}, "above 0"),
        ({"codec": 0}, "codec 0 is unknown"),
        ({"codec": 99}, "codec 99 is unknown"),
        ({"count": 0}, "states 0"),
        ({"count": limits.BATCH_RECORDS + 1}, "at most|1 to"),
        ({"records": b""}, "1 to"),
        ({"records": bytes(limits.BATCH_BYTES + 1)}, "a batch has at most"),
        ({"decompressed_bytes": limits.BATCH_DECOMPRESSED_BYTES + 1}, "before compression"),
        ({"data_types": list(range(65))}, "names 65 data types"),
    ],
)
def test_limits(change, says) -> None:
    good = {"epoch": 1, "seq": 1, "codec": CODEC_NONE, "records": b"x", "count": 1}
    problem = batches.check(RecordBatch(**{**good, **change}))
    with pytest.raises(batches.BatchError, match=says):
        raise batches.BatchError(problem)


def test_too_many_records_are_never_made() -> None:
    with pytest.raises(batches.BatchError, match="1 to 10000 records"):
        make([EncodedRecord()] * (limits.BATCH_RECORDS + 1))


@pytest.mark.parametrize("entry", [b"\x0a\x00", b"\x0a\x02\x08\x01"])
def test_millions_of_records_are_refused_before_there_is_an_object_for_each(entry: bytes) -> None:
    """They fit into a few KiB, and would take half a GiB."""
    content = entry * (limits.BATCH_DECOMPRESSED_BYTES // len(entry))
    batch = RecordBatch(
        epoch=1,
        seq=1,
        codec=CODEC_ZSTD,
        records=zstandard.ZstdCompressor().compress(content),
        count=limits.BATCH_RECORDS,
        decompressed_bytes=len(content),
    )
    with pytest.raises(batches.BatchError, match="more records than the 10000 that it states"):
        batches.decode(batch)


def test_a_large_batch_of_as_many_records_as_it_states_is_opened() -> None:
    records = [EncodedRecord(data_type=1, data=bytes(1500)) for _ in range(limits.BATCH_RECORDS)]
    assert batches.decode(make(records)) == records
