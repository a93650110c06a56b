"""The command line: parses it, runs one command, turns errors into a line and an exit code."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn, Protocol, cast

from outrider_cli import terminal
from outrider_cli.commands.flags import add_common
from outrider_cli.core.config_words import arranged
from outrider_cli.errors import CommandError, Exit, UsageError

DESCRIPTION: Final = "Run tasks on the nodes of a cluster, and read what came of them."
EXIT_CODES: Final = (
    "exit codes: 0 done, and all nodes succeeded; 1 some did not; 2 wrong flags; 3 the cluster "
    "refused or does not answer; 4 not all there in time; 130 left by Ctrl-C"
)


class Command(Protocol):
    """A module of `commands`."""

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add its flags."""

    def run(self, cluster: Any, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit code."""


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (kubectl outrider --help)")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        terminal.write(f"kubectl-outrider {version('outrider-cli')}\n")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        return int(_main(list(sys.argv[1:] if argv is None else argv)))
    except CommandError as error:
        terminal.say(f"error: {error}" if error.code != Exit.LEFT else str(error))
        return int(error.code)
    except KeyboardInterrupt:
        terminal.say("left by Ctrl-C")
        return int(Exit.LEFT)
    except BrokenPipeError:
        # The reader, say `head`, has seen enough. What Python would still flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.OK)


def _main(words: list[str]) -> int:
    # What comes after -- is the command's own, flags and all.
    own, after = words, []
    if "--" in words:
        at = words.index("--")
        own, after = words[:at], words[at + 1 :]
    if "config" in own:
        own = arranged(own)
    arguments = _parser(own).parse_args(own)
    if after and arguments.command != "run":
        raise UsageError(f"{arguments.command} takes nothing after --")
    arguments.words = after
    command = _command(arguments.command)
    if arguments.command == "records" and arguments.records:
        return command.run(None, arguments)  # folders need no cluster
    from outrider_cli.cluster import connect  # takes half a second: not before flags are right

    cluster = connect(
        arguments.kubeconfig, arguments.context, arguments.namespace, arguments.request_timeout
    )
    return command.run(cluster, arguments)


def _command(name: str) -> Command:
    """The module of a command; imported only when it is used, for that takes time."""
    return cast("Command", importlib.import_module(f"outrider_cli.commands.{name}"))


HELP: Final = {
    "run": "run a command on nodes now, and show what came of it: run [flags] -- CMD...",
    "results": "what came of a task, node by node",
    "output": "all that a task printed on one node",
    "records": "what agents gather: shown as it comes (tail), or written to a file (export)",
    "cancel": "end a task on all nodes",
    "config": "what a node is to run and why, and how changes of AgentConfigs go",
    "agents": "which agents there are, and why others are away",
    "ping": "how long the way to each node and back takes",
}


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The flags of all, and of those commands that are named."""
    parser = _Parser(prog="kubectl outrider", description=DESCRIPTION, epilog=EXIT_CODES)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    add_common(parser, top=True)
    each = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in HELP.items():
        child = each.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        add_common(child)
        if name in words:
            _command(name).add(child)
    return parser


if __name__ == "__main__":
    sys.exit(main())
