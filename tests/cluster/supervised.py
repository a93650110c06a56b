"""Processes that cannot outlive their owner, and the ports they listen on.

Why it exists: the control plane, Kafka, servers and agents of tests and demos run as plain
processes of this machine, and must be gone when their owner is: at the end of a block, at Ctrl-C,
and after a kill -9 of the owner (see `supervisor.py`, which holds them). It must not know what the
processes are.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from cluster import supervisor
from cluster.errors import ClusterError

CLOSE_SECONDS = 30.0
STOP_SECONDS = 10.0
LOG_LINES = 15
SOCKET = "supervisor.sock"
# Below the range that the kernel takes ports of outgoing connections from, so that a port stays
# ours while its process is being restarted.
PORTS = range(20000, 32000)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port of `host` that nobody listens on at this moment.

    Another process may still take it before its user does: check with `Supervised.wait_listening`.
    """
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return port


def wait_for(what: str, check: Callable[[], bool], seconds: float, every: float = 0.02) -> None:
    """Poll until `check` holds.

    Raises:
        ClusterError: it did not within `seconds`.
    """
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise ClusterError(f"not within {seconds:.0f} s: {what}")
        time.sleep(every)


@dataclass(frozen=True)
class Status:
    """A process: its pid, and its exit code (negative: the signal), None while it runs."""

    pid: int
    code: int | None


class Supervised:
    """A folder and the processes that run for it, by name.

    Made by `start`: they end with this process, or at `close`. Made by `start(detached=True)`:
    they live until somebody who calls `attach` closes them. Thread-safe. As a context manager it
    closes at the end.
    """

    def __init__(
        self,
        folder: Path,
        connection: socket.socket,
        process: subprocess.Popen[bytes] | psutil.Process,
    ) -> None:
        self.folder = folder
        self._connection = connection
        self._file = connection.makefile("rb")
        self._process = process
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def start(cls, folder: Path, *, detached: bool = False, keep: bool = False) -> Self:
        """Start a supervisor for a folder.

        Args:
            folder: of the state; made if need be. What a killed supervisor left in it is removed.
            detached: let it live on when this process ends.
            keep: leave the folder in place at the end; else it is removed.

        Raises:
            ClusterError: a supervisor for the folder is running, or it holds other files.
        """
        _make_empty(folder)
        ours: socket.socket | None = None
        if detached:
            theirs = _listen(folder)
        else:
            ours, theirs = socket.socketpair()
        flags = (["--listening"] if detached else []) + (["--keep"] if keep else [])
        with theirs, (folder / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", supervisor.__file__, str(folder)),
                    *("--descriptor", str(theirs.fileno()), *flags),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,  # an interrupt from the keyboard is for the owner alone
            )
        (folder / "supervisor.pid").write_text(str(process.pid))
        if ours is not None:
            return cls(folder, ours, process)
        process.returncode = 0  # Popen would warn of a process that lives on, which is meant here
        return cls(folder, _connect(folder), psutil.Process(process.pid))

    @classmethod
    def attach(cls, folder: Path) -> Self | None:
        """Return the detached supervisor of a folder, or None if none is alive."""
        try:
            pid = int((folder / "supervisor.pid").read_text())
            return cls(folder, _connect(folder), psutil.Process(pid))
        except (OSError, psutil.NoSuchProcess):
            return None

    def run(
        self,
        name: str,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> int:
        """Start a process; its output is appended to the log of that name.

        Args:
            name: to speak of it; free again when the process has ended.
            argv: the program and its arguments.
            env: the whole environment; this process' own if not given.
            cwd: working directory; the state folder if not given.

        Returns:
            Its pid.

        Raises:
            ClusterError: one of that name is running.
        """
        answer = self._ask(
            op="start",
            name=name,
            argv=[str(word) for word in argv],
            env=dict(os.environ if env is None else env),
            cwd=str(cwd or self.folder),
        )
        return int(answer["pid"])

    def status(self) -> dict[str, Status]:
        """Return all processes ever started here, by name; of a name used again, the last."""
        processes = self._ask(op="status")["processes"]
        return {name: Status(**status) for name, status in processes.items()}

    def running(self, name: str) -> bool:
        """Tell whether a process of that name runs."""
        status = self.status().get(name)
        return status is not None and status.code is None

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process (to it alone).

        Raises:
            ClusterError: it does not run.
        """
        self._ask(op="signal", name=name, signal=int(number))

    def freeze(self, name: str) -> None:
        """Stop a process in its tracks (SIGSTOP): it keeps its sockets and answers nothing."""
        self.signal(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Let a frozen process go on."""
        self.signal(name, signal.SIGCONT)

    def kill(self, name: str) -> None:
        """End a process with SIGKILL and wait until it is gone."""
        self.signal(name, signal.SIGKILL)
        self.wait(name, STOP_SECONDS)

    def stop(self, name: str, seconds: float = STOP_SECONDS) -> int:
        """End a process with SIGTERM, with SIGKILL after `seconds`; return its exit code."""
        self.signal(name, signal.SIGTERM)
        try:
            return self.wait(name, seconds)
        except ClusterError:
            self.kill(name)
            return -int(signal.SIGKILL)

    def wait(self, name: str, seconds: float) -> int:
        """Wait until a process has ended; return its exit code, negative for a signal.

        Raises:
            ClusterError: it still runs after `seconds`.
        """
        wait_for(f"{name} ends", lambda: not self.running(name), seconds)
        code = self.status()[name].code
        return 0 if code is None else code

    def log(self, name: str) -> str:
        """Return all a process has printed, both streams."""
        file = self.folder / "log" / f"{name}.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def wait_ready(self, name: str, what: str, check: Callable[[], bool], seconds: float) -> None:
        """Poll until `check` holds, as long as the process runs.

        Raises:
            ClusterError: the process ended, or was not ready within `seconds`; with the last lines
                of its log.
        """

        def ready() -> bool:
            if not self.running(name):
                raise ClusterError(f"{name} ended with {self.status()[name].code}")
            return check()

        try:
            wait_for(what, ready, seconds)
        except ClusterError as error:
            tail = "\n".join(self.log(name).splitlines()[-LOG_LINES:])
            raise ClusterError(f"{name}: {error}; the end of its log:\n{tail}") from None

    def wait_listening(self, name: str, port: int, seconds: float) -> None:
        """Wait until a process listens on a TCP port: it itself, not whoever else took that port.

        Raises:
            ClusterError: as `wait_ready`.
        """
        pid = self.status()[name].pid

        def listens() -> bool:
            try:
                sockets = psutil.Process(pid).net_connections("tcp")
            except psutil.NoSuchProcess:
                return False  # the next look at its status says how it ended
            return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)

        self.wait_ready(name, f"{name} listens on port {port}", listens, seconds)

    def close(self) -> None:
        """Kill all processes, remove the folder, and wait until that is done. Again: nothing.

        Raises:
            ClusterError, subprocess.TimeoutExpired: the supervisor did not end in time.
        """
        with self._lock:
            if self._closed:
                return
            with contextlib.suppress(OSError):
                self._connection.sendall(b'{"op": "close"}\n')
                self._file.readline()
        self.let_go()
        if isinstance(self._process, subprocess.Popen):
            self._process.wait(CLOSE_SECONDS)
        else:
            process = self._process
            wait_for(f"{self.folder} is closed", lambda: _ended(process), CLOSE_SECONDS)

    def let_go(self) -> None:
        """Break the connection: a detached supervisor lives on, another one ends by itself."""
        with self._lock:
            self._closed = True
            self._file.close()
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        with self._lock:
            if self._closed:
                raise ClusterError(f"{self.folder}: closed already")
            try:
                self._connection.sendall(json.dumps(request).encode() + b"\n")
                line = self._file.readline()
            except OSError as error:
                raise ClusterError(f"the supervisor of {self.folder} is gone: {error}") from error
        if not line:
            raise ClusterError(f"the supervisor of {self.folder} is gone")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ClusterError(answer["error"])
        return answer


def _ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # some machines' init is slow to reap
    except psutil.NoSuchProcess:
        return True


def _make_empty(folder: Path) -> None:
    if (folder / "supervisor.pid").exists():
        if (found := Supervised.attach(folder)) is not None:
            found.let_go()
            raise ClusterError(f"{folder} is in use by a running one; stop that first")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # keys and tokens will be in it
    if any(folder.iterdir()):
        raise ClusterError(f"{folder} holds other files; give a folder that is empty or not there")


def _listen(folder: Path) -> socket.socket:
    """Listen at a path of any length: a socket's own may have no more than 107 bytes."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"/proc/self/fd/{descriptor}/{SOCKET}")
        listener.listen()
        return listener
    finally:
        os.close(descriptor)


def _connect(folder: Path) -> socket.socket:
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(f"/proc/self/fd/{descriptor}/{SOCKET}")
        except OSError:
            connection.close()
            raise
        return connection
    finally:
        os.close(descriptor)
