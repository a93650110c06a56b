"""The agent as a process: start, stop, kill -9 in the middle of things, and wrong settings."""

import asyncio
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from fakes.agent_process import agent_in, start_agent
from fakes.certificates import Authority
from fakes.gateway_server import FakeGateway, credentials, serving
from outrider_agent.tasks import processes
from outrider_proto import records
from outrider_proto.v1 import agent_pb2 as pb


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def run_of(uid: str, script: str, timeout: int = 60) -> pb.Command:
    run = pb.RunCommand(
        id=pb.RunId(task_uid=uid, attempt=1),
        namespace="default",
        name="task",
        command=pb.Exec(argv=["sh", "-c", script]),
        timeout_seconds=timeout,
        preview_bytes=1000,
        max_output_bytes=1 << 20,
    )
    return pb.Command(runs=[run])


async def test_it_runs_beats_and_reports(tmp_path: Path, authority: Authority) -> None:
    async with serving(authority) as server, agent_in(tmp_path, server.address, authority) as agent:
        stream = await server.gateway.stream()
        hello = stream.hello.hello
        assert (hello.node, hello.net_mode) == ("node-a", "sd")
        kinds = {"command", "script", "plugin", "builtin/Ping", "builtin/Facts"}
        assert set(hello.run_kinds) == kinds
        stream.send(run_of("a", "echo hello"))
        state = await server.gateway.final("a")
        assert (state.phase, state.preview) == (pb.RUN_PHASE_SUCCEEDED, b"hello\n")
        wanted = (records.AGENT_HEARTBEAT, records.HOST_METRICS, records.TASK_OUTPUT)
        await server.gateway.until(lambda: all(map(server.gateway.records, wanted)))
        assert (await agent.get("/healthz"))[0] == 200
        assert (await agent.get("/readyz"))[0] == 200
        status, body = await agent.get("/metrics")
        assert status == 200
        assert 'outrider_agent_runs_total{phase="Succeeded"} 1.0' in body
        assert "\nnode_load1 " in body
        assert await agent.terminate() == 0
        assert "msg=stopped" in agent.text.splitlines()[-1]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
async def test_runs_of_another_user_come_well_out_of_the_fork(
    tmp_path: Path, authority: Authority
) -> None:
    # For another user a process is forked, and the child must run nothing of gRPC.
    allowed = "--tasks.allowed-users=nobody"
    async with (
        serving(authority) as server,
        agent_in(tmp_path, server.address, authority, allowed),
    ):
        stream = await server.gateway.stream()
        for number in range(30):
            command = run_of(f"fork-{number}", "id -u")
            command.runs[0].user = "nobody"
            stream.send(command)
            state = await server.gateway.final(f"fork-{number}")
            assert (state.phase, state.preview) == (pb.RUN_PHASE_SUCCEEDED, b"65534\n"), state
            stream.send(pb.Command(run_acks=[state.id]))


async def test_a_kill_in_the_middle_of_a_run_interrupts_it_and_never_runs_it_again(
    tmp_path: Path, authority: Authority
) -> None:
    uid = f"killed-{time.time_ns()}"
    marks = tmp_path / "marks"
    # One process in the group, and one that left it.
    command = run_of(uid, f"echo x >> {marks}; setsid sleep 600 & sleep 600")
    async with serving(authority) as server:
        agent = await start_agent(tmp_path, server.address, authority)
        stream = await server.gateway.stream()
        stream.send(command)
        await server.gateway.until(lambda: (uid, 1, pb.RUN_PHASE_RUNNING) in server.gateway.history)
        await server.gateway.until(
            lambda: len(processes.members(f"{uid}/1@node-a", None, below=None)) > 2
        )
        await agent.kill()
        assert processes.members(f"{uid}/1@node-a", None, below=None) != []
        async with agent_in(tmp_path, server.address, authority):
            again = await server.gateway.stream(1)
            state = await server.gateway.final(uid)
            assert (state.phase, state.reason) == (pb.RUN_PHASE_INTERRUPTED, "AgentRestarted")
            assert again.complete_reports[0].runs[0].phase == pb.RUN_PHASE_INTERRUPTED
            assert processes.members(f"{uid}/1@node-a", None, below=None) == []
            # The server that does not know yet sends it again.
            again.send(command)
            count = len(server.gateway.history)
            await server.gateway.until(lambda: len(server.gateway.history) > count)
            assert server.gateway.states[(uid, 1)].phase == pb.RUN_PHASE_INTERRUPTED
            again.send(pb.Command(run_acks=[pb.RunId(task_uid=uid, attempt=1)]))
            again.send(command)
            count = len(server.gateway.history)
            await server.gateway.until(lambda: len(server.gateway.history) > count)
    assert marks.read_text() == "x\n"


async def test_kills_at_any_moment_run_nothing_twice_and_lose_no_result(
    tmp_path: Path, authority: Authority
) -> None:
    """Short runs, and kills at moments that differ each time; the server repeats what is open."""
    gateway = FakeGateway()
    gateway.ack_runs = True
    commands = {f"r{n}": run_of(f"r{n}", f"echo {n} >> {tmp_path}/marks") for n in range(40)}
    async with serving(authority, gateway) as server:
        for kill in range(6):
            agent = await start_agent(tmp_path, server.address, authority)
            stream = await gateway.stream(kill)
            await gateway.until(partial(getattr, stream, "complete_reports"))
            for uid in list(commands)[kill * 6 :]:
                if (uid, 1) not in gateway.states:
                    stream.send(commands[uid])
            await asyncio.sleep(0.01 * kill)
            await agent.kill()
        async with agent_in(tmp_path, server.address, authority):
            stream = await gateway.stream(6)
            await gateway.until(lambda: stream.complete_reports)
            for uid, command in commands.items():
                if (uid, 1) not in gateway.states:
                    stream.send(command)
            for uid in commands:
                await gateway.final(uid)
    marks = (tmp_path / "marks").read_text().split()
    assert len(marks) == len(set(marks)), "a run was run twice"
    succeeded = {u for (u, _), s in gateway.states.items() if s.phase == pb.RUN_PHASE_SUCCEEDED}
    assert {f"r{m}" for m in marks} >= succeeded
    expected = {pb.RUN_PHASE_SUCCEEDED, pb.RUN_PHASE_INTERRUPTED}
    assert [s for s in gateway.states.values() if s.phase not in expected] == []


async def test_records_survive_a_kill_and_a_server_that_is_away(
    tmp_path: Path, authority: Authority
) -> None:
    gateway = FakeGateway()
    gateway.acknowledge = False
    async with serving(authority, gateway) as server:
        agent = await start_agent(tmp_path, server.address, authority)
        stream = await gateway.stream()
        stream.send(run_of("a", "for i in 1 2 3; do echo out-$i; done"))
        await gateway.until(lambda: gateway.records(records.TASK_OUTPUT))
        before = dict(gateway.all_batches)
        await agent.kill()
        gateway.acknowledge = True
        async with agent_in(tmp_path, server.address, authority):
            again = await gateway.stream(1)
            await gateway.until(lambda: {(b.epoch, b.seq) for b in again.batches} >= before.keys())
            # The fake gateway checked that the same name had the same content.
            assert gateway.repeats >= len(before)


async def test_a_stop_gives_runs_their_time_then_interrupts_them(
    tmp_path: Path, authority: Authority
) -> None:
    flags = ("--tasks.drain-seconds=1", "--tasks.termination-grace-seconds=0.5")
    async with (
        serving(authority) as server,
        agent_in(tmp_path, server.address, authority, *flags) as agent,
    ):
        stream = await server.gateway.stream()
        stream.send(run_of("short", "sleep 0.5; echo done"))
        stream.send(run_of("long", "trap '' TERM; sleep 600; sleep 600"))
        await server.gateway.until(
            lambda: (
                {u for u, _, p in server.gateway.history if p == pb.RUN_PHASE_RUNNING}
                == {"short", "long"}
            )
        )
        began = time.monotonic()
        assert await agent.terminate() == 0
        assert time.monotonic() - began < 8
        short, long = await server.gateway.final("short"), await server.gateway.final("long")
        assert (short.phase, short.preview) == (pb.RUN_PHASE_SUCCEEDED, b"done\n")
        assert (long.phase, long.reason) == (pb.RUN_PHASE_INTERRUPTED, "AgentStopped")


async def test_without_a_server_it_lives_is_not_ready_and_says_why(
    tmp_path: Path, authority: Authority
) -> None:
    async with agent_in(tmp_path, "127.0.0.1:1", authority) as agent:
        await agent.ops_port()
        async with asyncio.timeout(20):
            while "no TLS connection" not in (await agent.get("/readyz"))[1]:
                await asyncio.sleep(0.05)
        assert (await agent.get("/readyz"))[0] == 503
        assert (await agent.get("/healthz"))[0] == 200
        assert await agent.terminate() == 0


async def test_two_agents_do_not_share_a_state_directory(
    tmp_path: Path, authority: Authority
) -> None:
    async with agent_in(tmp_path, "127.0.0.1:1", authority) as agent:
        await agent.ops_port()
        async with asyncio.timeout(20):
            while not (tmp_path / "state/agent.db").exists():
                await asyncio.sleep(0.02)
        second = await start_agent(tmp_path, "127.0.0.1:1", authority, name="second")
        assert await asyncio.wait_for(second.process.wait(), 10) == 2
        last = second.text.splitlines()[-1]
        assert "state.directory" in last
        assert "in use by another agent" in last


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--no-such-flag=1", "--no-such-flag"),
        ("--ops.address=nonsense", '"ops.address"'),
        ("--ops.address=127.0.0.1:{taken}", '"ops.address"'),
        ("--server.ca-file=/no/such/file", '"server.caFile"'),
        ("--state.directory=/proc/nowhere", '"state.directory"'),
        ("--config=/no/such/file", "/no/such/file"),
        ("--tasks.max-concurrent=many", '"tasks.maxConcurrent"'),
    ],
)
async def test_wrong_settings_end_it_at_once_with_a_line_that_names_them(
    tmp_path: Path, authority: Authority, flag: str, said: str
) -> None:
    taken = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    began = time.monotonic()
    agent = await start_agent(tmp_path, "127.0.0.1:1", authority, flag.format(taken=port))
    try:
        async with asyncio.timeout(10):
            assert await agent.process.wait() == 2
    finally:
        taken.close()
    assert time.monotonic() - began < 4  # 2 s on a machine that does nothing else
    errors = [line for line in agent.text.splitlines() if "level=info" not in line]
    assert len(errors) == 1, agent.text
    assert said in errors[0].replace('\\"', '"')


def test_version_and_settings_can_be_printed(tmp_path: Path, authority: Authority) -> None:
    ca, _ = credentials(tmp_path, authority)
    program = [sys.executable, "-m", "outrider_agent"]
    version = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("outrider-agent 0.")
    printed = subprocess.run(
        [*program, "--print-config", f"--server.ca-file={ca}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"caFile: {ca}" in printed.stdout
