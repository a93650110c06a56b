"""A node's plug-ins on real processes, with a plug-in in C that does whatever a test wants."""

import asyncio
import contextlib
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fakes.agent_parts import ListSink
from outrider_agent.core.plugin_restarts import RestartLimits
from outrider_agent.core.records import RecordSink
from outrider_agent.metrics import AgentMetrics
from outrider_agent.plugins import cgroups, places
from outrider_agent.plugins.manager import Plugins, PluginsOptions
from outrider_agent.settings import PluginsSettings
from outrider_agent.tasks import processes
from outrider_agent.tasks.program import Children
from outrider_proto import records
from outrider_proto.effective import Plugin, Resources, Source
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry

SOURCE = Path(__file__).with_name("plugins") / "wire_plugin.c"
#: The type of the C plug-in's records.
NUMBERED = 6001
#: Quick ones, so that a crash loop is one within seconds.
QUICK = RestartLimits(base=0.05, cap=0.2, ends=4, window=60.0, rest=600.0)


@functools.cache
def wire_plugin() -> bytes:
    """The plug-in in C, built here."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "wire_plugin"
        command = ["cc", "-O1", "-Wall", "-Werror", "-static", "-o", str(target), str(SOURCE)]
        subprocess.run(command, check=True)
        return target.read_bytes()


@dataclass
class PluginBench:
    """Plug-ins that run, and what they said."""

    plugins: Plugins
    sink: Any
    registry: CollectorRegistry
    directory: Path
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def plugin(
        self, detail: str, name: str = "wire", content: bytes | None = None, **more: Any
    ) -> Plugin:
        """A plug-in whose package is in the cache already."""
        content = wire_plugin() if content is None else content
        sha256 = hashlib.sha256(content).hexdigest()
        packages = self.directory / "packages"
        packages.mkdir(parents=True, exist_ok=True)
        (packages / sha256).write_bytes(content)
        source = Source(urls=("https://127.0.0.1:1/x",), sha256=sha256, **more.pop("source", {}))
        return Plugin(
            name=name,
            version=more.pop("version", "1.0"),
            source=source,
            detail=detail,
            resources=Resources(**more.pop("resources", {})),
            **more,
        )

    async def apply(self, *wanted: Plugin) -> None:
        await self.plugins.switch(await self.plugins.prepare(wanted))

    def state(self, name: str = "wire") -> pb.PluginState:
        return next(state for state in self.plugins.states() if state.name == name)

    def numbers(self) -> list[int]:
        """The numbers of the C plug-in's records, as they came."""
        return [int(fields["n"]) for fields in self.sink.fields(NUMBERED)]

    async def until(self, condition: Callable[[], object], seconds: float = 30) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s; {self.plugins.states()}") from None

    def value(self, name: str, **labels: str) -> float:
        labels = {"plugin": "wire", **labels}
        return self.registry.get_sample_value(f"outrider_agent_plugin_{name}", labels) or 0.0

    def pid(self, name: str = "wire") -> int:
        """Id of the process of a plug-in that runs."""
        instance = self.plugins._runners[name].instance
        assert instance is not None
        return instance.pid

    def processes(self, name: str = "wire") -> list[int]:
        """Ids of the living processes that bear the plug-in's mark."""
        mark = places.mark_of(name, self.directory, "node-a")
        return [p.pid for p in processes.members(mark, None, below=os.getpid())]


@contextlib.asynccontextmanager
async def plugins_in(
    directory: Path,
    *,
    sink: RecordSink | None = None,
    restarts: RestartLimits = QUICK,
    cgroup_root: Path = cgroups.ROOT,
    own: Sequence[str] = ("root", "0"),
    **settings: Any,
) -> AsyncIterator[PluginBench]:
    """The plug-ins of a node whose files are in a folder; ended at the end."""
    processes.become_subreaper()
    registry = CollectorRegistry()
    taking = sink or ListSink()
    options = PluginsOptions(
        PluginsSettings(**{"termination_grace_seconds": 0.5, "healthy_seconds": 0.3, **settings}),
        "node-a",
        directory,
        tuple(own),
        restarts,
        cgroup_root,
    )
    with ThreadPoolExecutor(4) as threads:
        plugins = Plugins(options, taking, AgentMetrics(registry), Children(), threads)
        bench = PluginBench(plugins, taking, registry, directory)
        running = asyncio.create_task(plugins.run(bench.stop))
        try:
            yield bench
        finally:
            bench.stop.set()
            await running


def numbered(made: Sequence[pb.EncodedRecord]) -> list[int]:
    """The numbers in records."""
    return [int(records.fields_of(record)["n"]) for record in made]
