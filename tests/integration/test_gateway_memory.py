"""The server's memory under full load, with a Kafka that takes nothing: within what is documented.

A real server process, a real broker that is frozen, and more agents with full windows than its
bound has room for. The bound is that of docs/sizing.md, "Server memory".
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest
from cluster.controlplane import ControlPlane
from cluster.kafka import KafkaBroker
from cluster.programs import (
    AGENT_ACCOUNT,
    HOST,
    NAMESPACE,
    SERVER_NAME,
    Program,
    Programs,
    http,
)
from fakes.gateway import RawAgent, eventually, hello
from outrider_proto import limits
from outrider_proto.channel import connect
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD, PackagedData, RecordBatch

AGENTS = 50
#: gateway.maxInflightBytes.
BOUND = 32 * limits.MIB
#: As documented: the bound with what its heap needs around it, and a part for each stream.
ALLOWED = BOUND * 5 // 4 + AGENTS * 128 * limits.KIB
#: What the first batches make the process load and keep, whatever the bounds.
ONCE = 12 * limits.MIB
BATCH = 22_000
MESSAGE_BATCHES = 11
#: Memory is watched for so long once the bound is reached: also while batches are let go.
WATCH_SECONDS = 8.0


@pytest.fixture
def server(
    control_plane: ControlPlane, kafka: KafkaBroker, kafka_topic: str
) -> Iterator[tuple[Programs, Program]]:
    programs = Programs(control_plane, kafka=kafka.bootstrap)
    programs.install()
    settings = {
        "log": {"level": "warning"},
        "leader": {"enabled": False},
        "gateway": {"maxInflightBytes": BOUND},
        "sink": {"kafka": {"topic": kafka_topic}},
    }
    program = programs.server("memory", settings)
    programs.start(program)
    try:
        yield programs, program
    finally:
        kafka.thaw()
        control_plane.processes.kill(program.name)


def token_of(plane: ControlPlane, node: str) -> str:
    """Make a Node with its agent's Pod; returns the agent's token."""
    plane.make_node(node)
    pod = plane.make_agent_pod(node, NAMESPACE, AGENT_ACCOUNT)
    return plane.token(NAMESPACE, AGENT_ACCOUNT, bound_pod=pod)


def message(first: int, count: int) -> bytes:
    """Batches that nothing can make smaller."""
    return PackagedData(
        batches=[
            RecordBatch(
                epoch=7,
                seq=seq,
                codec=CODEC_ZSTD,
                records=os.urandom(BATCH),
                count=100,
                decompressed_bytes=4 * BATCH,
                data_types=[1000],
                created_unix_nanos=1,
            )
            for seq in range(first, first + count)
        ]
    ).SerializeToString()


async def full_window(agent: RawAgent) -> None:
    """Fill a window that was given, and stay."""
    first = await agent.receive()
    room, seq = first.welcome.window_bytes // BATCH, 1
    while room > 0:
        count = min(room, MESSAGE_BATCHES)
        await agent.send(message(seq, count))
        seq, room = seq + count, room - count
    with contextlib.suppress(grpc.aio.AioRpcError, EOFError):
        while True:
            await agent.receive(60)


def resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def metric(program: Program, name: str) -> float:
    for line in http(program, "/metrics")[1].splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    return 0.0


async def test_memory_with_a_frozen_kafka_and_full_windows(
    control_plane: ControlPlane, kafka: KafkaBroker, server: tuple[Programs, Program]
) -> None:
    programs, program = server
    tokens = [
        await asyncio.to_thread(token_of, control_plane, f"memory-{number}")
        for number in range(AGENTS)
    ]
    authority = (programs.folder / "ca.crt").read_bytes()
    pid = control_plane.processes.status()[program.name].pid
    async with contextlib.AsyncExitStack() as stack:
        agents = []
        for number, token in enumerate(tokens):
            address = f"{HOST}:{program.grpc_port}"
            channel = connect(address, ca=authority, server_name=SERVER_NAME)
            await stack.enter_async_context(channel)
            agents.append(RawAgent(channel, token))
            await agents[-1].send(hello(f"memory-{number}"))

        async def reached(name: str, least: float) -> None:
            async def look() -> bool:
                return await asyncio.to_thread(metric, program, name) >= least

            await eventually(look)

        await reached("outrider_server_streams", AGENTS)
        idle = resident(pid)
        await asyncio.to_thread(kafka.freeze)
        load = [asyncio.create_task(full_window(agent)) for agent in agents]
        await reached("outrider_server_batches_inflight_bytes", BOUND * 0.7)
        most, end = 0, asyncio.get_running_loop().time() + WATCH_SECONDS
        while asyncio.get_running_loop().time() < end:
            most = max(most, resident(pid) - idle)
            await asyncio.sleep(0.05)
        held = await asyncio.to_thread(metric, program, "outrider_server_batches_inflight_bytes")
        for task in load:
            task.cancel()
        await asyncio.gather(*load, return_exceptions=True)
    assert held <= BOUND
    assert most <= ALLOWED + ONCE, f"{most / limits.MIB:.0f} MiB above idle"
