"""From records to batches in the outbox: a bounded queue, a delay, one compression, one commit.

Takes records from every part of the agent without blocking them; what has no room is counted and
told in a record. Sends nothing: the uplink reads the outbox.
"""

import asyncio
import contextlib
import time
from dataclasses import dataclass

from outrider_proto import limits as wire
from outrider_proto import records
from outrider_proto.batches import BatchError
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.backoff import Backoff
from outrider_runtime.logs import get_logger

from outrider_agent.core.batching import Batcher, BatchLimits, size_of
from outrider_agent.core.eviction import Loss, Losses
from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import StorageError
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store.outbox import NewBatch
from outrider_agent.store.store import Store

log = get_logger("outrider.recorder")

#: Most bytes of records that wait to be stored, for each class.
MAX_QUEUE_BYTES = 4 * wire.MIB
#: Losses of one class are told at most this often, seconds: telling them must not cause more.
LOSS_REPORT_SECONDS = 10.0


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


class Recorder:
    """Takes records and puts them into the outbox. Implements core.records.RecordSink."""

    def __init__(self, store: Store, options: RecorderOptions, metrics: AgentMetrics) -> None:
        self._store = store
        self._options = options
        self._metrics = metrics
        self._batchers = {c: Batcher(options.limits) for c in RecordClass}
        self._wake = asyncio.Event()
        self._room = asyncio.Condition()
        self._stopping = False
        self._losses = Losses()
        self._losses_told = float("-inf")
        self._backoff = Backoff(0.5, 10.0)

    def submit(self, record: pb.EncodedRecord, record_class: RecordClass) -> bool:
        """Take a record at once; False, and counted, when there is no room."""
        reason = self._problem(record, record_class)
        if reason:
            self._drop(record_class, reason, 1)
            return False
        self._take(record, record_class)
        return True

    async def put(self, record: pb.EncodedRecord, record_class: RecordClass) -> None:
        """Take a record; wait while there is no room. One beyond the wire's limit is dropped."""
        async with self._room:
            await self._room.wait_for(lambda: self._problem(record, record_class) != "queue_full")
        self.submit(record, record_class)

    def _problem(self, record: pb.EncodedRecord, record_class: RecordClass) -> str | None:
        if self._stopping:
            return "stopping"
        if len(record.data) > wire.RECORD_BYTES:
            return "too_large"
        held = self._batchers[record_class].bytes
        if held and held + size_of(record) > self._options.max_queue_bytes:
            return "queue_full"
        return None

    def _take(self, record: pb.EncodedRecord, record_class: RecordClass) -> None:
        batcher = self._batchers[record_class]
        was_due = batcher.due()
        batcher.add(record, time.monotonic())
        if batcher.due() != was_due:  # the first record, or the one that fills the batch
            self._wake.set()
        self._metrics.records.labels(record_class.name.lower()).inc()
        self._observe()

    def _observe(self) -> None:
        self._metrics.queue_bytes.set(sum(b.bytes for b in self._batchers.values()))

    def _drop(self, record_class: RecordClass, reason: str, count: int) -> None:
        self._metrics.dropped_records.labels(record_class.name.lower(), reason).inc(count)

    async def run(self) -> None:
        """Store batches as they become due, until `finish`; what is held then is stored first."""
        while True:
            now = time.monotonic()
            due = [(b.due(), c) for c, b in self._batchers.items()]
            ready = [c for when, c in due if when is not None and (when <= now or self._stopping)]
            for record_class in sorted(ready, reverse=True):
                await self._store_batch(record_class)
            if ready:
                continue
            if self._stopping:
                return
            self._tell_losses(now)
            waits = [when - now for when, _ in due if when is not None]
            if self._losses:
                waits.append(self._losses_told + LOSS_REPORT_SECONDS - now)
            await self._sleep(min(waits, default=None))

    async def _sleep(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    async def finish(self) -> None:
        """Take no more records and have `run` store what is held, then end.

        Not by cancelling it: a batch whose commit is under way must not be stored twice.
        """
        self._stopping = True
        self._wake.set()
        async with self._room:
            self._room.notify_all()

    async def _store_batch(self, record_class: RecordClass) -> None:
        """Store one batch; while the disk does not take it, try again and hold what comes.

        At the end there is one try: what cannot be stored then is lost, counted and logged.
        """
        taken = self._batchers[record_class].take(time.monotonic())
        self._observe()
        while True:
            try:
                await self._append(record_class, taken)
                break
            except StorageError as error:
                if self._stopping:
                    self._drop(record_class, "stopping", len(taken))
                    log.warning("records lost at the end", records=len(taken), error=str(error))
                    return
                if not self._backoff.failures:
                    log.warning("records cannot be stored; trying again", error=str(error))
                await asyncio.sleep(self._backoff.next())
        if self._backoff.failures:
            log.info("records can be stored again")
            self._backoff.reset()
        async with self._room:
            self._room.notify_all()

    async def _append(self, record_class: RecordClass, taken: list[pb.EncodedRecord]) -> None:
        new = NewBatch(taken, record_class, self._options.codec, time.time_ns())
        try:
            done = await self._store.append_batch(new)
        except BatchError as error:
            self._drop(record_class, "too_large", len(taken))
            log.warning("records do not fit into a batch", records=len(taken), error=str(error))
            return
        for lost_class, loss in done.losses.by_class.items():
            _merge(self._losses.by_class.setdefault(lost_class, Loss()), loss)

    def _tell_losses(self, now: float) -> None:
        if not self._losses or now - self._losses_told < LOSS_REPORT_SECONDS:
            return
        losses, self._losses, self._losses_told = self._losses, Losses(), now
        for record_class, loss in losses.by_class.items():
            fields = {
                "class": record_class.name.lower(),
                "batches": str(loss.batches),
                "records": str(loss.records),
                "bytes": str(loss.bytes),
                "first_seq": str(loss.first_seq),
                "last_seq": str(loss.last_seq),
                "epoch": str(self._store.epoch),
            }
            log.warning("the outbox was full: records were given up", **fields)
            told = {"event": "OutboxFull", **fields}
            self.submit(
                records.payload(records.AGENT_EVENT, int(time.time()), told), RecordClass.LOG
            )


def _merge(into: Loss, loss: Loss) -> None:
    into.batches += loss.batches
    into.records += loss.records
    into.bytes += loss.bytes
    into.first_seq = min(into.first_seq or loss.first_seq, loss.first_seq)
    into.last_seq = max(into.last_seq, loss.last_seq)
