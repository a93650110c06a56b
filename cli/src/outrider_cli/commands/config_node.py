"""`kubectl outrider config NODE`: what a node is to run, and whether its agent does."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outrider_proto.effective import EffectiveError

from outrider_cli import terminal
from outrider_cli.commands.flags import task_name
from outrider_cli.core import config_effective as effective
from outrider_cli.core import config_table
from outrider_cli.core.config_effective import Wanted, standing
from outrider_cli.core.config_report import Part, Report, report_of, short
from outrider_cli.core.configs import config_of, revisions_of
from outrider_cli.core.text import plural, printable
from outrider_cli.errors import ClusterError, Exit, NotFoundError

if TYPE_CHECKING:
    # It takes most of a second, and flags can be wrong before.
    from outrider_cli.cluster import Cluster


def run(cluster: Cluster, arguments: argparse.Namespace) -> int:
    """Show it; with --diff 1 means that there are differences, as in `kubectl diff`.

    Raises:
        ClusterError: There is no such Agent, or a revision is not kept any more.
    """
    node, namespace = task_name(arguments.node), arguments.server_namespace
    report = report_of(cluster.agent(node), time.time())
    desired = _desired(cluster, namespace, report)
    if arguments.diff:
        return _diff(cluster, namespace, node, report, desired)
    terminal.write(config_table.node(node, report, desired, arguments.output))
    if report.away:
        _say(node, report.away)
    if report.known:
        for line in config_table.remarks(desired, report):
            _say(node, line)
    if not desired.values:
        _say(node, f"nothing is asked of it{_unlooked(cluster, report)}: its own settings hold")
    if report.parts or report.known:
        _say(node, standing(report, desired))
    return Exit.OK


def _say(node: str, text: str) -> None:
    terminal.say(f"{node}: {printable(text, line=True)}")


def _unlooked(cluster: Cluster, report: Report) -> str:
    """What is to be said where there are AgentConfigs, and the operator counts none for a node."""
    if report.known:
        return ""
    count = len(cluster.agent_configs())
    if not count:
        return " (there is no AgentConfig)"
    return f" so far ({plural(count, 'AgentConfig')}: none selects it, or no server has looked)"


def _desired(cluster: Cluster, namespace: str, report: Report) -> Wanted:
    """What the node is to run, made anew from the revisions that its Agent names."""
    specs: dict[Part, Mapping[str, Any]] = {}
    for part in report.parts:
        name, revision = part
        try:
            kept = cluster.controller_revision(namespace, f"{name}-{revision}")
        except NotFoundError:
            raise ClusterError(
                f"revision {revision} of AgentConfig {name} is not kept in the namespace "
                f"{namespace} (--server-namespace); if it is the right one, try again: the Agent "
                "object is some seconds behind"
            ) from None
        specs[part] = kept.get("data") or {}
    try:
        return effective.wanted(report.parts, specs)
    except EffectiveError as error:
        raise ClusterError(f"this version of kubectl outrider cannot read it: {error}") from None


def _diff(cluster: Cluster, namespace: str, node: str, report: Report, desired: Wanted) -> int:
    if report.away:
        _say(node, f"{report.away}; what follows is what it said last")
    if not report.known or (not report.phase and not report.hash):
        _say(node, "its agent never reported a configuration: it runs its own settings")
    elif report.phase == "Failed":
        _say(node, standing(report, desired))
    if effective.runs(report, desired):
        _say(node, "no difference")
        return Exit.OK
    nothing = effective.wanted((), {})
    running = nothing if report.hash in ("", nothing.hash) else None
    if running is None:
        running = _running(cluster, namespace, report, desired)
    if running is None:
        raise ClusterError(
            f"{node} runs {short(report.hash)} and is to run {short(desired.hash)}; of what it "
            "runs nothing else is known: the revisions that are kept do not make it"
        )
    terminal.write(effective.difference(node, running, desired))
    _say(node, standing(report, desired))
    return Exit.NODES


def _running(cluster: Cluster, namespace: str, report: Report, desired: Wanted) -> Wanted | None:
    """What the agent runs, looked for among what kept revisions make."""
    known: dict[str, list[str]] = {}
    specs: dict[Part, Mapping[str, Any]] = {}
    for body in cluster.agent_configs():
        config = config_of(body)
        found = revisions_of(config, cluster.controller_revisions(namespace, config.name))
        for revision in reversed(found):
            if revision.spec is not None:
                known.setdefault(config.name, []).append(revision.name)
                specs[config.name, revision.name] = revision.spec
    return effective.found_by_hash(report.hash, desired, known, specs)
