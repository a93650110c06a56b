"""The agent as a process and its configuration: taken, kept, whole after every kill, offline."""

import asyncio
import contextlib
import itertools
import json
import random
import re
import signal
import socket
from datetime import datetime
from pathlib import Path

import pytest
from fakes import dying_agent
from fakes.agent_process import AgentProcess, agent_in, start_agent
from fakes.certificates import Authority
from fakes.dying_agent import POINTS
from fakes.gateway_server import FakeGateway, serving
from outrider_agent.core.frames import HEARTBEAT, REPORT, Packet, frame
from outrider_proto import effective, records
from outrider_proto.effective import (
    Agent,
    Collector,
    Collectors,
    Effective,
    FramedTcp,
    Listeners,
)
from outrider_proto.v1 import agent_pb2 as pb

KILLS = 20


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def listening_on(port: int, **agent: object) -> Effective:
    return Effective(
        listeners=Listeners(framed_tcp=FramedTcp(address=f"127.0.0.1:{port}")),
        agent=Agent(**agent),  # type: ignore[arg-type] # of the test
    )


async def answers(port: int, packet: Packet | None = None) -> bytes:
    """What a listener answers; empty if nobody listens there."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return b""
    writer.write(frame(packet or Packet(HEARTBEAT, b"{}")))
    try:
        async with asyncio.timeout(10):
            return await reader.readline()
    finally:
        writer.close()


async def test_what_a_server_asks_for_goes_into_force_at_run_time(
    tmp_path: Path, authority: Authority
) -> None:
    port = free_port()
    wanted = Effective(
        collectors=Collectors(
            host=Collector(interval_seconds=1), heartbeat=Collector(enabled=False)
        ),
        listeners=Listeners(framed_tcp=FramedTcp(address=f"127.0.0.1:{port}")),
        agent=Agent(log_level="error", max_bytes_per_second=1_000_000),
    )
    flags = ("--heartbeat.interval-seconds=1", "--collectors.host.interval-seconds=3600")
    async with (
        serving(authority) as server,
        agent_in(tmp_path, server.address, authority, *flags) as agent,
    ):
        gateway = server.gateway
        stream = await gateway.stream()
        first = await gateway.configured(stream, "", pb.CONFIG_PHASE_NONE)
        assert first.hash == ""
        assert stream.kinds.index("complete") < stream.kinds.index("config")
        await gateway.until(lambda: len(gateway.records(records.AGENT_HEARTBEAT)) >= 2)
        assert len(gateway.records(records.HOST_METRICS)) == 1

        wanted_hash = stream.configure(wanted)
        report = await gateway.configured(stream, wanted_hash)
        assert (report.hash, report.message, list(report.drift)) == (wanted_hash, "", [])
        beats = len(gateway.records(records.AGENT_HEARTBEAT))
        await gateway.until(lambda: len(gateway.records(records.HOST_METRICS)) >= 4)
        assert len(gateway.records(records.AGENT_HEARTBEAT)) <= beats + 1
        assert "configuration in force" not in agent.text
        text = b'{"content":"load","rand":7,"timestamp":1700000000}'
        assert await answers(port, Packet(REPORT, text)) == b"Report data has recive\n"
        await gateway.until(lambda: gateway.records(records.LOCAL_REPORT))
        [record] = gateway.records(records.LOCAL_REPORT)
        assert records.fields_of(record)["report"] == text.decode()
        _, body = await agent.get("/metrics")
        assert f'outrider_agent_config_info{{hash="{wanted_hash}"}} 1.0' in body
        assert 'outrider_agent_part_cpu_seconds_total{part="store"}' in body
        run = pb.RunCommand(
            id=pb.RunId(task_uid="facts", attempt=1),
            builtin=pb.BUILTIN_FACTS,
            timeout_seconds=30,
            preview_bytes=8000,
            max_output_bytes=1 << 20,
        )
        stream.send(pb.Command(runs=[run]))
        state = await gateway.final("facts")
        assert json.loads(state.preview)["config_hash"] == wanted_hash

        # What nobody asks for any more is as the settings say; the stream was never touched.
        empty_hash = stream.configure(Effective())
        await gateway.configured(stream, empty_hash)
        assert "configuration in force" in agent.text
        assert await answers(port) == b""
        beats = len(gateway.records(records.AGENT_HEARTBEAT))
        await gateway.until(lambda: len(gateway.records(records.AGENT_HEARTBEAT)) >= beats + 2)
        assert len(gateway.streams) == 1


async def test_what_cannot_be_is_refused_with_the_reason_and_changes_nothing(
    tmp_path: Path, authority: Authority
) -> None:
    port, taken = free_port(), socket.create_server(("127.0.0.1", 0))
    async with serving(authority) as server, agent_in(tmp_path, server.address, authority):
        gateway = server.gateway
        stream = await gateway.stream()
        good = stream.configure(listening_on(port))
        await gateway.configured(stream, good)
        unwanted = listening_on(taken.getsockname()[1], log_level="error")
        bad = stream.configure(unwanted)
        report = await gateway.configured(stream, bad, pb.CONFIG_PHASE_FAILED)
        assert report.hash == good
        assert "listener framedTcp: cannot listen on 127.0.0.1" in report.message
        assert await answers(port) == b"heartBeat\n"
        content = b'{"agent":{"colour":"red"}}'
        odd = pb.EffectiveConfig(hash=effective.digest(content), content=content)
        stream.send(pb.Command(config=odd))
        report = await gateway.configured(stream, odd.hash, pb.CONFIG_PHASE_FAILED)
        assert "colour" in report.message
        # The server repeats it on a person's retry: it works once its cause is gone.
        taken.close()
        stream.send(pb.Command(config=effective.pack(unwanted)))
        await gateway.configured(stream, bad)


async def test_a_node_may_take_none(tmp_path: Path, authority: Authority) -> None:
    async with (
        serving(authority) as server,
        agent_in(tmp_path, server.address, authority, "--config.enabled=false"),
    ):
        stream = await server.gateway.stream()
        wanted = stream.configure(Effective(agent=Agent(log_level="error")))
        report = await server.gateway.configured(stream, wanted, pb.CONFIG_PHASE_FAILED)
        assert "config.enabled" in report.message
        assert not (tmp_path / "state/last-good-config").exists()


async def test_without_any_server_the_last_good_one_is_in_force_at_once(
    tmp_path: Path, authority: Authority
) -> None:
    port = free_port()
    async with serving(authority) as server, agent_in(tmp_path, server.address, authority) as agent:
        stream = await server.gateway.stream()
        wanted = stream.configure(listening_on(port, log_level="debug"))
        await server.gateway.configured(stream, wanted)
        await agent.terminate()
    agent = await start_agent(tmp_path, "127.0.0.1:1", authority, name="offline")
    try:
        async with asyncio.timeout(20):
            while await answers(port) != b"heartBeat\n":
                await asyncio.sleep(0.02)
            while "level=debug" not in agent.text:
                await asyncio.sleep(0.02)
        assert when(agent, "configuration in force") - when(agent, "starting") < 2
        assert await agent.terminate() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            await agent.kill()


def when(agent: AgentProcess, event: str) -> float:
    """When a line was logged first, seconds."""
    match = re.search(rf'ts=(\S+) .*msg="?{event}', agent.text)
    assert match, agent.text
    return datetime.fromisoformat(match[1].replace("Z", "+00:00")).timestamp()


async def test_kills_while_it_is_put_into_force_leave_the_old_or_the_new_one_whole(
    tmp_path: Path, authority: Authority
) -> None:
    ports = [free_port(), free_port()]
    levels = ("error", "info")
    configs = [
        listening_on(port, log_level=level) for port, level in zip(ports, levels, strict=True)
    ]
    hashes = [effective.pack(config).hash for config in configs]
    gateway, rng = FakeGateway(), random.Random(6)
    seen: list[str] = []
    window = 0.008  # seconds; follows how busy the machine is, so that kills come on both sides
    async with serving(authority, gateway) as server:
        for kill in range(KILLS):
            agent = await start_agent(tmp_path, server.address, authority, name=f"agent{kill}")
            stream = await gateway.stream(kill)
            await gateway.until(lambda: stream.config_reports)  # noqa: B023 - awaited here
            await gateway.until(
                lambda: stream.config_reports[-1].phase != pb.CONFIG_PHASE_APPLYING  # noqa: B023
            )
            report = stream.config_reports[-1]
            if kill == 0 or not report.hash:
                assert kill == 0 or seen == [""] * len(seen), "what was in force is lost"
                await agent_has(stream, gateway, configs[0], hashes[0])
                report = stream.config_reports[-1]
            assert report.phase == pb.CONFIG_PHASE_APPLIED, report
            place = hashes.index(report.hash)
            if seen:
                window *= 0.7 if seen[-1] != report.hash else 1.6
            seen.append(report.hash)
            # All of it, and nothing of the other.
            assert await answers(ports[place]) == b"heartBeat\n"
            assert await answers(ports[1 - place]) == b""
            if kill:
                told = "configuration in force" in agent.text
                assert told == (levels[place] == "info"), agent.text
            stream.configure(configs[1 - place])
            await asyncio.sleep(rng.uniform(0, window))
            await agent.kill()
    changes = sum(a != b for a, b in itertools.pairwise(seen))
    assert 0 < changes < KILLS - 1, "every kill was on one side: nothing was tested"


@pytest.mark.parametrize("point", POINTS)
async def test_a_kill_at_any_point_of_it_leaves_one_of_the_two(
    tmp_path: Path, authority: Authority, point: str
) -> None:
    gateway = FakeGateway()
    old, new = (listening_on(free_port(), log_level=level) for level in ("info", "debug"))
    dying = [str(Path(dying_agent.__file__)), point, effective.pack(new).hash]
    async with serving(authority, gateway) as server:
        agent = await start_agent(tmp_path, server.address, authority, program=dying)
        stream = await gateway.stream()
        await agent_has(stream, gateway, old, effective.pack(old).hash)
        stream.configure(new)
        async with asyncio.timeout(20):
            assert await agent.process.wait() == -signal.SIGKILL
        async with agent_in(tmp_path, server.address, authority):
            again = await gateway.stream(1)
            renamed = POINTS.index(point) >= POINTS.index("renamed")
            kept = effective.pack(new if renamed else old).hash
            report = await gateway.configured(again, kept)
            assert report.hash == kept
            await agent_has(again, gateway, new, effective.pack(new).hash)


async def agent_has(stream, gateway: FakeGateway, config: Effective, name: str) -> None:
    assert stream.configure(config) == name
    await gateway.configured(stream, name)
