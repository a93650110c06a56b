"""Batches that the sink will never take: set aside with the reason, and then done with.

They are few, so they have a task and time. Whoever sent one is never held up by it beyond its
window: once it is set aside it counts as stored. Bounded by the intake's budget, which it is in.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from outrider_runtime.backoff import Backoff
from outrider_runtime.logs import get_logger

from outrider_operator.core.sink import Sink, SinkError
from outrider_operator.gateway.waiting import Waiting
from outrider_operator.metrics import ServerMetrics

#: Batches that are set aside at once.
AT_ONCE: Final = 32
#: Waits between two tries while the place for them is away, seconds.
RETRY_BASE_SECONDS: Final = 0.2
RETRY_CAP_SECONDS: Final = 5.0

log = get_logger(__name__)


class Aside:
    """Sets batches aside, some at once, in the order they come; one that fails goes last.

    Args:
        sink: keeps them.
        metrics: where they are counted.
        done: told of each that is safe.
        dropped: told of each that is given up: its owner has gone and its agent keeps it, or
            the server stops.
    """

    def __init__(
        self,
        sink: Sink,
        metrics: ServerMetrics,
        done: Callable[[Waiting], None],
        dropped: Callable[[Waiting], None],
    ) -> None:
        self._sink = sink
        self._metrics = metrics
        self._done = done
        self._dropped = dropped
        self._waiting: deque[tuple[Waiting, str]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, waiting: Waiting, reason: str) -> None:
        """Set a batch aside."""
        self._waiting.append((waiting, reason))
        if len(self._tasks) < AT_ONCE:
            task = asyncio.get_running_loop().create_task(self._work(), name="set aside")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Set nothing more aside: agents send again what was not acknowledged."""
        while self._waiting:
            self._dropped(self._waiting.popleft()[0])
        for task in self._tasks:
            task.cancel()

    async def _work(self) -> None:
        backoff = Backoff(RETRY_BASE_SECONDS, RETRY_CAP_SECONDS)
        while self._waiting:
            waiting, reason = self._waiting.popleft()
            if waiting.owner.closed:
                self._dropped(waiting)
                continue
            try:
                done = await self._try(waiting, reason)
            except asyncio.CancelledError:
                self._dropped(waiting)
                raise
            if done:
                self._done(waiting)
                backoff.reset()
            else:
                # Behind all others: it may be one that is never taken.
                self._waiting.append((waiting, reason))
                await asyncio.sleep(backoff.next())

    async def _try(self, waiting: Waiting, reason: str) -> bool:
        try:
            await self._sink.set_aside(waiting.origin, waiting.batch, reason)
        except SinkError:
            return False  # the sink says why, in its log and condition
        except Exception:
            # A fault of ours: the batch stays unacknowledged with its agent, and is tried again.
            log.exception("batch not set aside", node=waiting.origin.node)
            return False
        return True
