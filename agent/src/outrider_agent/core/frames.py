"""The framed messages that local programs send, as a protocol without input or output.

A frame is FF FF, the length of its body (two bytes, high one first), the body, the upper 16 bits
of the body's CRC-32 (high byte first), FF FE. The body is JSON: {"PacketType": 0 or 1,
"PacketContent": base64 of the packet, JSON itself}. Type 0 is a heart-beat, 1 a report; each is
answered with a line. What is no such frame is an error: there is no looking for the next one in
rubbish, since it might begin in the middle of somebody's text.
"""

import base64
import binascii
import zlib
from dataclasses import dataclass
from typing import Final

import msgspec

HEAD: Final = b"\xff\xff"
TAIL: Final = b"\xff\xfe"
#: Bytes of a frame around its body.
AROUND: Final = 8
#: Largest body: what its length can say.
MOST_BYTES: Final = 0xFFFF
HEARTBEAT, REPORT = 0, 1
#: What is answered, with a line feed at its end; senders read lines.
ANSWERS: Final = {HEARTBEAT: b"heartBeat\n", REPORT: b"Report data has recive\n"}


class FrameError(ValueError):
    """What came is no frame; the text says why, in a few constant words."""


class _Packet(msgspec.Struct):
    kind: int = msgspec.field(name="PacketType")
    content: str | None = msgspec.field(name="PacketContent", default=None)


class _Times(msgspec.Struct):
    timestamp: int = 0


@dataclass(frozen=True)
class Packet:
    """What a frame holds: its kind (HEARTBEAT or REPORT), and its content, JSON most often."""

    kind: int
    content: bytes

    @property
    def timestamp(self) -> int:
        """When it was made by its own account, seconds since the Unix epoch; 0: it does not say."""
        try:
            return max(0, msgspec.json.decode(self.content, type=_Times).timestamp)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return 0


class Frames:
    """Takes the bytes of one connection and gives the packets in them.

    Holds at most one frame that is not whole, besides what is fed at once.
    """

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a frame has begun and is not whole."""
        return bool(self._held)

    def feed(self, data: bytes) -> list[Packet]:
        """The packets that are whole now, in their order.

        Raises:
            FrameError: Something is no frame. What came before it is lost with it: its sender got
                no answer for it.
        """
        self._held += data
        found: list[Packet] = []
        start = 0
        while (size := self._size(start)) is not None and len(self._held) - start >= size:
            found.append(_packet(bytes(memoryview(self._held)[start : start + size])))
            start += size
        del self._held[:start]
        return found

    def _size(self, start: int) -> int | None:
        """Size of the frame that begins there, bytes; None while that is not known."""
        held = self._held
        if not HEAD.startswith(bytes(held[start : start + 2])):
            raise FrameError("no frame begins there")
        if len(held) - start < 4:
            return None
        return int.from_bytes(held[start + 2 : start + 4], "big") + AROUND


def _packet(frame: bytes) -> Packet:
    body, check, tail = frame[4:-4], frame[-4:-2], frame[-2:]
    if tail != TAIL:
        raise FrameError("a frame does not end where it should")
    if check != _check(body):
        raise FrameError("a frame's checksum does not fit")
    try:
        packet = msgspec.json.decode(body, type=_Packet)
        content = base64.b64decode(packet.content or "", validate=True)
    except (msgspec.DecodeError, UnicodeDecodeError, binascii.Error):
        raise FrameError("a frame holds no packet") from None
    if packet.kind not in ANSWERS:
        raise FrameError("a packet is of no known kind")
    return Packet(packet.kind, content)


def _check(body: bytes) -> bytes:
    return (zlib.crc32(body) >> 16).to_bytes(2, "big")


def frame(packet: Packet) -> bytes:
    """A packet as it is sent; for those who make such programs, and for tests.

    Raises:
        FrameError: It is too large.
    """
    content = base64.b64encode(packet.content).decode()
    body = msgspec.json.encode({"PacketType": packet.kind, "PacketContent": content})
    if len(body) > MOST_BYTES:
        raise FrameError("the packet is too large for a frame")
    return HEAD + len(body).to_bytes(2, "big") + body + _check(body) + TAIL
