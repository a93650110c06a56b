"""Finds and ends the processes of a run, also those that left its group.

A run's processes are those of its process group, the descendants of its leader, and all that
carry its mark in their environment: a process that called setsid and whose parent has ended is
found by the mark alone. Reads /proc of the agent's own pid namespace, never the host's. Signals
go by pidfd, so that a process id that was reused is not hit.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from outrider_runtime.logs import get_logger

log = get_logger("outrider.tasks")

#: Names the run that a process belongs to; see `mark_for`.
MARK: Final = "OUTRIDER_RUN"
#: Only so much of a process's environment is searched, bytes: the mark comes first.
_ENVIRONMENT_BYTES: Final = 1024 * 1024
#: Between two rounds of killing, seconds.
_ROUND_SECONDS: Final = 0.02
_PR_SET_CHILD_SUBREAPER: Final = 36
_PROC: Final = Path("/proc")


@dataclass(frozen=True)
class ProcessInfo:
    """One process.

    Attributes:
        pid: Its id.
        parent: Its parent's.
        group: Its process group's.
        zombie: It has ended, and its parent has not asked how.
        start: When it began, clock ticks after boot.
    """

    pid: int
    parent: int
    group: int
    zombie: bool
    start: int


def boot_id() -> str:
    """Names the boot of the system; empty where the system does not tell."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def inspect(pid: int) -> ProcessInfo | None:
    """What is known of a process; None if there is none of that id."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The second field is the program's name in parentheses, and may hold anything.
    fields = stat[stat.rfind(b")") + 2 :].split()
    return ProcessInfo(
        pid=pid,
        parent=int(fields[1]),
        group=int(fields[2]),
        zombie=fields[0] in (b"Z", b"X"),
        start=int(fields[19]),
    )


def scan() -> list[ProcessInfo]:
    """All processes of this pid namespace."""
    found = (inspect(int(name)) for name in os.listdir(_PROC) if name.isdigit())  # noqa: PTH208 - one entry a process: speed counts
    return [info for info in found if info is not None]


def descendants(processes: Iterable[ProcessInfo], root: int) -> set[int]:
    """Ids of all processes below `root`, without it."""
    children: dict[int, list[int]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    todo = [root]
    while todo:
        for child in children.get(todo.pop(), ()):
            if child not in found:
                found.add(child)
                todo.append(child)
    return found


def mark_for(run: object, node: str) -> str:
    """The mark of a run. Several nodes may share one system: it is the node's own run only."""
    return f"{run}@{node}"


def mark_of(pid: int) -> str | None:
    """The run that a process says it belongs to; None without a mark, or if we may not look."""
    try:
        with (_PROC / str(pid) / "environ").open("rb") as file:
            environment = file.read(_ENVIRONMENT_BYTES)
    except OSError:
        return None
    prefix = f"{MARK}=".encode()
    for entry in environment.split(b"\0"):
        if entry.startswith(prefix):
            return entry[len(prefix) :].decode("utf-8", "replace")
    return None


def members(mark: str, leader: int | None, *, below: int | None) -> list[ProcessInfo]:
    """The living processes of a run.

    Args:
        mark: The run's mark.
        leader: Its leader, if that is surely still its (alive, or not waited for).
        below: Look for the mark only among the descendants of this process; None: everywhere.
    """
    everything = scan()
    family = descendants(everything, leader) if leader else set()
    marked = descendants(everything, below) if below else {p.pid for p in everything}
    own = os.getpid()
    return [
        p
        for p in everything
        if not p.zombie
        and p.pid != own
        and (
            (leader is not None and leader in (p.group, p.pid))
            or p.pid in family
            or (p.pid in marked and mark_of(p.pid) == mark)
        )
    ]


def send(process: ProcessInfo, number: signal.Signals) -> None:
    """Send a signal to a process, unless it has ended; never to a later one of the same id."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    except OSError:
        _send_by_id(process, number)  # kernels before 5.3, or a strict seccomp profile
        return
    try:
        now = inspect(process.pid)
        if now is not None and now.start == process.start:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
    finally:
        os.close(fd)


def _send_by_id(process: ProcessInfo, number: signal.Signals) -> None:
    now = inspect(process.pid)
    if now is not None and now.start == process.start:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def signal_all(mark: str, leader: int | None, number: signal.Signals, *, below: int | None) -> int:
    """Send a signal to all processes of a run; how many there were. May block. See `members`."""
    found = members(mark, leader, below=below)
    for process in found:
        _send_logged(process, number)
    return len(found)


def kill_all(mark: str, leader: int | None, *, seconds: float, below: int | None) -> bool:
    """Kill all processes of a run until none is left; False if some are after so long. Blocks.

    Args:
        mark: The run's mark.
        leader: See `members`.
        seconds: How long to go on.
        below: See `members`.
    """
    end = time.monotonic() + seconds
    while found := members(mark, leader, below=below):
        for process in found:
            _send_logged(process, signal.SIGKILL)
        if time.monotonic() >= end:
            return False
        time.sleep(_ROUND_SECONDS)  # in a thread of its own: the kernel needs a moment
    return True


def _send_logged(process: ProcessInfo, number: signal.Signals) -> None:
    try:
        send(process, number)
    except PermissionError:
        log.warning("a run's process may not be signalled", pid=process.pid, signal=number.name)


def same_process(pid: int, start: int, boot: str) -> bool:
    """Whether a process noted earlier, perhaps by an earlier agent, is still there."""
    if boot != boot_id():
        return False
    found = inspect(pid)
    return found is not None and found.start == start


def become_subreaper() -> bool:
    """Have orphans of our runs become our children, so that they can be found and waited for.

    Returns:
        Whether the system agreed; without it orphans are found among all processes less surely.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def ended_children() -> Iterator[int]:
    """Ids of our children that have ended and that nobody waited for."""
    own = os.getpid()
    return (p.pid for p in scan() if p.parent == own and p.zombie)
