"""What the agent gathers by its settings, put together: one coroutine for each collector.

Starts nothing by itself: the program owns what runs.
"""

from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider_proto import records
from prometheus_client import CollectorRegistry

from outrider_agent.collectors import inventory, nodemetrics
from outrider_agent.collectors.filesystems import FileSystems
from outrider_agent.collectors.heartbeat import Heartbeat
from outrider_agent.collectors.host import HostMetrics
from outrider_agent.collectors.hostinfo import HostPaths
from outrider_agent.collectors.schedule import collect_forever
from outrider_agent.core.records import RecordSink
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings import AgentSettings

Named = list[tuple[str, Coroutine[Any, Any, None]]]


def paths_of(settings: AgentSettings) -> HostPaths:
    """Where the host's file systems are."""
    node = settings.node
    return HostPaths(Path(node.proc), Path(node.sys), Path(node.root))


@dataclass(frozen=True)
class Collectors:
    """All that gathers, made from the settings."""

    settings: AgentSettings
    heartbeat: Heartbeat
    sink: RecordSink
    metrics: AgentMetrics
    registry: CollectorRegistry

    def parts(self) -> Named:
        """What is to run, by name; /metrics tells of the host from now on, too."""
        settings, paths = self.settings.collectors, paths_of(self.settings)
        file_systems = FileSystems(paths)
        nodemetrics.register(
            self.registry, settings.node_metrics, paths, self.settings.node.name, file_systems
        )
        beat = self.settings.heartbeat.interval_seconds
        found: Named = [
            (
                "heartbeat",
                collect_forever(
                    "heartbeat",
                    records.AGENT_HEARTBEAT,
                    beat,
                    self.heartbeat.collect,
                    self.sink,
                    self.metrics,
                ),
            )
        ]
        if settings.host.enabled:
            found.append(
                (
                    "host",
                    collect_forever(
                        "host",
                        records.HOST_METRICS,
                        settings.host.interval_seconds,
                        HostMetrics(paths, file_systems).collect,
                        self.sink,
                        self.metrics,
                    ),
                )
            )
        if settings.inventory.enabled:
            found.append(("inventory", self._inventory(paths, file_systems)))
        return found

    def _inventory(self, paths: HostPaths, file_systems: FileSystems) -> Coroutine[Any, Any, None]:
        settings = self.settings.collectors.inventory
        failures, left_out = self.metrics.collection_failures, self.metrics.inventory_left_out
        what = inventory.Inventory(
            inventory.kinds(settings, paths, file_systems),
            settings,
            lambda kind: failures.labels(f"inventory/{kind}").inc(),
            lambda kind, count: left_out.labels(kind).set(count),
        )
        return inventory.report_forever(what, self.sink, self.metrics)
