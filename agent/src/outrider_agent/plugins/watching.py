"""Looks at what plug-ins use: for metrics, for heart-beats, and for limits that no group holds."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from outrider_proto import records
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.core.traffic import Rates
from outrider_agent.metrics import AgentMetrics
from outrider_agent.plugins import usage
from outrider_agent.plugins.runner import Runner
from outrider_agent.plugins.usage import Usage
from outrider_agent.tasks import processes

log = get_logger("outrider.plugins")

#: Between two looks where a limit depends on them, and where none does, seconds.
CLOSE_SECONDS: Final = 2.0
CALM_SECONDS: Final = 15.0
#: More processor time than allowed is a fault only over so long, seconds, and by so much.
CPU_SECONDS: Final = 60.0
CPU_SLACK: Final = 1.2
#: Most faults of ours that are logged, each once.
MOST_LOGGED: Final = 100


@dataclass
class _Known:
    """What was seen of one process of a plug-in."""

    pid: int
    rates: Rates = field(default_factory=Rates)
    use: Usage = field(default_factory=Usage)
    cpu_from: tuple[float, float] = (0.0, 0.0)


@dataclass
class Watch:
    """Looks at all plug-ins.

    Attributes:
        metrics: Where it is shown.
        work: Folder of the working directories.
    """

    metrics: AgentMetrics
    work: Path
    _known: dict[str, _Known] = field(default_factory=dict)
    #: What was logged of faults of ours: plug-in and kind of error.
    _logged: set[tuple[str, str]] = field(default_factory=set)

    def fault(self, name: str, error: Exception) -> None:
        """A fault of ours in a look at a plug-in: counted, and logged once, and no more.

        What a plug-in does to its files and processes must not end the agent.
        """
        self.metrics.plugin_faults.labels(name, "look").inc()
        kind = (name, type(error).__name__)
        if kind not in self._logged and len(self._logged) < MOST_LOGGED:
            self._logged.add(kind)
            log.error("a plug-in cannot be looked at", plugin=name, exc_info=error)

    def look_up(self, runners: Sequence[Runner]) -> Mapping[int, Usage]:
        """What they use, by the id of their process. Blocks; changes nothing."""
        return used_by([(r, i.pid) for r in runners if (i := r.instance) is not None])

    def judge(self, runners: Sequence[Runner], uses: Mapping[int, Usage]) -> None:
        """Show what they use, and have those ended that use too much."""
        now = time.monotonic()
        living: set[str] = set()
        for runner in runners:
            instance, name = runner.instance, runner.plugin.name
            if instance is None or instance.pid not in uses:
                continue
            living.add(name)
            known = self._known.get(name)
            if known is None or known.pid != instance.pid:
                known = self._known[name] = _Known(instance.pid, cpu_from=(now, 0.0))
            known.use = use = uses[instance.pid]
            self.metrics.plugin_rss.labels(name).set(use.rss)
            self.metrics.plugin_cpu.labels(name).set(use.cpu_seconds)
            self.metrics.plugin_descriptors.labels(name).set(use.descriptors)
            try:
                self._check(runner, known, now)
            except Exception as error:  # noqa: BLE001 - the others are looked at all the same
                self.fault(name, error)
        for name in set(self._known) - living:
            del self._known[name]

    def _check(self, runner: Runner, known: _Known, now: float) -> None:
        """Blame a plug-in that uses more than it may, where no group keeps it from that."""
        resources, group, instance = runner.plugin.resources, runner.group, runner.instance
        if instance is None:
            return
        memory = resources.memory_bytes
        if memory is not None and not (group and group.memory) and known.use.rss > memory:
            self.metrics.plugin_faults.labels(runner.plugin.name, "memory").inc()
            instance.blame(
                "MemoryLimit", f"it used {known.use.rss} bytes of memory; it may use {memory}"
            )
        since, before = known.cpu_from
        if resources.cpu_millis is None or (group and group.cpu) or now - since < CPU_SECONDS:
            return
        share = (known.use.cpu_seconds - before) / (now - since)
        known.cpu_from = (now, known.use.cpu_seconds)
        if share * 1000 > resources.cpu_millis * CPU_SLACK:
            self.metrics.plugin_faults.labels(runner.plugin.name, "cpu").inc()
            instance.blame(
                "CpuLimit",
                f"it used {share * 1000:.0f} thousandths of a core for {now - since:.0f} s; it may "
                f"use {resources.cpu_millis}",
            )

    def heartbeats(self, runners: Sequence[Runner]) -> list[pb.EncodedRecord]:
        """A record of each plug-in that runs. Blocks."""
        found = []
        for runner in runners:
            instance = runner.instance
            known = self._known.get(runner.plugin.name)
            if instance is None or known is None or known.pid != instance.pid:
                continue
            try:
                fields = self._fields(runner, known, int(instance.started))
            except Exception as error:  # noqa: BLE001 - the others have theirs all the same
                self.fault(runner.plugin.name, error)
                continue
            found.append(records.payload(records.PLUGIN_HEARTBEAT, int(time.time()), fields))
        return found

    def _fields(self, runner: Runner, known: _Known, started: int) -> Mapping[str, str]:
        use, counts = known.use, runner.counts
        rates = known.rates.update(
            {
                "cpu": use.cpu_seconds,
                "read": use.read,
                "write": use.written,
                "rx": counts.tasks,
                "rx_bytes": counts.task_bytes,
                "tx": counts.records,
                "tx_bytes": counts.bytes,
            },
            time.monotonic(),
        )
        return {
            "name": runner.plugin.name,
            "pversion": runner.plugin.version,
            "cpu": f"{rates['cpu'] * 100:.4f}",
            "rss": str(use.rss),
            "read_speed": f"{rates['read']:.2f}",
            "write_speed": f"{rates['write']:.2f}",
            "pid": str(known.pid),
            "nfd": str(use.descriptors),
            "start_time": str(started),
            "du": str(usage.disk_use(self.work / runner.plugin.name)),
            # As the plug-in sees it: records go out, tasks come in.
            "rx_tps": f"{rates['rx']:.2f}",
            "tx_tps": f"{rates['tx']:.2f}",
            "rx_speed": f"{rates['rx_bytes']:.2f}",
            "tx_speed": f"{rates['tx_bytes']:.2f}",
        }


def used_by(plugins: Sequence[tuple[Runner, int]]) -> dict[int, Usage]:
    """What the processes of plug-ins use: those below it, and those that left it. Blocks.

    Args:
        plugins: Runner and id of the process of each.

    Returns:
        By the id of the process.
    """
    everything = processes.scan()
    ours = processes.descendants(everything, os.getpid())
    found: dict[int, set[int]] = {}
    marks: dict[str, int] = {}
    for runner, pid in plugins:
        own = {p.pid for p in everything if p.group == pid}
        found[pid] = {pid} | own | processes.descendants(everything, pid)
        if runner.group is not None:
            found[pid] |= runner.group.members()
        marks[runner.mark] = pid
    for other in ours.difference(*found.values()):
        owner = marks.get(processes.mark_of(other) or "")
        if owner is not None:
            found[owner].add(other)
    return {pid: usage.of(pids) for pid, pids in found.items()}
