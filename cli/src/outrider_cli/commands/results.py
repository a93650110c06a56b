"""`kubectl outrider results`: what came of a task, node by node."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from outrider_cli import terminal
from outrider_cli.commands.flags import task_name
from outrider_cli.core import render
from outrider_cli.core.rows import rows_of
from outrider_cli.core.waiting import reasons, snapshot, verdict
from outrider_cli.errors import Exit

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument("task", metavar="TASK", help="name of the AgentTask")
    parser.add_argument("-o", "--output", choices=render.FORMS, default="table")
    parser.add_argument("--failed", action="store_true", help="only nodes that failed")
    parser.add_argument("--absent", action="store_true", help="only nodes that were not reached")


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Show the results; how the task stands goes to stderr."""
    name = task_name(arguments.task)
    task = cluster.task(name)
    rows = rows_of(cluster.reports(name), task["metadata"]["uid"])
    chosen = rows
    if arguments.failed or arguments.absent:
        chosen = [
            row
            for row in rows
            if (arguments.failed and row.failed) or (arguments.absent and row.absent)
        ]
    terminal.write(render.results(task, chosen, arguments.output))
    found = snapshot(task)
    terminal.say(f"{name}: {verdict(found)}")
    for reason in reasons(found, rows):
        terminal.say(f"{name}: waiting: {reason}")
    return Exit.OK
