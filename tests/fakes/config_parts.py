"""Parts of an agent that a configuration changes, which do as a test says and note what is done."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from outrider_agent.config.applier import Applier
from outrider_agent.config.lastgood import LastGood
from outrider_agent.core.config import ConfigError
from outrider_agent.metrics import AgentMetrics
from outrider_proto import effective
from outrider_proto.effective import Effective
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry


@dataclass
class FakePart:
    """Has the log level of a configuration as its value; fails where it is told to."""

    name: str
    journal: list[str]
    value: str | None = None
    drift: list[str] = field(default_factory=list)
    #: Of "prepare", "switch", "undo", "finish" and "drop": what it does before that.
    before: dict[str, Callable[[Effective], None]] = field(default_factory=dict)
    #: While it is not set, `prepare` goes on.
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.go_on.set()

    def fail(self, *steps: str, level: str | None = None, error: Exception | None = None) -> None:
        """Fail in these steps, for configurations of that level only if one is given."""

        def work(wanted: Effective) -> None:
            if level is None or wanted.agent.log_level == level:
                raise error or ConfigError("told to fail")

        self.before |= dict.fromkeys(steps, work)

    def note(self, step: str, wanted: Effective) -> None:
        self.journal.append(f"{self.name}.{step} {wanted.agent.log_level}")
        if step in self.before:
            self.before[step](wanted)

    async def prepare(self, wanted: Effective) -> "FakeChange":
        self.note("prepare", wanted)
        await self.go_on.wait()
        return FakeChange(self, wanted, self.value)

    async def check(self) -> list[str]:
        return list(self.drift)


@dataclass
class FakeChange:
    part: FakePart
    wanted: Effective
    was: str | None

    async def switch(self) -> None:
        self.part.value = self.wanted.agent.log_level
        self.part.note("switch", self.wanted)

    async def undo(self) -> None:
        self.part.note("undo", self.wanted)
        self.part.value = self.was

    async def finish(self) -> None:
        self.part.note("finish", self.wanted)

    async def drop(self) -> None:
        self.part.note("drop", self.wanted)


def config_of(level: str) -> pb.EffectiveConfig:
    """A configuration that differs by its log level."""
    agent = effective.Agent(log_level=level)  # type: ignore[arg-type] # given by the test
    return effective.pack(Effective(agent=agent))


@dataclass
class ApplierBench:
    """An applier on fake parts."""

    applier: Applier
    parts: Sequence[FakePart]
    journal: list[str]
    registry: CollectorRegistry
    reports: list[pb.ConfigReport]
    file: Path

    async def until(self, condition: Callable[[], object], seconds: float = 10) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"{self.journal}, {self.reports[-3:]}") from None

    async def stands(self, config: pb.EffectiveConfig, phase: str) -> pb.ConfigReport:
        """How it stands, once it is that."""
        wanted = pb.ConfigPhase.Value(f"CONFIG_PHASE_{phase}")
        await self.until(
            lambda: (
                self.applier.report().tried_hash == config.hash
                and self.applier.report().phase == wanted
            )
        )
        return self.applier.report()

    @property
    def values(self) -> list[str | None]:
        return [part.value for part in self.parts]


@contextlib.asynccontextmanager
async def applying(
    folder: Path,
    *,
    check_seconds: float = 60,
    setup: Callable[[Sequence[FakePart]], None] = lambda _: None,
) -> AsyncIterator[ApplierBench]:
    """An applier that runs."""
    journal: list[str] = []
    parts = [FakePart(name, journal) for name in ("one", "two", "three")]
    setup(parts)
    registry = CollectorRegistry()
    file = folder / "last-good"
    applier = Applier(parts, LastGood(file), AgentMetrics(registry), check_seconds=check_seconds)
    reports: list[pb.ConfigReport] = []
    applier.on_change = lambda: reports.append(applier.report())
    task = asyncio.create_task(applier.run())
    try:
        yield ApplierBench(applier, parts, journal, registry, reports, file)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
