"""`kubectl outrider agents`: which agents are there, and why others are not."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from outrider_cli import terminal
from outrider_cli.core import render
from outrider_cli.core.text import plural
from outrider_cli.errors import Exit

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.add_argument(
        "-o", "--output", choices=("table", "wide", "json", "yaml", "name"), default="table"
    )
    parser.add_argument("--absent", action="store_true", help="only those that are not connected")


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Show them."""
    found = cluster.agents()
    away = [agent for agent in found if render.ready(agent)["status"] != "True"]
    shown = away if arguments.absent else found
    terminal.write(render.agents(shown, arguments.output, time.time()))
    terminal.say(f"{plural(len(found), 'agent')}, {len(found) - len(away):,} connected")
    return Exit.OK
