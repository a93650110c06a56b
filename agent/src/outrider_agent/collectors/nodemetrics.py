"""The host's metrics for Prometheus, read when scraped, under node_exporter's names and labels.

One collector of the registry that asks a list of named parts, each guarded by itself: one that
fails or hangs costs its own metrics and says so in node_scrape_collector_success. Blocks for a
bounded time: scrapes are answered in a thread.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from outrider_runtime.logs import get_logger
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from outrider_agent.collectors import nodedevices, nodekernel
from outrider_agent.collectors.filesystems import FileSystems
from outrider_agent.collectors.hostinfo import HostPaths
from outrider_agent.collectors.limited import Limited
from outrider_agent.collectors.nodedevices import FileSystemMetrics, Found
from outrider_agent.collectors.nodekernel import family
from outrider_agent.settings_collectors import NodeMetricsSettings

log = get_logger("outrider.collectors")

#: Answers are told again for this long: several scrapers read the host once, seconds.
CACHE_SECONDS = 1.0
#: Longest wait for a part that reads sensors, seconds.
SENSOR_SECONDS = 1.0


@dataclass(frozen=True)
class _Result:
    name: str
    seconds: float
    found: Found
    ok: bool


class NodeMetrics(Collector):
    """Metrics of the host. `collect` may be called by any thread.

    Args:
        parts: What reads them, by the name of node_exporter's collector.
        clock: Seconds of a steady clock.
    """

    def __init__(
        self,
        parts: Mapping[str, Callable[[], Found]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts = parts
        self._clock = clock
        self._lock = threading.Lock()
        self._failing: set[str] = set()
        self._answer: list[Metric] = []
        self._until = float("-inf")

    def collect(self) -> list[Metric]:
        """The metrics; not older than CACHE_SECONDS."""
        with self._lock:
            if self._clock() >= self._until:
                results = [self._read(name, part) for name, part in self._parts.items()]
                self._answer = [m for r in results for m in r.found.metrics]
                self._answer += _of_scrape(results)
                self._until = self._clock() + CACHE_SECONDS
            return self._answer

    def describe(self) -> Iterable[Metric]:
        """Nothing: names depend on the host, and are not read when this is registered."""
        return []

    def _read(self, name: str, part: Callable[[], Found]) -> _Result:
        began = self._clock()
        found, ok = Found([]), True
        try:
            found = part()
        except Exception as error:  # noqa: BLE001 - hosts differ: told once, and in the metric
            ok = False
            if name not in self._failing:
                log.warning("node metrics cannot be read", collector=name, error=str(error))
            self._failing.add(name)
        else:
            self._failing.discard(name)
        return _Result(name, self._clock() - began, found, ok)


def _of_scrape(results: list[_Result]) -> list[Metric]:
    labels = [{"collector": result.name} for result in results]
    return [
        family(
            "gauge",
            "node_scrape_collector_duration_seconds",
            "Time that reading took.",
            zip(labels, (r.seconds for r in results), strict=True),
        ),
        family(
            "gauge",
            "node_scrape_collector_success",
            "1 if it could be read.",
            zip(labels, (float(r.ok) for r in results), strict=True),
        ),
        family(
            "gauge",
            "outrider_agent_collector_devices_left_out",
            "Devices that have no metrics, as there are more than the bound.",
            zip(labels, (r.found.left_out for r in results), strict=True),
        ),
    ]


def node_parts(
    settings: NodeMetricsSettings, paths: HostPaths, node: str, file_systems: FileSystems
) -> dict[str, Callable[[], Found]]:
    """What the settings want read, by name."""
    networks = re.compile(settings.networks_exclude or r"(?!)")
    disks = re.compile(settings.disks_exclude or r"(?!)")
    mounts = FileSystemMetrics(
        file_systems,
        re.compile(settings.mount_points_exclude or r"(?!)"),
        re.compile(settings.fs_types_exclude or r"(?!)"),
    )
    of_host: dict[str, Callable[[], list[Metric]]] = {
        "cpu": nodekernel.Processors(paths),
        "stat": partial(nodekernel.stat, paths),
        "meminfo": partial(nodekernel.meminfo, paths),
        "loadavg": partial(nodekernel.loadavg, paths),
        "sockstat": partial(nodekernel.sockstat, paths),
        "netstat": partial(nodekernel.netstat, paths),
        "vmstat": partial(nodekernel.vmstat, paths),
        "conntrack": partial(nodekernel.conntrack, paths),
        "pressure": partial(nodekernel.pressure, paths),
        "filefd": partial(nodekernel.filefd, paths),
        "uname": partial(nodekernel.uname, paths, node),
        "time": nodekernel.clock,
    }
    parts: dict[str, Callable[[], Found]] = {
        "diskstats": partial(nodedevices.diskstats, paths, disks),
        "netdev": partial(nodedevices.netdev, paths, networks),
        "netclass": _limited("netclass", partial(nodedevices.netclass, paths, networks)),
        "filesystem": mounts,
        "hwmon": _limited("hwmon", partial(nodedevices.hwmon, paths)),
        "thermal_zone": _limited("thermal_zone", partial(nodedevices.thermal_zone, paths)),
    }
    for name, read_metrics in of_host.items():
        parts[name] = partial(_found, read_metrics)
    return {name: parts[name] for name in sorted(settings.collectors)}


def _found(read_metrics: Callable[[], list[Metric]]) -> Found:
    return Found(read_metrics())


def _limited(name: str, part: Callable[[], Found]) -> Callable[[], Found]:
    return partial(Limited(name, part).call, SENSOR_SECONDS)


def register(
    registry: CollectorRegistry,
    settings: NodeMetricsSettings,
    paths: HostPaths,
    node: str,
    file_systems: FileSystems,
) -> None:
    """Have scrapes of this registry read the host, unless the settings say no."""
    if settings.enabled:
        registry.register(NodeMetrics(node_parts(settings, paths, node, file_systems)))
