"""The way of batches from all streams into the sink, within one bound for the whole process.

Holds batches while the sink is away, up to the bound, and tries again; never says that a batch is
stored before the sink does. Beyond the bound streams wait, and after a while batches are let go:
their agents keep them, and send them again when they are told to connect anew.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import RecordBatch
from outrider_runtime.backoff import Backoff
from outrider_runtime.logs import get_logger

from outrider_operator.core.sink import Origin, Sink, SinkError, SinkUnavailableError
from outrider_operator.metrics import ServerMetrics

#: Longest wait between two tries to store a batch, seconds.
RETRY_CAP_SECONDS: Final = 5.0
RETRY_BASE_SECONDS: Final = 0.2
#: What a batch that waits takes besides its records, bytes, as measured: task, message, futures.
#: Without it many small batches would hold many times the bound.
BATCH_COST_BYTES: Final = 8 * limits.KIB
#: A stream waits so long for room before its batch is let go, seconds. Its run reports wait
#: behind the batch, so this is also how late a full sink can make them.
PATIENCE_SECONDS: Final = 5.0

log = get_logger(__name__)


class ByteBudget:
    """So many bytes may be held at once; more wait, first come, first served.

    Args:
        limit: bytes; one holding alone may be larger.
        on_change: told how many bytes are held, at each change.
    """

    def __init__(self, limit: int, on_change: Callable[[int], None] = lambda _: None) -> None:
        self._limit = limit
        self._on_change = on_change
        # Made when it is needed: each stream has a budget, and an empty deque takes 600 bytes.
        self._waiting: deque[tuple[int, asyncio.Future[None]]] | None = None
        self.held = 0

    async def take(self, size: int) -> None:
        """Hold `size` bytes more; waits until they fit."""
        if not self._waiting and self._fits(size):
            self._hold(size)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size, future)
        waiting = self._waiting = deque() if self._waiting is None else self._waiting
        waiting.append(entry)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give_back(size)  # it was granted, and nobody is there to use it
            else:
                if entry in waiting:
                    waiting.remove(entry)
                self._grant()
            raise

    def give_back(self, size: int) -> None:
        """Hold `size` bytes less."""
        self._hold(-size)
        self._grant()

    def _fits(self, size: int) -> bool:
        return self.held == 0 or self.held + size <= self._limit

    def _hold(self, size: int) -> None:
        self.held += size
        self._on_change(self.held)

    def _grant(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size, future = self._waiting.popleft()
            if not future.done():
                self._hold(size)
                future.set_result(None)


class Intake:
    """Takes batches for the sink.

    Args:
        sink: where they are stored.
        limit: most bytes of batches held at once, with what surrounds them.
        metrics: where they are counted.

    Attributes:
        patience: how long a batch waits for room before it is let go, seconds.
    """

    def __init__(self, sink: Sink, limit: int, metrics: ServerMetrics) -> None:
        self.patience = PATIENCE_SECONDS
        self._sink = sink
        self._metrics = metrics
        self._budget = ByteBudget(limit, metrics.inflight_bytes.set)
        # Called by whichever batch is stored next: then there is room again.
        self._let_go: set[Callable[[], None]] = set()
        metrics.inflight_limit.set(limit)

    async def admit(self, batch: RecordBatch, *, at_once: bool = False) -> bool:
        """Make room for a batch, with patience or at once; False: there is none.

        After True, `store` or `release` must follow.
        """
        try:
            async with asyncio.timeout(0 if at_once else self.patience):
                await self._budget.take(_cost(batch))
        except TimeoutError:
            self._metrics.batches.labels("let_go").inc()
            return False
        return True

    def when_room(self, call: Callable[[], None]) -> None:
        """Have `call` called once, as soon as the sink stores batches again."""
        self._let_go.add(call)

    def forget(self, call: Callable[[], None]) -> None:
        """Undo `when_room`."""
        self._let_go.discard(call)

    def release(self, batch: RecordBatch) -> None:
        """Give an admitted batch's room back."""
        self._budget.give_back(_cost(batch))

    async def store(self, origin: Origin, batch: RecordBatch) -> None:
        """Store an admitted batch, however long the sink needs; returns when it is safe."""
        began = time.monotonic()
        backoff = Backoff(RETRY_BASE_SECONDS, RETRY_CAP_SECONDS)
        while not await self._try(origin, batch):  # noqa: ASYNC110 - a retry, no event tells
            await asyncio.sleep(backoff.next())
        self._metrics.store_seconds.observe(time.monotonic() - began)
        self._metrics.batches.labels("stored").inc()
        self._metrics.records.inc(batch.count)
        calls, self._let_go = self._let_go, set()
        for call in calls:
            call()

    async def _try(self, origin: Origin, batch: RecordBatch) -> bool:
        try:
            await self._sink.store(origin, batch)
        except SinkUnavailableError:
            # The sink itself says why, once, in its log and condition; this is one of many.
            self._metrics.batches.labels("unavailable").inc()
            return False
        except SinkError as error:
            # Not acknowledged either: what is not stored stays with its agent, and is seen there.
            self._metrics.batches.labels("rejected").inc()
            log.error(  # noqa: TRY400 - the text says it all
                "sink rejects batch",
                node=origin.node,
                epoch=batch.epoch,
                seq=batch.seq,
                bytes=len(batch.records),
                error=str(error),
            )
            return False
        return True


def _cost(batch: RecordBatch) -> int:
    """The memory that a waiting batch takes, about, bytes."""
    return len(batch.records) + BATCH_COST_BYTES
