"""The file sink's files: written, rotated and deleted. Knows no event loop and no batch's fate.

What was written whole can be read whatever happens to what follows it: each write is a Zstandard
frame of its own, or, without compression, batches behind their lengths.
"""

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import zstandard
from outrider_proto import limits, stored
from outrider_proto.v1.sink_pb2 import StoredBatch
from outrider_runtime.logs import get_logger

from outrider_operator.core.batch import Batch, message_of
from outrider_operator.core.sink import Origin
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import FileSinkSettings

#: Agents compress batches already: those are only copied, at 5 to 10 us a batch, whatever the
#: level. Batches that come uncompressed become three to four times smaller at this one.
ZSTD_LEVEL: Final = 1
#: Most bytes in one frame, before compression, unless it is a single batch.
PART_BYTES: Final = 16 * limits.MIB
#: After a failure the disk is tried with so many bytes.
PROBE_BYTES: Final = 64 * limits.KIB
#: Files of batches that were set aside which are kept, each of at most max_file_bytes.
ASIDE_FILES: Final = 2

log = get_logger(__name__)


class RotatedFiles:
    """The files of one folder. All methods block: call them in one thread, one at a time.

    Args:
        settings: where, how large, how old, how much.
        metrics: where files and bytes are counted.
    """

    def __init__(self, settings: FileSinkSettings, metrics: ServerMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._directory = Path(settings.directory)
        self._compressor = (
            zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)
            if settings.compression == "zstd"
            else None
        )
        self._file: int | None = None
        self._path: Path | None = None
        self._size = 0
        self._opened_at = 0.0
        self._flushed_at = 0.0
        self._dirty = False
        self._last_name = 0

    @property
    def is_open(self) -> bool:
        """Whether there is a file that the next batches go to."""
        return self._file is not None

    def prepare(self) -> None:
        """Make the directory and see that files can be made in it.

        Raises:
            OSError: they cannot.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._retain()
        self.probe()

    def probe(self) -> None:
        """See that the disk takes something, without what is too old.

        Raises:
            OSError: it does not.
        """
        if self._settings.max_age_seconds:
            # On a full disk nothing else would look at the files, and this may make room.
            self._rotate_if_due()
            self._retain()
        self._check_room(PROBE_BYTES)
        path = self._directory / f".probe-{os.getpid()}"
        try:
            with path.open("wb") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def append(self, batches: Sequence[tuple[Origin, Batch]]) -> int:
        """Write batches, and flush them to the disk as the settings say; returns their bytes.

        Raises:
            OSError: not all of them are stored; the file they went to is left alone from then on.
        """
        parts = [self._pack(part) for part in _parts(batches)]
        size = sum(map(len, parts))
        self._check_room(size)
        try:
            self._rotate_if_due()
            if self._file is None:
                self._open()
            assert self._file is not None
            for part in parts:
                _write(self._file, part)
            self._dirty = True
            if self._settings.fsync == "always":
                self._flush()
        except OSError:
            self._leave()
            raise
        self._size += size
        self._metrics.sink_file_bytes.inc(size)
        self.flush_if_due()
        return size

    def tend(self) -> None:
        """Close the file when it is full or old, delete what is too old, flush what is due.

        Raises:
            OSError: the disk fails.
        """
        self._rotate_if_due()
        if self._settings.max_age_seconds:
            self._retain()
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """With `fsync: interval`: flush what was written for so long.

        Raises:
            OSError: what was written since the last flush may be lost.
        """
        due = self._flushed_at + self._settings.fsync_interval_seconds
        if self._dirty and self._settings.fsync == "interval" and time.monotonic() >= due:
            try:
                self._flush()
            except OSError:
                self._leave()
                raise

    def set_aside(self, origin: Origin, batch: Batch, reason: str) -> None:
        """Add a batch that can never be stored to a file of such, flushed whatever the policy.

        Raises:
            OSError: it is not stored.
        """
        data = _frame(origin, batch, reason)
        self._check_room(len(data))
        found = sorted(self._directory.glob(f"*{stored.SUFFIX_ASIDE}"))
        if not found or found[-1].stat().st_size >= self._settings.max_file_bytes:
            for path in found[: -(ASIDE_FILES - 1)]:
                path.unlink()
                log.warning("old batches that were set aside deleted", file=path.name)
            found.append(self._directory / f"{self._name()}{stored.SUFFIX_ASIDE}")
        file = os.open(found[-1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        size = os.fstat(file).st_size
        try:
            _write(file, data)
            os.fsync(file)
        except OSError:
            # A torn batch in the middle would hide those after it.
            os.ftruncate(file, size)
            raise
        finally:
            os.close(file)
        self._sync_directory()

    def close(self) -> None:
        """Close the open file, flushed unless the settings leave that to the kernel.

        Raises:
            OSError: what was written since the last flush may be lost.
        """
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            if self._dirty and self._settings.fsync != "never":
                os.fsync(file)
        finally:
            self._dirty = False
            os.close(file)

    def _pack(self, frames: Sequence[bytes]) -> bytes:
        content = b"".join(frames)
        return content if self._compressor is None else self._compressor.compress(content)

    def _flush(self) -> None:
        assert self._file is not None
        os.fsync(self._file)
        self._dirty = False
        self._flushed_at = time.monotonic()

    def _check_room(self, size: int) -> None:
        found = os.statvfs(self._directory)
        free = found.f_bavail * found.f_frsize
        self._metrics.sink_free_bytes.set(free)
        if free < self._settings.min_free_bytes + size:
            raise OSError(
                errno.ENOSPC,
                f"{free} bytes are free, sink.file.minFreeBytes is {self._settings.min_free_bytes}",
            )

    def _leave(self) -> None:
        """Leave the open file for good, after an error.

        What an error leaves in a file is unknown: half a batch, or pages that were dropped and
        would count as clean at the next flush. Nothing more goes into it.
        """
        if self._file is not None:
            with contextlib.suppress(OSError):  # only to give the room back
                os.ftruncate(self._file, self._size)
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file, self._dirty = None, False
        if self._path is not None and not self._size:
            # A file that holds nothing, or a full disk would fill with them.
            with contextlib.suppress(OSError):  # it is counted and removed like any other, later
                self._path.unlink()
                self._metrics.sink_files.dec()
        self._path = None

    def _rotate_if_due(self) -> None:
        if self._file is None:
            return
        age = time.monotonic() - self._opened_at
        full = self._size >= self._settings.max_file_bytes
        # Someone who made room may have deleted it: what goes into it would be gone.
        deleted = os.fstat(self._file).st_nlink == 0
        if full or deleted or age >= self._settings.max_file_seconds:
            self.close()

    def _open(self) -> None:
        self._retain()
        suffix = stored.SUFFIX if self._compressor is None else stored.SUFFIX_ZSTD
        path = self._directory / f"{self._name()}{suffix}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640)
        self._path, self._size = path, 0
        self._opened_at = self._flushed_at = time.monotonic()
        self._metrics.sink_files.inc()
        self._sync_directory()

    def _name(self) -> str:
        """A name after those of all files there are, also when the clock was put back."""
        self._last_name = max(time.time_ns(), self._last_name + 1)
        return f"{self._last_name:020d}"

    def _sync_directory(self) -> None:
        if self._settings.fsync == "never":
            return
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)  # or the file's name may be lost in a crash
        finally:
            os.close(directory)

    def _retain(self) -> None:
        """Delete the oldest files until a whole new one has room, and those that are too old."""
        kept = stored.files_in(self._directory)
        if kept and (number := kept[-1].name.partition(".")[0]).isdecimal():
            self._last_name = max(self._last_name, int(number))
        found = [(path, path.stat()) for path in kept]
        room = self._settings.max_total_bytes - self._settings.max_file_bytes
        total = sum(stat.st_size for _, stat in found)
        age = self._settings.max_age_seconds
        now = time.time()
        left = len(found)
        for path, stat in found:
            if path == self._path and self._file is not None:
                break
            too_old = bool(age) and now - stat.st_mtime > age
            if total <= room and not too_old:
                break
            path.unlink()
            total, left = total - stat.st_size, left - 1
            self._metrics.sink_removed_bytes.inc(stat.st_size)
            log.info(
                "old records deleted",
                file=path.name,
                bytes=stat.st_size,
                bound="maxAgeSeconds" if too_old else "maxTotalBytes",
            )
        self._metrics.sink_files.set(left)
        self._metrics.sink_file_bytes.set(total)


def _parts(batches: Sequence[tuple[Origin, Batch]]) -> list[list[bytes]]:
    """Batches as they stand in a file, in parts that a reader can hold."""
    parts: list[list[bytes]] = [[]]
    size = 0
    for origin, batch in batches:
        data = _frame(origin, batch)
        if parts[-1] and size + len(data) > PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(data)
        size += len(data)
    return parts


def _frame(origin: Origin, batch: Batch, reason: str = "") -> bytes:
    return stored.frame(
        StoredBatch(
            agent_id=origin.agent_id,
            node=origin.node,
            server_unix_nanos=origin.received_unix_nanos,
            batch=message_of(batch),
            reason=reason,
        )
    )


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
