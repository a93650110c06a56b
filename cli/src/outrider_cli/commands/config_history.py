"""`kubectl outrider config history`: the revisions of an AgentConfig, and what each asked for."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from outrider_cli import terminal
from outrider_cli.commands.flags import task_name
from outrider_cli.core import config_render
from outrider_cli.core.config_diff import unified
from outrider_cli.core.configs import Config, Revision, config_of, pick, revisions_of
from outrider_cli.errors import ClusterError, Exit

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Show it."""
    config, revisions = read(cluster, task_name(arguments.name), arguments.server_namespace)
    if not revisions:
        terminal.say(f"{config.name}: no revision yet: no server has looked at it")
        return Exit.OK
    if not arguments.revision and not arguments.diff:
        terminal.write(config_render.history(config, revisions, arguments.output, time.time()))
        return Exit.OK
    chosen = one_of(config, revisions, arguments.revision or revisions[-1].name)
    if not arguments.diff:
        terminal.write(config_render.content(chosen, arguments.output))
        return Exit.OK
    place = revisions.index(chosen)
    before = revisions[place - 1] if place else None
    if before is not None and before.spec is None:
        raise ClusterError(f"what revision {before.name} asked for is not kept any more")
    old = f"{config.name}@{before.name}" if before else f"{config.name} before it was made"
    spec = (before.spec if before else None) or {}
    terminal.write(unified(spec, chosen.spec or {}, old, f"{config.name}@{chosen.name}"))
    return Exit.OK


def read(cluster: Cluster, name: str, namespace: str) -> tuple[Config, list[Revision]]:
    """An AgentConfig and its revisions, the oldest first. Raises as Cluster.request."""
    config = config_of(cluster.agent_config(name))
    return config, revisions_of(config, cluster.controller_revisions(namespace, name))


def one_of(config: Config, revisions: Sequence[Revision], asked: str) -> Revision:
    """The revision that is named, with what it asks for.

    Raises:
        ClusterError: There is none, several begin so, or its content is not kept any more.
    """
    try:
        found = pick(revisions, asked.removeprefix(f"{config.name}-"))
    except ValueError as error:
        raise ClusterError(f"AgentConfig {config.name}: {error}") from None
    if found.spec is None:
        raise ClusterError(f"what revision {found.name} asked for is not kept any more")
    return found
