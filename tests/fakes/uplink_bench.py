"""An uplink that runs in the test's own process, and the runs that servers ask it for."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from fakes.agent_parts import store_in
from fakes.certificates import SERVER_NAME, Authority
from fakes.gateway_server import credentials
from fakes.memory_outbox import MemoryOutbox
from outrider_agent.core.runs import RunKey
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings import ServerSettings
from outrider_agent.store.store import Store
from outrider_agent.uplink.uplink import Identity, Uplink
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry


class FakeRuns:
    """Keeps what servers ask for."""

    def __init__(self) -> None:
        self.submitted: list[pb.RunCommand] = []
        self.cancelled: list[RunKey] = []
        self.acknowledged: list[RunKey] = []
        self.known: list[pb.RunState] = []
        self.foreign_tasks: list[pb.Task] = []

    async def submit(self, commands: Any) -> None:
        self.submitted += commands

    async def cancel(self, keys: Any) -> None:
        self.cancelled += keys

    async def acknowledge(self, keys: list[RunKey]) -> None:
        self.acknowledged += keys

    async def foreign(self, task: pb.Task) -> None:
        self.foreign_tasks.append(task)

    async def report(self) -> list[pb.RunState]:
        return self.known


AnyOutbox = TypeVar("AnyOutbox", Store, MemoryOutbox)


@dataclass
class Bench(Generic[AnyOutbox]):
    """An uplink at work; `store` is the outbox it sends from."""

    uplink: Uplink
    store: AnyOutbox
    runs: FakeRuns
    registry: CollectorRegistry
    connected: list[tuple[bool, str]] = field(default_factory=list)
    folder: Path = Path()

    async def until(self, condition: Callable[[], object], seconds: float = 20) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s: {self.connected}") from None


@contextlib.asynccontextmanager
async def uplink_to(
    target: str, folder: Path, authority: Authority, **change: Any
) -> AsyncIterator[Bench[Store]]:
    """An uplink with the agent's own store; `change`: settings of the server."""
    async with (
        store_in(folder / "state") as store,
        uplink_of(store, target, folder, authority, **change) as bench,
    ):
        yield bench


@contextlib.asynccontextmanager
async def uplink_of(
    outbox: AnyOutbox, target: str, folder: Path, authority: Authority, **change: Any
) -> AsyncIterator[Bench[AnyOutbox]]:
    """An uplink with any outbox."""
    ca, token = credentials(folder, authority)
    settings = ServerSettings(
        **{
            "target": target,
            "ca_file": str(ca),
            "token_file": str(token),
            "server_name": SERVER_NAME,
            "dial_timeout_seconds": 1.0,
            "backoff_base_seconds": 0.05,
            "backoff_cap_seconds": 0.2,
            **change,
        }
    )
    registry = CollectorRegistry()
    metrics = AgentMetrics(registry)
    identity = Identity(pb.Hello(node="node-a", version="1"), pb.PackagedData(product="agent"))
    connected: list[tuple[bool, str]] = []
    runs = FakeRuns()
    uplink = Uplink(
        settings, identity, outbox, metrics, lambda ok, why: connected.append((ok, why))
    )
    outbox.on_append = uplink.batch_appended
    task = asyncio.create_task(uplink.run(runs))
    try:
        yield Bench(uplink, outbox, runs, registry, connected, folder)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
