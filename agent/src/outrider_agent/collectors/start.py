"""What the agent gathers, put together: one coroutine for each collector, and its pace.

The settings say how it begins; a configuration may change it at run time. Starts nothing by
itself: the program owns what runs.
"""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outrider_proto import effective, records
from prometheus_client import CollectorRegistry

from outrider_agent.collectors import inventory, nodemetrics
from outrider_agent.collectors.filesystems import FileSystems
from outrider_agent.collectors.heartbeat import Heartbeat
from outrider_agent.collectors.host import HostMetrics
from outrider_agent.collectors.hostinfo import HostPaths
from outrider_agent.collectors.schedule import Fields, Pace, collect_forever
from outrider_agent.core.records import RecordSink
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings import AgentSettings

Named = list[tuple[str, Coroutine[Any, Any, None]]]


def paths_of(settings: AgentSettings) -> HostPaths:
    """Where the host's file systems are."""
    node = settings.node
    return HostPaths(Path(node.proc), Path(node.sys), Path(node.root))


@dataclass(frozen=True)
class _Gathered:
    """How often something is gathered, and whether."""

    interval: float
    enabled: bool

    def asked(self, wanted: effective.Collector) -> "_Gathered":
        """As a configuration asks for it; what it does not ask for stays."""
        interval, enabled = wanted.interval_seconds, wanted.enabled
        return _Gathered(
            self.interval if interval is None else interval,
            self.enabled if enabled is None else enabled,
        )


@dataclass
class Collectors:
    """All that gathers."""

    settings: AgentSettings
    heartbeat: Heartbeat
    sink: RecordSink
    metrics: AgentMetrics
    registry: CollectorRegistry
    _paces: dict[str, Pace] = field(init=False)
    _inventory: inventory.Inventory = field(init=False)

    def __post_init__(self) -> None:
        beat, given = self.settings.heartbeat, self.settings.collectors
        self._paces = {
            "heartbeat": Pace(beat.interval_seconds),
            "host": Pace(given.host.interval_seconds, enabled=given.host.enabled),
            "inventory": Pace(given.inventory.check_seconds, enabled=given.inventory.enabled),
        }

    def configure(self, wanted: effective.Collectors) -> None:
        """Gather as a configuration asks, from now on; what it does not ask for is as set."""
        given = self.settings.collectors
        own = _Gathered(self.settings.heartbeat.interval_seconds, enabled=True)
        self._set("heartbeat", own.asked(wanted.heartbeat))
        own = _Gathered(given.host.interval_seconds, given.host.enabled)
        self._set("host", own.asked(wanted.host))
        own = _Gathered(given.inventory.interval_seconds, given.inventory.enabled)
        told = own.asked(wanted.inventory)
        self._inventory.interval_seconds = told.interval
        # Signs of a change are looked for as often as set, but not less than all is read.
        check = min(given.inventory.check_seconds, told.interval)
        self._set("inventory", _Gathered(check, told.enabled))

    def _set(self, name: str, wanted: _Gathered) -> None:
        pace = self._paces[name]
        if (pace.interval, pace.enabled) != (wanted.interval, wanted.enabled):
            pace.set(wanted.interval, enabled=wanted.enabled)

    def parts(self) -> Named:
        """What is to run, by name; /metrics tells of the host from now on, too."""
        settings, paths = self.settings.collectors, paths_of(self.settings)
        file_systems = FileSystems(paths)
        nodemetrics.register(
            self.registry, settings.node_metrics, paths, self.settings.node.name, file_systems
        )
        host = HostMetrics(paths, file_systems)
        failures, left_out = self.metrics.collection_failures, self.metrics.inventory_left_out
        self._inventory = inventory.Inventory(
            inventory.kinds(settings.inventory, paths, file_systems),
            settings.inventory,
            lambda kind: failures.labels(f"inventory/{kind}").inc(),
            lambda kind, count: left_out.labels(kind).set(count),
        )
        pace = self._paces["inventory"]
        told = inventory.report_forever(self._inventory, pace, self.sink, self.metrics)
        return [
            self._part("heartbeat", records.AGENT_HEARTBEAT, self.heartbeat.collect),
            self._part("host", records.HOST_METRICS, host.collect),
            ("inventory", told),
        ]

    def _part(
        self, name: str, data_type: int, collect: Callable[[], Fields]
    ) -> tuple[str, Coroutine[Any, Any, None]]:
        pace = self._paces[name]
        return name, collect_forever(name, data_type, pace, collect, self.sink, self.metrics)
