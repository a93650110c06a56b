"""Batches in rotated files on this machine: the sink of an install without any broker.

A batch is stored when its file was flushed to the disk; batches that come together share a flush.
Files only grow, and are read with `python -m outrider_proto.records FILE`. After a crash the last
file may end in the middle of a batch that was never acknowledged; a start always begins a new one.
"""

import asyncio
import contextlib
import errno
import os
import time
from collections import deque
from pathlib import Path
from typing import Final

from outrider_proto import limits
from outrider_proto.records import frame
from outrider_proto.v1.agent_pb2 import RecordBatch
from outrider_proto.v1.sink_pb2 import StoredBatch
from outrider_runtime.health import Health
from outrider_runtime.logs import get_logger
from outrider_runtime.settings import SettingsError

from outrider_operator.core.sink import Origin, SinkUnavailableError
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import FileSinkSettings
from outrider_operator.sinks.base import SinkState

#: Files of this sink end so; others in the directory are left alone.
SUFFIX: Final = ".records"
#: Most bytes that wait to be written; beyond it batches are sent back.
PENDING_BYTES: Final = 128 * limits.MIB
#: Most bytes written between two flushes.
GROUP_BYTES: Final = 16 * limits.MIB
#: A flush that takes longer than this makes the sink unready, seconds.
SLOW_SECONDS: Final = 10.0
#: After a failure the disk is tried again so often, seconds, with so many bytes.
PROBE_SECONDS: Final = 2.0
PROBE_BYTES: Final = 64 * limits.KIB
#: Errors that no waiting mends: the setting is wrong.
WRONG_DIRECTORY: Final = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.ENOENT, errno.EEXIST),
)

log = get_logger(__name__)

Waiting = tuple[bytes, asyncio.Future[None]]


class RotatedFiles:
    """The files themselves. All methods block: call them in a thread, one at a time.

    Args:
        settings: where, how large, how old, how much.
        metrics: where files and bytes are counted.
    """

    def __init__(self, settings: FileSinkSettings, metrics: ServerMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._directory = Path(settings.directory)
        self._file: int | None = None
        self._path: Path | None = None
        self._size = 0
        self._opened_at = 0.0

    def prepare(self) -> None:
        """Make the directory and see that files can be made in it.

        Raises:
            OSError: they cannot.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._retain()
        self.probe()

    def probe(self) -> None:
        """See that the disk takes something.

        Raises:
            OSError: it does not.
        """
        path = self._directory / f".probe-{os.getpid()}"
        try:
            with path.open("wb") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def append(self, frames: list[bytes]) -> None:
        """Write batches and flush them to the disk.

        Raises:
            OSError: not all of them are stored; the file they went to is left alone from then on.
        """
        try:
            self._rotate_if_due()
            if self._file is None:
                self._open()
            assert self._file is not None
            for data in frames:
                view = memoryview(data)
                while view:
                    view = view[os.write(self._file, view) :]
            os.fsync(self._file)
            self._size += sum(map(len, frames))
            self._metrics.sink_file_bytes.inc(sum(map(len, frames)))
        except OSError:
            # What an error leaves in a file is unknown: half a batch, or pages that were dropped
            # and would count as clean at the next flush. Nothing more goes into it.
            self.close()
            self._remove_if_empty()
            raise

    def rotate_if_old(self) -> None:
        """Close the file when it is full or old, so that readers have it whole."""
        self._rotate_if_due()

    def close(self) -> None:
        """Close the open file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what counts was flushed before
                os.close(self._file)
            self._file = None

    def _remove_if_empty(self) -> None:
        """Remove a file that no batch was stored in, or a full disk would fill with them."""
        if self._path is not None and not self._size:
            with contextlib.suppress(OSError):  # it is counted and removed like any other, later
                self._path.unlink()
                self._metrics.sink_files.dec()
        self._path = None

    def _rotate_if_due(self) -> None:
        age = time.monotonic() - self._opened_at
        if self._file is not None and (
            self._size >= self._settings.max_file_bytes or age >= self._settings.max_file_seconds
        ):
            self.close()

    def _open(self) -> None:
        self._retain()
        path = self._directory / f"{time.time_ns():020d}{SUFFIX}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640)
        self._path, self._size = path, 0
        self._opened_at = time.monotonic()
        self._metrics.sink_files.inc()
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)  # or the file's name may be lost in a crash
        finally:
            os.close(directory)

    def _retain(self) -> None:
        """Delete the oldest files until a whole new one has room in the bound."""
        room = self._settings.max_total_bytes - self._settings.max_file_bytes
        found = [(path, path.stat().st_size) for path in sorted(self._directory.glob(f"*{SUFFIX}"))]
        total = sum(size for _, size in found)
        kept = deque(found)
        while kept and total > room:
            path, size = kept.popleft()
            path.unlink()
            total -= size
            self._metrics.sink_removed_bytes.inc(size)
            log.warning("old records deleted to stay within the bound", file=path.name, bytes=size)
        self._metrics.sink_files.set(len(kept))
        self._metrics.sink_file_bytes.set(total)


class FileSink:
    """Stores batches in rotated files.

    Args:
        settings: where, how large, how old, how much.
        metrics: of the server.
        health: the condition "sink" is set here.

    Raises:
        SettingsError: the bounds contradict each other.
    """

    def __init__(self, settings: FileSinkSettings, metrics: ServerMetrics, health: Health) -> None:
        if settings.max_total_bytes < 2 * settings.max_file_bytes:
            raise SettingsError(
                'setting "sink.file.maxTotalBytes": expected at least twice '
                f"sink.file.maxFileBytes, {2 * settings.max_file_bytes}"
            )
        self._settings = settings
        self._metrics = metrics
        self._files = RotatedFiles(settings, metrics)
        self._state = SinkState("file", metrics, health)
        self._waiting: deque[Waiting] = deque()
        self._pending_bytes = 0
        self._wake = asyncio.Event()

    async def store(self, origin: Origin, batch: RecordBatch) -> None:
        """Store a batch; returns when it is on the disk.

        Raises:
            SinkUnavailableError: the disk does not take it.
        """
        data = frame(
            StoredBatch(
                agent_id=origin.agent_id,
                node=origin.node,
                server_unix_nanos=origin.received_unix_nanos,
                batch=batch,
            )
        )
        if not self._state.ok or self._pending_bytes + len(data) > PENDING_BYTES:
            self._metrics.sink_stores.labels("unavailable").inc()
            raise SinkUnavailableError(self._state.reason or "the file sink is behind")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((data, future))
        self._count(len(data))
        self._wake.set()
        await future

    async def run(self, stop: asyncio.Event) -> None:
        """Write until `stop` is set, then write what waits and return.

        Raises:
            SettingsError: the directory can never be used.
        """
        try:
            await self._prepare()
            stopping = asyncio.create_task(self._wake_at(stop), name="sink-stop")
            try:
                while not stop.is_set() or self._waiting:
                    await self._wait()
                    await self._write_group()
                    if stop.is_set() and not self._state.ok:
                        break
            finally:
                stopping.cancel()
        finally:
            self._state.unwell("the server stops")
            self._send_back(self._state.reason)
            await asyncio.to_thread(self._files.close)

    async def _prepare(self) -> None:
        try:
            await asyncio.to_thread(self._files.prepare)
        except OSError as error:
            if error.errno in WRONG_DIRECTORY:
                raise SettingsError(
                    f'setting "sink.file.directory": cannot write to '
                    f"{self._settings.directory!r}: {error.strerror}"
                ) from None
            self._failed(error)
        else:
            self._state.well()

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._wake.set()

    async def _wait(self) -> None:
        """Wait for something to write; after a failure no longer than until the next try."""
        seconds = PROBE_SECONDS if not self._state.ok else self._settings.max_file_seconds / 4
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    async def _write_group(self) -> None:
        group: list[Waiting] = []
        size = 0
        while self._waiting and (not group or size + len(self._waiting[0][0]) <= GROUP_BYTES):
            group.append(self._waiting.popleft())
            size += len(group[-1][0])
        if self._waiting:
            self._wake.set()
        try:
            if group:
                await self._in_thread([data for data, _ in group])
            elif not self._state.ok:
                await asyncio.to_thread(self._files.probe)
            else:
                await asyncio.to_thread(self._files.rotate_if_old)
        except OSError as error:
            self._failed(error)
            self._settle(group, SinkUnavailableError(self._state.reason))
        else:
            self._state.well()
            self._settle(group, None)

    async def _in_thread(self, frames: list[bytes]) -> None:
        task = asyncio.ensure_future(asyncio.to_thread(self._files.append, frames))
        _, late = await asyncio.wait({task}, timeout=SLOW_SECONDS)
        if late:
            self._state.unwell(
                f"the disk of {self._settings.directory!r} has not answered for {SLOW_SECONDS:g} s"
            )
        await task

    def _settle(self, group: list[Waiting], error: SinkUnavailableError | None) -> None:
        for data, future in group:
            self._count(-len(data))
            self._metrics.sink_stores.labels("unavailable" if error else "stored").inc()
            if error is None:
                self._metrics.sink_bytes.inc(len(data))
            if future.done():
                continue  # its stream has gone
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _send_back(self, reason: str) -> None:
        group = list(self._waiting)
        self._waiting.clear()
        self._settle(group, SinkUnavailableError(reason))

    def _failed(self, error: OSError) -> None:
        advice = ": free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        self._state.unwell(
            f"cannot write to {self._settings.directory!r}: {error.strerror or error}{advice}"
        )

    def _count(self, size: int) -> None:
        self._pending_bytes += size
        self._metrics.sink_pending.set(self._pending_bytes)
