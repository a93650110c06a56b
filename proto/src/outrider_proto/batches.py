"""Make and open record batches.

The agent makes a batch once; everything on the way passes it on unopened; readers open it here.
What comes from an agent is not trusted: sizes are checked before anything is decompressed.
"""

from collections.abc import Sequence

import zstandard
from google.protobuf.message import DecodeError

from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import (
    CODEC_NONE,
    CODEC_ZSTD,
    Codec,
    EncodedRecord,
    RecordBatch,
    RecordList,
)

#: The level at which compression costs the agent least per byte saved.
ZSTD_LEVEL = 1


class BatchError(ValueError):
    """A batch that cannot be opened, and why."""


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
        codec: CODEC_NONE or CODEC_ZSTD.
        created_unix_nanos: Now.

    Raises:
        BatchError: It would be beyond the limits.
    """
    content = RecordList(records=records).SerializeToString()
    packed = content
    if codec == CODEC_ZSTD:
        packed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(content)
    types = sorted({r.data_type for r in records})
    if len(types) > limits.BATCH_DATA_TYPES:
        types = [0, *types[: limits.BATCH_DATA_TYPES - 1]]
    batch = RecordBatch(
        epoch=epoch,
        seq=seq,
        codec=codec,
        records=packed,
        count=len(records),
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
    if batch.codec not in (CODEC_NONE, CODEC_ZSTD):
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
        content = _decompress(batch.records)
    if len(content) != batch.decompressed_bytes:
        raise BatchError(f"holds {len(content)} bytes, states {batch.decompressed_bytes}")
    try:
        records = list(RecordList.FromString(content).records)
    except DecodeError as error:
        raise BatchError(f"does not hold records: {error}") from None
    if len(records) != batch.count:
        raise BatchError(f"holds {len(records)} records, states {batch.count}")
    return records


def _decompress(packed: bytes) -> bytes:
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 <= size <= limits.BATCH_DECOMPRESSED_BYTES:
            raise BatchError(f"its zstd frame states {size} bytes")
        return zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise BatchError(f"is not a zstd frame: {error}") from None
