"""Make and open record batches.

The agent makes a batch once; everything on the way passes it on unopened; readers open it here.
What comes from an agent is not trusted: sizes are checked before anything is decompressed.
"""

from collections.abc import Iterable, Sequence

import lz4.frame
import zstandard
from google.protobuf.message import DecodeError

from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import (
    CODEC_LZ4,
    CODEC_NONE,
    CODEC_ZSTD,
    Codec,
    EncodedRecord,
    RecordBatch,
    RecordList,
)
from outrider_proto.wire import beyond

#: The level at which compression costs the agent least per byte saved.
ZSTD_LEVEL = 1
#: Batches that are larger than this before compression are counted before they are parsed, bytes.
#: Those that agents make are smaller.
COUNTED_BYTES = limits.MIB


class BatchError(ValueError):
    """A batch that cannot be opened, and why."""


def entry(record: EncodedRecord) -> bytes:
    """A record as it stands in a serialized RecordList: entries one after the other are one."""
    body = record.SerializeToString()
    size = len(body)
    if size < 0x80:
        return b"\x0a%c" % size + body
    if size < 0x4000:
        return b"\x0a%c%c" % (size & 0x7F | 0x80, size >> 7) + body
    return RecordList(records=[record]).SerializeToString()


def encode(
    records: Sequence[EncodedRecord],
    *,
    epoch: int,
    seq: int,
    codec: Codec.ValueType,
    created_unix_nanos: int,
) -> RecordBatch:
    """Make a batch.

    Args:
        records: Oldest first; not empty.
        epoch: The life of the agent's outbox.
        seq: The batch's number in it.
        codec: CODEC_NONE, CODEC_ZSTD or CODEC_LZ4.
        created_unix_nanos: Now.

    Raises:
        BatchError: It would be beyond the limits.
    """
    return pack(
        RecordList(records=records).SerializeToString(),
        count=len(records),
        data_types={r.data_type for r in records},
        epoch=epoch,
        seq=seq,
        codec=codec,
        created_unix_nanos=created_unix_nanos,
    )


def pack(
    content: bytes,
    *,
    count: int,
    data_types: Iterable[int],
    epoch: int,
    seq: int,
    codec: Codec.ValueType,
    created_unix_nanos: int,
) -> RecordBatch:
    """Make a batch of a RecordList that is serialized already: the same as `encode`.

    Args:
        content: The RecordList.
        count: Number of records in it.
        data_types: The different types among them.
        epoch: The life of the agent's outbox.
        seq: The batch's number in it.
        codec: CODEC_NONE, CODEC_ZSTD or CODEC_LZ4.
        created_unix_nanos: Now.

    Raises:
        BatchError: It would be beyond the limits.
    """
    packed = content
    if codec == CODEC_ZSTD:
        packed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(content)
    elif codec == CODEC_LZ4:
        packed = lz4.frame.compress(content, store_size=True)
    types = sorted(data_types)
    if len(types) > limits.BATCH_DATA_TYPES:
        types = [0, *types[: limits.BATCH_DATA_TYPES - 1]]
    batch = RecordBatch(
        epoch=epoch,
        seq=seq,
        codec=codec,
        records=packed,
        count=count,
        decompressed_bytes=len(content),
        data_types=types,
        created_unix_nanos=created_unix_nanos,
    )
    problem = check(batch)
    if problem:
        raise BatchError(problem)
    return batch


def check(batch: RecordBatch) -> str | None:
    """Why a batch is not acceptable, or None; does not open it."""
    if batch.epoch == 0 or batch.seq == 0:
        return "epoch and seq must be above 0"
    if batch.codec not in (CODEC_NONE, CODEC_ZSTD, CODEC_LZ4):
        return f"codec {batch.codec} is unknown"
    if not batch.records or not 0 < batch.count <= limits.BATCH_RECORDS:
        return f"a batch has 1 to {limits.BATCH_RECORDS} records, this one states {batch.count}"
    if len(batch.records) > limits.BATCH_BYTES:
        return f"{len(batch.records)} bytes; a batch has at most {limits.BATCH_BYTES}"
    # Fields that are not known here are kept and passed on: they must not be a way around.
    if batch.ByteSize() - len(batch.records) > limits.BATCH_HEAD_BYTES:
        return f"more than {limits.BATCH_HEAD_BYTES} bytes besides its records"
    if batch.decompressed_bytes > limits.BATCH_DECOMPRESSED_BYTES:
        return (
            f"{batch.decompressed_bytes} bytes before compression; "
            f"at most {limits.BATCH_DECOMPRESSED_BYTES}"
        )
    if len(batch.data_types) > limits.BATCH_DATA_TYPES:
        return f"names {len(batch.data_types)} data types; at most {limits.BATCH_DATA_TYPES}"
    return None


def decode(batch: RecordBatch) -> list[EncodedRecord]:
    """Open a batch.

    Raises:
        BatchError: It is damaged, beyond the limits, or not what it says it is.
    """
    problem = check(batch)
    if problem:
        raise BatchError(problem)
    content = batch.records
    if batch.codec == CODEC_ZSTD:
        content = _from_zstd(batch.records)
    elif batch.codec == CODEC_LZ4:
        content = _from_lz4(batch.records)
    if len(content) != batch.decompressed_bytes:
        raise BatchError(f"holds {len(content)} bytes, states {batch.decompressed_bytes}")
    # Before there is an object for each, which takes a hundred times as much: millions of empty
    # ones fit into a batch, and that into a few bytes.
    if len(content) > COUNTED_BYTES and beyond(content, {(1,): batch.count}) is not None:
        raise BatchError(f"holds more records than the {batch.count} that it states")
    try:
        found = RecordList.FromString(content).records
    except DecodeError as error:
        raise BatchError(f"does not hold records: {error}") from None
    if len(found) != batch.count:
        raise BatchError(f"holds {len(found)} records, states {batch.count}")
    return list(found)


def _from_zstd(packed: bytes) -> bytes:
    try:
        _check_stated(zstandard.frame_content_size(packed), "zstd")
        return zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BatchError(f"is not a zstd frame: {error}") from None


def _from_lz4(packed: bytes) -> bytes:
    try:
        # 0 stands for a frame that states nothing: no batch is empty.
        stated = lz4.frame.get_frame_info(packed)["content_size"] or -1
        _check_stated(stated, "lz4")
        opener = lz4.frame.LZ4FrameDecompressor()
        # One more than it states: the frame's end is seen, and more than that never made.
        content: bytes = opener.decompress(packed, max_length=stated + 1)
    except RuntimeError as error:  # what the library raises for everything
        raise BatchError(f"is not an lz4 frame: {error}") from None
    if not opener.eof or opener.unused_data:
        raise BatchError("is not one whole lz4 frame")
    return content


def _check_stated(size: int, codec: str) -> None:
    if not 0 <= size <= limits.BATCH_DECOMPRESSED_BYTES:
        raise BatchError(f"its {codec} frame states {size} bytes")
