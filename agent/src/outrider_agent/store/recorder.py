"""From records to batches in the outbox: a bounded queue, a delay, one commit for all that wait.

Takes records from every part of the agent without blocking them; what has no room is counted and
told in a record. Compresses and sends nothing: the store's thread does the one, the uplink, which
reads the outbox, the other.
"""

import asyncio
import contextlib
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from outrider_proto import limits as wire
from outrider_proto import records
from outrider_proto.batches import BatchError, entry
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.backoff import Backoff
from outrider_runtime.logs import get_logger

from outrider_agent.core.batching import Batcher, BatchLimits, group_numbers
from outrider_agent.core.eviction import Loss
from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import OutboxFullError, StorageError
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store.outbox import NewBatch
from outrider_agent.store.store import Store

log = get_logger("outrider.recorder")

#: Most bytes of records that wait to be stored, for each class.
MAX_QUEUE_BYTES = 8 * wire.MIB
#: Losses are told at most this often, seconds: telling them must not cause more.
LOSS_REPORT_SECONDS = 10.0
#: Most batches of one class in a commit.
COMMIT_BATCHES = 16
#: The group of the data types that are in none.
_REST = 0


@dataclass(frozen=True)
class RecorderOptions:
    """How records become batches.

    Attributes:
        limits: When a batch is closed.
        codec: How it is compressed.
        max_queue_bytes: Most bytes that wait, for each class.
    """

    limits: BatchLimits
    codec: pb.Codec.ValueType
    max_queue_bytes: int = MAX_QUEUE_BYTES


@dataclass
class _Queue:
    """The records of one class that are not stored yet.

    Attributes:
        record_class: The class.
        batchers: By group of data types.
        pending: What is being stored, or is to be tried again; batches of `batchers` no more.
        bytes: Of all records, until they are stored.
        retry_at: Not to be tried before this time.
        refused: Whether that is because the outbox was full.
        backoff: Time between tries.
    """

    record_class: RecordClass
    batchers: dict[int, Batcher] = field(default_factory=dict)
    pending: list[NewBatch] = field(default_factory=list)
    bytes: int = 0
    retry_at: float = float("-inf")
    refused: bool = False
    backoff: Backoff = field(default_factory=lambda: Backoff(0.5, 10.0))

    def due(self) -> float | None:
        """When it is to be looked at; None while it is empty."""
        times = [due for b in self.batchers.values() if (due := b.due()) is not None]
        if self.pending:
            return self.retry_at
        return max(self.retry_at, min(times)) if times else None


class Recorder:
    """Takes records and puts them into the outbox. Implements core.records.RecordSink."""

    def __init__(self, store: Store, options: RecorderOptions, metrics: AgentMetrics) -> None:
        self._store = store
        self._options = options
        self._metrics = metrics
        self._queues = {c: _Queue(c) for c in RecordClass}
        self._groups: dict[int, int] = {}
        self._limits = options.limits
        self._max_batch_bytes = wire.BATCH_BYTES
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._stopping = False
        self._losses_told = float("-inf")
        store.on_room = self._room_made
        metrics.queue_bytes.set_function(lambda: sum(q.bytes for q in self._queues.values()))

    def set_groups(self, groups: Sequence[Collection[int]]) -> None:
        """Have batches hold data types of one group only; types in no group are one as well."""
        numbers = group_numbers(groups)
        if numbers != self._groups:
            self._groups = numbers
            self._begin_anew()

    def set_max_batch_bytes(self, max_bytes: int) -> None:
        """Keep batches, once compressed, under what a server takes, bytes; 0: the wire's limit."""
        found = min(max_bytes or wire.BATCH_BYTES, wire.BATCH_BYTES)
        if found != self._max_batch_bytes:
            self._max_batch_bytes = found
            limits = self._options.limits
            # Most batches get smaller by compression: few have to be split then.
            self._limits = replace(limits, max_bytes=min(limits.max_bytes, found))
            self._begin_anew()

    def _room_made(self) -> None:
        """The outbox got smaller: try again at once what was refused because it was full."""
        self._room.set()
        for queue in self._queues.values():
            if queue.refused:
                queue.refused, queue.retry_at = False, float("-inf")
                self._wake.set()

    def _begin_anew(self) -> None:
        """Store what is held as it is; what comes goes by what was set."""
        for queue in self._queues.values():
            for group, batcher in list(queue.batchers.items()):
                batcher.close()
                batcher.limits = self._limits
                if batcher.due() is None:
                    del queue.batchers[group]
        self._wake.set()

    def submit(self, record: pb.EncodedRecord, record_class: RecordClass) -> bool:
        """Take a record at once; False, and counted, when there is no room."""
        item = entry(record)
        reason = self._problem(record, item, record_class)
        if reason:
            self._drop(record_class, reason, 1)
            return False
        self._take(item, record.data_type, record_class)
        return True

    async def put(self, record: pb.EncodedRecord, record_class: RecordClass) -> None:
        """Take a record; wait while there is no room. One beyond the wire's limit is dropped.

        There may be none for long: while results fill the outbox, or more of them than its reserve
        wait for a server. Whoever waits here then slows who it takes from: a run's output is not
        read, and the run waits when it goes on printing.
        """
        item = entry(record)
        while (reason := self._problem(record, item, record_class)) in ("queue_full", "refused"):
            self._room.clear()
            await self._room.wait()
        if reason:
            self._drop(record_class, reason, 1)
        else:
            self._take(item, record.data_type, record_class)

    async def flush(self, record_class: RecordClass) -> None:
        """Store what was taken of a class so far without waiting for its delay; then return.

        Also once it was given up, which is counted: as the agent stops, or beyond the wire's limit.
        """
        queue = self._queues[record_class]
        # These very ones: what came later, or is in another group, may be stored before them.
        held = [new.held for new in queue.pending]
        for batcher in queue.batchers.values():
            batcher.close()
            held += batcher.closed
        self._wake.set()
        while not all(one.settled for one in held):
            self._room.clear()
            await self._room.wait()

    def _problem(
        self, record: pb.EncodedRecord, item: bytes, record_class: RecordClass
    ) -> str | None:
        size, held = len(item), self._queues[record_class].bytes
        if size > wire.RECORD_BYTES and len(record.data) > wire.RECORD_BYTES:
            return "too_large"
        if self._stopping:
            return "stopping"
        if record_class in self._store.crowded:
            return "refused"
        if held and held + size > self._options.max_queue_bytes:
            return "queue_full"
        return None

    def _take(self, item: bytes, data_type: int, record_class: RecordClass) -> None:
        queue = self._queues[record_class]
        group = self._groups.get(data_type, _REST)
        batcher = queue.batchers.get(group)
        if batcher is None:
            batcher = queue.batchers[group] = Batcher(self._limits)
        queue.bytes += len(item)
        if batcher.add(item, data_type, time.monotonic()):
            self._wake.set()

    def _drop(self, record_class: RecordClass, reason: str, count: int) -> None:
        self._metrics.dropped_records.labels(record_class.name.lower(), reason).inc(count)

    async def run(self) -> None:
        """Store batches as they become due, until `finish`; what is held then is stored first."""
        while True:
            self._wake.clear()
            now = time.monotonic()
            # The worthier class first.
            ready = [q for q in reversed(self._queues.values()) if self._is_ready(q, now)]
            if ready:
                await self._store_batches(ready)
                continue
            if self._stopping:
                return
            self._tell_losses(now)
            waits = [due - now for q in self._queues.values() if (due := q.due()) is not None]
            if self._store.losses:
                waits.append(self._losses_told + LOSS_REPORT_SECONDS - now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(waits, default=None)):
                    await self._wake.wait()

    def _is_ready(self, queue: _Queue, now: float) -> bool:
        due = queue.due()
        if due is None or not (due <= now or self._stopping):
            return False
        created = time.time_ns()
        for batcher in queue.batchers.values():
            while len(queue.pending) < COMMIT_BATCHES:
                when = batcher.due()
                if when is None or not (when <= now or self._stopping):
                    break
                new = NewBatch(
                    batcher.take(),
                    queue.record_class,
                    self._options.codec,
                    created,
                    self._max_batch_bytes,
                )
                queue.pending.append(new)
                self._metrics.records.labels(queue.record_class.name.lower()).inc(new.records)
        return bool(queue.pending)

    async def finish(self) -> None:
        """Take no more records and have `run` store what is held, then end.

        Not by cancelling it: a batch whose commit is under way must not be stored twice.
        """
        self._stopping = True
        self._wake.set()
        self._room.set()

    async def _store_batches(self, ready: Sequence[_Queue]) -> None:
        """Store what is pending in one commit; what the disk does not take is tried again.

        At the end there is one try: what cannot be stored then is lost, counted and logged.
        """
        news = [new for queue in ready for new in queue.pending]
        try:
            results: Sequence[object] = await self._store.append_batches(news)
        except StorageError as error:
            results = [error] * len(news)
        outcomes = iter(results)
        for queue in ready:
            failed = None
            for new in queue.pending.copy():
                result = next(outcomes)
                if isinstance(result, StorageError) and not self._stopping:
                    failed = result
                    continue
                queue.pending.remove(new)
                self._done(queue, new, result)
            self._tell_state(queue, failed)
        self._room.set()

    def _done(self, queue: _Queue, new: NewBatch, result: object) -> None:
        queue.bytes -= new.held.size
        new.held.settled = True
        if isinstance(result, BatchError):
            self._drop(queue.record_class, "too_large", new.records)
            log.warning("records do not fit into a batch", records=new.records, error=str(result))
        elif isinstance(result, StorageError):
            self._drop(queue.record_class, "stopping", new.records)
            log.warning("records lost at the end", records=new.records, error=str(result))

    def _tell_state(self, queue: _Queue, failed: StorageError | None) -> None:
        record_class = queue.record_class.name.lower()
        if failed is not None:
            if not queue.backoff.failures:
                log.warning(
                    "records cannot be stored; trying again",
                    error=str(failed),
                    **{"class": record_class},
                )
            queue.refused = isinstance(failed, OutboxFullError)
            queue.retry_at = time.monotonic() + queue.backoff.next()
        elif queue.backoff.failures:
            log.info("records can be stored again", **{"class": record_class})
            queue.backoff.reset()
            queue.retry_at = float("-inf")

    def _tell_losses(self, now: float) -> None:
        """Make a record of what was given up; where there is no room for that one, later."""
        losses = self._store.losses
        if not losses or now - self._losses_told < LOSS_REPORT_SECONDS:
            return
        self._losses_told = now
        for reason, lost in list(losses.items()):
            for record_class, loss in list(lost.by_class.items()):
                fields = self._loss_fields(reason, record_class, loss)
                log.warning("records were given up", **fields)
                event = "OutboxDamaged" if reason == "damaged" else "OutboxFull"
                told = records.payload(
                    records.AGENT_EVENT, int(time.time()), {"event": event, **fields}
                )
                if self.submit(told, RecordClass.LOG):
                    del lost.by_class[record_class]
            if not lost:
                del losses[reason]

    def _loss_fields(self, reason: str, record_class: RecordClass, loss: Loss) -> dict[str, str]:
        return {
            "reason": reason,
            "class": record_class.name.lower(),
            "batches": str(loss.batches),
            "records": str(loss.records),
            "bytes": str(loss.bytes),
            "first_seq": str(loss.first_seq),
            "last_seq": str(loss.last_seq),
            "epoch": str(self._store.epoch),
        }
