"""The way of batches from all streams into the sink, within one bound for the whole process.

Holds batches while the sink is away, up to the bound, and tries again; never says that a batch is
stored before the sink does. The bound is of memory: the sink's copies count, and so does what waits
for room. Beyond it streams wait, and after a while, or where too much waits, batches are let go:
their agents keep them, and send them again when they are told to connect anew. There is no task, no
timer and no line of log for a batch: a callback is all that one costs besides the sink itself.
"""

import asyncio
import functools
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Final

from outrider_proto import limits
from outrider_runtime.backoff import Backoff
from outrider_runtime.logs import get_logger

from outrider_operator.core.batch import Batch
from outrider_operator.core.rates import Flow
from outrider_operator.core.sink import Origin, Sink, SinkError, SinkRejectedError, Storing
from outrider_operator.gateway.aside import Aside
from outrider_operator.gateway.budget import ByteBudget
from outrider_operator.gateway.waiting import Again, Owner, Waiting
from outrider_operator.metrics import ServerMetrics

#: Longest wait between two tries to store a batch, seconds.
RETRY_CAP_SECONDS: Final = 5.0
RETRY_BASE_SECONDS: Final = 0.2
#: So many batches are tried again at once, and what remains of one agent's.
RETRY_STEP: Final = 1024
#: What a batch that waits takes besides its records, bytes, as measured: messages, futures, and
#: what a sink keeps. Without it many small batches would hold many times the bound.
BATCH_COST_BYTES: Final = 8 * limits.KIB
#: The part of the bound that is kept for batches which wait for room; the others wait in vain.
WAITING_SHARE: Final = 0.25
#: A stream waits so long for room before its batches are let go, seconds. Its run reports wait
#: behind them, so this is also how late a full sink can make them.
PATIENCE_SECONDS: Final = 5.0
#: Those whose batches were let go are told to come back when less than half of the bound is held,
#: so many at once as would fill that again if each sent so many bytes, and so often, seconds.
RETURN_BYTES: Final = 512 * limits.KIB
RETURN_SECONDS: Final = 0.5
#: From this share of the bound on agents are told to pause, until about that share is held as the
#: sink goes, and so long in seconds at most and at least.
NEARLY_FULL: Final = 0.75
HALF_FULL: Final = 0.5
MOST_PAUSE_SECONDS: Final = 3.0
LEAST_PAUSE_SECONDS: Final = 0.05

log = get_logger(__name__)


class Intake:
    """Takes batches for the sink.

    Args:
        sink: where they are stored.
        limit: most bytes held at once for batches: theirs, the sink's, and what surrounds them.
        metrics: where they are counted.

    Attributes:
        patience: how long batches wait for room before they are let go, seconds.
    """

    def __init__(self, sink: Sink, limit: int, metrics: ServerMetrics) -> None:
        self.patience = PATIENCE_SECONDS
        self.sink = sink
        self._metrics = metrics
        self._limit = int(limit * (1 - WAITING_SHARE))
        self._most_waiting = limit - self._limit
        self._budget = ByteBudget(self._limit)
        self._waiting = 0
        self._aside = Aside(sink, metrics, self._stored, self._drop)
        self._closed = False
        # Called in this order when there is room again.
        self._let_go: dict[Callable[[], None], None] = {}
        self._returning: asyncio.TimerHandle | None = None
        self._number = 0
        self._again = Again()
        self._step = 1
        self._backoff = Backoff(RETRY_BASE_SECONDS, RETRY_CAP_SECONDS)
        self._timer: asyncio.TimerHandle | None = None
        # What was stored in this turn of the loop, and is counted at its end.
        self._counting = False
        self._batches = 0
        self._records = 0
        self._bytes = 0
        self._flow = Flow(time.monotonic())
        self._results = {
            name: metrics.batches.labels(name)
            for name in ("stored", "unavailable", "rejected", "let_go", "dropped")
        }
        metrics.inflight_limit.set(limit)
        metrics.inflight_bytes.set_function(lambda: self.held)
        metrics.batches_retrying.set_function(lambda: len(self._again))

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return self._budget.held + self._waiting

    def pressure(self) -> float:
        """How long an agent is to pause because the sink is slow, seconds; mostly 0."""
        held = self._budget.held
        if held < NEARLY_FULL * self._limit:
            return 0.0
        rate = self._flow.rate(time.monotonic())
        seconds = (held - HALF_FULL * self._limit) / max(rate, 1.0)
        # Each its own time, so that they do not come back together.
        bounded = min(MOST_PAUSE_SECONDS, max(LEAST_PAUSE_SECONDS, seconds))
        return random.uniform(0.5, 1.0) * bounded

    async def admit(self, batches: Sequence[tuple[Batch, int]], *, patience: float | None) -> bool:
        """Make room for batches, with patience in seconds (None: without end); False: none.

        After True, `store` must follow.
        """
        cost = sum(self._cost(batch, size) for batch, size in batches)
        if self._budget.take_at_once(cost):
            return True
        size = sum(size for _, size in batches)
        # Who waits without end keeps its batches anyway: they are nowhere else.
        if patience is None or (patience and self._waiting + size <= self._most_waiting):
            self._waiting += size
            try:
                async with asyncio.timeout(patience):
                    await self._budget.take(cost)
            except TimeoutError:
                pass
            else:
                return True
            finally:
                self._waiting -= size
        self._results["let_go"].inc(len(batches))
        return False

    def when_room(self, call: Callable[[], None]) -> None:
        """Have `call` called once, when there is room again, for whatever reason."""
        self._let_go[call] = None
        self._return_later()

    def forget(self, call: Callable[[], None]) -> None:
        """Undo `when_room`."""
        self._let_go.pop(call, None)

    def _cost(self, batch: Batch, size: int) -> int:
        """Bytes that are held for a batch: the same until it is settled."""
        return size + self.sink.cost(batch) + BATCH_COST_BYTES

    def store(self, owner: Owner, origin: Origin, batches: Sequence[tuple[Batch, int]]) -> None:
        """Have admitted batches stored, each with its size, however long the sink needs.

        The owner is told of each when it is safe, or is not to be.
        """
        began = time.monotonic()
        for batch, size in batches:
            self._number += 1
            cost = self._cost(batch, size)
            waiting = Waiting(owner, origin, batch, size, cost, began, self._number)
            began = 0.0  # the first of a message stands for all in the histogram
            if self._again:
                self._again.add(waiting)  # behind those that wait longer
            else:
                self._hand_over(waiting)

    def close(self) -> None:
        """Try nothing again from now on: what the sink has not taken is dropped."""
        self._closed = True
        for timer in (self._timer, self._returning):
            if timer is not None:
                timer.cancel()
        self._let_go.clear()
        while self._again:
            for waiting in self._again.take():
                self._drop(waiting)
        self._aside.close()

    def _hand_over(self, waiting: Waiting) -> None:
        try:
            storing = self.sink.store(waiting.origin, waiting.batch)
        except Exception as error:  # noqa: BLE001 - a fault of ours, told below, like a sink's
            self._failed(waiting, error)
        else:
            storing.add_done_callback(functools.partial(self._settle, waiting))

    def _settle(self, waiting: Waiting, storing: Storing) -> None:
        error = None if storing.cancelled() else storing.exception()
        if error is None and not storing.cancelled():
            self._stored(waiting)
        elif isinstance(error, SinkRejectedError):
            self._reject(waiting, error)
        else:
            self._failed(waiting, error)

    def _failed(self, waiting: Waiting, error: BaseException | None) -> None:
        """The sink does not take a batch now."""
        # The sink itself says why, once, in its log and condition; this is one of many. What is
        # no error of a sink is a fault of ours, and told: not for each, there may be thousands.
        if error is not None and not isinstance(error, SinkError) and not self._again:
            log.error("batch not stored, it is tried again", exc_info=error)
        self._results["unavailable"].inc()
        self._step = 1
        if self._closed or waiting.owner.closed:
            self._drop(waiting)
            return
        self._again.add(waiting)
        self._try_later()

    def _answered(self) -> None:
        """The sink has taken or refused a batch: see to the rest at the end of this turn."""
        if not self._counting:
            self._counting = True
            asyncio.get_running_loop().call_soon(self._count)

    def _stored(self, waiting: Waiting) -> None:
        if not self._counting:
            self._answered()
        self._batches += 1
        self._records += waiting.batch.count
        self._bytes += waiting.cost
        if waiting.began:
            self._metrics.store_seconds.observe(time.monotonic() - waiting.began)
        self._budget.give_back(waiting.cost)
        waiting.owner.stored(waiting.batch, waiting.size)

    def _count(self) -> None:
        """Once for all that was stored or refused in a turn of the loop."""
        self._counting = False
        self._results["stored"].inc(self._batches)
        self._metrics.records.inc(self._records)
        self._flow.add(self._bytes, time.monotonic())
        self._batches = self._records = self._bytes = 0
        if self._again:  # the sink takes batches again: more and more of them at once
            self._step = min(RETRY_STEP, 2 * self._step)
            self._backoff.reset()
            self._try_again()

    def _call_back(self) -> None:
        """Tell some of those whose batches were let go that there is room."""
        room = HALF_FULL * self._limit - self.held
        for call in list(self._let_go)[: max(0, math.ceil(room / (2 * RETURN_BYTES)))]:
            del self._let_go[call]
            call()
        self._returning = None
        if self._let_go:
            self._return_later()

    def _return_later(self) -> None:
        """Look for room soon. Asked for, not told: it comes from many places, or was there."""
        if self._returning is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._returning = loop.call_later(RETURN_SECONDS, self._call_back)

    def _reject(self, waiting: Waiting, error: SinkRejectedError) -> None:
        self._results["rejected"].inc()
        self._answered()
        owner, batch = waiting.owner, waiting.batch
        if self._closed or owner.closed:
            self._drop(waiting)
        elif error.max_bytes and batch.count > 1 and owner.splits:
            self._metrics.batch_rejects.labels("too_large", "split").inc()
            self._budget.give_back(waiting.cost)
            owner.split(batch, waiting.size, error.max_bytes)
        else:
            reason = "too_large" if error.max_bytes else "other"
            self._metrics.batch_rejects.labels(reason, "set_aside").inc()
            owner.rejected(batch, str(error))
            self._aside.put(waiting, str(error))

    def _try_later(self) -> None:
        if self._again and self._timer is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._backoff.next(), self._timed)

    def _timed(self) -> None:
        self._timer = None
        try:
            self._try_again()
        finally:
            self._try_later()

    def _try_again(self) -> None:
        """Hand some over again, each agent's in order; those of owners that are gone are no try."""
        tried = 0
        while self._again and tried < self._step:
            for waiting in self._again.take():
                if waiting.owner.closed:
                    self._drop(waiting)
                else:
                    self._hand_over(waiting)
                    tried += 1

    def _drop(self, waiting: Waiting) -> None:
        self._results["dropped"].inc()
        self._budget.give_back(waiting.cost)
        waiting.owner.dropped(waiting.batch, waiting.size)
