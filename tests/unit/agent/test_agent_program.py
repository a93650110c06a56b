"""Programs: real processes that fork, flood, hide, hang and refuse to end."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from outrider_agent.core.outcome import Cause, Ending
from outrider_agent.core.output import Chunk, Output
from outrider_agent.tasks import processes
from outrider_agent.tasks import program as running_programs
from outrider_agent.tasks.program import Children, Program, Started, StartError, run_program

PATH = os.environ["PATH"]


@dataclass
class Bench:
    """What it takes to run programs, and what came of them."""

    mark: str
    threads: ThreadPoolExecutor
    children: Children = field(default_factory=Children)
    chunks: list[Chunk] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    output: Output = field(default_factory=lambda: Output(preview_bytes=1000, max_bytes=20 << 20))
    stop: "asyncio.Future[Cause]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def run(
        self, argv: Sequence[str], *, timeout: float = 20.0, grace: float = 0.3
    ) -> Ending:
        environment = {processes.MARK: self.mark, "PATH": PATH}
        program = Program(argv, environment, self.mark, timeout, grace)

        async def on_start(started: Started) -> None:
            self.started.append(started)

        return await run_program(
            program,
            self.output,
            stop=self.stop,
            children=self.children,
            threads=self.threads,
            on_start=on_start,
            emit=self.emit,
        )

    async def emit(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)

    async def shell(self, script: str, *, timeout: float = 20.0, grace: float = 0.3) -> Ending:
        return await self.run(["sh", "-c", script], timeout=timeout, grace=grace)

    def left(self) -> list[processes.ProcessInfo]:
        """Processes that bear the mark, wherever they are."""
        return processes.members(self.mark, None, below=None)


@pytest.fixture(autouse=True, scope="module")
def _subreaper() -> None:
    assert processes.become_subreaper()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    with ThreadPoolExecutor(4) as threads:
        made = Bench(f"{tmp_path.name}-{time.time_ns()}/1", threads)
        yield made
        assert made.left() == [], "processes of a run are left"
        assert made.children.known == set()
        assert made.children.starting == 0
        # Orphans became our children: so are they waited for.
        made.children.reap(list(processes.ended_children()))
        assert list(processes.ended_children()) == []


async def test_exit_code_and_output_of_both_streams_in_order(bench: Bench) -> None:
    ending = await bench.shell("echo one; echo two >&2; echo three; exit 3")
    assert ending == Ending(exit_code=3)
    assert bench.output.preview == b"one\ntwo\nthree\n"


async def test_a_signal_is_told(bench: Bench) -> None:
    assert await bench.shell("kill -SEGV $$") == Ending(signal=signal.SIGSEGV)


async def test_it_has_a_session_of_its_own_no_input_and_the_root_directory(bench: Bench) -> None:
    script = "pwd; cat; ps -o pid=,pgid=,sid= -p $$; echo $$; ls -l /proc/$$/fd"
    assert (await bench.shell(script)).exit_code == 0
    lines = bench.output.preview.decode().splitlines()
    assert lines[0] == "/"
    pid = lines[2].strip()
    assert lines[1].split() == [pid, pid, pid]
    # No descriptor of the agent is handed on: input, output, errors, and perhaps the shell's own.
    assert "/dev/null" in bench.output.preview.decode()
    assert bench.started[0].pid == int(pid)
    assert bench.started[0].start > 0


async def test_no_descriptor_is_inherited(bench: Bench) -> None:
    opened = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(opened, True)
    try:
        await bench.shell("ls -l /proc/self/fd")
    finally:
        os.close(opened)
    assert b"/dev/zero" not in bench.output.preview


async def test_the_timeout_ends_it_with_term(bench: Bench) -> None:
    began = time.monotonic()
    ending = await bench.shell("sleep 60", timeout=0.3)
    assert ending.cause is Cause.TIMEOUT
    assert ending.signal == signal.SIGTERM
    assert time.monotonic() - began < 5


async def test_one_that_ignores_term_is_killed_after_the_grace(bench: Bench) -> None:
    began = time.monotonic()
    ending = await bench.shell("trap '' TERM; echo ready; sleep 60; sleep 60", timeout=0.5)
    assert (ending.cause, ending.signal, ending.stuck) == (Cause.TIMEOUT, signal.SIGKILL, False)
    assert 0.8 <= time.monotonic() - began < 6


async def test_one_that_cleans_up_on_term_has_the_time(bench: Bench) -> None:
    script = "trap 'echo cleaned; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
    ending = await bench.shell(script, timeout=0.5, grace=5)
    assert (ending.cause, ending.exit_code) == (Cause.TIMEOUT, 7)
    # The shell may say of its own child that it was terminated.
    assert bench.output.preview.endswith(b"cleaned\n")


async def test_a_cancel_ends_it(bench: Bench) -> None:
    running = asyncio.ensure_future(bench.shell("echo ready; sleep 60"))
    while not bench.started:
        await asyncio.sleep(0.01)
    bench.stop.set_result(Cause.CANCEL)
    assert (await running).cause is Cause.CANCEL


async def test_being_cancelled_ourselves_leaves_nothing(bench: Bench) -> None:
    running = asyncio.ensure_future(bench.shell("sleep 60 & sleep 60"))
    while not bench.left():
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_being_cancelled_while_it_starts_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process begins in a thread: it is there before we hear of it, or even after."""
    spawning, go = asyncio.Event(), threading.Event()
    loop, spawn = asyncio.get_running_loop(), running_programs._spawn

    def slow(*arguments: Any) -> Any:
        loop.call_soon_threadsafe(spawning.set)
        assert go.wait(10)
        return spawn(*arguments)

    monkeypatch.setattr(running_programs, "_spawn", slow)
    running = asyncio.ensure_future(bench.shell("sleep 60 & sleep 60"))
    await spawning.wait()
    running.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_background_child_that_holds_the_pipe_does_not_hang_the_run(bench: Bench) -> None:
    began = time.monotonic()
    ending = await bench.shell("sleep 60 & echo done")
    assert ending == Ending(exit_code=0)
    assert bench.output.preview == b"done\n"
    assert time.monotonic() - began < 5


async def test_output_that_nobody_takes_in_time_is_said_to_be_cut_short(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_programs, "DRAIN_SECONDS", 0.2)

    async def never(chunk: Chunk) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(bench, "emit", never)
    assert await bench.shell("head -c 300000 /dev/zero") == Ending(exit_code=0)
    assert bench.output.truncated


async def test_output_that_was_taken_is_whole(bench: Bench) -> None:
    assert await bench.shell("head -c 300000 /dev/zero") == Ending(exit_code=0)
    assert not bench.output.truncated
    assert sum(len(chunk.data) for chunk in bench.chunks) == 300_000


async def test_a_child_in_a_session_of_its_own_is_ended_too(bench: Bench) -> None:
    """Its parent has gone, its group is its own: only its mark tells."""
    began = time.monotonic()
    ending = await bench.shell(
        "setsid sh -c 'sleep 60' & (setsid sleep 61 &); sleep 0.3; echo done"
    )
    assert ending == Ending(exit_code=0)
    assert time.monotonic() - began < 5


async def test_a_child_that_hides_its_mark_is_ended_with_its_ancestors(bench: Bench) -> None:
    ending = await bench.shell("env -i setsid sleep 3600 & echo $!; sleep 60", timeout=0.5)
    assert ending.cause is Cause.TIMEOUT
    hidden = int(bench.output.preview.split()[0])
    found = processes.inspect(hidden)
    assert found is None or found.zombie


async def test_an_orphan_that_hides_its_mark_is_ended_with_its_group(bench: Bench) -> None:
    assert await bench.shell("(env -i sleep 3600 & echo $!)") == Ending(exit_code=0)
    found = processes.inspect(int(bench.output.preview))
    assert found is None or found.zombie


async def test_many_forks_are_all_ended(bench: Bench) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9 10; do (sh -c 'sleep 60 & sleep 60' &); done; sleep 60"
    ending = await bench.shell(script, timeout=0.7)
    assert ending.cause is Cause.TIMEOUT


async def test_a_flood_is_counted_and_cut(bench: Bench) -> None:
    bench.output = Output(preview_bytes=10, max_bytes=1 << 20)
    ending = await bench.shell("head -c 10485760 /dev/zero | tr '\\0' x")
    assert ending == Ending(exit_code=0)
    assert bench.output.total == 10 << 20
    assert bench.output.truncated
    assert sum(len(c.data) for c in bench.chunks) == 1 << 20
    assert bench.output.preview == b"x" * 10


async def test_an_endless_flood_ends_at_its_timeout(bench: Bench) -> None:
    bench.output = Output(preview_bytes=10, max_bytes=1000)
    assert (await bench.run(["yes"], timeout=0.5)).cause is Cause.TIMEOUT
    assert bench.output.total > 1000


async def test_output_comes_while_it_runs(bench: Bench) -> None:
    running = asyncio.ensure_future(bench.shell("echo early; sleep 60"))
    async with asyncio.timeout(10):
        while not bench.chunks:
            await asyncio.sleep(0.02)
    assert bench.chunks[0].data == b"early\n"
    assert not running.done()
    bench.stop.set_result(Cause.CANCEL)
    await running


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no-such-program", "CommandNotFound"),
        ("/no/such/program", "CommandNotFound"),
        ("{tmp}/plain", "NotExecutable"),
        ("{tmp}/no-interpreter", "CommandNotFound"),
        ("{tmp}/rubbish", "NotExecutable"),
        ("{tmp}", "NotExecutable"),
    ],
)
async def test_what_cannot_be_started(bench: Bench, tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    (tmp_path / "no-interpreter").write_text("#!/no/such/interpreter\n")
    (tmp_path / "rubbish").write_bytes(b"\x01\x02\x03\x04")
    for executable in ("no-interpreter", "rubbish"):
        (tmp_path / executable).chmod(0o755)
    with pytest.raises(StartError) as caught:
        await bench.run([name.format(tmp=tmp_path)])
    assert caught.value.outcome.reason == reason
    assert bench.started == []


async def test_programs_are_looked_up_in_the_path_of_the_run(bench: Bench, tmp_path: Path) -> None:
    program = tmp_path / "mine"
    program.write_text("#!/bin/sh\necho mine\n")
    program.chmod(0o755)
    with pytest.raises(StartError):
        await bench.run(["mine"])


async def test_descriptors_and_threads_do_not_leak(bench: Bench) -> None:
    await bench.run(["true"])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        await bench.run(["true"])
        with pytest.raises(StartError):
            await bench.run(["no-such-program"])
    assert len(os.listdir("/proc/self/fd")) == before


async def test_without_pidfd_no_thread_is_held(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, flags: int = 0) -> int:
        raise OSError(38, "not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with ThreadPoolExecutor(1) as bench.threads:
        assert await bench.shell("exit 4") == Ending(exit_code=4)
        began = time.monotonic()
        assert (await bench.shell("sleep 15", timeout=0.3)).cause is Cause.TIMEOUT
        assert time.monotonic() - began < 10, "nothing could end it"


def test_a_reused_process_id_is_not_hit() -> None:
    own = processes.inspect(os.getpid())
    assert own is not None
    other = processes.ProcessInfo(own.pid, own.parent, own.group, own.zombie, own.start + 1)
    processes.send(other, signal.SIGKILL)  # were it sent, this test would not come to its end
    assert not processes.same_process(own.pid, own.start + 1, processes.boot_id())
    assert not processes.same_process(own.pid, own.start, "another boot")
    assert processes.same_process(own.pid, own.start, processes.boot_id())


def test_names_with_brackets_and_spaces_do_not_confuse(tmp_path: Path) -> None:
    odd = tmp_path / "a) R 1 2 3 (b"
    odd.symlink_to("/bin/sleep")
    pid = os.posix_spawn(str(odd), [str(odd), "60"], {})
    try:
        found = processes.inspect(pid)
        assert found is not None
        assert found.parent == os.getpid()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_only_orphans_are_reaped() -> None:
    """The leader of a run is waited for by its run, and one that is being started by its start."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    while pid not in processes.ended_children():
        time.sleep(0.01)
    ended = list(processes.ended_children())
    assert Children(known={pid}).reap([pid]) == 0
    assert Children(starting=1).reap(ended) == 0
    assert Children().reap([pid]) == 1
    assert Children().reap([pid]) == 0
