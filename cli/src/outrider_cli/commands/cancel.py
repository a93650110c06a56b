"""`kubectl outrider cancel`: ends a task on all nodes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from outrider_cli import terminal
from outrider_cli.commands.flags import task_name
from outrider_cli.core.waiting import snapshot, verdict
from outrider_cli.errors import Exit
from outrider_cli.follow import Follower

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument("task", metavar="TASK", help="name of the AgentTask")
    parser.add_argument("--wait", action="store_true", help="until nothing of it runs any more")


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Cancel it; 0 also when it had ended before."""
    name = task_name(arguments.task)
    found = snapshot(cluster.task(name))
    if found.ended:
        terminal.say(f"{name} has ended before: {verdict(found)}")
        return Exit.OK
    cluster.cancel_task(name)
    if not arguments.wait:
        terminal.say(f"{name} is being cancelled")
        return Exit.OK
    ended = snapshot(Follower(cluster, name, cancelling=True).to_end())
    terminal.say(f"{name}: {verdict(ended)}")
    return Exit.OK
