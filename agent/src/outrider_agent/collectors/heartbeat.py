"""The heart-beat record: what this agent is, how it does, and what it runs on.

Its fields have the names that consumers of such heart-beats know, all of them strings. Speeds are
bytes per second, times seconds since the Unix epoch, `cpu`, `cpu_usage` and `mem_usage` percent
(`cpu` of one processor), sizes bytes.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outrider_agent.collectors import hostinfo
from outrider_agent.collectors.hostinfo import HostPaths
from outrider_agent.core import procfs
from outrider_agent.core.traffic import Rates, Traffic


@dataclass(frozen=True)
class AgentStatus:
    """What the agent says of itself.

    Attributes:
        state: "running" or "abnormal".
        detail: What is not well with it or with its connection, else empty.
        net_mode: How its server was found.
    """

    state: str
    detail: str
    net_mode: str


class Heartbeat:
    """Makes the fields of heart-beats. `collect` blocks: use a thread."""

    def __init__(
        self,
        *,
        paths: HostPaths,
        state_directory: Path,
        region: str,
        traffic: Traffic,
        status: Callable[[], AgentStatus],
        started: float,
    ) -> None:
        self._paths = paths
        self._state_directory = state_directory
        self._region = region
        self._traffic = traffic
        self._status = status
        self._started = started
        self._rates = Rates()
        self._static: dict[str, str] = {}
        self._ticks = (0, 0)

    def collect(self) -> dict[str, str]:
        """The fields of one heart-beat."""
        if not self._static:
            self._static = hostinfo.static_fields(self._paths)
        return {
            **self._static,
            **hostinfo.changing_fields(self._paths),
            **self._of_agent(),
            **self._of_host(),
        }

    def _of_agent(self) -> dict[str, str]:
        status = self._status()
        rates = self._rates.update(
            {
                **hostinfo.self_counters(),
                "rx_bytes": self._traffic.received_bytes,
                "tx_bytes": self._traffic.sent_bytes,
                "rx": self._traffic.received_messages,
                "tx": self._traffic.sent_records,
            },
            time.monotonic(),
        )
        return {
            "state": status.state,
            "state_detail": status.detail,
            "idc": "",  # there is no such thing as a data centre's name on a Node
            "region": self._region,
            "net_mode": status.net_mode,
            "rx_speed": f"{rates['rx_bytes']:.2f}",
            "tx_speed": f"{rates['tx_bytes']:.2f}",
            "rx_tps": f"{rates['rx']:.2f}",
            "tx_tps": f"{rates['tx']:.2f}",
            "cpu": f"{rates['cpu'] * 100:.4f}",
            "read_speed": f"{rates['read']:.2f}",
            "write_speed": f"{rates['write']:.2f}",
            "rss": str(hostinfo.self_rss()),
            "pid": str(os.getpid()),
            "nfd": str(hostinfo.self_descriptors()),
            "start_time": str(int(self._started)),
            "du": str(hostinfo.disk_use(self._state_directory)),
        }

    def _of_host(self) -> dict[str, str]:
        proc = self._paths.proc
        loads = procfs.loads(hostinfo.read(proc / "loadavg")) or (0.0, 0.0, 0.0)
        running, total = process_counts(proc)
        memory, available = hostinfo.memory(proc)
        return {
            "load_1": f"{loads[0]:.2f}",
            "load_5": f"{loads[1]:.2f}",
            "load_15": f"{loads[2]:.2f}",
            "running_procs": str(running),
            "total_procs": str(total),
            "cpu_usage": f"{self._cpu_usage():.2f}",
            "mem_usage": f"{100 * (memory - available) / max(1, memory):.2f}",
        }

    def _cpu_usage(self) -> float:
        """Percent of all processors since the last call; 0 at the first."""
        found = procfs.cpu_ticks(hostinfo.read(self._paths.proc / "stat"), 0)
        busy, total = procfs.busy(found[""]) if "" in found else (0, 0)
        before, self._ticks = self._ticks, (busy, total)
        passed = total - before[1]
        if before[1] == 0 or passed <= 0:
            return 0.0
        return min(100.0, max(0.0, 100 * (busy - before[0]) / passed))


def process_counts(proc: Path) -> tuple[int, int]:
    """Processes that run or could run, and all there are."""
    running = procfs.stat_totals(hostinfo.read(proc / "stat", hostinfo.TABLE_BYTES))
    return running.get("procs_running", 0), hostinfo.count_processes(proc)
