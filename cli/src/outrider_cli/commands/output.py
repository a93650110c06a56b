"""`kubectl outrider output`: all that a task printed on one node, as it was printed.

Output travels as records, apart from the results, into the servers' files or Kafka. A server Pod
reads them there for us (exec), or they are read from a folder of a file sink. What is not there
is told, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from outrider_proto.output import Joined, Piece, Wanted, from_line, join, read_directory

from outrider_cli import terminal
from outrider_cli.commands.flags import task_name
from outrider_cli.core.rows import Row, rows_of
from outrider_cli.core.text import plural, time_of
from outrider_cli.errors import (
    ClusterError,
    CommandError,
    Exit,
    IncompleteError,
    NotFoundError,
    UsageError,
)

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster

#: Labels of server Pods, as the chart sets them.
SERVERS: Final = "app.kubernetes.io/part-of=outrider,app.kubernetes.io/component=server"
CONTAINER: Final = "server"
#: Records are looked for again so often, seconds.
AGAIN_SECONDS: Final = 1.0


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument("task", metavar="TASK", help="name of the AgentTask")
    parser.add_argument("node", metavar="NODE", help="name of the node")
    parser.add_argument("--attempt", type=int, default=0, help="default: the last one")
    parser.add_argument(
        "--wait", type=float, default=10.0, metavar="SECONDS", help="for records; default: 10"
    )
    parser.add_argument(
        "--records",
        action="append",
        default=[],
        metavar="DIR",
        help="folder of a file sink, repeatable; default: ask the server Pods",
    )
    parser.add_argument(
        "--server-namespace", default="outrider", metavar="NS", help="default: outrider"
    )


@dataclass(frozen=True)
class _Expected:
    """Which output is looked for, and how long it is: None if that is not known."""

    wanted: Wanted
    total: int | None
    task: str
    row: Row


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Write the output to stdout; what is missing is told on stderr."""
    expected = _expected(cluster, arguments)
    row = expected.row
    whole = row.preview.encode()
    if expected.total == len(whole) and "\ufffd" not in row.preview:
        # All of it stands in the report: no record is needed.
        terminal.write_bytes(whole)
        return Exit.OK
    source = _files(arguments.records) if arguments.records else _servers(cluster, arguments)
    joined = _gather(source, expected, arguments.wait)
    terminal.write_bytes(joined.data)
    if row.truncated and expected.total is not None:
        terminal.say(
            f"{expected.row.node} printed {row.output_bytes:,} bytes: those after "
            f"{expected.total:,} were thrown away (spec.output.maxBytes)"
        )
    _complain(joined, expected)
    return Exit.OK


def _expected(cluster: Cluster, arguments: argparse.Namespace) -> _Expected:
    name = task_name(arguments.task)
    task = cluster.task(name)
    uid = str(task["metadata"]["uid"])
    rows = rows_of(cluster.reports(name), uid)
    row = next((row for row in rows if row.node == arguments.node), None)
    if row is None:
        raise NotFoundError(
            f"AgentTask {cluster.namespace}/{name} is not for a node {arguments.node} "
            f"(it is for {plural(len(rows), 'node')}: kubectl outrider results {name})"
        )
    if not row.attempt:
        why = f", {row.reason}" if row.reason else ""
        raise NotFoundError(f"nothing has run on {row.node} ({row.phase}{why})")
    attempt = arguments.attempt or row.attempt
    if attempt > row.attempt:
        raise UsageError(f"--attempt {attempt}: the last one on {row.node} was {row.attempt}")
    since = time_of(str(task["metadata"].get("creationTimestamp", ""))) or 0.0
    return _Expected(Wanted(uid, row.node, attempt, since), _total(task, row, attempt), name, row)


def _total(task: Mapping[str, Any], row: Row, attempt: int) -> int | None:
    """How many bytes of output were kept; None while it runs, or of an earlier attempt."""
    if not row.final or attempt != row.attempt:
        return None
    kept = int(task["spec"].get("output", {}).get("maxBytes", row.output_bytes))
    return min(row.output_bytes, kept)


def _gather(
    read: Callable[[Wanted, list[str]], Iterable[Piece]], expected: _Expected, seconds: float
) -> Joined:
    """Read until all is there or the time is over, and say what is waited for."""
    until = time.monotonic() + seconds
    said = False
    while True:
        problems: list[str] = []
        joined = join(read(expected.wanted, problems))
        missing = joined.missing(expected.total or 0)
        if not missing or time.monotonic() >= until:
            for problem in problems:
                terminal.say(f"warning: {problem}")
            return joined
        if not said:
            said = True
            amount = sum(end - begin for begin, end in missing)
            terminal.say(
                f"waiting: {amount:,} of {expected.total:,} bytes are still on their way "
                f"from the agent of {expected.row.node} (at most {seconds:g} s)"
            )
        time.sleep(AGAIN_SECONDS)


def _files(folders: list[str]) -> Callable[[Wanted, list[str]], Iterable[Piece]]:
    def read(wanted: Wanted, problems: list[str]) -> Iterable[Piece]:
        for folder in folders:
            try:
                yield from read_directory(Path(folder), wanted, problems)
            except OSError as error:
                raise UsageError(f"--records {folder}: {error.strerror or error}") from None

    return read


def _servers(
    cluster: Cluster, arguments: argparse.Namespace
) -> Callable[[Wanted, list[str]], Iterable[Piece]]:
    namespace = arguments.server_namespace

    def read(wanted: Wanted, problems: list[str]) -> Iterable[Piece]:
        pods = [
            str(pod["metadata"]["name"])
            for pod in cluster.pods(namespace, SERVERS)
            if (pod.get("status") or {}).get("phase") == "Running"
        ]
        if not pods:
            raise ClusterError(
                f"no server Pod runs in the namespace {namespace}: give --server-namespace, "
                "or --records with the folder of a file sink"
            )
        answered = 0
        for pod in pods:
            try:
                sink = yield from _server(cluster, namespace, pod, wanted, problems)
            except ClusterError as error:
                problems.append(str(error))
                continue
            answered += 1
            if sink == "kafka":  # all servers store in the same topic
                return
        if not answered:
            raise ClusterError(problems[-1])

    return read


def _server(cluster: Cluster, namespace: str, pod: str, wanted: Wanted, problems: list[str]) -> Any:
    """Yield the pieces that one server has; returns the kind of its sink."""
    command = ["python", "-m", "outrider_operator.output"]
    command += ["--task-uid", wanted.task_uid, "--node", wanted.node]
    command += ["--attempt", str(wanted.attempt), "--since", f"{wanted.since:.0f}"]
    for line in cluster.execute(namespace, pod, CONTAINER, command):
        if not line:
            continue
        try:
            yield from_line(line)
        except ValueError:
            end = _end(line, pod)
            problems += [f"Pod {pod}: {problem}" for problem in end.get("problems", [])]
            return str(end["sink"])
    raise ClusterError(f"Pod {namespace}/{pod}: its answer broke off")


def _end(line: str, pod: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
        if found["end"] is True and isinstance(found["sink"], str):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise ClusterError(f"Pod {pod}: {line[:200]!r} is not what a server of this version answers")


def _complain(joined: Joined, expected: _Expected) -> None:
    """Tell what is missing.

    Raises:
        CommandError: Something is.
    """
    node, total = expected.row.node, expected.total
    if total is None:
        if not expected.row.final:
            terminal.say(f"{node}: {expected.row.phase}: more may come")
        return
    missing = joined.missing(total)
    if missing:
        ranges = ", ".join(f"{begin:,}-{end:,}" for begin, end in missing[:5])
        more = f" and {len(missing) - 5} more ranges" if len(missing) > 5 else ""
        error: CommandError = IncompleteError(
            f"of {total:,} bytes of {node}'s output these are missing: {ranges}{more}; "
            f"they are on their way (try again: kubectl outrider output "
            f"{shlex.quote(expected.task)} {shlex.quote(node)}), or were deleted with old records"
        )
        raise error
