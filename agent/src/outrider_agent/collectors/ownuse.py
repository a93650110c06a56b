"""What the agent itself uses, by part, for /metrics: processor time of its threads.

The parts that share the event loop (uplink, runs, listeners, plug-ins' pipes) share its thread
too, and count as one: to time every step of theirs would cost more than it told. Memory is not
told by part: one process has one heap. Read when scraped, from /proc.
"""

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

#: Parts by the names of their threads, or how those begin; what is none of Python's is gRPC's.
_PARTS: Final[Mapping[str, str]] = {
    "MainThread": "loop",
    "store": "store",
    "heartbeat": "collectors",
    "host": "collectors",
    "inventory": "collectors",
    "run": "runs",
    "plugin": "plugins",
}
NETWORK: Final = "network"
OTHER: Final = "other"
PARTS: Final = ("loop", "store", "collectors", "runs", "plugins", NETWORK, OTHER)
_TASKS: Final = Path("/proc/self/task")


class OwnUse(Collector):
    """Seconds of processor time by part. A thread that ended keeps what was seen of it."""

    def __init__(self, registry: CollectorRegistry, tasks: Path = _TASKS) -> None:
        self._tasks = tasks
        self._tick = os.sysconf("SC_CLK_TCK")
        self._lock = threading.Lock()
        self._seen: dict[int, float] = {}
        self._total = dict.fromkeys(PARTS, 0.0)
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The metric."""
        made = CounterMetricFamily(
            "outrider_agent_part_cpu_seconds",
            "Processor time of the agent by part: loop (uplink, runs, listeners and plug-ins' "
            "pipes), store, collectors, runs (their threads), plugins (likewise), network (gRPC), "
            "other.",
            labels=["part"],
        )
        for part, seconds in self.totals().items():
            made.add_metric([part], seconds)
        return [made]

    def totals(self) -> dict[str, float]:
        """Seconds by part, since the agent began."""
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        with self._lock:
            now: dict[int, float] = {}
            for entry in os.listdir(self._tasks):  # noqa: PTH208 - one entry a thread
                number = int(entry)
                seconds = self._seconds(number)
                if seconds is None:
                    continue
                now[number] = seconds
                # The number of a thread that ended may be another's by now: it began at 0.
                before = self._seen.get(number, 0.0)
                gone = seconds - before if seconds >= before else seconds
                self._total[part_of(names.get(number))] += gone
            self._seen = now
            return dict(self._total)

    def _seconds(self, number: int) -> float | None:
        try:
            stat = (self._tasks / str(number) / "stat").read_bytes()
        except OSError:
            return None  # it ended
        fields = stat[stat.rfind(b")") + 2 :].split()
        return (int(fields[11]) + int(fields[12])) / self._tick


def part_of(name: str | None) -> str:
    """The part that a thread works for; None: a thread that Python does not know."""
    if name is None:
        return NETWORK
    for begin, part in _PARTS.items():
        if name == begin or name.startswith((f"{begin}_", f"{begin}-", f"{begin} ")):
            return part
    return OTHER
