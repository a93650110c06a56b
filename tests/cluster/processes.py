"""Starting, finding, waiting for and killing the cluster's processes.

Keeps a record of every daemon under STATE/run as "pid start-time", because pids are recycled
soon. Knows nothing of machines or Kubernetes.
"""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from cluster.errors import ClusterError
from cluster.layout import LOGS, NAME, STATE

T = TypeVar("T")
R = TypeVar("R")
MARK = "OUTRIDER_CLUSTER"
"""In the environment of every daemon, so that `down --check` finds strays without cgroups."""

_BEGIN = time.monotonic()


def say(message: str) -> None:
    """One line about what is going on, with the time since the command began."""
    print(f"[{time.monotonic() - _BEGIN:6.2f} s] {message}", file=sys.stderr, flush=True)


def run(
    *argv: object, stdin: str | None = None, check: bool = True, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and keep what it prints.

    Raises:
        ClusterError: it failed (unless check is off) or took longer than timeout seconds.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"took more than {timeout:.0f} s: {' '.join(words)}") from None
    if check and done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-15:]
        raise ClusterError(
            f"exit code {done.returncode} from {' '.join(words)[:400]}\n" + "\n".join(said)
        )
    return done


def wait_for(
    what: str,
    condition: Callable[[], T],
    timeout: float = 90.0,
    every: float = 0.05,
    alive: Iterable[str] = (),
) -> T:
    """Poll until the condition is true and return its value.

    Args:
        what: what is awaited, for the error.
        condition: anything true ends the wait.
        timeout: seconds.
        every: seconds between two looks.
        alive: daemons without which waiting is in vain.

    Raises:
        ClusterError: the time is over, or one of the daemons has died.
    """
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        for name in alive:
            if not read_pid(name):
                raise ClusterError(f"{name} died while waiting for {what}:\n{log_tail(name)}")
        if time.monotonic() > end:
            raise ClusterError(f"not there after {timeout:.0f} s: {what}")
        time.sleep(every)


def parallel(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Do the same to all items at once; the first error is raised."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(work, items))


def log_tail(name: str, lines: int = 8) -> str:
    """The last lines of a daemon's log and where the rest is."""
    log = LOGS / f"{name}.log"
    try:
        return "\n".join([*log.read_text(errors="replace").splitlines()[-lines:], f"({log})"])
    except OSError:
        return f"(no log at {log})"


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def start_time(pid: int) -> str | None:
    """When a process began: tells a recycled pid from the one that was meant."""
    fields = _stat(pid)
    return fields[19] if fields else None


def is_zombie(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has collected it yet."""
    fields = _stat(pid)
    return not fields or fields[0] in "ZX"


def program(pid: int) -> str | None:
    """Short name of the program that a process runs."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None


def write_pid(name: str, pid: int) -> None:
    """Record a daemon under a name."""
    record = STATE / "run" / name
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(f"{pid} {start_time(pid)}")


def read_pid(name: str) -> int | None:
    """The pid recorded under a name if that very process is still there."""
    try:
        pid, started = (STATE / "run" / name).read_text().split()
    except (OSError, ValueError):
        return None
    return int(pid) if start_time(int(pid)) == started else None


def start(
    name: str, argv: Sequence[object], environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a daemon in a session of its own, its output in LOGS/<name>.log."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / f"{name}.log").open("ab") as out:
        return subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME": "/root",
                "LANG": "C.UTF-8",
                MARK: NAME,
                **(environment or {}),
            },
        )


def only_child(process: subprocess.Popen[bytes], name: str) -> int:
    """Pid of the one process that a wrapper (unshare, nsenter) forks, as soon as it is there."""

    def first() -> int | None:
        try:
            listing = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        except OSError:
            listing = ""
        if not listing and process.poll() is not None:
            raise ClusterError(f"{name} ended with {process.returncode}:\n{log_tail(name)}")
        return int(listing.split()[0]) if listing else None

    pid = wait_for(f"start of {name}", first, 20, 0.01)
    assert pid
    return pid


def kill(name: str) -> bool:
    """SIGKILL what is recorded under a name and wait for its end; False if it was not there."""
    pid = read_pid(name)
    if pid:
        os.kill(pid, signal.SIGKILL)
        wait_for(f"end of {name}", lambda: read_pid(name) is None, 20, 0.01)
    (STATE / "run" / name).unlink(missing_ok=True)
    return bool(pid)
