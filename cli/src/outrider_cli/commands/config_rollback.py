"""`kubectl outrider config rollback` and `retry`: change an AgentConfig, or have it tried again.

Both only write the AgentConfig: how nodes get there is the operator's, by spec.rollout.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from outrider_cli import terminal
from outrider_cli.commands import config_history
from outrider_cli.commands.flags import task_name
from outrider_cli.core.config_diff import unified
from outrider_cli.core.configs import (
    KIND,
    RETRY,
    ROLLED_BACK,
    SETTLED,
    Config,
    Revision,
    asked_for,
    config_of,
    current,
    earlier,
    revisions_of,
    state,
)
from outrider_cli.core.text import plural
from outrider_cli.errors import ClusterError, ConflictError, Exit, NotFoundError

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster

#: Times that a write is tried when only the status was written meanwhile.
TRIES: Final = 5
_NOTE: Final = {"none": "", "client": " (dry run)", "server": " (server dry run)"}


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Do either."""
    name = task_name(arguments.name)
    if arguments.action == "retry":
        return _retry(cluster, name, arguments.dry_run)
    return _rollback(cluster, name, arguments)


def _rollback(cluster: Cluster, name: str, arguments: argparse.Namespace) -> int:
    body = cluster.agent_config(name)
    config = config_of(body)
    revisions = revisions_of(config, cluster.controller_revisions(arguments.server_namespace, name))
    if arguments.to:
        goal = config_history.one_of(config, revisions, arguments.to)
    else:
        found = earlier(config, revisions)
        if found is None:
            raise NotFoundError(
                f"AgentConfig {name} has no earlier revision that settled and is kept "
                f"(kubectl outrider config history {name})"
            )
        goal = found
    now = current(config, revisions)
    if goal == now:
        terminal.write(
            f"{KIND}/{name} skipped rollback (it asks for revision {goal.name} already)\n"
        )
        _hint_retry(config, goal)
        return Exit.OK
    told = f"{name}@{goal.name}" + (f" ({state(goal, config)})" if state(goal, config) else "")
    before = f"{name}@{now.name}" if now else f"{name} as it is now"
    if arguments.dry_run != "none":
        terminal.write(unified(asked_for(config.spec), goal.spec or {}, before, told))
    if arguments.dry_run != "client":
        _write(cluster, body, goal, dry_run=arguments.dry_run == "server")
    terminal.write(f"{KIND}/{name} rolled back{_NOTE[arguments.dry_run]}\n")
    terminal.say(f"{name}: from {before} to {told}, spec.rollout as it is")
    if arguments.dry_run == "none":
        terminal.say(f"{name}: to follow it: kubectl outrider config status {name}")
    return Exit.OK


def _hint_retry(config: Config, goal: Revision) -> None:
    if goal.name == config.trial and config.phase == ROLLED_BACK:
        terminal.say(
            f"{config.name}: to have it tried again: kubectl outrider config retry {config.name}"
        )


def _write(cluster: Cluster, body: dict[str, Any], goal: Revision, *, dry_run: bool) -> None:
    """Put a revision's spec in place of what the AgentConfig asks for, and keep spec.rollout.

    Raises:
        ConflictError: Somebody else changed the spec meanwhile.
    """
    name, generation = body["metadata"]["name"], body["metadata"].get("generation")
    for left in range(TRIES, 0, -1):
        spec = dict(goal.spec or {})
        if "rollout" in body["spec"]:
            spec["rollout"] = body["spec"]["rollout"]
        try:
            cluster.replace_agent_config({**body, "spec": spec}, dry_run=dry_run)
            return
        except ConflictError:
            body = cluster.agent_config(name)
            if left == 1 or body["metadata"].get("generation") != generation:
                raise ConflictError(
                    f"AgentConfig {name} was changed by somebody else meanwhile: look at it, "
                    "then try again"
                ) from None


def _retry(cluster: Cluster, name: str, dry_run: str) -> int:
    config = config_of(cluster.agent_config(name))
    settled = config.phase in (SETTLED, "") and config.settled == config.target != ""
    failed = int(config.counts.get("failed", 0))
    if config.seen and settled and not failed:
        terminal.write(f"{KIND}/{name} skipped retry (revision {config.settled} is settled)\n")
        return Exit.OK
    if not config.seen or not config.target:
        raise ClusterError(
            f"no server has looked at AgentConfig {name} as it is now: nothing to try again"
        )
    if dry_run != "client":
        value = datetime.now(UTC).isoformat(timespec="milliseconds")
        cluster.annotate_agent_config(name, RETRY, value, dry_run=dry_run == "server")
    terminal.write(f"{KIND}/{name} retried{_NOTE[dry_run]}\n")
    if settled:
        again = f"{plural(failed, 'node')} that could not take it: asked again"
    elif config.phase == ROLLED_BACK:
        again = "is tried again, from the canary on"
    else:
        again = "begins anew, from the canary on"
    terminal.say(f"{name}: revision {config.target}: {again}")
    if dry_run == "none":
        terminal.say(f"{name}: to follow it: kubectl outrider config status {name}")
    return Exit.OK
