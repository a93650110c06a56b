"""A small program that owns processes, so that none of them outlives who asked for them.

Why it exists: tests and demos start servers, and tests get killed. Every process here dies with its
supervisor (the kernel sees to it), and the supervisor ends when its owner is gone, however that
went: it holds one end of a socket whose other end the owner has, and reads its end of file. It then
kills all that descends from it, also what has moved to a session of its own, and removes the
folder.

Run as a script with nothing but the standard library, to start fast; `supervised.py` speaks to it.
It must not know what it runs, and never restarts anything.

Requests and answers are lines of JSON. Requests: {"op": "start", "name", "argv", "env", "cwd"},
{"op": "signal", "name", "signal"}, {"op": "status"}, {"op": "close"}. An answer has "error" if
refused.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG_BYTES = 64 * 1024 * 1024
LOG_CHECK_SECONDS = 30.0
KILL_SECONDS = 20.0
REQUEST_BYTES = 4 * 1024 * 1024
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """The processes, by name, and what a request does to them."""

    def __init__(self, folder: Path) -> None:
        self._logs = folder / "log"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.closing = asyncio.Event()

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request and return its answer."""
        operation = request.get("op")
        try:
            if operation == "start":
                return self._start(request)
            if operation == "signal":
                return self._signal(request["name"], request["signal"])
            if operation == "status":
                return {"processes": self._status()}
            if operation == "close":
                self.closing.set()
                return {}
        except (OSError, KeyError, TypeError, ValueError, subprocess.SubprocessError) as error:
            return {"error": f"{operation}: {type(error).__name__}: {error}"}
        return {"error": f"unknown operation {operation!r}"}

    def _start(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["name"]
        old = self._processes.get(name)
        if old is not None and old.returncode is None:
            return {"error": f"{name} is running already, as process {old.pid}"}
        with (self._logs / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                request["argv"],
                env=request.get("env"),
                cwd=request.get("cwd"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Set before exec: a program that does it (setpriv) would leave a gap. There is
                # one thread here, so that running Python between fork and exec is safe.
                preexec_fn=_die_with_parent(os.getpid()),  # noqa: PLW1509
            )
        return {"pid": self._processes[name].pid}

    def _signal(self, name: str, number: int) -> dict[str, Any]:
        process = self._processes[name]
        if process.returncode is not None:
            return {"error": f"{name} has ended with {process.returncode}"}
        os.kill(process.pid, number)
        return {}

    def _status(self) -> dict[str, Any]:
        return {
            name: {"pid": process.pid, "code": process.returncode}
            for name, process in self._processes.items()
        }

    def reap(self) -> None:
        """Collect every child that has ended, orphans of our processes included."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for process in self._processes.values():
                if process.pid == pid and process.returncode is None:
                    process.returncode = os.waitstatus_to_exitcode(status)

    def kill_all(self) -> None:
        """Kill all that descends from here: as parents die, their children become ours."""
        end = time.monotonic() + KILL_SECONDS
        while children := _children():
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.reap()
            if time.monotonic() > end:
                raise TimeoutError(f"processes {children} do not die")
            time.sleep(0.005)

    async def bound_logs(self) -> None:
        """Empty a log that has grown too large; the writers append, so that they go on well."""
        while True:
            await asyncio.sleep(LOG_CHECK_SECONDS)
            for log in self._logs.iterdir():
                if log.stat().st_size > LOG_BYTES:
                    os.truncate(log, 0)


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _die_with_parent(parent: int) -> Callable[[], None]:
    """Return what a child does before exec, so that the kernel kills it if its parent dies."""

    def set_up() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            os.kill(os.getpid(), signal.SIGKILL)

    return set_up


def _children() -> list[int]:
    pid = os.getpid()
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def _converse(
    supervisor: Supervisor, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            writer.write(json.dumps(supervisor.handle(json.loads(line))).encode() + b"\n")
            await writer.drain()
    writer.close()


async def _serve(supervisor: Supervisor, descriptor: int, *, listening: bool) -> None:
    """Answer requests until told to close, or until the owner's end of the socket is closed."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGCHLD, supervisor.reap)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.closing.set)
    connection = socket.socket(fileno=descriptor)
    logs = asyncio.create_task(supervisor.bound_logs())
    talks: set[asyncio.Task[None]] = set()
    if listening:
        server = await asyncio.start_unix_server(
            lambda reader, writer: _converse(supervisor, reader, writer),
            sock=connection,
            limit=REQUEST_BYTES,
        )
        await supervisor.closing.wait()
        server.close()
    else:
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=REQUEST_BYTES)
        talk = asyncio.create_task(_converse(supervisor, reader, writer))
        talks.add(talk)
        talk.add_done_callback(lambda _: supervisor.closing.set())
        await supervisor.closing.wait()
    logs.cancel()
    # The answer to "close" is on its way already; what is cut off here has nobody who waits.
    for talk in talks:
        talk.cancel()
    loop.remove_signal_handler(signal.SIGCHLD)


def main() -> None:
    """Serve one folder; see the module's description."""
    parser = argparse.ArgumentParser(description="own processes; used by cluster.supervised")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--descriptor", type=int, required=True, help="of the inherited socket")
    parser.add_argument("--listening", action="store_true", help="serve many; live until closed")
    parser.add_argument("--keep", action="store_true", help="do not remove the folder at the end")
    arguments = parser.parse_args()
    # Orphans of our processes become our children instead of init's, so that they can be found.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    supervisor = Supervisor(arguments.folder)
    try:
        asyncio.run(_serve(supervisor, arguments.descriptor, listening=arguments.listening))
    finally:
        supervisor.kill_all()
        if not arguments.keep:
            shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
