"""The agent's file for the rest of the agent: async methods, one thread, group commit.

Operations that wait together share one transaction and so one sync of the disk; each has a
savepoint, so that one that fails takes no other with it. A method returns once its work is on
disk. Nobody else touches the connection.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.core.eviction import Losses
from outrider_agent.core.runs import RunKey
from outrider_agent.core.storage import Backlog, Process, StorageError, Unfinished, Waiting
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store import journal, outbox
from outrider_agent.store.database import (
    SUSPECT_NAME,
    Lock,
    Opened,
    StoreDamagedError,
    is_damage,
    open_database,
)

log = get_logger("outrider.store")
T = TypeVar("T")

#: Most operations in one transaction.
GROUP = 256
#: Most operations that wait; callers wait for a place.
MAX_WAITING = 1024
#: An operation that takes longer than this means that the disk or the thread hangs, seconds.
STUCK_SECONDS = 60.0


@dataclass(frozen=True)
class StoreLimits:
    """Bounds of what is kept.

    Attributes:
        max_outbox_bytes: Most bytes of batches.
        tombstone_seconds: How long acknowledged runs are remembered.
        max_tombstones: Most of them.
    """

    max_outbox_bytes: int
    tombstone_seconds: int
    max_tombstones: int


@dataclass
class _Operation:
    work: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    result: Any = None
    error: Exception | None = None


class Store:
    """Journal and outbox. Made by `open_store`."""

    def __init__(
        self, directory: Path, opened: Opened, limits: StoreLimits, metrics: AgentMetrics
    ) -> None:
        self._suspect = directory / SUSPECT_NAME
        self.epoch = opened.epoch
        self.damaged = opened.damaged
        self._db = opened.connection
        self._limits = limits
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._places = asyncio.Semaphore(MAX_WAITING)
        self._busy_since: float | None = None
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._closed = False
        #: What waits in the outbox, as last known.
        self.backlog = Backlog(0, 0)
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()
        #: Called on the loop after batches were added to the outbox.
        self.on_append: Callable[[], None] = lambda: None
        metrics.store_queue.set_function(self._queue.qsize)
        metrics.outbox_limit_bytes.set(limits.max_outbox_bytes)

    # Runs.

    async def accept_run(self, state: pb.RunState) -> pb.RunState | None:
        """Enter a new run into the journal; of a known one return its state instead.

        Raises:
            JournalFullError: Too many results wait for their acknowledgement.
            StorageError: It could not be written.
        """
        return await self._do(lambda db: journal.accept(db, state, int(time.time())))

    async def update_run(self, state: pb.RunState, process: Process | None = None) -> None:
        """Write the new state of a run, final or not; a run that has ended is left as it is.

        Raises:
            StorageError: It could not be written.
        """
        await self._do(lambda db: journal.update(db, state, process))

    async def bury_run(self, state: pb.RunState) -> None:
        """Remember a run that is not in the journal as one not to be run any more.

        Raises:
            StorageError: It could not be written.
        """
        expires = int(time.time()) + self._limits.tombstone_seconds
        await self._do(lambda db: journal.bury(db, state, expires=expires))

    async def find_run(self, key: RunKey) -> pb.RunState | None:
        """The state of a run, also of an acknowledged one."""
        return await self._do(lambda db: journal.find(db, key))

    async def run_states(self) -> list[pb.RunState]:
        """All runs whose result was not acknowledged."""
        return await self._do(journal.states)

    async def unfinished_runs(self) -> list[Unfinished]:
        """All runs that have not ended."""
        return await self._do(journal.unfinished)

    async def ack_runs(self, keys: list[RunKey]) -> int:
        """Forget the results of ended runs but for a tombstone; how many there were."""
        now = int(time.time())
        return await self._do(
            lambda db: journal.acknowledge(
                db,
                keys,
                now=now,
                expires=now + self._limits.tombstone_seconds,
                max_tombstones=self._limits.max_tombstones,
            )
        )

    # Batches.

    async def append_batch(self, new: outbox.NewBatch) -> outbox.Appended:
        """Add a batch; the oldest of the least class go where there is no room.

        Raises:
            BatchError: It is beyond the limits of the wire.
            StorageError: It could not be written.
        """
        limit = self._limits.max_outbox_bytes
        done = await self._do(lambda db: outbox.append(db, new, epoch=self.epoch, max_bytes=limit))
        self._observe(done.totals)
        self._count("outbox_full", done.losses)
        self.on_append()
        return done

    async def batches_after(
        self, seq: int, limit: int, *, at_least_one: bool = False
    ) -> list[Waiting]:
        """The batches that follow `seq`, oldest first, at most `limit` bytes of them."""
        found = await self._do(lambda db: outbox.after(db, seq, limit, at_least_one=at_least_one))
        if found.damaged:
            self._count("damaged", found.damaged)
            log.error("batches were damaged on disk and are lost", losses=str(found.damaged))
        return found.batches

    async def ack_batches(self, epoch: int, first: int, last: int) -> int:
        """Forget batches; how many there were. Those of another epoch are not here."""
        if epoch != self.epoch:
            return 0
        count, totals = await self._do(lambda db: outbox.acknowledge(db, first, last))
        self._metrics.acked_batches.inc(count)
        self._observe(totals)
        return count

    async def totals(self) -> outbox.Totals:
        """What the outbox holds."""
        totals = await self._do(outbox.totals)
        self._observe(totals)
        return totals

    def _observe(self, totals: outbox.Totals) -> None:
        self.backlog = Backlog(totals.bytes, totals.batches)
        self._metrics.outbox_bytes.set(totals.bytes)
        self._metrics.outbox_batches.set(totals.batches)

    def _count(self, reason: str, losses: Losses) -> None:
        for record_class, loss in losses.by_class.items():
            self._metrics.dropped_records.labels(record_class.name.lower(), reason).inc(
                loss.records
            )

    # Life.

    def check(self) -> str | None:
        """For the liveness probe: what is wrong with the thread, None if nothing is."""
        if not self._thread.is_alive():
            return "the store's thread has ended"
        since = self._busy_since
        if since is not None and time.monotonic() - since > STUCK_SECONDS:
            return f"the store has been busy with one commit for more than {STUCK_SECONDS:g} s"
        return None

    async def watch(self) -> None:
        """Wait for ever; raises StoreDamagedError once the file turns out to be damaged."""
        await asyncio.shield(self._failed)

    async def close(self) -> None:
        """Finish what waits, then close the file."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._db.close()
        if not self._failed.done():
            self._failed.cancel()

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        async with self._places:
            if self._closed or not self._thread.is_alive():
                raise StorageError("the store is closed")
            future: asyncio.Future[T] = self._loop.create_future()
            self._queue.put(_Operation(work, future))
            # A caller that is cancelled must not take the work with it: it may be half done.
            return await asyncio.shield(future)

    # The thread.

    def _work(self) -> None:
        closing = False
        while not closing:
            group = [self._queue.get()]
            while len(group) < GROUP and group[-1] is not None:
                try:
                    group.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            closing = group[-1] is None
            operations = [o for o in group if o is not None]
            if operations:
                self._busy_since = time.monotonic()
                self._commit(operations)
                self._metrics.commits.observe(time.monotonic() - self._busy_since)
                self._busy_since = None
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                    self._loop.call_soon_threadsafe(self._resolve, operations)

    def _commit(self, operations: list[_Operation]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for operation in operations:
                self._apply(operation)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            for operation in operations:
                operation.error = _translate(error)

    def _apply(self, operation: _Operation) -> None:
        self._db.execute("SAVEPOINT operation")
        try:
            operation.result = operation.work(self._db)
        except sqlite3.Error as error:
            if not self._db.in_transaction:  # some errors end the whole transaction
                raise
            operation.error = _translate(error)
            self._db.execute("ROLLBACK TO operation")
        except Exception as error:  # noqa: BLE001 - handed to the caller, whose error it is
            operation.error = error
            self._db.execute("ROLLBACK TO operation")
        self._db.execute("RELEASE operation")

    def _resolve(self, operations: list[_Operation]) -> None:
        self._metrics.store_operations.inc(len(operations))
        for operation in operations:
            if operation.error is None:
                _set(operation.future, operation.result)
                continue
            self._metrics.store_failures.inc()
            if isinstance(operation.error, StoreDamagedError) and not self._failed.done():
                self._failed.set_exception(operation.error)
                self._failed.exception()  # perhaps nobody watches
                with contextlib.suppress(OSError):  # then the checks at the next start must do
                    self._suspect.touch()
            if not operation.future.done():
                operation.future.set_exception(operation.error)
                operation.future.exception()  # its caller may be gone: that is no news


def _set(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _translate(error: sqlite3.Error) -> Exception:
    if is_damage(error):
        return StoreDamagedError(f"the state file is damaged: {error}")
    return StorageError(f"the state file cannot be used now: {error}")


@contextlib.asynccontextmanager
async def open_store(
    directory: Path, limits: StoreLimits, metrics: AgentMetrics
) -> AsyncIterator[Store]:
    """Open the store in a directory, locked against other agents, and close it in the end.

    Raises:
        SettingsError: The directory cannot be used, or another agent uses it.
    """
    lock = Lock(directory)
    try:
        opened = await asyncio.to_thread(open_database, directory)
        if opened.damaged is not None:
            metrics.damaged_files.inc()
        store = Store(directory, opened, limits, metrics)
        try:
            await store.totals()
            yield store
        finally:
            await store.close()
    finally:
        lock.release()
