"""Agents through the gateway into a real broker that is killed: what they were told is there."""

import asyncio
import contextlib
from pathlib import Path

import grpc.aio
import pytest
from cluster.kafka import KafkaBroker
from fakes.gateway import RunningGateway, eventually, make_batch, open_stream, running_gateway
from fakes.kafka_sink import read_topic, running_sink
from fakes.token_review import node_uid
from outrider_proto.v1.agent_pb2 import PackagedData

AGENTS = 10
WINDOW = 20
#: A broker that was killed may take so long to be back on a busy machine.
AWAY_SECONDS = 100.0
Name = tuple[str, int, int]


async def send_for_ever(running: RunningGateway, node: str, acknowledged: set[Name]) -> None:
    """An agent that keeps some batches in flight, and sends them again after a reconnect."""
    token = running.reviews.agent(node)
    waiting: dict[int, bool] = {}
    last = 0
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError, EOFError):
            async with running.connect() as channel:
                agent = await open_stream(channel, token, node)
                for seq in sorted(waiting):
                    await agent.send(PackagedData(batches=[make_batch(seq, size=300)]))
                while True:
                    while len(waiting) < WINDOW:
                        last += 1
                        waiting[last] = True
                        await agent.send(PackagedData(batches=[make_batch(last, size=300)]))
                    for ack in (await agent.receive(AWAY_SECONDS)).batch_acks:
                        for seq in range(ack.first, ack.last + 1):
                            waiting.pop(seq, None)
                            acknowledged.add((node_uid(node), ack.epoch, seq))


@pytest.mark.timeout(240)
async def test_broker_killed_under_load(
    kafka: KafkaBroker, kafka_topic: str, tmp_path: Path
) -> None:
    acknowledged: set[Name] = set()
    async with (
        running_sink(kafka.bootstrap, kafka_topic) as case,
        running_gateway(tmp_path, sink=case.sink, drain_seconds=0.1) as running,
    ):
        await eventually(lambda: case.health.ready)
        agents = [
            asyncio.create_task(send_for_ever(running, f"node-{number}", acknowledged))
            for number in range(AGENTS)
        ]
        await eventually(lambda: len(acknowledged) > 2000)
        await asyncio.to_thread(kafka.kill)
        await eventually(lambda: not case.health.ready, 60)
        held = len(acknowledged)
        assert running.metric("streams") == AGENTS  # they keep their streams
        assert running.metric("batches_inflight_bytes") > 0
        await asyncio.to_thread(kafka.resume)
        await eventually(lambda: len(acknowledged) > held + 2000, AWAY_SECONDS)
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)
        found = {
            (item.agent_id, item.epoch, item.seq)
            for item in await read_topic(kafka.bootstrap, kafka_topic)
        }
    assert acknowledged <= found
