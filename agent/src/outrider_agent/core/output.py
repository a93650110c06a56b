"""Keeps a run's output within its limits while it streams in.

The first bytes become the preview, as many as allowed go on as chunks for records, the rest is
only counted. Reads from nowhere.
"""

import base64
import codecs
from dataclasses import dataclass

from outrider_proto.limits import KIB

#: Largest chunk that goes into one record, bytes.
CHUNK_BYTES = 256 * KIB


@dataclass(frozen=True)
class Chunk:
    """A piece of output.

    Attributes:
        offset: Where in the output it begins, bytes.
        data: Its bytes, at most CHUNK_BYTES.
    """

    offset: int
    data: bytes


class Output:
    """The output of one run."""

    def __init__(self, *, preview_bytes: int, max_bytes: int) -> None:
        self._preview_bytes = preview_bytes
        self._max_bytes = max_bytes
        self._preview = bytearray()
        self._pending = bytearray()
        self._taken = 0
        #: Bytes seen in all, also beyond every limit.
        self.total = 0
        #: Bytes of the chunks that were handed on.
        self.handed_on = 0
        self._cut_short = False

    @property
    def preview(self) -> bytes:
        """The first bytes."""
        return bytes(self._preview)

    @property
    def truncated(self) -> bool:
        """Whether output was thrown away: beyond the limit, or because it was taken too slowly."""
        return self._cut_short or self.total > self._max_bytes

    def give_up(self) -> None:
        """Nothing more will be handed on: what was not, is thrown away."""
        self._cut_short = self.handed_on < min(self.total, self._max_bytes)

    @property
    def pending(self) -> int:
        """Bytes that no chunk was made of yet."""
        return len(self._pending)

    def feed(self, data: bytes) -> list[Chunk]:
        """Take what was read; returns the chunks that are full now."""
        self.total += len(data)
        if len(self._preview) < self._preview_bytes:
            self._preview += data[: self._preview_bytes - len(self._preview)]
        room = self._max_bytes - self._taken - len(self._pending)
        self._pending += data[: max(0, room)]
        chunks = []
        while len(self._pending) >= CHUNK_BYTES:
            chunks.append(self._cut(CHUNK_BYTES))
        return chunks

    def flush(self, *, last: bool = False) -> list[Chunk]:
        """A chunk of what is pending, without a character that may still be incomplete.

        Args:
            last: No more will come: an incomplete character goes too.
        """
        size = len(self._pending) if last else _whole_characters(self._pending)
        return [self._cut(size)] if size else []

    def _cut(self, size: int) -> Chunk:
        if size == CHUNK_BYTES:
            size = _whole_characters(self._pending[:size]) or size
        chunk = Chunk(self._taken, bytes(self._pending[:size]))
        del self._pending[:size]
        self._taken += size
        return chunk


def _whole_characters(data: bytes | bytearray) -> int:
    """How many bytes of the data are there without an incomplete last character of UTF-8."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if wanted > back else len(data)
    return len(data)


def as_text(data: bytes) -> tuple[str, str]:
    """Output as a string that loses nothing, and its encoding: "utf-8", else "base64"."""
    try:
        return codecs.decode(data, "utf-8"), "utf-8"
    except UnicodeDecodeError:
        return base64.b64encode(data).decode("ascii"), "base64"
