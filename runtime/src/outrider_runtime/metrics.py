"""The registry of a program's metrics, and how late its event loop runs.

Metrics of a program's own are in that program's metrics module.
"""

import asyncio

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    Histogram,
    PlatformCollector,
    disable_created_metrics,
)
from prometheus_client.process_collector import ProcessCollector


def new_registry() -> CollectorRegistry:
    """A registry with the usual metrics of a Python process, and nothing global."""
    # A line of creation time for each counter would double what is scraped; nobody asks for it.
    disable_created_metrics()  # type: ignore[no-untyped-call]  # the library lacks the types
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class LoopLag:
    """How much later than asked the event loop wakes a sleeper: the budget everything shares."""

    INTERVAL_SECONDS = 0.5

    def __init__(self, registry: CollectorRegistry) -> None:
        self._histogram = Histogram(
            "outrider_event_loop_lag_seconds",
            "How much later than asked the event loop ran, sampled twice a second.",
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=registry,
        )
        #: When the loop was last seen alive, by its own clock; None before `watch` began.
        self.last_seen: float | None = None

    async def watch(self) -> None:
        """Sample for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self.INTERVAL_SECONDS
            await asyncio.sleep(self.INTERVAL_SECONDS)
            self.last_seen = loop.time()
            self._histogram.observe(max(0.0, self.last_seen - due))
