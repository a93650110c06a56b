"""A terminal that a test sits at: a program under a pseudo-terminal, its screen, and keys."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

CTRL_C = b"\x03"
CTRL_D = b"\x04"
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])")


class Terminal:
    """Runs a program with a terminal as its stdin, stdout and stderr.

    Args:
        command: program and arguments.
        environ: its environment.
        columns: width of the terminal.
        stdout: a file for its stdout instead of the terminal.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        environ: Mapping[str, str],
        columns: int = 200,
        stdout: Path | None = None,
    ) -> None:
        self.seen = ""
        self._at = 0
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        # A session of its own, whose terminal this is: only so Ctrl-C becomes a signal.
        taken = slave if stdout is None else os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.process = subprocess.Popen(
            [*map(str, command)],
            stdin=slave,
            stdout=taken,
            stderr=slave,
            env={**environ, "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - one system call
        )
        os.close(slave)
        if taken != slave:
            os.close(taken)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._master)

    def press(self, keys: bytes) -> None:
        """Type something."""
        os.write(self._master, keys)

    def expect(self, text: str, seconds: float = 30.0) -> str:
        """Wait until a text shows up after what was expected before; returns what came up to it."""
        until = time.monotonic() + seconds
        while (found := self.seen.find(text, self._at)) < 0:
            if not self._read(until):
                raise AssertionError(f"no {text!r} on the terminal:\n{self.seen[self._at :]}")
        passed, self._at = self.seen[self._at : found], found + len(text)
        return passed

    def end(self, seconds: float = 30.0) -> int:
        """Read on until the program ends; returns its exit code."""
        until = time.monotonic() + seconds
        while self._read(until):
            pass
        return self.process.wait(timeout=max(0.1, until - time.monotonic()))

    def _read(self, until: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the program has ended
            return False
        text = self.seen + data.decode("utf-8", "replace")
        # An escape that came in two reads is taken out with the second.
        self.seen = _ESCAPES.sub("", text)
        return True
