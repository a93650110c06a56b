"""The agent as a process against the real gateway: both ends of the contract."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes.agent_process import AgentProcess, start_agent
from fakes.gateway import RunningGateway, eventually, running_gateway
from fakes.token_review import node_uid
from outrider_operator.core.sink import SinkUnavailableError
from outrider_proto import batches, records


@pytest.fixture(autouse=True)
async def started() -> AsyncIterator[list[AgentProcess]]:
    """The agents of a test; those it leaves are killed."""
    made: list[AgentProcess] = []
    yield made
    for agent in made:
        if agent.process.returncode is None:
            await agent.kill()


async def start(
    started: list[AgentProcess], folder: Path, gateway: RunningGateway, token: str
) -> AgentProcess:
    folder.mkdir(exist_ok=True)
    (folder / "own-token").write_text(token)
    agent = await start_agent(
        folder,
        gateway.address,
        gateway.authority,
        f"--server.token-file={folder}/own-token",
        "--collectors.host.interval-seconds=1",
    )
    started.append(agent)
    return agent


def types(gateway: RunningGateway) -> set[int]:
    return {r.data_type for _, b in gateway.sink.stored for r in batches.decode(b)}


async def test_records_reach_the_sink_under_the_name_in_the_token(
    tmp_path: Path, started: list[AgentProcess]
) -> None:
    async with running_gateway(tmp_path / "tls") as gateway:
        agent = await start(started, tmp_path / "agent", gateway, gateway.reviews.agent("node-a"))
        await eventually(lambda: types(gateway) >= {records.AGENT_HEARTBEAT, records.HOST_METRICS})
        origin, _ = gateway.sink.stored[0]
        assert (origin.node, origin.agent_id) == ("node-a", node_uid("node-a"))
        assert await agent.terminate() == 0
        assert len(gateway.sink.names) == len(set(gateway.sink.names))


async def test_a_token_of_another_node_is_refused_and_the_reason_is_said(
    tmp_path: Path, started: list[AgentProcess]
) -> None:
    async with running_gateway(tmp_path / "tls") as gateway:
        agent = await start(started, tmp_path / "agent", gateway, gateway.reviews.agent("node-b"))
        await eventually(lambda: "does not let our token speak for this node" in agent.text)
        (tmp_path / "agent/own-token").write_text("rubbish")
        await eventually(lambda: "does not accept our token" in agent.text)
        assert "rubbish" not in agent.text
        (tmp_path / "agent/own-token").write_text(gateway.reviews.agent("node-a"))
        await eventually(lambda: "msg=connected" in agent.text)
        assert await agent.terminate() == 0


async def test_a_sink_that_is_away_holds_records_on_the_agent_and_loses_none(
    tmp_path: Path, started: list[AgentProcess]
) -> None:
    async with running_gateway(tmp_path / "tls") as gateway:
        gateway.sink.error = SinkUnavailableError("away")
        agent = await start(started, tmp_path / "agent", gateway, gateway.reviews.agent("node-a"))

        async def waiting() -> float:
            body = (await agent.get("/metrics"))[1]
            found = [x for x in body.splitlines() if x.startswith("outrider_agent_outbox_batches ")]
            return float(found[0].split()[1])

        await agent.ops_port()

        async def has_some() -> bool:
            return await waiting() >= 3

        await eventually(has_some)
        assert gateway.sink.stored == []
        await agent.kill()
        gateway.sink.error = None
        agent = await start(started, tmp_path / "agent", gateway, gateway.reviews.agent("node-a"))
        await eventually(lambda: len(gateway.sink.stored) >= 4)
        # From the first number on, without a gap.
        seqs = sorted({seq for _, _, seq in gateway.sink.names})
        assert seqs == list(range(1, len(seqs) + 1))
        assert await agent.terminate() == 0
