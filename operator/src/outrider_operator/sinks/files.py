"""Batches in rotated files on this machine: the sink of an install without any broker.

A batch is acknowledged when its write is as safe as `fsync` says; batches that come together share
a write and a flush. All that touches the disk happens in one thread, in order. The files are read
with `kubectl outrider records`, or `python -m outrider_proto.records FILE`. A start always begins
a new file: the last one may end in the middle of a batch that was never acknowledged.
"""

import asyncio
import contextlib
import errno
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from outrider_proto import limits
from outrider_runtime.health import Health
from outrider_runtime.logs import get_logger
from outrider_runtime.settings import SettingsError

from outrider_operator.core.batch import Batch
from outrider_operator.core.sink import Origin, SinkUnavailableError
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import FileSinkSettings
from outrider_operator.sinks.base import SinkState
from outrider_operator.sinks.files_writer import RotatedFiles

#: Most bytes that wait to be written; beyond it batches are sent back.
PENDING_BYTES: Final = 128 * limits.MIB
#: Most bytes written between two flushes.
GROUP_BYTES: Final = 16 * limits.MIB
#: Beside its records a waiting batch takes about so many bytes.
BATCH_OVERHEAD: Final = 512
#: A write that takes longer than this makes the sink unready, seconds.
SLOW_SECONDS: Final = 10.0
#: After a failure the disk is tried again so often, seconds.
PROBE_SECONDS: Final = 2.0
#: Files are looked after at least so often, seconds.
TEND_SECONDS: Final = 60.0
#: Errors that no waiting mends: the setting is wrong.
WRONG_DIRECTORY: Final = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.ENOENT, errno.EEXIST),
)
NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)

log = get_logger(__name__)

Result = TypeVar("Result")
Waiting = tuple[Origin, Batch, int, asyncio.Future[None]]


class FileSink:
    """Stores batches in rotated files.

    Args:
        settings: where, how large, how old, how much, how safe.
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
        # One thread: what it is given is done in order, also when who asked for it has gone.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="file-sink")
        self._state = SinkState("file", metrics, health)
        self._waiting: deque[Waiting] = deque()
        self._pending_bytes = 0
        self._wake = asyncio.Event()

    @property
    def max_batch_bytes(self) -> int:
        """Every batch fits that fits on the wire."""
        return limits.BATCH_BYTES

    @property
    def separate(self) -> Sequence[Sequence[int]]:
        """No data types go to places of their own."""
        return ()

    def cost(self, batch: Batch) -> int:
        """A batch is copied when it is written."""
        return len(batch.records)

    def store(self, origin: Origin, batch: Batch) -> asyncio.Future[None]:
        """Store a batch; done when it is as safe as `fsync` says.

        Raises (when awaited):
            SinkUnavailableError: the disk does not take it.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        size = len(batch.records) + BATCH_OVERHEAD
        if not self._state.ok or self._pending_bytes + size > PENDING_BYTES:
            self._metrics.sink_stores.labels("unavailable").inc()
            reason = self._state.reason or "the file sink is behind"
            future.set_exception(SinkUnavailableError(reason))
            return future
        self._waiting.append((origin, batch, size, future))
        self._count(size)
        self._wake.set()
        return future

    async def set_aside(self, origin: Origin, batch: Batch, reason: str) -> None:
        """Keep a batch in a file of such that can never be stored, beside the others.

        Raises:
            SinkUnavailableError: the disk does not take it.
        """
        if not self._state.ok:
            raise SinkUnavailableError(self._state.reason)
        try:
            await self._do(lambda: self._files.set_aside(origin, batch, reason))
        except OSError as error:
            self._failed(error)
            raise SinkUnavailableError(self._state.reason) from error
        self._metrics.sink_stores.labels("set_aside").inc()

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
                    await self._step()
                    if stop.is_set() and not self._state.ok:
                        break
            finally:
                stopping.cancel()
        finally:
            self._state.unwell("the server stops")
            self._send_back(self._state.reason)
            await self._close()

    async def _prepare(self) -> None:
        try:
            await self._do(self._files.prepare)
        except OSError as error:
            if error.errno in WRONG_DIRECTORY:
                raise SettingsError(
                    f'setting "sink.file.directory": cannot write to '
                    f"{self._settings.directory!r}: {error.strerror}"
                ) from None
            self._failed(error)
        else:
            self._state.well()

    async def _close(self) -> None:
        """Close the file, after a write that is under way; a disk that hangs is not waited for."""
        try:
            async with asyncio.timeout(SLOW_SECONDS):
                await self._do(self._files.close)
        except OSError as error:  # TimeoutError is one
            why = str(error) or "the disk does not answer"
            log.warning("a file was not closed in order", error=why)
        self._thread.shutdown(wait=False)

    async def _do(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._wake.set()

    async def _wait(self) -> None:
        """Wait for something to write, at most until files have to be looked after."""
        seconds = min(TEND_SECONDS, self._settings.max_file_seconds / 4)
        if self._settings.fsync == "interval":
            seconds = min(seconds, self._settings.fsync_interval_seconds)
        if not self._state.ok:
            seconds = PROBE_SECONDS
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    async def _step(self) -> None:
        group = self._take_group()
        try:
            if group:
                batches = [(origin, batch) for origin, batch, _, _ in group]
                size = await self._watch(lambda: self._files.append(batches))
                self._metrics.sink_bytes.inc(size)
            elif not self._state.ok:
                await self._watch(self._files.probe)
            else:
                await self._watch(self._files.tend)
        except OSError as error:
            self._failed(error)
            self._settle(group, SinkUnavailableError(self._state.reason))
        except BaseException:
            # Cancelled: it may be stored or not, and comes again.
            self._settle(group, SinkUnavailableError("the server stops"))
            raise
        else:
            self._state.well()
            self._settle(group, None)

    def _take_group(self) -> list[Waiting]:
        group: list[Waiting] = []
        size = 0
        while self._waiting and (not group or size + self._waiting[0][2] <= GROUP_BYTES):
            group.append(self._waiting.popleft())
            size += group[-1][2]
        if self._waiting:
            self._wake.set()
        return group

    async def _watch(self, work: Callable[[], Result]) -> Result:
        """Have something done by the thread; what takes long makes the sink unready meanwhile."""
        doing = asyncio.ensure_future(self._do(work))
        _, late = await asyncio.wait({doing}, timeout=SLOW_SECONDS)
        if late:
            self._state.unwell(
                f"the disk of {self._settings.directory!r} has not answered for {SLOW_SECONDS:g} s"
            )
        return await doing

    def _settle(self, group: list[Waiting], error: SinkUnavailableError | None) -> None:
        if not group:
            return
        self._count(-sum(size for _, _, size, _ in group))
        self._metrics.sink_stores.labels("unavailable" if error else "stored").inc(len(group))
        for _, _, _, future in group:
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
        advice = ": free some space" if error.errno in NO_ROOM else ""
        self._state.unwell(
            f"cannot write to {self._settings.directory!r}: {error.strerror or error}{advice}"
        )

    def _count(self, size: int) -> None:
        self._pending_bytes += size
        self._metrics.sink_pending.set(self._pending_bytes)
