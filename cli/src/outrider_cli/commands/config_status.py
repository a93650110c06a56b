"""`kubectl outrider config status`: follows a change of an AgentConfig until it has an end.

The object is asked for again and again rather than watched, as follow.py does and for its reasons.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Final

from outrider_cli import terminal
from outrider_cli.commands.flags import task_name
from outrider_cli.core.config_progress import Outcome, Progress, progress, waits
from outrider_cli.core.configs import Config, config_of
from outrider_cli.core.text import printable
from outrider_cli.errors import ClusterError, Exit, IncompleteError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster

#: Time between two looks, seconds.
POLL_SECONDS: Final = 0.5
#: When nothing moved for so long it is told which nodes it waits for, seconds.
STALLED_SECONDS: Final = 5.0
#: The Agents, which may be thousands, are read at most so often for that, seconds.
AGENTS_SECONDS: Final = 15.0
#: The same is told again after this time, seconds.
REPEAT_SECONDS: Final = 60.0
#: So many reasons for waiting are shown at once.
MAX_REASONS: Final = 5


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Follow it: 0 when it settled, 1 when it was given up or nodes failed.

    Raises:
        IncompleteError: It had no end within --timeout.
        NotFoundError: There is no such AgentConfig, or it was deleted.
    """
    name = task_name(arguments.name)
    if not arguments.watch:
        found = progress(config_of(cluster.agent_config(name)))
        return _end(found)
    return _end(_Following(cluster, name, arguments.timeout).to_end())


def _end(found: Progress) -> int:
    if found.outcome is Outcome.FAILED:
        terminal.say(f"error: {printable(found.line, line=True)}")
        return Exit.NODES
    terminal.write(printable(found.line, line=True) + "\n")
    return Exit.OK


class _Following:
    """One change on its way; `seconds`: how long it may take, None: for ever."""

    def __init__(self, cluster: Cluster, name: str, seconds: float | None) -> None:
        self._cluster = cluster
        self._name = name
        self._ends = None if seconds is None else time.monotonic() + seconds
        self._line = ""
        self._moved = time.monotonic()
        self._read = float("-inf")
        self._told: tuple[str, ...] = ()
        self._told_at = float("-inf")

    def to_end(self) -> Progress:
        """Wait for the end."""
        there = False
        while True:
            try:
                config = config_of(self._cluster.agent_config(self._name))
                there = True
                found = progress(config)
                if found.outcome is not Outcome.GOING:
                    return found
                self._tell(config, found)
            except UnavailableError as error:
                self._wait((str(error),))
            except NotFoundError as error:
                gone = NotFoundError(f"AgentConfig {self._name} was deleted")
                raise (gone if there else error) from None
            if self._ends is not None and time.monotonic() >= self._ends:
                raise IncompleteError(
                    f"timed out waiting for the condition: AgentConfig {self._name} is still on "
                    "its way"
                )
            time.sleep(POLL_SECONDS)

    def _tell(self, config: Config, found: Progress) -> None:
        now = time.monotonic()
        if found.line != self._line:
            self._line, self._moved = found.line, now
            terminal.write(printable(found.line, line=True) + "...\n")
        if now - self._moved < STALLED_SECONDS or now - self._read < AGENTS_SECONDS:
            return
        self._read = now
        self._wait(self._reasons(config))

    def _reasons(self, config: Config) -> tuple[str, ...]:
        if not config.seen:
            return (
                "no server has looked at it: is one the leader? "
                "(kubectl get pods -A -l app.kubernetes.io/component=server)",
            )
        try:
            agents = self._cluster.agents()
        except UnavailableError:
            raise
        except ClusterError as error:
            return (f"which nodes it waits for cannot be told: {error}",)
        return tuple(waits(config, agents, time.time()))

    def _wait(self, reasons: tuple[str, ...]) -> None:
        now = time.monotonic()
        if reasons and (reasons != self._told or now - self._told_at >= REPEAT_SECONDS):
            self._told, self._told_at = reasons, now
            for reason in reasons[:MAX_REASONS]:
                terminal.say(f"{self._name}: waiting: {printable(reason, line=True)}")
