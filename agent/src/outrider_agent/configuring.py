"""The parts of the agent as a configuration changes them, and all of them put together.

What a configuration does not ask for is as the agent's own settings say. Decides nothing about
when: that is config.applier's.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from outrider_proto import effective
from outrider_proto.effective import Effective
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime import logs
from outrider_runtime.logs import get_logger

from outrider_agent.collectors.start import Collectors
from outrider_agent.config.applier import Applier, Change, Part
from outrider_agent.config.lastgood import LastGood
from outrider_agent.config.limits import OwnLimits
from outrider_agent.core.config import ConfigError
from outrider_agent.core.plugins import PluginError
from outrider_agent.core.records import RecordSink
from outrider_agent.listeners.framed_tcp import NAME, Listener, bind, parse
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings import AgentSettings
from outrider_agent.uplink.uplink import Uplink

log = get_logger("outrider.config")


class PluginManager(Protocol):
    """Who runs plug-ins."""

    async def prepare(self, wanted: Sequence[effective.Plugin]) -> Any:
        """Get all that can fail. Raises PluginError; touches nothing that runs."""
        ...

    async def switch(self, prepared: Any) -> None:
        """Run what was prepared, and nothing else."""
        ...

    def states(self) -> Sequence[pb.PluginState]:
        """How they stand, by name."""
        ...

    def drift(self) -> list[str]:
        """What differs from what was asked for, besides their states: sentences."""
        ...


@dataclass
class _Plain:
    """A change that cannot fail and has nothing to let go of."""

    part: "_Settings"
    wanted: Effective
    before: Effective

    async def switch(self) -> None:
        await self.part.put(self.wanted)

    async def undo(self) -> None:
        await self.part.put(self.before)

    async def finish(self) -> None:
        pass

    async def drop(self) -> None:
        pass


class _Settings:
    """A part whose values are just set."""

    name = ""

    def __init__(self) -> None:
        self._now = Effective()

    async def prepare(self, wanted: Effective) -> Change:
        return _Plain(self, wanted, self._now)

    async def put(self, wanted: Effective) -> None:
        await self.set(wanted)
        self._now = wanted

    async def set(self, wanted: Effective) -> None:
        raise NotImplementedError

    async def check(self) -> list[str]:
        return []


class CollectorsPart(_Settings):
    """What is gathered, and how often."""

    name = "collectors"

    def __init__(self, collectors: Collectors) -> None:
        super().__init__()
        self._collectors = collectors

    async def set(self, wanted: Effective) -> None:
        """Only what asks for another pace is woken."""
        self._collectors.configure(wanted.collectors)


class AgentPart(_Settings):
    """Log level and bandwidth."""

    name = "agent"

    def __init__(self, settings: AgentSettings, uplink: Uplink) -> None:
        super().__init__()
        self._settings = settings
        self._uplink = uplink

    async def set(self, wanted: Effective) -> None:
        """The uplink's stream stays."""
        level, rate = wanted.agent.log_level, wanted.agent.max_bytes_per_second
        logs.set_level(self._settings.log.level if level is None else level)
        self._uplink.set_max_bytes_per_second(
            self._settings.server.max_bytes_per_second if rate is None else rate
        )


class LimitsPart(_Settings):
    """Hard limits of the agent's own use."""

    name = "agent limits"

    def __init__(self, limits: OwnLimits, metrics: AgentMetrics) -> None:
        super().__init__()
        self._limits = limits
        self._metrics = metrics
        self._count()

    async def set(self, wanted: Effective) -> None:
        """Where the kernel cannot be asked to hold them, that is told by `check`, and no failure.

        Else a limit would keep a node of another kind from everything else that is configured.
        """
        agent = wanted.agent
        await asyncio.to_thread(self._limits.set, agent.cpu_millis, agent.memory_bytes)
        self._count()
        for problem in self._limits.problems():
            log.warning("a limit of the agent does not hold", error=problem)

    async def check(self) -> list[str]:
        """Try again what does not hold."""
        await asyncio.to_thread(self._limits.again)
        self._count()
        return self._limits.problems()

    def _count(self) -> None:
        for resource, asked in self._limits.asked.items():
            held = -1 if asked is None else int(resource not in self._limits.unheld)
            self._metrics.own_limit.labels(resource).set(held)


class ListenersPart:
    """The listener for framed messages."""

    name = f"listener {NAME}"

    def __init__(self, settings: AgentSettings, sink: RecordSink, metrics: AgentMetrics) -> None:
        self._settings = settings.listeners.framed_tcp
        self._sink = sink
        self._metrics = metrics
        self.address = self._settings.address
        self.listener: Listener | None = None

    async def prepare(self, wanted: Effective) -> Change:
        """Listen on the new address already; who connects there waits."""
        asked = wanted.listeners.framed_tcp
        address = self._settings.address if asked is None else asked.address
        if address == self.address and (not address or (self.listener and self.listener.serving)):
            return _Listening(self, address, self.listener, self.listener)
        return _Listening(self, address, self.listener, self._bound(address))

    def _bound(self, address: str) -> Listener | None:
        if not address:
            return None
        host, port = parse(address, allow_remote=self._settings.allow_remote)
        old = self.listener
        shared = old is not None and old.serving and old.port == port
        made = bind(host, port, old.socket if old is not None and shared else None)
        return Listener(made, self._settings, self._sink, self._metrics)

    async def check(self) -> list[str]:
        """Begin anew where it does not listen."""
        if not self.address or (self.listener is not None and self.listener.serving):
            return []
        text = f"{self.name}: nobody listened on {self.address}"
        if self.listener is not None:
            await self.listener.close()
            self.listener = None
        try:
            self.listener = self._bound(self.address)
            assert self.listener is not None
            await self.listener.start()
        except (ConfigError, OSError) as error:
            return [f"{text}: {error}"]
        return [f"{text}; it was put right"]

    async def close(self) -> None:
        """Take no more, as the agent stops."""
        self.address = ""
        if self.listener is not None:
            await self.listener.close()
            self.listener = None


@dataclass
class _Listening:
    """From one listener to another, which may be the same or none."""

    part: ListenersPart
    address: str
    old: Listener | None
    new: Listener | None
    before: str = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.part.address

    async def switch(self) -> None:
        if self.new is not self.old and self.new is not None:
            await self.new.start()
            log.info("listening", listener=NAME, address=self.address, port=self.new.port)
        self.part.address, self.part.listener = self.address, self.new

    async def undo(self) -> None:
        self.part.address, self.part.listener = self.before, self.old
        await self.drop()

    async def finish(self) -> None:
        if self.old is not self.new and self.old is not None:
            await self.old.close()

    async def drop(self) -> None:
        if self.new is not self.old and self.new is not None:
            await self.new.close()


class PluginsPart:
    """The plug-ins; which of them have to be started anew is their manager's to know."""

    name = "plug-ins"

    def __init__(self, manager: PluginManager) -> None:
        self._manager = manager
        self._now: Sequence[effective.Plugin] = ()

    async def prepare(self, wanted: Effective) -> Change:
        """Fetch and check what is new."""
        prepared = await self._prepared(wanted.plugins)
        return _Plugins(self, prepared, wanted.plugins, self._now)

    async def _prepared(self, wanted: Sequence[effective.Plugin]) -> Any:
        try:
            return await self._manager.prepare(wanted)
        except PluginError as error:
            raise ConfigError(str(error)) from None

    async def put(self, prepared: Any, wanted: Sequence[effective.Plugin]) -> None:
        """Run what was prepared."""
        try:
            await self._manager.switch(prepared)
        except PluginError as error:
            raise ConfigError(str(error)) from None
        self._now = wanted

    async def again(self, wanted: Sequence[effective.Plugin]) -> None:
        """Run others; their packages are in the cache."""
        await self.put(await self._prepared(wanted), wanted)

    async def check(self) -> list[str]:
        """Files that were changed; whether they run is told by their states."""
        return self._manager.drift()


@dataclass
class _Plugins:
    part: PluginsPart
    prepared: Any
    wanted: Sequence[effective.Plugin]
    before: Sequence[effective.Plugin]

    async def switch(self) -> None:
        await self.part.put(self.prepared, self.wanted)

    async def undo(self) -> None:
        await self.part.again(self.before)

    async def finish(self) -> None:
        pass

    async def drop(self) -> None:
        pass


@dataclass
class Configuring:
    """The agent's configuration, wired to all it changes.

    Attributes:
        applier: What servers talk to.
        listeners: To be closed before records are taken no more.
        limits: Whoever starts processes for others has them released of them.
    """

    applier: Applier
    listeners: ListenersPart
    limits: OwnLimits

    @classmethod
    def build(
        cls,
        settings: AgentSettings,
        uplink: Uplink,
        collectors: Collectors,
        sink: RecordSink,
        metrics: AgentMetrics,
        plugins: PluginManager | None = None,
    ) -> "Configuring":
        """Put it together; nothing runs or is read yet."""
        limits = OwnLimits()
        listeners = ListenersPart(settings, sink, metrics)
        parts: list[Part] = [
            CollectorsPart(collectors),
            AgentPart(settings, uplink),
            LimitsPart(limits, metrics),
            listeners,
        ]
        if plugins is not None:
            parts.append(PluginsPart(plugins))  # last: what it undoes costs most
        path = Path(settings.state.directory) / settings.config.file
        last_good = LastGood(path) if settings.config.enabled else None
        applier = Applier(parts, last_good, metrics)
        applier.on_change = uplink.config_changed
        uplink.config = applier
        return cls(applier, listeners, limits)

    async def close(self) -> None:
        """Take no more from programs on the node."""
        with contextlib.suppress(OSError):
            await self.listeners.close()
