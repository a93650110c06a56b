"""The messages between agent and plug-in, as bytes: records up, tasks down.

Each is its length (four bytes, the least first) and a protobuf message. Written by hand, because a
plug-in is to need no library for four small messages. Reads and writes nothing.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

#: Largest message that an agent takes, bytes.
MESSAGE_BYTES: Final = 1024 * 1024
_LENGTH: Final = struct.Struct("<I")


@dataclass(frozen=True)
class Task:
    """Something the agent asks for.

    Attributes:
        data_type: What kind of task; the plug-in's to define, at least 1.
        object_name: Name of the plug-in.
        data: Its content; the plug-in's to define.
        token: Names the task; the answer bears it.
    """

    data_type: int
    object_name: str = ""
    data: str = ""
    token: str = ""


def record(data_type: int, timestamp: int, fields: Mapping[str, str]) -> bytes:
    """A record, ready to be written.

    Args:
        data_type: At least 1.
        timestamp: Seconds since the Unix epoch.
        fields: Names and values.

    Raises:
        ValueError: It has no such type, or is larger than MESSAGE_BYTES.
    """
    if not 1 <= data_type < 2**31:
        raise ValueError(f"data type {data_type}: expected 1 to 2147483647")
    payload = b"".join(
        _text(1, _text(1, _encoded(name)) + _text(2, _encoded(value)))
        for name, value in fields.items()
    )
    message = (
        b"\x08" + _varint(data_type) + b"\x10" + _varint(timestamp % 2**64) + _text(3, payload)
    )
    if len(message) > MESSAGE_BYTES:
        raise ValueError(f"a record of {len(message)} bytes; at most {MESSAGE_BYTES}")
    return _LENGTH.pack(len(message)) + message


def length(data: bytes) -> int:
    """How long the message is that follows these four bytes."""
    size: int = _LENGTH.unpack(data)[0]
    return size


def task(message: bytes) -> Task:
    """A task from its bytes, without its length.

    Raises:
        ValueError: They are none.
    """
    data_type, texts = 0, {2: b"", 3: b"", 4: b""}
    for number, value in _fields(message):
        if isinstance(value, int):
            data_type = value if number == 1 else data_type
        elif number in texts:
            texts[number] = value
    name, data, token = (texts[number].decode("utf-8", "replace") for number in (2, 3, 4))
    return Task(data_type, name, data, token)


def _encoded(text: str) -> bytes:
    # Names of files may hold bytes that are no text; Python keeps them as lone surrogates.
    return text.encode("utf-8", "replace")


def _text(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    place = 0
    while place < len(message):
        tag, place = _read_varint(message, place)
        number, kind = tag >> 3, tag & 7
        value = 8 if kind == 1 else 4
        if kind in (0, 2):
            value, place = _read_varint(message, place)
        if kind == 0:
            yield number, value
            continue
        if kind not in (1, 2, 5) or value > len(message) - place:
            raise ValueError("no protobuf message")
        if kind == 2:
            yield number, message[place : place + value]
        place += value


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    value = 0
    for count, byte in enumerate(message[place : place + 10]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, place + count + 1
    raise ValueError("no protobuf message")
