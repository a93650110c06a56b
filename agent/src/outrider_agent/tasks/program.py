"""Runs one program: starts it in a session of its own, reads its output, ends it in time.

Every process of the run is gone when it returns, and the pipe is closed, whatever the program
left behind. Knows no tasks, no journal and no wire: it is told what to start and hands back how it
went.
"""

import asyncio
import errno
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from outrider_agent.core.accounts import Account
from outrider_agent.core.outcome import Cause, Ending, Outcome, start_failure, user_failure
from outrider_agent.core.output import Chunk, Output
from outrider_agent.tasks import lookup, processes

#: Output is handed on at least this often, seconds.
FLUSH_SECONDS = 1.0
#: Bytes read from the pipe at once.
READ_BYTES = 64 * 1024
#: After all processes of a run have ended, its pipe must be at its end within this, seconds.
DRAIN_SECONDS = 2.0
#: How long processes are killed again and again, seconds: one in an uninterruptible wait stays.
KILL_SECONDS = 5.0
#: Between two looks whether a process has ended, where the system does not tell, seconds.
EXIT_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Program:
    """What to start.

    Attributes:
        argv: The program, looked up in PATH of `environment`, and its arguments.
        environment: All of its environment.
        mark: The run's mark; see `processes`.
        timeout: After so many seconds it is ended.
        grace: Seconds between TERM and KILL.
        executable: The file to start where it was found already, else empty.
        account: Whom to become; None: nobody else.
        inherited: Descriptors that it gets besides the usual three.
        everywhere: Look for its processes among all, not only below the agent: it may be in
            another process namespace, whose orphans do not come to us.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    mark: str
    timeout: float
    grace: float
    executable: str = ""
    account: Account | None = None
    inherited: Sequence[int] = ()
    everywhere: bool = False

    @property
    def below(self) -> int | None:
        """Where its processes are looked for; see `processes.members`."""
        return None if self.everywhere else os.getpid()


@dataclass(frozen=True)
class Started:
    """A program that has begun."""

    pid: int
    start: int


@dataclass
class Children:
    """The leaders that are waited for by name; whatever else ends is an orphan.

    Attributes:
        known: Ids of processes whose end somebody waits for.
        starting: Programs that are being started, whose id is not known yet.
        on_start: Called with the id of each, for what is to be done to it from outside.
    """

    known: set[int] = field(default_factory=set)
    starting: int = 0
    on_start: Callable[[int], None] = lambda _: None

    def reap(self, ended: Sequence[int]) -> int:
        """Wait for ended children that nobody else waits for; how many there were.

        Args:
            ended: What `processes.ended_children` found.
        """
        if self.starting:
            return 0  # one of them may be the one that is being started
        count = 0
        for pid in ended:
            if pid not in self.known:
                try:
                    count += os.waitpid(pid, os.WNOHANG)[0] == pid
                except ChildProcessError:
                    continue
        return count


class StartError(Exception):
    """A program could not be started; `outcome` says why."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


async def run_program(
    program: Program,
    output: Output,
    *,
    stop: asyncio.Future[Cause],
    children: Children,
    threads: Executor,
    on_start: Callable[[Started], Awaitable[None]],
    emit: Callable[[Chunk], Awaitable[None]],
) -> Ending:
    """Run a program to its end.

    Args:
        program: What to run.
        output: Takes what it prints.
        stop: Done when the program is to be ended early, with the cause.
        children: Where it is entered while it is ours to wait for.
        threads: For calls that block.
        on_start: Awaited when it has begun; output is read meanwhile.
        emit: Takes chunks of output; may make the program wait.

    Raises:
        StartError: It could not be started.
    """
    process, read_end = await _start(program, children, threads)
    pipe = _Pipe(read_end)
    pump = asyncio.create_task(_pump(pipe, output, emit), name=f"output {process.pid}")
    all_gone = False
    try:
        info = processes.inspect(process.pid)
        await on_start(Started(process.pid, info.start if info else 0))
        ending = await _supervise(program, process.pid, stop, threads)
        all_gone = not ending.stuck
        await _finish_output(pump, output, emit)
        return ending
    finally:
        pump.cancel()
        pipe.close()
        if not all_gone:  # we are cancelled, or the journal failed: nothing of the run may stay
            all_gone = await asyncio.shield(_kill(program, process.pid, threads))
        if all_gone:
            process.wait()  # at once: it has ended
        children.known.discard(process.pid)  # one that is stuck is left to the reaper


async def _undo(
    started: "asyncio.Future[subprocess.Popen[bytes]]",
    program: Program,
    children: Children,
    threads: Executor,
) -> None:
    """End a process that began although its run was cancelled meanwhile."""
    await asyncio.wait([started])
    if started.exception() is None:
        process = started.result()
        children.known.add(process.pid)
        if await _kill(program, process.pid, threads):
            process.wait()
        children.known.discard(process.pid)


async def _start(
    program: Program, children: Children, threads: Executor
) -> tuple["subprocess.Popen[bytes]", int]:
    name = program.argv[0]
    path = program.executable or lookup.locate(name, program.environment.get("PATH", os.defpath))
    if path is None:
        raise StartError(start_failure(name, errno.ENOENT, "not found"))
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    children.starting += 1
    try:
        started = asyncio.get_running_loop().run_in_executor(
            threads, _spawn, program, path, write_end
        )
        try:
            process = await asyncio.shield(started)
        except asyncio.CancelledError:
            # Not to be left half-way: a process that nobody knows of would stay.
            os.close(read_end)
            await asyncio.shield(_undo(started, program, children, threads))
            raise
        children.known.add(process.pid)
        children.on_start(process.pid)
    except OSError as error:
        os.close(read_end)
        if error.errno == errno.EPERM and program.account is not None:
            raise StartError(user_failure(name, program.account.name)) from None
        detail = error.strerror or str(error)
        raise StartError(start_failure(name, error.errno, detail)) from None
    except (ValueError, UnicodeError) as error:
        os.close(read_end)
        raise StartError(start_failure(name, None, str(error))) from None
    finally:
        children.starting -= 1
        os.close(write_end)
    return process, read_end


def _spawn(program: Program, path: str, write_end: int) -> "subprocess.Popen[bytes]":
    account = program.account
    # Both streams share one pipe, so that their order is kept.
    return subprocess.Popen(
        program.argv,
        executable=path,
        stdin=subprocess.DEVNULL,
        stdout=write_end,
        stderr=write_end,
        cwd="/",
        env=dict(program.environment),
        start_new_session=True,
        pass_fds=program.inherited,
        user=account.uid if account else None,
        group=account.gid if account else None,
        extra_groups=account.groups if account else None,
    )


class _Pipe:
    """The end of a pipe that we read, which is closed once.

    Not `loop.connect_read_pipe`: uvloop closes the descriptor in C and then once more as a Python
    file, and in between another thread may have got the same number for a file of its own.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._closed = False

    async def read(self) -> bytes:
        """What is there, at most READ_BYTES; empty at the end."""
        while not self._closed:
            try:
                return os.read(self._fd, READ_BYTES)
            except BlockingIOError:
                await self._readable()
        return b""

    async def _readable(self) -> None:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._fd, readable.set)
        try:
            await readable.wait()
        finally:
            if not self._closed:
                loop.remove_reader(self._fd)

    def close(self) -> None:
        """Close it; again: nothing."""
        if not self._closed:
            self._closed = True
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)


async def _pump(pipe: "_Pipe", output: Output, emit: Callable[[Chunk], Awaitable[None]]) -> None:
    """Read to the end of the pipe."""
    while True:
        try:
            async with asyncio.timeout(FLUSH_SECONDS if output.pending else None):
                data = await pipe.read()
        except TimeoutError:
            chunks = output.flush()
        else:
            if not data:
                return
            chunks = output.feed(data)
        for chunk in chunks:
            await emit(chunk)
            output.handed_on += len(chunk.data)


async def _finish_output(
    pump: asyncio.Task[None], output: Output, emit: Callable[[Chunk], Awaitable[None]]
) -> None:
    """Read what is left in the pipe; a process that escaped may hold it open for ever."""
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            await pump
            for chunk in output.flush(last=True):
                await emit(chunk)
                output.handed_on += len(chunk.data)
    except TimeoutError:
        output.give_up()


async def _supervise(
    program: Program, pid: int, stop: asyncio.Future[Cause], threads: Executor
) -> Ending:
    """Wait for the leader's end, or bring it about; then end all that it left."""
    gone = asyncio.ensure_future(exited(pid))
    cause = Cause.ITSELF
    try:
        ends: set[asyncio.Future[Any]] = {gone, stop}
        await asyncio.wait(ends, timeout=program.timeout, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            cause = stop.result() if stop.done() else Cause.TIMEOUT
            await _terminate(program, pid, gone, threads)
        all_gone = await _kill(program, pid, threads)
        if not gone.done():
            await asyncio.wait({gone}, timeout=1.0)
        exit_code, number = gone.result() if gone.done() else (None, 0)
        return Ending(cause, exit_code, number, stuck=not all_gone)
    finally:
        gone.cancel()


async def _terminate(
    program: Program, pid: int, gone: "asyncio.Future[tuple[int | None, int]]", threads: Executor
) -> None:
    """TERM for all, then time for the leader to end."""
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(
        threads,
        lambda: processes.signal_all(program.mark, pid, signal.SIGTERM, below=program.below),
    )
    await asyncio.wait({gone}, timeout=program.grace)


async def _kill(program: Program, leader: int, threads: Executor) -> bool:
    """Kill what is there of a run whose leader was not waited for yet."""
    return await asyncio.get_running_loop().run_in_executor(
        threads,
        lambda: processes.kill_all(program.mark, leader, seconds=KILL_SECONDS, below=program.below),
    )


async def exited(pid: int) -> tuple[int | None, int]:
    """Wait for the end of a child without reaping it: its id stays taken till we say so.

    Returns:
        Its exit code, None if a signal ended it, and the signal's number, else 0.
    """
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(pid)
    except OSError:  # kernels before 5.3, or a strict seccomp profile
        # Not in a thread: a few long runs would take all of them, and none could be ended.
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:  # noqa: ASYNC110, ASYNC222 - nothing tells of it, and the call does not wait
            await asyncio.sleep(EXIT_POLL_SECONDS)
    else:
        readable = asyncio.Event()
        loop.add_reader(fd, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
    status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - it has ended
    assert status is not None
    if status.si_code == os.CLD_EXITED:
        return status.si_status, 0
    return None, status.si_status
