"""Runs as other users, and in the namespaces of a host that the test makes; needs root."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fakes.agent_parts import ListSink, store_in
from outrider_agent.core.policy import RUN_KINDS, Policy
from outrider_agent.core.runs import is_final, key_of
from outrider_agent.metrics import AgentMetrics
from outrider_agent.tasks import lookup, processes
from outrider_agent.tasks.execution import Host
from outrider_agent.tasks.leaving import Exit, Marker
from outrider_agent.tasks.placing import Place
from outrider_agent.tasks.supervisor import RunLimits, Supervisor
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for users and namespaces")

EVERYTHING = Policy(RUN_KINDS, users=["*"], own={"root", "0"}, host=True)
PRINT_IDS = "id -u; id -g; id -G; echo $HOME $USER"


def left_of(uid: str) -> list[processes.ProcessInfo]:
    """The living processes of a run, wherever they are."""
    return processes.members(processes.mark_for(f"{uid}/1", "node-a"), None, below=None)


class Node:
    """A supervisor, and what it said."""

    def __init__(self, supervisor: Supervisor, states: list[pb.RunState]) -> None:
        self.supervisor = supervisor
        self.states = states
        self.count = 0

    async def begin(self, **fields: object) -> str:
        self.count += 1
        uid = f"placing-{os.getpid()}-{id(self)}-{self.count}"
        run = pb.RunCommand(
            id=pb.RunId(task_uid=uid, attempt=1),
            namespace="default",
            name="task",
            timeout_seconds=20,
            preview_bytes=4000,
            max_output_bytes=10_000,
        )
        run.MergeFrom(pb.RunCommand(**fields))  # type: ignore[arg-type] # fields by name
        await self.supervisor.submit([run])
        return uid

    async def until(self, uid: str, *, final: bool) -> pb.RunState:
        async with asyncio.timeout(30):
            while True:
                for state in self.states:
                    if state.id.task_uid == uid and (
                        is_final(state) or (not final and state.phase == pb.RUN_PHASE_RUNNING)
                    ):
                        return state
                await asyncio.sleep(0.01)

    async def shell(self, text: str, **fields: object) -> pb.RunState:
        command = pb.Exec(argv=["sh", "-c", text])
        return await self.until(await self.begin(command=command, **fields), final=True)

    async def script(self, *interpreter: str, source: str, **fields: object) -> pb.RunState:
        script = pb.Script(interpreter=interpreter, source=source)
        return await self.until(await self.begin(script=script, **fields), final=True)


@contextlib.asynccontextmanager
async def node_in(
    folder: Path, allowed: Policy = EVERYTHING, host_pid: int = 1
) -> AsyncIterator[Node]:
    with ThreadPoolExecutor(4) as threads:
        async with store_in(folder / "state") as store:
            place = Place("node-a", folder / "work", 0.5, allowed, host_pid)
            states: list[pb.RunState] = []
            supervisor = Supervisor(
                store,
                Host(place=place, builtins={}, records=ListSink(), threads=threads),
                RunLimits(max_concurrent=4, max_queued=10),
                AgentMetrics(CollectorRegistry()),
                states.append,
                Exit(Marker(folder / "state"), "", lambda _: None),
            )
            task = asyncio.create_task(supervisor.run())
            await asyncio.sleep(0)
            try:
                yield Node(supervisor, states)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    async with node_in(tmp_path) as made:
        yield made


# Users.


async def test_a_run_is_of_its_user_and_its_groups_and_no_others(node: Node) -> None:
    before = os.getgroups()
    os.setgroups([54321])  # one of the agent's own must not be passed on
    try:
        state = await node.shell(PRINT_IDS, user="nobody")
    finally:
        os.setgroups(before)
    assert state.phase == pb.RUN_PHASE_SUCCEEDED, state
    assert state.preview.decode().split() == ["65534", "65534", "65534", "/nonexistent", "nobody"]


async def test_a_number_without_a_name_is_a_user_with_a_group_of_its_own(node: Node) -> None:
    state = await node.shell(PRINT_IDS, user="54321")
    assert state.preview.decode().split() == ["54321", "54321", "54321", "/", "54321"]


async def test_own_user_by_name_needs_no_switch(node: Node) -> None:
    own = (await node.shell(PRINT_IDS)).preview
    assert own.startswith(b"0\n0\n")
    assert (await node.shell("id -u", user="root")).preview == b"0\n"


async def test_a_user_that_is_not_known_is_said(node: Node) -> None:
    state = await node.shell("true", user="no-such-user")
    assert (state.phase, state.reason) == (pb.RUN_PHASE_FAILED, "UserNotFound")
    assert "no-such-user" in state.message


async def test_a_user_cannot_get_back_to_root_nor_read_the_journal() -> None:
    with tempfile.TemporaryDirectory() as name:  # not below pytest's, which is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        async with node_in(folder) as node:
            (folder / "state").chmod(0o755)  # as kubelet makes it
            source = f"""
import os, pathlib
try:
    os.setuid(0)
except PermissionError:
    print("not root")
for file in sorted(pathlib.Path({str(folder / "state")!r}).iterdir()):
    print(file.name, "open" if os.access(file, os.R_OK) else "closed")
"""
            state = await node.script("python3", source=source, user="nobody")
    lines = state.preview.decode().splitlines()
    assert lines[0] == "not root", state
    files = dict(line.split() for line in lines[1:])
    assert {file for file in files if file.startswith("agent.db")} >= {"agent.db", "agent.db-wal"}
    assert set(files.values()) == {"closed"}


@pytest.mark.parametrize("interpreter", [["sh", "-eu"], ["bash", "-eu"]])
async def test_a_script_for_another_user_needs_no_file(
    node: Node, tmp_path: Path, interpreter: list[str]
) -> None:
    state = await node.script(
        *interpreter,
        source='id -u; ls -d "$0"; echo x >> "$0" || echo sealed; cat "$0" | wc -l\n',
        user="nobody",
    )
    assert state.phase == pb.RUN_PHASE_SUCCEEDED, state
    lines = state.preview.decode().split("\n")
    assert lines[0] == "65534"
    assert lines[1].startswith("/proc/self/fd/")
    assert "sealed" in lines
    assert not (tmp_path / "work").exists()


async def test_the_processes_of_a_user_are_ended_too(node: Node) -> None:
    uid = await node.begin(
        command=pb.Exec(argv=["sh", "-c", "trap '' TERM; setsid sleep 600 & sleep 600; sleep 600"]),
        user="nobody",
        timeout_seconds=1,
    )
    state = await node.until(uid, final=True)
    assert state.phase == pb.RUN_PHASE_TIMED_OUT
    assert "did not go away" not in state.message
    assert left_of(uid) == []


# Executables.


async def test_what_is_started_is_what_was_checked(tmp_path: Path) -> None:
    """Neither a PATH of the task's own, nor a link, nor ".." gets past the list."""
    tools, other = tmp_path / "tools", tmp_path / "other"
    for folder in (tools, other):
        folder.mkdir()
        shutil.copy("/usr/bin/id", folder / "id")
    (tmp_path / "link").symlink_to(tools)
    (tools / "sub").symlink_to(other)
    allowed = Policy(RUN_KINDS, executables=[f"{tools}/*"], own={"root"})
    async with node_in(tmp_path, allowed) as node:

        async def tried(program: str, path: str = "") -> str:
            env = {"PATH": path} if path else {}
            uid = await node.begin(command=pb.Exec(argv=[program, "-u"]), env=env)
            state = await node.until(uid, final=True)
            return state.reason or pb.RunPhase.Name(state.phase)

        good = "RUN_PHASE_SUCCEEDED"
        assert await tried(f"{tools}/id") == good
        assert await tried("id", str(tools)) == good
        assert await tried(f"{tmp_path}/link/id") == good
        assert await tried("id") == "NotAllowed"
        assert await tried("id", str(other)) == "NotAllowed"
        assert await tried(f"{other}/id") == "NotAllowed"
        assert await tried(f"{tools}/sub/id") == "NotAllowed"
        assert await tried(f"{tools}/../other/id") == "NotAllowed"
        assert await tried(f"{tools}/sub/../other/id") == "NotAllowed"
        state = await node.script("sh", source="true")
        assert (state.phase, state.reason) == (pb.RUN_PHASE_REJECTED, "NotAllowed")
        assert "tasks.allowedExecutables" in state.message


def test_links_are_followed_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "usr/bin").mkdir(parents=True)
    program = root / "usr/bin/tool-1"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (root / "bin").symlink_to("/usr/bin")
    (root / "usr/bin/tool").symlink_to("/usr/bin/tool-1")
    (root / "up").symlink_to("../../../../../usr/bin")
    (root / "round").symlink_to("/round")
    (root / "usr/bin/plain").write_text("")
    (root / "usr/bin/folder").mkdir()
    there = str(root)
    assert lookup.locate("tool", "/bin", there) == "/usr/bin/tool"
    assert lookup.locate("/up/tool", "", there) == "/usr/bin/tool"
    assert lookup.executable("/usr/bin/tool", there)
    assert lookup.resolve("/bin/tool", there) == "/usr/bin/tool-1"
    assert lookup.locate("sh", "/bin", there) is None
    assert lookup.locate("plain", "/bin", there) == "/usr/bin/plain"
    assert not lookup.executable("/usr/bin/plain", there)
    assert lookup.locate("folder", "/bin", there) is None
    assert lookup.locate("/usr/bin/..", "", there) is None
    assert lookup.locate("/round/x", "", there) is None
    (root / "etc").mkdir()
    (root / "etc/passwd").symlink_to("/etc/real")
    (root / "etc/real").write_text("here")
    assert lookup.text_of("/etc/passwd", there) == "here"
    assert lookup.text_of("/etc/group", there) == ""


# The host.


@contextlib.asynccontextmanager
async def made_host(folder: Path) -> AsyncIterator[int]:
    """A process in namespaces of its own, with a name, a passwd file and a tool of its own."""
    etc, tool = folder / "passwd", folder / "tool"
    etc.write_text("root:x:0:0::/root:/bin/sh\nhostuser:x:4711:4712::/srv/hostuser:/bin/sh\n")
    tool.write_text("#!/bin/sh\necho tool of the host\n")
    tool.chmod(0o755)
    script = (
        "set -e; mount --make-rprivate /; hostname made-host;"
        f" mount --bind {etc} /etc/passwd; mount -t tmpfs none /opt;"
        f" mkdir /opt/tools; cp {tool} /opt/tools/real; ln -s /opt/tools/real /opt/tool;"
        " echo ready; exec sleep 600"
    )
    unshare = "unshare --mount --uts --ipc --net --pid --fork --mount-proc"
    # As a true host: not among the agent's descendants.
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", f'{unshare} sh -c "$0" & echo $!', script), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    outer = int(await process.stdout.readline())
    try:
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"ready\n"
        (first,) = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        yield int(first)
    finally:
        for child in Path(f"/proc/{outer}/task/{outer}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)  # and with it all of its process namespace
        async with asyncio.timeout(20):
            while (left := processes.inspect(outer)) and not left.zombie:
                await asyncio.sleep(0.02)
            await process.wait()


async def test_a_run_on_the_host_sees_the_host(tmp_path: Path) -> None:
    async with made_host(tmp_path) as pid, node_in(tmp_path, host_pid=pid) as node:
        spaces = "for n in mnt uts ipc net pid; do readlink /proc/self/ns/$n; done"
        state = await node.shell(f"hostname; /opt/tool; {spaces}", host=True)
        assert state.phase == pb.RUN_PHASE_SUCCEEDED, state
        lines = state.preview.decode().splitlines()
        assert lines[:2] == ["made-host", "tool of the host"]
        wanted = [os.readlink(f"/proc/{pid}/ns/{n}") for n in ("mnt", "uts", "ipc", "net", "pid")]
        assert lines[2:] == wanted
        # And one beside it does not.
        state = await node.shell("hostname; ls /opt/tool")
        assert state.preview.decode().splitlines()[0] == socket.gethostname()
        assert state.phase == pb.RUN_PHASE_FAILED


async def test_programs_and_users_are_those_of_the_host(tmp_path: Path) -> None:
    async with made_host(tmp_path) as pid, node_in(tmp_path, host_pid=pid) as node:
        run = {"command": pb.Exec(argv=["tool"]), "env": {"PATH": "/opt"}, "host": True}
        state = await node.until(await node.begin(**run), final=True)
        assert state.preview == b"tool of the host\n"
        state = await node.shell(PRINT_IDS, host=True, user="hostuser")
        assert state.preview.decode().split() == [
            "4711",
            "4712",
            "4712",
            "/srv/hostuser",
            "hostuser",
        ]
        # That user is known there only.
        assert (await node.shell("true", user="hostuser")).reason == "UserNotFound"
        assert (await node.shell("true", user="nobody", host=True)).reason == "UserNotFound"
        run = {"command": pb.Exec(argv=["no-such-program"]), "host": True}
        state = await node.until(await node.begin(**run), final=True)
        assert (state.phase, state.reason) == (pb.RUN_PHASE_FAILED, "CommandNotFound")
        run = {"command": pb.Exec(argv=["/etc/passwd"]), "host": True}
        state = await node.until(await node.begin(**run), final=True)
        assert (state.phase, state.reason) == (pb.RUN_PHASE_FAILED, "NotExecutable")
        state = await node.shell("exit 7", host=True)
        assert (state.reason, state.exit_code) == ("NonZeroExit", 7)
        state = await node.shell("kill -9 $$", host=True)
        assert (state.reason, state.signal) == ("Signalled", 9)


async def test_executables_are_checked_as_the_host_sees_them(tmp_path: Path) -> None:
    allowed = Policy(RUN_KINDS, executables=["/opt/tools/*"], own={"root"}, host=True)
    async with made_host(tmp_path) as pid, node_in(tmp_path, allowed, pid) as node:

        async def tried(program: str) -> pb.RunState:
            run = pb.Exec(argv=[program])
            return await node.until(await node.begin(command=run, host=True), final=True)

        assert (await tried("/opt/tools/real")).preview == b"tool of the host\n"
        # nsenter is not asked for, and not in the list.
        assert (await tried("/opt/tool")).reason == "NotAllowed"
        assert (await tried("nsenter")).reason == "NotAllowed"


@pytest.mark.parametrize("user", ["", "hostuser"])
async def test_scripts_reach_the_host_without_a_file(tmp_path: Path, user: str) -> None:
    async with made_host(tmp_path) as pid, node_in(tmp_path, host_pid=pid) as node:
        source = 'hostname\nid -u\n(echo x >> "$0") 2>&- || echo sealed\n'
        state = await node.script("sh", "-u", source=source, host=True, user=user)
        assert state.phase == pb.RUN_PHASE_SUCCEEDED, state
        assert state.preview.decode().split() == ["made-host", "4711" if user else "0", "sealed"]


@pytest.mark.parametrize("how", ["timeout", "cancel"])
async def test_all_that_a_run_left_on_the_host_is_ended(tmp_path: Path, how: str) -> None:
    """Also what left its session, and whose parent has ended: on the host its mark finds it."""
    async with made_host(tmp_path) as pid, node_in(tmp_path, host_pid=pid) as node:
        text = "(setsid sleep 600 &); trap '' TERM; echo up; sleep 600; sleep 600"
        uid = await node.begin(
            command=pb.Exec(argv=["sh", "-c", text]),
            host=True,
            timeout_seconds=2 if how == "timeout" else 60,
        )
        await node.until(uid, final=False)
        async with asyncio.timeout(20):
            while len(left_of(uid)) < 4:
                await asyncio.sleep(0.02)
        if how == "cancel":
            run = next(s for s in node.states if s.id.task_uid == uid)

            await node.supervisor.cancel([key_of(run.id)])
        state = await node.until(uid, final=True)
        wanted = pb.RUN_PHASE_TIMED_OUT if how == "timeout" else pb.RUN_PHASE_CANCELLED
        assert state.phase == wanted
        assert left_of(uid) == []
        assert processes.inspect(pid) is not None  # and nothing else


async def test_a_host_that_cannot_be_entered_is_said(tmp_path: Path) -> None:
    async with node_in(tmp_path, host_pid=2**22 + 1) as node:
        state = await node.shell("true", host=True)
        assert (state.phase, state.reason) == (pb.RUN_PHASE_FAILED, "NoHostAccess")
        assert "hostAccess" in state.message
