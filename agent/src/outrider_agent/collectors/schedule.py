"""Runs a collector again and again, in a thread of its own, without ever overlapping itself.

A collection that hangs (a dead network file system) costs one thread and its own records, nothing
else: the program ends without it.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

from outrider_proto import records
from outrider_runtime.logs import get_logger

from outrider_agent.core.records import RecordClass, RecordSink
from outrider_agent.metrics import AgentMetrics

log = get_logger("outrider.collectors")

#: A collection that takes longer is told; it goes on, and the next one waits for it, seconds.
SLOW_SECONDS = 10.0


Fields = dict[str, str]
T = TypeVar("T")


class Pace:
    """How often a collector collects, and whether; both may change while it runs.

    Args:
        interval: Seconds from one begin to the next.
        enabled: Whether it collects.
    """

    def __init__(self, interval: float, *, enabled: bool = True) -> None:
        self.interval = interval
        self.enabled = enabled
        self._changed = asyncio.Event()

    def set(self, interval: float, *, enabled: bool) -> None:
        """Change it: what is under way goes on, the next one comes by the new pace."""
        self.interval, self.enabled = interval, enabled
        self._changed.set()

    async def due(self, began: float | None) -> None:
        """Wait until the next collection is due.

        Args:
            began: When the last one began, seconds of the steady clock; None: there was none.
        """
        while True:
            self._changed.clear()
            seconds = None
            if self.enabled:
                # One that was turned on collects at once unless it just did.
                since = float("-inf") if began is None else began
                seconds = since + self.interval - time.monotonic()
                if seconds <= 0:
                    return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()


class _Thread(Generic[T]):
    """One thread for all collections of one collector.

    Always the same one, for some counters are kept for each thread. Not an executor's: the program
    would wait for it at its end.
    """

    def __init__(self, name: str, collect: Callable[[], T]) -> None:
        self._collect = collect
        self._loop = asyncio.get_running_loop()
        self._asked: queue.SimpleQueue[asyncio.Future[T] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def collect(self) -> asyncio.Future[T]:
        """Begin a collection."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._asked.put(future)
        return future

    def end(self) -> None:
        """Have the thread end after what it does now."""
        self._asked.put(None)

    def _work(self) -> None:
        while (future := self._asked.get()) is not None:
            settle: Callable[[], None]
            try:
                settle = partial(future.set_result, self._collect())
            except Exception as problem:  # noqa: BLE001 - handed to the one who waits
                settle = partial(future.set_exception, problem)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(_settle, future, settle)


def _settle(future: asyncio.Future[T], settle: Callable[[], None]) -> None:
    if not future.done():
        settle()


async def repeat_forever(
    name: str,
    pace: Pace | float,
    collect: Callable[[], T],
    deliver: Callable[[T], Awaitable[None]],
    metrics: AgentMetrics,
) -> None:
    """Collect now and after each interval, and deliver what was found.

    Args:
        name: For metrics and logs; a constant.
        pace: How often and whether; or just the seconds from one begin to the next.
        collect: Gathers; may block.
        deliver: Takes what it returned.
        metrics: Count.
    """
    if not isinstance(pace, Pace):
        pace = Pace(pace)
    thread = _Thread(name, collect)
    failing = False
    began: float | None = None
    try:
        while True:
            await pace.due(began)
            began = time.monotonic()
            work = thread.collect()
            try:
                done, _ = await asyncio.wait({work}, timeout=SLOW_SECONDS)
                if not done:
                    log.warning("collector is slow", collector=name, seconds=SLOW_SECONDS)
                found = await work
            except Exception as error:  # noqa: BLE001 - hosts differ: one reading less, told once
                metrics.collection_failures.labels(name).inc()
                if not failing:
                    log.warning("collector failed", collector=name, error=repr(error))
                failing = True
            else:
                failing = False
                metrics.collections.labels(name).observe(time.monotonic() - began)
                await deliver(found)
    finally:
        thread.end()


async def collect_forever(
    name: str,
    data_type: int,
    pace: Pace | float,
    collect: Callable[[], Fields],
    sink: RecordSink,
    metrics: AgentMetrics,
) -> None:
    """Make a record of what `collect` returns now and after each interval.

    Args:
        name: For metrics and logs; a constant.
        data_type: Type of the records.
        pace: See `repeat_forever`.
        collect: Gathers; may block.
        sink: Takes the records.
        metrics: Count.
    """

    async def deliver(fields: Fields) -> None:
        record = records.payload(data_type, int(time.time()), fields)
        sink.submit(record, RecordClass.TELEMETRY)

    await repeat_forever(name, pace, collect, deliver, metrics)
