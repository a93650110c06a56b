"""`kubectl outrider run`: runs a command on nodes now, and shows what came of it."""

from __future__ import annotations

import argparse
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from outrider_cli import terminal
from outrider_cli.commands import flags
from outrider_cli.core import render, request
from outrider_cli.core.rows import rows_of
from outrider_cli.core.text import span
from outrider_cli.core.waiting import snapshot, verdict
from outrider_cli.errors import ConflictError, Exit, LeftError, UnavailableError, UsageError
from outrider_cli.follow import Follower, patiently

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster

#: Largest script, bytes; the resource definition has the same bound.
SCRIPT_BYTES: Final = 262_144
FORMS: Final = ("group", *(form for form in render.FORMS if form != "group"))


def add(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    flags.add_target(parser)
    how = parser.add_argument_group("how it is run")
    how.add_argument("--max-concurrent", metavar="N|P%", help="nodes at a time; begins no waves")
    how.add_argument("--max-failures", metavar="N|P%", help="when more fail, nothing new begins")
    how.add_argument("--waves", metavar="W,...", help="such as 1,5,20%%,100%%")
    how.add_argument("--timeout", metavar="TIME", help="of a run on one node, such as 90s or 5m")
    how.add_argument("--deadline", metavar="TIME", help="of the whole task")
    how.add_argument("--retries", type=int, metavar="N", help="more attempts after a failure")
    how.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    how.add_argument("--run-as", default="", metavar="USER", help="the user on the node")
    how.add_argument("--host", action="store_true", help="in the namespaces of the host")
    how.add_argument("--name", default="", help="of the AgentTask; default: a random one")
    how.add_argument("--keep", action="store_true", help="keep the AgentTask; else for an hour")
    how.add_argument(
        "--preview-bytes", type=int, metavar="N", help="of a node's output that are shown"
    )
    how.add_argument("-o", "--output", choices=FORMS, default="group", help="default: group")
    what = parser.add_argument_group("what is run, instead of -- CMD")
    what.add_argument("--script", default="", metavar="FILE", help="a script; - for stdin")
    what.add_argument("--interpreter", default="", help="of the script; default: its first line")
    what.add_argument("--builtin", choices=request.BUILTINS, help="something of the agent's own")


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Make the task, follow it to its end, and show its results; 0 if all nodes succeeded."""
    asked = _request(cluster, arguments)
    began = time.monotonic()
    uid = _create(cluster, asked)
    task = Follower(cluster, asked.name).to_end()
    rows = rows_of(patiently(lambda: cluster.reports(asked.name)), uid)
    terminal.write(render.results(task, rows, arguments.output))
    found = snapshot(task)
    terminal.say(f"{asked.name}: {verdict(found)}, {span(time.monotonic() - began)}")
    return Exit.OK if found.phase == "Succeeded" else Exit.NODES


def _create(cluster: Cluster, asked: request.Request) -> str:
    try:
        made = cluster.create_task(request.task(asked))
    except ConflictError:
        raise ConflictError(
            f"there is an AgentTask {cluster.namespace}/{asked.name} already: "
            "give another --name, or delete it"
        ) from None
    except UnavailableError as error:
        raise UnavailableError(
            f"{error} (AgentTask {cluster.namespace}/{asked.name} may have been made all the same)"
        ) from None
    except KeyboardInterrupt:
        raise LeftError(
            f"left: AgentTask {cluster.namespace}/{asked.name} may have been made"
        ) from None
    return str(made["metadata"]["uid"])


def _request(cluster: Cluster, arguments: argparse.Namespace) -> request.Request:
    try:
        what = _what(arguments)
        return request.Request(
            name=arguments.name or f"run-{secrets.token_hex(4)}",
            namespace=cluster.namespace,
            run=what,
            max_concurrent=_amount(arguments.max_concurrent),
            max_failures=_amount(arguments.max_failures),
            waves=[request.amount(wave) for wave in (arguments.waves or "").split(",") if wave],
            timeout=_duration(arguments.timeout),
            deadline=_duration(arguments.deadline),
            retries=arguments.retries,
            env=_env(arguments.env),
            user=arguments.run_as,
            host=arguments.host,
            preview_bytes=arguments.preview_bytes,
            keep=arguments.keep,
            **flags.target(arguments),
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def _what(arguments: argparse.Namespace) -> dict[str, Any]:
    """spec.run: exactly one of the command, the script and the builtin."""
    given = [bool(arguments.words), bool(arguments.script), bool(arguments.builtin)]
    if sum(given) != 1:
        raise UsageError("give one thing to run: -- CMD..., --script FILE or --builtin NAME")
    if arguments.interpreter and not arguments.script:
        raise UsageError("--interpreter goes with --script")
    if arguments.builtin:
        return {"builtin": arguments.builtin}
    if arguments.script:
        return request.script(_source(arguments.script), arguments.interpreter)
    return {"command": list(arguments.words)}


def _source(file: str) -> str:
    try:
        data = sys.stdin.buffer.read(SCRIPT_BYTES + 1) if file == "-" else _read(Path(file))
        text = data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"--script {shlex.quote(file)}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--script {shlex.quote(file)}: is no text in UTF-8") from None
    if len(data) > SCRIPT_BYTES:
        raise UsageError(f"--script {shlex.quote(file)}: is longer than {SCRIPT_BYTES} bytes")
    return text


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(SCRIPT_BYTES + 1)


def _amount(text: str | None) -> request.Amount | None:
    return None if text is None else request.amount(text)


def _duration(text: str | None) -> int | None:
    return None if text is None else request.duration(text)


def _env(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not name or not sign:
            raise UsageError(f"--env {pair}: write NAME=VALUE")
        found[name] = value
    return found
