"""Restart and Shutdown of the agent as a process: reported once, and what it is afterwards."""

import asyncio
from functools import partial
from pathlib import Path

import pytest
from fakes.agent_process import AgentProcess, agent_in, start_agent
from fakes.certificates import Authority
from fakes.gateway_server import FakeGateway, serving
from outrider_proto.v1 import agent_pb2 as pb

ALLOWED = "--tasks.allowed-kinds=command,builtin/Restart,builtin/Shutdown"
POD = "--node.pod-uid=pod-1"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def builtin(uid: str, which: pb.Builtin.ValueType) -> pb.Command:
    run = pb.RunCommand(
        id=pb.RunId(task_uid=uid, attempt=1),
        namespace="default",
        name="task",
        builtin=which,
        timeout_seconds=60,
        preview_bytes=100,
        max_output_bytes=100,
    )
    return pb.Command(runs=[run])


def command(uid: str, script: str) -> pb.Command:
    run = pb.RunCommand(
        id=pb.RunId(task_uid=uid, attempt=1),
        command=pb.Exec(argv=["sh", "-c", script]),
        timeout_seconds=60,
        preview_bytes=100,
        max_output_bytes=100,
    )
    return pb.Command(runs=[run])


def phases(gateway: FakeGateway, uid: str) -> list[int]:
    """The phases that were reported, each once in a row."""
    found = [phase for name, _, phase in gateway.history if name == uid]
    return [p for i, p in enumerate(found) if i == 0 or p != found[i - 1]]


async def until_ready_says(agent: AgentProcess, text: str) -> None:
    async with asyncio.timeout(20):
        while text not in (await agent.get("/readyz"))[1]:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("which", [pb.BUILTIN_RESTART, pb.BUILTIN_SHUTDOWN])
async def test_both_are_refused_by_default(
    tmp_path: Path, authority: Authority, which: pb.Builtin.ValueType
) -> None:
    async with serving(authority) as server, agent_in(tmp_path, server.address, authority) as agent:
        stream = await server.gateway.stream()
        stream.send(pb.Command(task=pb.Task(data_type=1060, object_name="outrider-agent")))
        stream.send(builtin("no", which))
        state = await server.gateway.final("no")
        assert (state.phase, state.reason) == (pb.RUN_PHASE_REJECTED, "NotAllowed")
        assert "tasks.allowedKinds" in state.message
        # It is there as before.
        stream.send(builtin("ping", pb.BUILTIN_PING))
        assert (await server.gateway.final("ping")).phase == pb.RUN_PHASE_SUCCEEDED
        assert "shutdown refused" in agent.text


async def test_a_restart_is_one_process_with_one_report(
    tmp_path: Path, authority: Authority
) -> None:
    async with (
        serving(authority) as server,
        agent_in(tmp_path, server.address, authority, ALLOWED) as agent,
    ):
        gateway = server.gateway
        first = await gateway.stream()
        first.send(command("before", "echo kept"))
        await gateway.final("before")
        first.send(command("during", "sleep 1; echo done"))
        await gateway.until(lambda: ("during", 1, pb.RUN_PHASE_RUNNING) in gateway.history)
        first.send(builtin("restart", pb.BUILTIN_RESTART))
        again = await gateway.stream(1)
        # The same process, another life.
        assert agent.process.returncode is None
        assert again.hello.hello.instance != first.hello.hello.instance
        state = await gateway.final("restart")
        assert (state.phase, state.message) == (pb.RUN_PHASE_SUCCEEDED, "restarted")
        assert state.exit_code == 0
        assert state.finished_unix_nanos > state.started_unix_nanos > 0
        # What ran was given its time, and the journal was kept.
        during = await gateway.final("during")
        assert (during.phase, during.preview) == (pb.RUN_PHASE_SUCCEEDED, b"done\n")
        await gateway.until(lambda: again.complete_reports)
        assert {s.id.task_uid for s in again.complete_reports[0].runs} == {
            "before",
            "during",
            "restart",
        }
        # A server that does not know sends it again: it is not done again.
        again.send(builtin("restart", pb.BUILTIN_RESTART))
        again.send(pb.Command(run_acks=[state.id]))
        again.send(builtin("restart", pb.BUILTIN_RESTART))
        again.send(command("after", "echo here"))
        assert (await gateway.final("after")).phase == pb.RUN_PHASE_SUCCEEDED
        assert len(gateway.streams) == 2
        assert agent.text.count("beginning anew") == 1
        assert pb.RUN_PHASE_INTERRUPTED not in phases(gateway, "restart")
        assert await agent.terminate() == 0


async def test_restarts_leave_no_descriptors_behind(tmp_path: Path, authority: Authority) -> None:
    async with (
        serving(authority) as server,
        agent_in(tmp_path, server.address, authority, ALLOWED) as agent,
    ):
        counts = []
        for number in range(3):
            stream = await server.gateway.stream(number)
            await server.gateway.until(partial(getattr, stream, "complete_reports"))
            counts.append(len(list(Path(f"/proc/{agent.process.pid}/fd").iterdir())))
            stream.send(builtin(f"restart-{number}", pb.BUILTIN_RESTART))
        assert counts[2] <= counts[0] + 1, counts


async def test_a_kill_while_it_restarts_is_a_restart_too(
    tmp_path: Path, authority: Authority
) -> None:
    async with serving(authority) as server:
        gateway = server.gateway
        agent = await start_agent(tmp_path, server.address, authority, ALLOWED)
        stream = await gateway.stream()
        stream.send(command("long", "sleep 60"))
        await gateway.until(lambda: ("long", 1, pb.RUN_PHASE_RUNNING) in gateway.history)
        stream.send(builtin("restart", pb.BUILTIN_RESTART))
        await gateway.until(lambda: ("restart", 1, pb.RUN_PHASE_RUNNING) in gateway.history)
        await agent.kill()
        async with agent_in(tmp_path, server.address, authority, ALLOWED):
            assert (await gateway.final("restart")).phase == pb.RUN_PHASE_SUCCEEDED
            assert (await gateway.final("long")).phase == pb.RUN_PHASE_INTERRUPTED
            assert len(gateway.streams) == 2


async def test_a_signal_goes_before_a_restart(tmp_path: Path, authority: Authority) -> None:
    async with serving(authority) as server:
        gateway = server.gateway
        agent = await start_agent(
            tmp_path, server.address, authority, ALLOWED, "--tasks.drain-seconds=2"
        )
        stream = await gateway.stream()
        stream.send(command("long", "sleep 60"))
        await gateway.until(lambda: ("long", 1, pb.RUN_PHASE_RUNNING) in gateway.history)
        stream.send(builtin("restart", pb.BUILTIN_RESTART))
        await gateway.until(lambda: ("restart", 1, pb.RUN_PHASE_RUNNING) in gateway.history)
        assert await agent.terminate() == 0
        assert "beginning anew" not in agent.text
        assert (await gateway.final("long")).reason == "AgentStopped"


async def test_a_shutdown_lasts_as_long_as_the_pod(tmp_path: Path, authority: Authority) -> None:
    gateway = FakeGateway()
    gateway.ack_runs = True
    async with serving(authority, gateway) as server:
        async with agent_in(tmp_path, server.address, authority, ALLOWED, POD) as agent:
            stream = await gateway.stream()
            began = asyncio.get_running_loop().time()
            stream.send(builtin("off", pb.BUILTIN_SHUTDOWN))
            state = await gateway.final("off")
            assert (state.phase, state.exit_code) == (pb.RUN_PHASE_SUCCEEDED, 0)
            await until_ready_says(agent, "ShutDown")
            # It was acknowledged, so nothing had to be waited for.
            assert asyncio.get_running_loop().time() - began < 8
            assert (await agent.get("/healthz"))[0] == 200
            assert (await agent.get("/readyz"))[0] == 503
            assert "outrider_agent_shut_down 1.0" in (await agent.get("/metrics"))[1]
            await gateway.until(lambda: stream.half_closed or stream.outgoing.empty())
            assert await agent.terminate() == 0
        # Another process of the same Pod, also after a kill.
        for _ in range(2):
            agent = await start_agent(tmp_path, server.address, authority, ALLOWED, POD, name="b")
            await until_ready_says(agent, "ShutDown")
            assert (await agent.get("/healthz"))[0] == 200
            await agent.kill()
            (tmp_path / "b.log").unlink()
        assert len(gateway.streams) == 1
        other = "--node.pod-uid=pod-2"
        agent = await start_agent(tmp_path, server.address, authority, ALLOWED, other, name="c")
        back = await gateway.stream(1)
        back.send(command("a", "echo here"))
        assert (await gateway.final("a")).preview == b"here\n"
        assert (await agent.get("/readyz"))[0] == 200
        assert not (tmp_path / "state/shutdown.json").exists()
        await agent.kill()
        assert phases(gateway, "off") == [
            pb.RUN_PHASE_ACCEPTED,
            pb.RUN_PHASE_RUNNING,
            pb.RUN_PHASE_SUCCEEDED,
        ]


async def test_a_shutdown_that_nobody_acknowledges_is_reported_by_the_next_pod(
    tmp_path: Path, authority: Authority
) -> None:
    async with serving(authority) as server:
        gateway = server.gateway
        async with agent_in(tmp_path, server.address, authority, ALLOWED, POD) as agent:
            stream = await gateway.stream()
            stream.send(builtin("off", pb.BUILTIN_SHUTDOWN))
            await gateway.final("off")
            assert (await agent.get("/readyz"))[0] == 200  # it waits
            await until_ready_says(agent, "ShutDown")
        gateway.states.clear()
        async with agent_in(tmp_path, server.address, authority, ALLOWED, "--node.pod-uid=pod-2"):
            assert (await gateway.final("off")).phase == pb.RUN_PHASE_SUCCEEDED


async def test_the_shutdown_of_other_servers(tmp_path: Path, authority: Authority) -> None:
    async with (
        serving(authority) as server,
        agent_in(tmp_path, server.address, authority, ALLOWED, POD) as agent,
    ):
        stream = await server.gateway.stream()
        stream.send(pb.Command(task=pb.Task(data_type=1060, object_name="other-plugin")))
        stream.send(pb.Command(task=pb.Task(data_type=6003, object_name="outrider-agent")))
        stream.send(command("a", "true"))
        await server.gateway.final("a")
        stream.send(pb.Command(task=pb.Task(data_type=1060, object_name="outrider-agent")))
        await until_ready_says(agent, "ShutDown")
        await agent.kill()
        again = await start_agent(tmp_path, server.address, authority, ALLOWED, POD, name="again")
        try:
            await until_ready_says(again, "ShutDown")
        finally:
            await again.kill()


async def test_without_a_pod_a_shutdown_lasts_as_long_as_the_process(
    tmp_path: Path, authority: Authority
) -> None:
    gateway = FakeGateway()
    gateway.ack_runs = True
    async with serving(authority, gateway) as server:
        async with agent_in(tmp_path, server.address, authority, ALLOWED) as agent:
            stream = await gateway.stream()
            stream.send(builtin("off", pb.BUILTIN_SHUTDOWN))
            await until_ready_says(agent, "ShutDown")
        async with agent_in(tmp_path, server.address, authority, ALLOWED):
            await gateway.stream(1)


async def test_a_kill_after_the_marker_and_before_the_result_is_a_shutdown(
    tmp_path: Path, authority: Authority
) -> None:
    """The two steps in the order of the disk: what stands in between tells the next Pod."""
    gateway = FakeGateway()
    async with serving(authority, gateway) as server:
        agent = await start_agent(tmp_path, server.address, authority, ALLOWED, POD)
        stream = await gateway.stream()
        stream.send(builtin("off", pb.BUILTIN_SHUTDOWN))
        marker = tmp_path / "state/shutdown.json"
        async with asyncio.timeout(20):
            while not marker.exists():
                await asyncio.sleep(0)
        await agent.kill()
        async with agent_in(tmp_path, server.address, authority, ALLOWED, "--node.pod-uid=pod-2"):
            await gateway.stream(1)
            assert (await gateway.final("off")).phase == pb.RUN_PHASE_SUCCEEDED
