"""`kubectl outrider config`: what a node is to run and why, and how AgentConfigs change.

Here are the flags and what all actions share; each action is in a module of its own.
"""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Final, Protocol, cast

from outrider_cli.commands.flags import add_common
from outrider_cli.core.request import duration

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster

#: Forms of a node's configuration, and of a history.
NODE_FORMS: Final = ("table", "wide", "yaml", "json")
HISTORY_FORMS: Final = ("table", "yaml", "json", "name")
USAGE: Final = """kubectl outrider config NODE [--diff] [-o table|wide|yaml|json]
       kubectl outrider config history NAME [--revision R] [--diff] [-o table|yaml|json|name]
       kubectl outrider config status NAME [--no-watch] [--timeout TIME]
       kubectl outrider config rollback NAME [--to R] [--dry-run client|server]
       kubectl outrider config retry NAME [--dry-run client|server]"""
#: Which module does what.
_MODULES: Final = {
    "node": "config_node",
    "history": "config_history",
    "rollback": "config_rollback",
    "retry": "config_rollback",
    "status": "config_status",
}


class _Action(Protocol):
    """A module that does one or two of the actions."""

    def run(self, cluster: Cluster, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit code."""


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.usage = USAGE
    each = parser.add_subparsers(dest="action", required=True, metavar="ACTION", prog=parser.prog)
    node = each.add_parser("node", help="what a node is to run, and where each value comes from")
    node.add_argument("node", metavar="NODE", help="name of the node")
    node.add_argument("--diff", action="store_true", help="against what its agent runs")
    node.add_argument("-o", "--output", choices=NODE_FORMS, default="table")
    history = _named(each.add_parser("history", help="the revisions of an AgentConfig"))
    history.add_argument("--revision", metavar="R", help="show what this one asks for")
    history.add_argument(
        "--diff", action="store_true", help="show what this one, or the last, changed"
    )
    history.add_argument("-o", "--output", choices=HISTORY_FORMS, default="table")
    status = _named(each.add_parser("status", help="follow a change until it has an end"))
    status.add_argument(
        "-w",
        "--watch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="until it has an end; default: yes",
    )
    status.add_argument(
        "--timeout", type=_seconds, metavar="TIME", help="such as 90s, 10m; default: for ever"
    )
    rollback = _named(each.add_parser("rollback", help="go back to an earlier revision"))
    rollback.add_argument(
        "--to", "--to-revision", metavar="R", help="default: the last that settled before"
    )
    retry = _named(each.add_parser("retry", help="try a revision again that was given up"))
    for child in (rollback, retry):
        child.add_argument(
            "--dry-run",
            choices=("none", "client", "server"),
            default="none",
            help="only say what would be done; server: have it checked, too",
        )
    for child in (node, history, status, rollback, retry):
        add_common(child)
    for child in (node, history, rollback):
        child.add_argument(
            "--server-namespace",
            default="outrider",
            metavar="NS",
            help="where the operator keeps revisions; default: outrider",
        )


def _named(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("name", metavar="NAME", help="name of the AgentConfig")
    return parser


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Do what is asked."""
    name = _MODULES[arguments.action]
    module = cast("_Action", importlib.import_module(f"outrider_cli.commands.{name}"))
    return module.run(cluster, arguments)


def _seconds(text: str) -> float | None:
    """A time limit; None if there is none."""
    if text in ("0", "0s"):
        return None
    try:
        return float(duration(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
