"""Flags that several commands share."""

import argparse
from typing import Any, Final

from outrider_cli.core import request, selector
from outrider_cli.errors import UsageError

#: Time for a request unless --request-timeout says otherwise, seconds.
REQUEST_SECONDS: Final = 10


def add_common(parser: argparse.ArgumentParser, *, top: bool = False) -> None:
    """The flags that kubectl has, before and after the command's name.

    Args:
        parser: gets them.
        top: it comes first, and has their defaults.
    """

    def default(value: Any) -> Any:
        return value if top else argparse.SUPPRESS

    group = parser.add_argument_group("as in kubectl")
    group.add_argument("--kubeconfig", default=default(""), metavar="FILE")
    group.add_argument("--context", default=default(""), metavar="NAME")
    group.add_argument("-n", "--namespace", default=default(""), metavar="NS")
    group.add_argument(
        "--request-timeout", type=float, default=default(REQUEST_SECONDS), metavar="SECONDS"
    )


def add_target(parser: argparse.ArgumentParser) -> None:
    """Flags that choose nodes."""
    which = parser.add_argument_group("which nodes; without these all that have an agent")
    which.add_argument("-l", "--selector", default="", help="labels of nodes, as kubectl takes it")
    which.add_argument(
        "--node", action="append", default=[], metavar="NAME", help="repeatable, or with commas"
    )
    which.add_argument("--sample", metavar="N|P%", help="a random part of them")


def target(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parts of a Request that choose nodes.

    Raises:
        UsageError: A flag cannot be read.
    """
    try:
        return {
            "selector": selector.parse(arguments.selector) if arguments.selector else {},
            "nodes": [name for word in arguments.node for name in word.split(",") if name],
            "sample": None if arguments.sample is None else request.amount(arguments.sample),
        }
    except ValueError as error:
        raise UsageError(str(error)) from None


def task_name(text: str) -> str:
    """The name in "NAME", "at/NAME" or "agenttask/NAME", as kubectl prints it too."""
    return text.rpartition("/")[2]
