"""Starts a plug-in's process with its two pipes, its user and its limits.

The process is our own small launcher first, see there: it becomes the plug-in, or says why not.
Blocks: to be called in a thread.
"""

import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from outrider_agent.core.accounts import Account
from outrider_agent.core.outcome import start_failure
from outrider_agent.plugins import launcher
from outrider_agent.tasks import processes

#: How long it may take to become the plug-in, seconds.
START_SECONDS: Final = 15.0
#: Most descriptors a plug-in may open: its leak is not to be the node's.
DESCRIPTORS: Final = 4096


class SpawnError(Exception):
    """A plug-in could not be started; a sentence that says why."""


@dataclass(frozen=True)
class Job:
    """What to start.

    Attributes:
        executable: The program.
        argv: The name it goes by, and its arguments.
        environment: All of it.
        directory: Its working directory.
        account: Whom to become; None: nobody else.
        cgroups: Files that it is entered in.
        address_bytes: Bound of its address space; 0: none.
    """

    executable: Path
    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: Path
    account: Account | None
    cgroups: Sequence[str]
    address_bytes: int


@dataclass(frozen=True)
class Spawned:
    """A plug-in's process, and our ends of its pipes."""

    process: "subprocess.Popen[bytes]"
    tasks: int
    records: int
    prints: int

    def close(self) -> None:
        """Close our ends."""
        for fd in (self.tasks, self.records, self.prints):
            os.close(fd)


def spawn(job: Job) -> Spawned:
    """Start a plug-in.

    Raises:
        SpawnError: It could not be started; nothing is left of it.
    """
    pipes: list[int] = []
    try:
        for _ in range(4):
            pipes += os.pipe2(os.O_CLOEXEC)
    except OSError as error:
        for fd in pipes:
            os.close(fd)
        raise SpawnError(f"there is no room for its pipes: {error.strerror}") from None
    tasks, my_tasks, my_records, records, my_prints, prints, my_status, status = pipes
    theirs = [tasks, records, prints, status]
    spawned = None
    try:
        process = _launch(job, tasks, records, prints, status)
        for fd in theirs:
            os.close(fd)
        theirs.clear()
        problem = _wait(my_status)
        if problem is not None:
            process.kill()
            process.wait()
            raise SpawnError(_sentence(job, problem))
        spawned = Spawned(process, my_tasks, my_records, my_prints)
        return spawned
    except (OSError, ValueError) as error:
        raise SpawnError(f"could not be started: {error}") from None
    finally:
        os.close(my_status)
        for fd in theirs + ([] if spawned else [my_tasks, my_records, my_prints]):
            os.close(fd)


def _launch(
    job: Job, tasks: int, records: int, prints: int, status: int
) -> "subprocess.Popen[bytes]":
    account = job.account
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, DESCRIPTORS)]
    if job.address_bytes:
        limits.append((resource.RLIMIT_AS, job.address_bytes))
    description = json.dumps(
        {
            "descriptors": [tasks, records],
            "cgroups": list(job.cgroups),
            "limits": limits,
            "directory": str(job.directory),
            "ids": [account.uid, account.gid, account.groups] if account else None,
            "path": str(job.executable),
            "argv": list(job.argv),
            "environment": dict(job.environment),
        }
    )
    fd = os.memfd_create("plugin", os.MFD_CLOEXEC)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(description.encode())
        return subprocess.Popen(
            [sys.executable, "-I", "-S", launcher.__file__, str(fd), str(status)],
            stdin=subprocess.DEVNULL,
            stdout=prints,
            stderr=prints,
            cwd="/",
            # Its mark is there from the first moment; nothing else, for the launcher may be root.
            env={processes.MARK: job.environment[processes.MARK]},
            start_new_session=True,
            pass_fds=(fd, tasks, records, status),
        )
    finally:
        os.close(fd)


def _wait(status: int) -> dict[str, object] | None:
    """What went wrong, None once it is the plug-in."""
    data = b""
    while True:
        ready, _, _ = select.select([status], [], [], START_SECONDS)
        if not ready:
            return {"step": "start", "errno": 0, "text": f"nothing for {START_SECONDS:g} s"}
        piece = os.read(status, 4096)
        if not piece:
            break
        data += piece
    found: dict[str, object] | None = json.loads(data) if data else None
    return found


def _sentence(job: Job, problem: dict[str, object]) -> str:
    step, number, text = problem["step"], problem["errno"], problem["text"]
    if step == "become its user" and job.account is not None:
        return (
            f"the agent may not become user {job.account.name}: its container lacks the "
            "capabilities SETUID and SETGID, or is not root"
        )
    if step != "start":
        return f"it could not {step}: {text}"
    assert isinstance(number, int)
    return start_failure(str(job.executable), number, str(text)).message
