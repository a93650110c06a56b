"""Files of batches: how the file sink writes them, and how they are read, also while they grow.

A file is a row of StoredBatch messages, each behind its length as a varint. In a compressed file
the row is cut between batches into Zstandard frames, one for each write, so that whatever was
written whole can be read whatever happened to the rest. What a crash left unfinished at the end
belongs to a write that was never acknowledged, and is left out.

Which of the two forms a file has, its first bytes say. Nothing here opens a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import zstandard
from google.protobuf.message import DecodeError

from outrider_proto import limits
from outrider_proto.batches import BatchError
from outrider_proto.v1.sink_pb2 import StoredBatch

#: Files of the file sink end so, not compressed and compressed.
SUFFIX: Final = ".records"
SUFFIX_ZSTD: Final = ".records.zst"
#: Files of batches that were set aside end so; never compressed.
SUFFIX_ASIDE: Final = ".dead-letter"
#: Most bytes in one Zstandard frame, before compression: what a reader must be ready to hold. A
#: single batch is below it by far.
FRAME_BYTES: Final = 2 * limits.BATCH_DECOMPRESSED_BYTES

#: How a Zstandard frame begins. A batch never does: its second byte is the tag of a field.
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
#: No frame of a batch is shorter, and the head of none is longer, bytes.
_HEAD_BYTES: Final = 18
#: Read and decompressed at a time, bytes.
_CHUNK: Final = 64 * limits.KIB


def frame(stored: StoredBatch) -> bytes:
    """A batch as it stands in a file: its length as a varint, then the message."""
    body = stored.SerializeToString()
    length, prefix = len(body), bytearray()
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + body


def files_in(folder: Path) -> list[Path]:
    """The files of a file sink in a folder, oldest first; what was set aside is not among them.

    Raises:
        OSError: The folder cannot be read.
    """
    found = (p for p in folder.iterdir() if p.name.endswith((SUFFIX, SUFFIX_ZSTD)))
    # The number before the first point is when the file was begun.
    return sorted(found, key=lambda path: path.name.partition(".")[0])


def read_stored(file: IO[bytes]) -> Iterator[StoredBatch]:
    """The batches of a file in either form, up to its end or to what was not written whole.

    Called again for the same file it begins where the file stands then: to follow a file that
    grows take a `Parser`.

    Raises:
        BatchError: The file is damaged.
    """
    parser = Parser()
    while data := file.read(_CHUNK):
        yield from parser.feed(data)


class Parser:
    """Batches out of the bytes of one file, in whatever pieces these come.

    It holds at most one frame (FRAME_BYTES) or one batch.
    """

    def __init__(self) -> None:
        self._start = b""
        self._row = _Row()
        self._frames: _Frames | None = None
        self._known = False

    def feed(self, data: bytes) -> Iterator[StoredBatch]:
        """The batches that are whole with these bytes, which follow those fed before.

        Raises:
            BatchError: The file is damaged; nothing can be read from it any more.
        """
        if not self._known:
            data = self._start + data
            if len(data) < len(_MAGIC):
                self._start = data
                return
            self._known = True
            self._frames = _Frames() if data.startswith(_MAGIC) else None
        if self._frames is None:
            yield from self._row.feed(data)
            return
        for content in self._frames.feed(data):
            yield from self._row.feed(content)


class _Row:
    """Messages behind their lengths."""

    def __init__(self) -> None:
        self._left = bytearray()

    def feed(self, data: bytes) -> Iterator[StoredBatch]:
        left = self._left
        left += data
        at = 0
        while (found := _varint(left, at)) is not None:
            begin, length = found
            if length > limits.MESSAGE_BYTES:
                raise BatchError(f"a frame states {length} bytes")
            if begin + length > len(left):
                break
            try:
                stored = StoredBatch.FromString(bytes(left[begin : begin + length]))
            except DecodeError:
                raise BatchError("a frame does not hold a batch") from None
            at = begin + length
            yield stored
        del left[:at]


def _varint(data: bytearray, at: int) -> tuple[int, int] | None:
    """Where what follows the number at `at` begins, and the number; None if it is not whole."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return at, value
        shift += 7
        if shift > 28:
            raise BatchError("a frame has no length")
    return None


class _Frames:
    """Contents of Zstandard frames that follow one another, none beyond FRAME_BYTES."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._left = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        data = self._left + data
        self._left = b""
        try:
            while data:
                if self._frame is None:
                    if len(data) < _HEAD_BYTES:
                        self._left = data
                        return
                    self._frame = self._begin(data)
                if content := self._frame.decompress(data):
                    yield content
                if not self._frame.eof:
                    return
                data, self._frame = self._frame.unused_data, None
        except zstandard.ZstdError as error:
            raise BatchError(f"a compressed part is damaged: {error}") from None

    def _begin(self, data: bytes) -> zstandard.ZstdDecompressionObj:
        size = zstandard.frame_content_size(data[:_HEAD_BYTES])
        # Not more can come out of it then: what it states is checked when it is decompressed.
        if not 0 <= size <= FRAME_BYTES:
            raise BatchError(f"a compressed part states {size} bytes")
        return self._decompressor.decompressobj()
