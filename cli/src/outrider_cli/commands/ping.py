"""`kubectl outrider ping`: how long the way to each node and back takes, and who does not answer.

The round trip is what a user of tasks feels: from making an AgentTask to the node's result in a
report, as seen from here. It goes through the API server, the leader, a gateway and the agent.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from outrider_cli import terminal
from outrider_cli.commands import flags
from outrider_cli.core import render, request
from outrider_cli.core.rows import SUCCEEDED, Row, names, row_of
from outrider_cli.core.text import plural, printable
from outrider_cli.core.timing import Summary, summary
from outrider_cli.core.waiting import reasons, snapshot, verdict
from outrider_cli.errors import CommandError, Exit, UnavailableError, UsageError

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster, Watch

#: How the task stands is looked at so often, seconds.
LOOK_SECONDS: Final = 1.0
#: A node that is not connected is not waited for longer than this, seconds.
ABSENT_SECONDS: Final = 1.0
#: The task itself ends at the time given; its last results get so long to arrive, seconds.
GRACE_SECONDS: Final = 3.0


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    flags.add_target(parser)
    parser.add_argument("--timeout", default="10s", metavar="TIME", help="default: 10s")
    parser.add_argument("--keep", action="store_true", help="keep the AgentTask")
    parser.add_argument("-o", "--output", choices=("table", "json", "yaml"), default="table")


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Ping all nodes; 0 if all of them answered."""
    try:
        seconds = request.duration(arguments.timeout)
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from None
    name = f"ping-{secrets.token_hex(4)}"
    target = request.Request(
        name=name,
        namespace=cluster.namespace,
        run={},
        keep=arguments.keep,
        **flags.target(arguments),
    )
    ping = _Ping(cluster, name, seconds)
    try:
        ping.measure(request.ping(name, cluster.namespace, target, seconds))
    except KeyboardInterrupt:
        terminal.say("")  # after the ^C; what is known by now is shown as of every ping
    finally:
        if not arguments.keep:
            with contextlib.suppress(CommandError):  # its time to live takes it away later
                cluster.delete_task(name)
    return ping.show(arguments.output)


class _Ping:
    """One ping: when it began, and what came when."""

    def __init__(self, cluster: Cluster, name: str, seconds: int) -> None:
        self._cluster = cluster
        self._name = name
        self._seconds = seconds
        self._began = time.monotonic()
        self._rows: dict[str, Row] = {}
        self._times: dict[str, float] = {}
        self._ended = ""
        self._said: list[str] = []

    def measure(self, task: Mapping[str, Any]) -> None:
        """Make the task, and take the results until all are there or the time is over."""
        watch = self._open()
        try:
            self._began = time.monotonic()
            self._cluster.create_task(task)
            looked = self._began
            while not self._done():
                watch = self._take(watch)
                if time.monotonic() - looked >= LOOK_SECONDS:
                    looked = time.monotonic()
                    self._look()
        finally:
            watch.close()

    def _open(self) -> Watch:
        """A watch of the reports; an API server that has just begun may ask to come again."""
        until = time.monotonic() + self._seconds
        while True:
            try:
                return self._cluster.watch_reports(self._name)
            except UnavailableError as error:
                if time.monotonic() >= until:
                    raise
                if str(error) not in self._said:
                    self._said = [str(error)]
                    terminal.say(f"waiting: {error}")
                time.sleep(LOOK_SECONDS / 4)

    def _take(self, watch: Watch) -> Watch:
        """Take the changes that are there; returns the watch to go on with."""
        try:
            found = watch.next(LOOK_SECONDS / 4)
        except UnavailableError:
            watch.close()
            return self._open()  # it begins with all that is there
        if found is not None:
            came, report = found
            for row in map(row_of, report.get("nodes") or []):
                self._rows[row.node] = row
                if row.phase == SUCCEEDED:
                    self._times.setdefault(row.node, came - self._began)
        return watch

    def _look(self) -> None:
        """See whether the task has ended without results, and tell what it waits for."""
        try:
            task = self._cluster.task(self._name)
        except UnavailableError as error:
            terminal.say(f"waiting: {error}")
            return
        found = snapshot(task)
        if found.ended:
            self._ended = verdict(found)
        told = reasons(found, list(self._rows.values()))
        for reason in told if told != self._said else ():
            terminal.say(f"waiting: {reason}")
        self._said = told

    def _done(self) -> bool:
        passed = time.monotonic() - self._began
        if passed > self._seconds + GRACE_SECONDS:
            return True
        if not self._rows:
            return bool(self._ended)
        unfinished = [row for row in self._rows.values() if not row.final]
        if not unfinished:
            return True
        return passed >= ABSENT_SECONDS and all(row.absent for row in unfinished)

    def show(self, form: str) -> int:
        """Show times and who did not answer; returns the exit code."""
        found = summary(list(self._times.values()))
        silent = [row for row in self._rows.values() if row.node not in self._times]
        if form == "table":
            if self._times:
                terminal.write(render.pings(self._times, found))
        else:
            terminal.write(render.structured(self._structure(found, silent), form))
        for reason, rows in sorted(_by_reason(silent).items()):
            terminal.say(f"no answer, {reason}: {names(rows)}")
        answered = f"{len(self._times):,} of {plural(len(self._rows), 'node')} answered"
        if self._rows:
            terminal.say(answered)
        else:
            terminal.say(f"no node answered: {self._ended or 'no server took the task'}")
        return Exit.OK if self._times and not silent else Exit.NODES

    def _structure(self, found: Summary | None, silent: list[Row]) -> dict[str, Any]:
        value: dict[str, Any] = {
            "nodes": {node: round(took, 6) for node, took in sorted(self._times.items())},
            "silent": [
                {"node": row.node, "phase": row.phase, "reason": row.reason} for row in silent
            ],
        }
        if found is not None:
            shares = {f"p{percent}": round(took, 6) for percent, took in found.percentiles.items()}
            value["seconds"] = {"min": round(found.least, 6), **shares, "max": round(found.most, 6)}
        return value


def _by_reason(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        said = f" ({printable(row.message, line=True)})" if row.message else ""
        found.setdefault(f"{row.reason or row.phase}{said}", []).append(row)
    return found
