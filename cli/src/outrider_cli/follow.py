"""Follows a task to its end, telling what it waits for; Ctrl-C asks what is to become of it.

The task is the cluster's: whatever happens here, it goes on there unless it is cancelled. It is
asked for again and again rather than watched: one small object, and no connection that can fall
silent unnoticed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from outrider_cli import terminal
from outrider_cli.core.rows import Row, rows_of
from outrider_cli.core.waiting import Snapshot, reasons, snapshot
from outrider_cli.errors import LeftError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from outrider_cli.cluster import Cluster

#: Time between two looks at the task at first, and after the first minute; seconds.
POLL_SECONDS: Final = 0.3
POLL_LATER_SECONDS: Final = 1.0
LATER_SECONDS: Final = 60.0
#: When nothing moved for so long it is told what the task waits for, seconds.
STALLED_SECONDS: Final = 2.0
#: The reports, which may be large, are read at most so often for that, seconds.
REPORTS_SECONDS: Final = 5.0

#: What is read after the end of a task is tried so often, a second apart.
TRIES: Final = 10

T = TypeVar("T")

LEAVE, CANCEL, WATCH = "leave", "cancel", "watch"


@dataclass
class _Memory:
    """What was last seen, and when it last moved."""

    counts: Mapping[str, int] | None = None
    phase: str | None = None
    moved: float = field(default_factory=time.monotonic)
    read: float = float("-inf")
    rows: Sequence[Row] = ()

    def note(self, found: Snapshot) -> None:
        if (found.counts, found.phase) != (self.counts, self.phase):
            self.counts, self.phase, self.moved = found.counts, found.phase, time.monotonic()
            # What the rows say is about a moment that is over.
            self.rows, self.read = (), float("-inf")

    @property
    def stalled(self) -> bool:
        return time.monotonic() - self.moved >= STALLED_SECONDS


def patiently(read: Callable[[], T]) -> T:
    """Read something, also from an API server that is away for a moment.

    Raises:
        UnavailableError: It was away for TRIES seconds and more.
    """
    for left in range(TRIES, 0, -1):
        try:
            return read()
        except UnavailableError as error:
            if left == 1:
                raise
            terminal.say(f"waiting: {error}")
            time.sleep(1)
    raise AssertionError("TRIES is at least 1")


class Follower:
    """Follows one task.

    Args:
        cluster: Where it is.
        name: Of the task.
        cancelling: Its cancel was asked for already: Ctrl-C leaves at once.
    """

    def __init__(self, cluster: Cluster, name: str, *, cancelling: bool = False) -> None:
        self._cluster = cluster
        self._name = name
        self._cancelling = cancelling
        self._began = time.monotonic()

    def to_end(self) -> Mapping[str, Any]:
        """Wait until the task has ended; returns it.

        Raises:
            LeftError: The user left it running.
            ClusterError: The task was deleted, or the API server refuses to show it.
        """
        while True:
            try:
                return self._watch()
            except KeyboardInterrupt:
                self._interrupted()

    def _watch(self) -> Mapping[str, Any]:
        memory = _Memory()
        with terminal.board(self._name) as board:
            found = snapshot({})
            while True:
                waits: list[str] = []
                try:
                    task = self._cluster.task(self._name)
                    found = snapshot(task)
                    memory.note(found)
                    waits = self._waits(task, found, memory)
                except UnavailableError as error:
                    waits = [str(error)]
                except NotFoundError:
                    raise NotFoundError(
                        f"AgentTask {self._cluster.namespace}/{self._name} was deleted"
                    ) from None
                board.update(found, waits)
                if found.ended:
                    return task
                time.sleep(self._pause())

    def _waits(self, task: Mapping[str, Any], found: Snapshot, memory: _Memory) -> list[str]:
        if found.ended or not memory.stalled:
            return []
        if found.phase and time.monotonic() - memory.read >= REPORTS_SECONDS:
            reports = self._cluster.reports(self._name)
            memory.rows = rows_of(reports, task["metadata"]["uid"])
            memory.read = time.monotonic()
        return reasons(found, memory.rows, self._cancelling)

    def _pause(self) -> float:
        late = time.monotonic() - self._began > LATER_SECONDS
        return POLL_LATER_SECONDS if late else POLL_SECONDS

    def _interrupted(self) -> None:
        """Ctrl-C: leave, cancel or go on watching, as the user says.

        Raises:
            LeftError: The task is left running.
        """
        if self._cancelling or not terminal.can_ask():
            raise self._left()
        terminal.say(f"\nAgentTask {self._name} goes on in the cluster.")
        try:
            answer = terminal.ask(
                "[l]eave it running, [c]ancel it, or go on to [w]atch? (Ctrl-C leaves) ",
                (LEAVE, CANCEL, WATCH),
                LEAVE,
            )
            if answer == CANCEL:
                self._cluster.cancel_task(self._name)
                self._cancelling = True
                terminal.say("cancelling: what runs is ended (Ctrl-C leaves)")
        except KeyboardInterrupt:
            terminal.say("")
            raise self._left() from None
        if answer == LEAVE:
            raise self._left()

    def _left(self) -> LeftError:
        name, flags = self._name, f"-n {self._cluster.namespace}"
        state = "is being cancelled" if self._cancelling else "goes on"
        return LeftError(
            f"left: AgentTask {self._cluster.namespace}/{name} {state} "
            f"(kubectl outrider results {name} {flags}; kubectl outrider cancel {name} {flags})"
        )
