"""The leader's links and controller with a real gateway over TLS; its agents always succeed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc.aio
import pytest
from fakes.certificates import SERVER_NAME, Authority
from fakes.cluster import MemoryCluster
from fakes.configs import MemoryConfigs
from fakes.gateway import RawAgent, RunningGateway, eventually, open_stream, running_gateway
from outrider_operator.fleet import controller as controller_module
from outrider_operator.fleet import orphans
from outrider_operator.fleet.controller import Controller
from outrider_operator.fleet.links import Links
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import FleetSettings, ServerSettings
from outrider_proto.v1.agent_pb2 import PackagedData, RunId, RunPhase, RunReport, RunState
from outrider_runtime.discovery import Address
from prometheus_client import CollectorRegistry

PING = {"run": {"builtin": "Ping"}, "rollout": {"maxConcurrent": "100%", "waves": ["100%"]}}


class Leader:
    """Controller and links of one leader."""

    def __init__(self, cluster: MemoryCluster, gateway: RunningGateway, term: int) -> None:
        self.registry = CollectorRegistry()
        metrics = ServerMetrics(self.registry)
        token = gateway.tls_folder / f"token-{term}"
        token.write_text(gateway.reviews.server())
        self.ca = gateway.tls_folder / f"ca-{term}.crt"
        self.ca.write_bytes(gateway.authority.pem)
        settings = FleetSettings(
            server_name=SERVER_NAME,
            token_file=str(token),
            ca_file=str(self.ca),
            resolve_seconds=0.2,
            gateways="x:1",
        )
        self.addresses = [Address("127.0.0.1", gateway.gateway.port)]
        self.controller = Controller(cluster, MemoryConfigs(), ServerSettings(), metrics)
        self.links = Links(
            settings,
            f"leader-{term}",
            term,
            self.controller,
            metrics,
            find=self._find,
        )

    async def _find(self, _target: str) -> list[Address]:
        return self.addresses

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"outrider_server_{name}", labels) or 0.0

    async def run(self) -> None:
        await self.controller.load()
        async with asyncio.TaskGroup() as group:
            group.create_task(self.controller.run(self.links))
            group.create_task(self.links.run())


@asynccontextmanager
async def leading(leader: Leader) -> AsyncIterator[Leader]:
    task = asyncio.create_task(leader.run())
    try:
        yield leader
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class FakeAgent:
    """Answers every run with a success, and keeps what it was told."""

    def __init__(self, channel: Any, stream: RawAgent) -> None:
        self.channel, self.stream = channel, stream
        self.runs: list[RunId] = []
        self.acks: list[RunId] = []
        self.cancels: list[RunId] = []
        self.known: dict[tuple[str, int], RunState] = {}
        self.task = asyncio.create_task(self._obey())

    async def report(self, *states: RunState, complete: bool = False) -> None:
        self.known.update({(state.id.task_uid, state.id.attempt): state for state in states})
        message = RunReport(runs=states, complete=complete)
        await self.stream.send(PackagedData(run_report=message))

    async def _obey(self) -> None:
        with suppress(EOFError, grpc.aio.AioRpcError, TimeoutError):
            while True:
                command = await self.stream.receive()
                self.acks += command.run_acks
                for acked in command.run_acks:
                    self.known.pop((acked.task_uid, acked.attempt), None)
                self.cancels += command.cancels
                for run in command.runs:
                    self.runs.append(run.id)
                    phase = RunPhase.RUN_PHASE_SUCCEEDED
                    await self.report(RunState(id=run.id, phase=phase, exit_code=0))
                if command.report_runs:
                    await self.report(*self.known.values(), complete=True)

    async def close(self) -> None:
        self.task.cancel()
        self.stream.call.cancel()
        with suppress(asyncio.CancelledError):
            await self.task
        await self.channel.close()


async def join(gateway: RunningGateway, node: str) -> FakeAgent:
    channel = gateway.connect()
    return FakeAgent(channel, await open_stream(channel, gateway.reviews.agent(node), node))


def ready(cluster: MemoryCluster, node: str) -> tuple[str, str]:
    status = cluster.agents.get(node, {}).get("status", {})
    condition: dict[str, str] = next(iter(status.get("conditions", [])), {})
    return condition.get("status", ""), condition.get("reason", "")


@pytest.fixture
async def gateway(tmp_path) -> AsyncIterator[RunningGateway]:
    async with running_gateway(tmp_path, drain_seconds=0.2) as running:
        yield running


async def test_a_task_through_the_link_and_back(gateway) -> None:
    cluster = MemoryCluster()
    for node in ("a", "b"):
        cluster.add_node(node)
    async with leading(Leader(cluster, gateway, 1)):
        agents = [await join(gateway, node) for node in ("a", "b")]
        await eventually(lambda: ready(cluster, "a")[0] == ready(cluster, "b")[0] == "True")
        cluster.add_task("t", PING)
        # The watch would tell; here reading all tasks anew does.
    leader = Leader(cluster, gateway, 2)
    async with leading(leader):
        await eventually(lambda: cluster.task("t").get("status", {}).get("phase") == "Succeeded")
        await eventually(lambda: all(len(agent.acks) == 1 for agent in agents))
        assert [len(agent.runs) for agent in agents] == [1, 1]
        assert leader.metric("tasks_ended_total", phase="Succeeded") == 1
    for agent in agents:
        await agent.close()


async def test_a_stream_that_ends_is_told_and_a_gateway_that_goes_takes_its_agents_along(
    gateway, monkeypatch
) -> None:
    monkeypatch.setattr(controller_module, "LINK_GRACE_SECONDS", 0.3)
    cluster = MemoryCluster()
    async with leading(Leader(cluster, gateway, 1)) as leader:
        agents = {node: await join(gateway, node) for node in ("a", "b")}
        await eventually(lambda: ready(cluster, "a")[0] == ready(cluster, "b")[0] == "True")
        await agents["a"].close()
        await eventually(lambda: ready(cluster, "a")[0] == "False")
        assert ready(cluster, "b")[0] == "True"
        leader.addresses = []
        gateway.stop.set()
        await eventually(lambda: ready(cluster, "b")[0] == "False")
        await agents["b"].close()
        await eventually(lambda: leader.metric("leader_links") == 0)


async def test_an_older_leader_is_fenced_off(gateway) -> None:
    cluster = MemoryCluster()
    async with leading(Leader(cluster, gateway, 1)) as old:
        await eventually(lambda: old.metric("leader_links") == 1)
        async with leading(Leader(cluster, gateway, 2)) as new:
            await eventually(lambda: new.metric("leader_links") == 1)
            await eventually(lambda: old.metric("leader_links") == 0)
            await asyncio.sleep(1.0)  # time for the old one to try again
            assert new.metric("leader_links") == 1
            assert old.metric("leader_links") == 0


async def test_runs_without_a_task_are_settled(gateway, monkeypatch) -> None:
    monkeypatch.setattr(orphans, "GRACE_SECONDS", 0.3)
    cluster = MemoryCluster()
    async with leading(Leader(cluster, gateway, 1)):
        agent = await join(gateway, "a")
        await agent.report(
            RunState(id=RunId(task_uid="gone", attempt=1), phase=RunPhase.RUN_PHASE_FAILED),
            RunState(id=RunId(task_uid="gone", attempt=2), phase=RunPhase.RUN_PHASE_RUNNING),
        )
        # Once or, where a report came again meanwhile, more often.
        await eventually(lambda: {run.attempt for run in agent.acks} == {1})
        await eventually(lambda: {run.attempt for run in agent.cancels} == {2})
        await agent.close()


async def test_a_gateway_with_two_addresses_is_linked_once(gateway) -> None:
    cluster = MemoryCluster()
    leader = Leader(cluster, gateway, 1)
    leader.addresses.append(Address("localhost", gateway.gateway.port))
    async with leading(leader):
        agent = await join(gateway, "a")
        await eventually(lambda: ready(cluster, "a")[0] == "True")
        await asyncio.sleep(2.0)
        ends = gateway.metric("link_ends_total", reason="Replaced")
        began = time.monotonic()
        await asyncio.sleep(1.5)
        assert gateway.metric("link_ends_total", reason="Replaced") - ends <= 1, (
            f"the links take each other's place within {time.monotonic() - began:.1f} s"
        )
        assert leader.metric("leader_links") == 1
        await agent.close()


async def test_a_changed_issuer_is_used_without_a_restart(gateway: RunningGateway) -> None:
    leader = Leader(MemoryCluster(), gateway, term=1)
    good = leader.ca.read_bytes()
    leader.ca.write_bytes(Authority().pem)
    async with leading(leader):
        await eventually(lambda: bool(leader.links._kept))
        await asyncio.sleep(0)
        assert leader.metric("leader_links") == 0
        leader.ca.write_bytes(good)
        await eventually(lambda: leader.metric("leader_links") == 1)
