"""The thread that owns the agent's file: group commit, and when a commit waits for the disk.

Operations that wait together share one transaction and so one sync of the disk; each has a
savepoint, so that one that fails takes no other with it. Nobody else touches the connection.

Which commits are synced (`PRAGMA synchronous`, switched between transactions; the file is in WAL
mode, where a commit is lost in a power cut only together with all that came after it):

- FULL where one operation of the group must be on the disk before its caller goes on.
- NORMAL where nothing is lost with it: acknowledgements (the batches are sent again), and what may
  be late. SQLite writes the log then and leaves it to the system: this process may be killed.
- What may be late is followed by a FULL commit within SYNC_SECONDS, which takes it along.
"""

import asyncio
import contextlib
import enum
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from outrider_runtime.logs import get_logger

from outrider_agent.core.storage import StorageError
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store.database import StoreDamagedError, is_damage

log = get_logger("outrider.store")
T = TypeVar("T")

#: Most operations in one transaction.
GROUP = 256
#: Most operations that wait; callers wait for a place.
MAX_WAITING = 1024
#: An operation that takes longer than this means that the disk or the thread hangs, seconds.
STUCK_SECONDS = 60.0
#: What may be late is synced after this time, seconds: with the time that the sync itself takes
#: on a busy disk, less than a second is lost.
SYNC_SECONDS = 0.5


class Sync(enum.IntEnum):
    """How soon the work of an operation has to be on the disk."""

    NEVER = 0
    SOON = 1
    NOW = 2


@dataclass
class _Operation:
    work: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    sync: Sync
    result: Any = None
    error: Exception | None = None


@dataclass(frozen=True)
class Hooks:
    """What the thread does besides operations; each is called there, outside of transactions.

    Attributes:
        unsynced: None: what is needed SOON is synced at once. Else it may be late, and this is
            called before such a commit; what it returns, if anything, is committed first and
            synced.
        tend: Called after each group; returns after how many seconds it is to be called again even
            if nothing is done, None: not before something is.
        damaged: Called on the loop once the file turned out to be damaged.
    """

    unsynced: Callable[[sqlite3.Connection], Callable[[sqlite3.Connection], None] | None] | None
    tend: Callable[[sqlite3.Connection], float | None]
    damaged: Callable[[Exception], None]


class Worker:
    """One thread on one connection."""

    def __init__(self, db: sqlite3.Connection, hooks: Hooks, metrics: AgentMetrics) -> None:
        self._db = db
        self._hooks = hooks
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._places = asyncio.Semaphore(MAX_WAITING)
        self._busy_since: float | None = None
        self._unsynced_since: float | None = None
        self._tend_at: float | None = None
        self._full = True
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        metrics.store_queue.set_function(self._queue.qsize)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    async def do(self, work: Callable[[sqlite3.Connection], T], sync: Sync = Sync.NOW) -> T:
        """Have the thread do something in a transaction, and return once it is committed.

        Raises:
            StorageError: The disk does not take it now, or the file is closed.
            StoreDamagedError: The file is damaged.
        """
        async with self._places:
            if self._closed or not self._thread.is_alive():
                raise StorageError("the store is closed")
            future: asyncio.Future[T] = self._loop.create_future()
            self._queue.put(_Operation(work, future, sync))
            # A caller that is cancelled must not take the work with it: it may be half done.
            return await asyncio.shield(future)

    def later(self, function: Callable[..., None], *arguments: object) -> None:
        """From the thread: call a function on the loop; nothing if that is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def problem(self) -> str | None:
        """What is wrong with the thread, None if nothing is."""
        if not self._thread.is_alive():
            return "the store's thread has ended"
        since = self._busy_since
        if since is not None and time.monotonic() - since > STUCK_SECONDS:
            return f"the store has been busy with one commit for more than {STUCK_SECONDS:g} s"
        return None

    async def close(self) -> None:
        """Finish what waits, then end the thread."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)

    # The thread.

    def _work(self) -> None:
        closing = False
        while not closing:
            group = self._group()
            closing = bool(group) and group[-1] is None
            operations = [o for o in group if o is not None]
            self._busy_since = time.monotonic()
            if operations:
                self._commit(operations)
                self.later(self._resolve, operations)
            self._sync_if_due(at_once=closing)
            again = self._hooks.tend(self._db)
            self._tend_at = None if again is None else time.monotonic() + again
            self._busy_since = None

    def _group(self) -> list[_Operation | None]:
        """What is to be done next; nothing if a sync or a look at the disk is due first."""
        group: list[_Operation | None] = []
        due = [] if self._tend_at is None else [self._tend_at]
        if self._unsynced_since is not None:
            due.append(self._unsynced_since + SYNC_SECONDS)
        with contextlib.suppress(queue.Empty):
            left = max(0.0, min(due) - time.monotonic()) if due else None
            group.append(self._queue.get(timeout=left))
            while len(group) < GROUP and group[-1] is not None:
                group.append(self._queue.get_nowait())
        return group

    def _commit(self, operations: list[_Operation]) -> None:
        began = time.monotonic()
        need = max(operation.sync for operation in operations)
        prepare = self._hooks.unsynced
        late = need is Sync.SOON and prepare is not None
        try:
            if prepare is not None and any(o.sync is Sync.SOON for o in operations):
                first = prepare(self._db)
                if first is not None:
                    self.transact(first, full=True)
            self.transact(
                lambda _: self._apply_all(operations), full=need is not Sync.NEVER and not late
            )
            if late and self._unsynced_since is None:
                self._unsynced_since = began
        except sqlite3.Error as error:
            for operation in operations:
                operation.error = _translate(error)
        self._metrics.commits.observe(time.monotonic() - began)

    def transact(self, work: Callable[[sqlite3.Connection], T], *, full: bool) -> T:
        """In the thread: do something in a transaction, and sync it if that is asked for.

        Raises:
            sqlite3.Error: It could not be committed.
        """
        if full is not self._full:
            # Not as a statement: what this pragma does, it does while it is compiled, and the
            # connection keeps compiled statements.
            self._db.executescript(f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}")
            self._full = full
        try:
            self._db.execute("BEGIN IMMEDIATE")
            result = work(self._db)
            if full and self._unsynced_since is not None:
                # A commit that changes nothing syncs nothing.
                self._db.execute(
                    "INSERT INTO meta VALUES ('syncs', 1) "
                    "ON CONFLICT (name) DO UPDATE SET value = value + 1"
                )
            self._db.execute("COMMIT")
        except sqlite3.Error:
            with contextlib.suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            raise
        if full:
            self._unsynced_since = None
            self._metrics.syncs.inc()
        return result

    def _apply_all(self, operations: list[_Operation]) -> None:
        for operation in operations:
            self._apply(operation)

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

    def _sync_if_due(self, *, at_once: bool) -> None:
        since = self._unsynced_since
        if since is None or not (at_once or time.monotonic() - since >= SYNC_SECONDS):
            return
        try:
            self.transact(lambda _: None, full=True)
        except sqlite3.Error as error:
            # Tried again after the same time; what waits for a server is in the log all the same.
            self._unsynced_since = time.monotonic()
            self._metrics.store_failures.inc()
            log.warning("records could not be synced to the disk", error=str(error))

    # The loop.

    def _resolve(self, operations: list[_Operation]) -> None:
        self._metrics.store_operations.inc(len(operations))
        for operation in operations:
            future = operation.future
            if operation.error is None:
                if not future.done():
                    future.set_result(operation.result)
                continue
            self._metrics.store_failures.inc()
            if isinstance(operation.error, StoreDamagedError):
                self._hooks.damaged(operation.error)
            if not future.done():
                future.set_exception(operation.error)
                future.exception()  # its caller may be gone: that is no news


def _translate(error: sqlite3.Error) -> Exception:
    if is_damage(error):
        return StoreDamagedError(f"the state file is damaged: {error}")
    return StorageError(f"the state file cannot be used now: {error}")
