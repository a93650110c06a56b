"""What is said to people while a command works: a live bar on a terminal, plain lines elsewhere.

Everything here goes to stderr: stdout belongs to the results, so that they can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Final

from outrider_cli.core.waiting import Snapshot, progress

#: Without a terminal the same reasons for waiting are told again after this time, seconds.
REPEAT_SECONDS: Final = 60.0
#: Without a terminal there is at most one line of progress in this time, seconds.
LINE_SECONDS: Final = 1.0
#: So many reasons for waiting are shown at once.
MAX_REASONS: Final = 5


def say(text: str) -> None:
    """A line for people."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def write(text: str) -> None:
    """Results, for people or programs."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_bytes(data: bytes) -> None:
    """Output of a program as it was printed."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def can_ask() -> bool:
    """Whether there is someone at a terminal who can answer a question."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def ask(question: str, answers: Sequence[str], otherwise: str) -> str:
    """Ask until one of the answers comes, of which the first letter is enough.

    Args:
        question: For people.
        answers: What can be answered; their first letters differ.
        otherwise: The answer when the input ends.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    while True:
        sys.stderr.write(question)
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            say("")
            return otherwise
        found = line.strip().lower()
        for answer in answers:
            if found and answer.startswith(found):
                return answer


class Board:
    """Where the progress of one task is shown."""

    def update(self, found: Snapshot, waits: Sequence[str]) -> None:
        """Show how far it is and what it waits for."""
        raise NotImplementedError


class _Bar(Board):
    def __init__(self, update: Callable[[Snapshot, Sequence[str]], None]) -> None:
        self._update = update

    def update(self, found: Snapshot, waits: Sequence[str]) -> None:
        self._update(found, waits)


class _Lines(Board):
    def __init__(self, name: str) -> None:
        self._name = name
        self._progress, self._shown_at = "", float("-inf")
        self._waits: Sequence[str] = ()
        self._waits_at = float("-inf")

    def update(self, found: Snapshot, waits: Sequence[str]) -> None:
        now, text = time.monotonic(), progress(found)
        if text != self._progress and (now - self._shown_at >= LINE_SECONDS or found.ended):
            self._progress, self._shown_at = text, now
            say(f"{self._name}: {text}")
        if waits and (waits != self._waits or now - self._waits_at >= REPEAT_SECONDS):
            self._waits, self._waits_at = waits, now
            for wait in waits[:MAX_REASONS]:
                say(f"{self._name}: waiting: {wait}")


@contextmanager
def board(name: str, stream: IO[str] | None = None) -> Iterator[Board]:
    """Show the progress of the task of this name while the context lasts.

    Args:
        name: Of the task.
        stream: A terminal or not; stderr by default.
    """
    stream = stream or sys.stderr
    if not stream.isatty():
        yield _Lines(name)
        return
    from outrider_cli.bar import bar  # takes a tenth of a second, and is for terminals only

    with bar(name, stream, MAX_REASONS) as update:
        yield _Bar(update)
