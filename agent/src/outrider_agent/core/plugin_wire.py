"""The pipe between agent and plug-in: messages cut from bytes, records and tasks on the wire.

Each message is its length, four bytes with the least first, and a protobuf message: Task down,
Record up. A Record's bytes are those of an EncodedRecord whose data is the serialized Payload, so
records pass on as they are. What comes from a plug-in is not trusted. Reads no descriptor.
"""

import struct
from collections.abc import Iterator
from typing import Final

from google.protobuf.message import DecodeError
from outrider_proto import limits, records
from outrider_proto.v1 import agent_pb2 as pb

#: Largest message from a plug-in, bytes.
MESSAGE_BYTES: Final = limits.RECORD_BYTES
#: Types that say something of the agent itself: no plug-in may.
RESERVED_TYPES: Final = frozenset(
    {records.AGENT_HEARTBEAT, records.PLUGIN_HEARTBEAT, *range(20_000, 20_100)}
)
#: The field that names the task which a record answers.
TOKEN: Final = "token"  # noqa: S105 - a name
_LENGTH: Final = struct.Struct("<I")


class MalformedError(ValueError):
    """Bytes that are no record, and why."""


class Frames:
    """Cuts what a plug-in writes into messages.

    Attributes:
        fault: What is wrong with the bytes that follow the last message; once there is a fault,
            nothing more is taken, for nobody knows where a message would begin. None: nothing.
    """

    def __init__(self, max_bytes: int = MESSAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self.fault: str | None = None

    @property
    def pending(self) -> int:
        """Bytes of a message that is not whole yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """Take what was read; returns the messages that are whole now, oldest first."""
        if self.fault is not None:
            return []
        buffer = self._buffer
        buffer += data
        found: list[bytes] = []
        place, end = 0, len(buffer)
        while end - place >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(buffer, place)
            if not 0 < size <= self._max_bytes:
                self.fault = f"a message of {size} bytes; they must have 1 to {self._max_bytes}"
                buffer.clear()
                return found
            begin = place + _LENGTH.size
            if end - begin < size:
                break
            found.append(bytes(buffer[begin : begin + size]))
            place = begin + size
        del buffer[:place]
        return found


def frame(message: bytes) -> bytes:
    """A message as it goes through the pipe."""
    return _LENGTH.pack(len(message)) + message


def record_of(message: bytes) -> pb.EncodedRecord:
    """The record in a message, with the payload's bytes as they came.

    Only where a text in it is no UTF-8 (names of files may be anything, and older plug-ins pass
    them on as they are) the payload is made anew, with the bad bytes replaced: nobody could read
    it otherwise.

    Raises:
        MalformedError: It is no Record.
    """
    try:
        record = pb.EncodedRecord.FromString(message)
    except DecodeError:
        raise MalformedError("a message that is no Record") from None
    if record.data_type < 1:
        raise MalformedError(f"a record of type {record.data_type}; types begin at 1")
    record.DiscardUnknownFields()
    try:
        pb.Payload.FromString(record.data)
    except DecodeError:
        fields = _replaced(record.data)
        if fields is None:
            raise MalformedError("a record whose data is no Payload") from None
        record.data = pb.Payload(fields=fields).SerializeToString()
    return record


def token_of(record: pb.EncodedRecord) -> str | None:
    """The token of the task that a record answers; None for most."""
    if b"token" not in record.data:
        return None
    return pb.Payload.FromString(record.data).fields.get(TOKEN)


def _replaced(data: bytes) -> dict[str, str] | None:
    """The fields of a payload with bad text in it; None if it is no payload at all."""
    fields: dict[str, str] = {}
    try:
        for tag, entry in _texts(data):
            if tag != 1:
                return None
            pair = dict(_texts(entry))
            fields[pair.get(1, b"").decode("utf-8", "replace")] = pair.get(2, b"").decode(
                "utf-8", "replace"
            )
    except ValueError:
        return None
    return fields


def _texts(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the fields of a message that has nothing but texts and messages."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        size, place = _varint(data, place)
        if tag & 7 != 2 or size > len(data) - place:
            raise ValueError("not a length-delimited field")
        yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for count, byte in enumerate(data[place : place + 5]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, place + count + 1
    raise ValueError("not a varint")
