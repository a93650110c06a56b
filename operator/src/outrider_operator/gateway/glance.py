"""Messages of batches, seen at a glance instead of parsed.

Of such a message nearly all is the batches' `records`. Counting its fields one by one, or having
protobuf copy and keep the whole, costs more than all else that is done with it. Here there is one
match for each batch; this knows the order in which the usual libraries write, and says so when a
message is anything else: then protobuf has the word.
"""

import functools
import re
from typing import Final

from google.protobuf.message import DecodeError
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import RecordBatch

from outrider_operator.core.batch import SeenBatch

#: The beginning of a PackagedData.batches entry: its tag and length (1), its epoch, seq and codec,
#: then the tag and the length (2) of its records.
_BATCH: Final = re.compile(
    rb"\x8a\x01([\x80-\xff]{0,4}[\x00-\x7f])"
    rb"(?:[\x08\x10\x18][\x80-\xff]{0,9}[\x00-\x7f]){0,3}"
    rb"\x22([\x80-\xff]{0,4}[\x00-\x7f])"
)
#: The same with each of them: length (1), epoch (2), seq (3), codec (4), length of records (5).
_HEAD: Final = re.compile(
    rb"\x8a\x01([\x80-\xff]{0,3}[\x00-\x7f])"
    rb"\x08([\x80-\xff]{0,8}[\x00-\x7f]|[\x80-\xff]{9}\x01)"
    rb"\x10([\x80-\xff]{0,5}[\x00-\x7f])"
    rb"\x18([\x01-\x03])"
    rb"\x22([\x80-\xff]{0,3}[\x00-\x7f])"
)
#: What follows the records: count (1), decompressed_bytes (2), length of the data types (3), and
#: after these when the batch was closed.
_TAIL: Final = re.compile(
    rb"\x28([\x80-\xff]{0,2}[\x00-\x7f])\x30([\x80-\xff]{0,3}[\x00-\x7f])(?:\x3a([\x00-\x7f]))?"
)
_CLOSED: Final = re.compile(rb"\x40[\x80-\xff]{0,8}[\x00-\x7f]|")
#: Sets of data types that are remembered: agents use few.
_TYPES: Final = 4096

Sized = tuple[SeenBatch, int]


def besides_records(data: bytes) -> int:
    """Bytes of a serialized PackagedData that are not `records` of its batches; at most all."""
    place, end, rest = 0, len(data), 0
    match = _BATCH.match
    while place < end:
        found = match(data, place)
        if found is None:
            return rest + end - place
        content = found.end()
        after = found.end(1) + _number(found[1])
        records = _number(found[2])
        if after > end or content + records > after:
            return rest + end - place
        rest += after - place - records
        place = after
    return rest


class Glance:
    """Sees the batches of one stream's messages."""

    __slots__ = ("_epoch", "_epoch_bytes")

    def __init__(self) -> None:
        # Of the last batch: mostly the next one's as well.
        self._epoch = 0
        self._epoch_bytes = b""

    def batches(self, data: bytes) -> list[Sized] | None:
        """The batches of a serialized PackagedData, each with its size in bytes.

        None: it holds something else, or not only what the contract allows, or is written in
        another way. Then it has to be parsed.
        """
        found: list[Sized] = []
        place, end = 0, len(data)
        while place < end:
            head = _HEAD.match(data, place)
            if head is None or len(found) == limits.BATCHES_PER_MESSAGE:
                return None
            size, epoch, seq, codec, length = head.groups()
            start = head.end(1)
            content = head.end()
            after, over = start + _number(size), content + _number(length)
            tail = _TAIL.match(data, over, after)
            if tail is None or after > end:
                return None
            if epoch != self._epoch_bytes:
                self._epoch, self._epoch_bytes = _number(epoch), epoch
            rest = tail.end()
            types: tuple[int, ...] | None = ()
            if tail[3] is not None:
                packed = data[rest : rest + tail[3][0]]
                rest += tail[3][0]
                types = data_types(packed)
            if types is None or rest > after or not _CLOSED.fullmatch(data, rest, after):
                return None
            batch = SeenBatch(
                self._epoch,
                _number(seq),
                codec[0],
                data[content:over],
                _number(tail[1]),
                _number(tail[2]),
                types,
                data[rest:after],
            )
            if not _fits(batch):
                return None
            found.append((batch, after - start))
            place = after
        return found or None


def _fits(batch: SeenBatch) -> bool:
    """As batches.check; why a batch does not is said by that."""
    return (
        batch.epoch > 0
        and batch.seq > 0
        and 0 < batch.count <= limits.BATCH_RECORDS
        and 0 < len(batch.records) <= limits.BATCH_BYTES
        and batch.decompressed_bytes <= limits.BATCH_DECOMPRESSED_BYTES
    )


@functools.lru_cache(_TYPES)
def data_types(packed: bytes) -> tuple[int, ...] | None:
    """A batch's data types as it packs them; None: they are none, or too many."""
    try:
        types = RecordBatch.FromString(b"\x3a%c" % len(packed) + packed).data_types
    except DecodeError:
        return None
    return tuple(types) if len(types) <= limits.BATCH_DATA_TYPES else None


def _number(varint: bytes) -> int:
    size = len(varint)
    if size == 3:
        return varint[0] & 0x7F | (varint[1] & 0x7F) << 7 | varint[2] << 14
    if size == 1:
        return varint[0]
    if size == 2:
        return varint[0] & 0x7F | varint[1] << 7
    value = 0
    for shift, byte in enumerate(varint):
        value |= (byte & 0x7F) << (7 * shift)
    return value
