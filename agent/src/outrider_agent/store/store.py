"""The agent's file for the rest of the agent: async methods, each back once its work is done.

Done means on the disk, but for what durability `relaxed` lets be late; see store.worker, which has
the thread that does it all.
"""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from outrider_proto.batches import BatchError
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.core.eviction import Bounds, Losses, crowded_out
from outrider_agent.core.records import RecordClass
from outrider_agent.core.runs import RunKey
from outrider_agent.core.storage import (
    Backlog,
    OutboxFullError,
    Process,
    Unfinished,
    Waiting,
)
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store import journal, outbox, space
from outrider_agent.store.database import SUSPECT_NAME, Lock, Opened, open_database
from outrider_agent.store.worker import Hooks, Sync, Worker

log = get_logger("outrider.store")
T = TypeVar("T")


@dataclass(frozen=True)
class StoreLimits:
    """Bounds of what is kept, and how well.

    Attributes:
        max_outbox_bytes: Most bytes of batches.
        tombstone_seconds: How long acknowledged runs are remembered.
        max_tombstones: Most of them.
        result_reserve_bytes: How many bytes of results may be beyond max_outbox_bytes.
        min_free_bytes: Free bytes to leave on the disk.
        min_free_percent: The same in percent of its size; the larger one counts.
        relaxed: Whether batches may be synced to the disk a moment after they count as stored.
    """

    max_outbox_bytes: int
    tombstone_seconds: int
    max_tombstones: int
    result_reserve_bytes: int = 0
    min_free_bytes: int = 0
    min_free_percent: float = 0.0
    relaxed: bool = False

    @property
    def bounds(self) -> Bounds:
        """Those of the outbox."""
        return Bounds(
            self.max_outbox_bytes,
            self.result_reserve_bytes,
            self.min_free_bytes,
            self.min_free_percent,
        )


class Store:
    """Journal and outbox. Made by `open_store`."""

    def __init__(
        self, directory: Path, opened: Opened, limits: StoreLimits, metrics: AgentMetrics
    ) -> None:
        self._directory = directory
        self.epoch = opened.epoch
        self.damaged = opened.damaged
        #: The highest number that a batch was given; 0 before the first.
        self.last_seq = outbox.last_seq(opened.connection)
        #: What waits in the outbox, as last known.
        self.backlog = Backlog(0, 0)
        #: Classes of records that have no room because of worthier ones, as last known.
        self.crowded: frozenset[RecordClass] = frozenset()
        #: What was given up and not told yet, by reason.
        self.losses: dict[str, Losses] = {}
        #: Called on the loop after batches were added to the outbox.
        self.on_append: Callable[[], None] = lambda: None
        #: Called on the loop after the outbox got smaller.
        self.on_room: Callable[[], None] = lambda: None
        self._db = opened.connection
        self._limits = limits
        self._bounds = limits.bounds
        self._metrics = metrics
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Of the thread, which alone writes them.
        self._limit = limits.max_outbox_bytes
        self._next_look = 0.0
        hooks = Hooks(
            unsynced=_reservation if limits.relaxed else None, tend=self._tend, damaged=self._damage
        )
        self._worker = Worker(opened.connection, hooks, metrics)
        self._worker.start()
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
        return await self._do(lambda db: journal.find(db, key), Sync.NEVER)

    async def run_states(self) -> list[pb.RunState]:
        """All runs whose result was not acknowledged."""
        return await self._do(journal.states, Sync.NEVER)

    async def unfinished_runs(self) -> list[Unfinished]:
        """All runs that have not ended."""
        return await self._do(journal.unfinished, Sync.NEVER)

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
            OutboxFullError: It holds results, and there are too many of them already.
            StorageError: It could not be written.
        """
        (done,) = await self.append_batches([new])
        if isinstance(done, Exception):
            raise done
        return done

    async def append_batches(
        self, news: Sequence[outbox.NewBatch]
    ) -> list[outbox.Appended | BatchError | OutboxFullError]:
        """Add batches in one commit; what became of each.

        Raises:
            StorageError: None of them could be written.
        """

        def append(
            db: sqlite3.Connection,
        ) -> list[outbox.Appended | BatchError | OutboxFullError]:
            room = outbox.Room(self._bounds, self._limit, reserved=self._limits.relaxed)
            results: list[outbox.Appended | BatchError | OutboxFullError] = []
            full: OutboxFullError | None = None
            for new in news:
                if full is not None and new.record_class is RecordClass.RESULT:
                    results.append(full)
                    continue
                try:
                    results.append(outbox.append(db, new, room, epoch=self.epoch))
                except BatchError as error:  # nothing was written for it
                    results.append(error)
                except OutboxFullError as error:
                    # Smaller ones that come later might fit, and would go before it for ever.
                    full = error
                    results.append(error)
            return results

        results = await self._do(append, Sync.SOON)
        done = [result for result in results if isinstance(result, outbox.Appended)]
        for appended in done:
            self._lost(self._full_reason(), appended.losses)
        if done:
            self.last_seq = max(self.last_seq, done[-1].seq)
            self._observe(done[-1].totals)
            self.on_append()
        return results

    async def batches_after(
        self,
        seq: int,
        limit: int,
        *,
        upto: int | None = None,
        classes: Collection[RecordClass] | None = None,
        at_least_one: bool = False,
    ) -> list[Waiting]:
        """The batches that follow `seq`, oldest first, at most `limit` bytes of them.

        Args:
            seq: Those above this number.
            limit: Most bytes altogether.
            upto: Those up to this number only.
            classes: Those of these classes only.
            at_least_one: The first comes whatever its size.
        """
        found = await self._do(
            lambda db: outbox.after(
                db, seq, limit, upto=upto, classes=classes, at_least_one=at_least_one
            ),
            Sync.NEVER,
        )
        self._lost("damaged", found.damaged)
        return found.batches

    async def split_batch(self, epoch: int, seq: int, max_bytes: int) -> int:
        """Put smaller batches with new numbers in a batch's place; how many, 0: nothing to split.

        A batch of one record is left as it is; another one becomes two at least. Records that were
        in it stay in their order.
        """
        if epoch != self.epoch:
            return 0
        # Synced at once: there may be more pieces than numbers were reserved.
        done = await self._do(lambda db: outbox.split(db, seq, max_bytes))
        self._lost("damaged", done.damaged)
        self.last_seq = max(self.last_seq, done.seq)
        self._observe(done.totals)
        if done.pieces:
            self._metrics.split_batches.inc()
            self.on_append()
        return done.pieces

    async def ack_batches(self, epoch: int, first: int, last: int) -> int:
        """Forget batches; how many there were. Those of another epoch are not here."""
        if epoch != self.epoch:
            return 0
        # Not synced: after a power loss they are sent again, and the reader drops them.
        count, totals = await self._do(lambda db: outbox.acknowledge(db, first, last), Sync.NEVER)
        self._metrics.acked_batches.inc(count)
        self._observe(totals)
        self.on_room()
        return count

    async def totals(self) -> outbox.Totals:
        """What the outbox holds."""
        totals = await self._do(outbox.totals, Sync.NEVER)
        self._observe(totals)
        return totals

    def _observe(self, totals: outbox.Totals) -> None:
        self.backlog = Backlog(totals.bytes, totals.batches)
        self.crowded = crowded_out(totals.by_class, self._limit)
        self._metrics.outbox_bytes.set(totals.bytes)
        self._metrics.outbox_batches.set(totals.batches)

    def _full_reason(self) -> str:
        return "outbox_full" if self._limit >= self._limits.max_outbox_bytes else "disk_low"

    def _lost(self, reason: str, losses: Losses) -> None:
        if not losses:
            return
        for record_class, loss in losses.by_class.items():
            self._metrics.dropped_records.labels(record_class.name.lower(), reason).inc(
                loss.records
            )
        if reason == "damaged":
            log.error("batches were damaged on disk and are lost", losses=str(losses))
        self.losses.setdefault(reason, Losses()).merge(losses)

    # Free space; the first of these in the thread.

    def _tend(self, db: sqlite3.Connection) -> float | None:
        """Look at the disk now and then, and keep the outbox to what it has room for.

        Returns after how many seconds to look again whatever happens: while the outbox has less
        room than it may, records are refused, and nothing else might ever come here.
        """
        left = self._next_look - time.monotonic()
        if left <= 0:
            self._look(db)
            left = self._next_look - time.monotonic()
        return max(0.0, left) if self._limit < self._limits.max_outbox_bytes else None

    def _look(self, db: sqlite3.Connection) -> None:
        self._next_look = time.monotonic() + space.LOOK_SECONDS
        try:
            disk = space.disk_of(self._directory)
            limit = self._limit = space.limit(db, self._bounds, disk)
            losses = self._worker.transact(lambda db: outbox.make_room(db, limit), full=False)
            totals = outbox.totals(db)
            self._worker.later(self._tended, losses, totals)
            space.give_back(db, self._bounds.shortage(disk))
        except (OSError, sqlite3.Error) as error:
            log.warning("the outbox could not be kept to the room on its disk", error=str(error))

    def _tended(self, losses: Losses, totals: outbox.Totals) -> None:
        self._metrics.outbox_limit_bytes.set(self._limit)
        self._lost("disk_low", losses)
        self._observe(totals)
        self.on_room()

    # Life.

    def check(self) -> str | None:
        """For the liveness probe: what is wrong with the thread, None if nothing is."""
        return self._worker.problem()

    async def watch(self) -> None:
        """Wait for ever; raises StoreDamagedError once the file turns out to be damaged."""
        await asyncio.shield(self._failed)

    def _damage(self, error: Exception) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)
            self._failed.exception()  # perhaps nobody watches
            with contextlib.suppress(OSError):  # then the checks at the next start must do
                (self._directory / SUSPECT_NAME).touch()

    async def close(self) -> None:
        """Finish what waits, then close the file."""
        await self._worker.close()
        with contextlib.suppress(sqlite3.Error):  # numbers are skipped then: no harm
            outbox.give_up_reserved(self._db)
        self._db.close()
        if not self._failed.done():
            self._failed.cancel()

    async def _do(self, work: Callable[[sqlite3.Connection], T], sync: Sync = Sync.NOW) -> T:
        return await self._worker.do(work, sync)


def _reservation(db: sqlite3.Connection) -> Callable[[sqlite3.Connection], None] | None:
    return outbox.reserve if outbox.must_reserve(db) else None


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
