"""`kubectl outrider records`: what agents gathered, shown as it comes or written to a file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from outrider_proto.lines import Line, Wanted

from outrider_cli import terminal
from outrider_cli.commands import record_files
from outrider_cli.commands.flags import add_common
from outrider_cli.commands.record_sources import Servers, from_folders
from outrider_cli.core import request
from outrider_cli.core.records import data_types, for_people, for_programs
from outrider_cli.core.text import plural
from outrider_cli.errors import Exit, UsageError

if TYPE_CHECKING:
    from outrider_cli.cluster import Cluster

#: How far an export is, is told so often, seconds.
TELL_SECONDS: Final = 5.0


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    each = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    tail = each.add_parser("tail", help="show records as they come, until Ctrl-C")
    tail.add_argument(
        "-f",
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on at the end; default: yes",
    )
    tail.add_argument("-o", "--output", choices=("text", "json"), default="text")
    export = each.add_parser("export", help="write records to a file")
    export.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    export.add_argument(
        "--output", required=True, metavar="FILE", help="made anew; - is stdout, for jsonl"
    )
    for child, since in ((tail, "only what comes, or all with --no-follow"), (export, "all")):
        _add_shared(child, since)
        add_common(child)


def _add_shared(parser: argparse.ArgumentParser, since: str) -> None:
    parser.add_argument(
        "--node", action="append", default=[], metavar="NAME", help="repeatable, or with commas"
    )
    parser.add_argument(
        "--type",
        action="append",
        default=[],
        metavar="TYPE",
        help="number or name, such as host-metrics; repeatable, or with commas",
    )
    parser.add_argument(
        "--since", metavar="TIME", help=f"what servers took in it, such as 10m; default: {since}"
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


def run(cluster: Cluster | None, arguments: argparse.Namespace) -> int:
    """Show or write them; `cluster` is not needed for folders."""
    if arguments.action == "tail":
        return _tail(cluster, arguments)
    return _export(cluster, arguments)


def _tail(cluster: Cluster | None, arguments: argparse.Namespace) -> int:
    show = for_programs if arguments.output == "json" else for_people
    waiting: list[str] = []
    try:
        for line in _source(cluster, arguments, follow=arguments.follow):
            if line is not None:
                waiting.append(show(line) + "\n")
            # Together while there are more, at once when there are not.
            if waiting and (line is None or len(waiting) >= 100):
                terminal.write("".join(waiting))
                waiting.clear()
    except KeyboardInterrupt:
        pass  # the usual way to end it
    terminal.write("".join(waiting))
    return Exit.OK


def _export(cluster: Cluster | None, arguments: argparse.Namespace) -> int:
    record_files.check(arguments.format)
    count, told_at = 0, time.monotonic()
    with record_files.writing(arguments.format, arguments.output) as writer:
        for line in _source(cluster, arguments, follow=False):
            if line is not None:
                writer.write(line)
                count += 1
            if time.monotonic() - told_at >= TELL_SECONDS:
                told_at = time.monotonic()
                terminal.say(f"{plural(count, 'record')} so far")
    terminal.say(f"{plural(count, 'record')} written to {arguments.output}")
    return Exit.OK


def _source(
    cluster: Cluster | None, arguments: argparse.Namespace, *, follow: bool
) -> Iterator[Line | None]:
    try:
        types = data_types(arguments.type)
        last = None if arguments.since is None else float(request.duration(arguments.since))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if last is None and follow:
        last = 0.0
    nodes = frozenset(name for word in arguments.node for name in word.split(",") if name)
    since = 0.0 if last is None else time.time() - last
    wanted = Wanted(nodes, frozenset(types), since)
    if arguments.records:
        return from_folders(arguments.records, wanted, follow=follow)
    assert cluster is not None
    return Servers(cluster, arguments.server_namespace, wanted, last, follow=follow).read()
