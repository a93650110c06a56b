"""How far a change of an AgentConfig is, and whether it came to an end, for people."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from outrider_cli.core.config_report import report_of
from outrider_cli.core.configs import (
    IN_TRIAL,
    PAUSED,
    ROLLED_BACK,
    ROLLING_BACK,
    SETTLED,
    Config,
)
from outrider_cli.core.text import plural

#: Nodes that a line names at most.
NAMED: Final = 3
# Reasons of the condition Ready: nodes could not take it, though it rolled out; the spec cannot be
# read.
NODES_FAILED: Final = "NodesFailed"
INVALID: Final = "Invalid"


class Outcome(Enum):
    """Whether it came to an end."""

    GOING = "going"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Progress:
    """How far a change is: one line."""

    outcome: Outcome
    line: str


def progress(config: Config) -> Progress:
    """How far the change is that the spec asks for."""
    what = f'agentconfig "{config.name}"'
    if not config.seen or not config.target:
        return Progress(Outcome.GOING, f"{_waiting(config)}: no server has looked at it yet")
    ready = str(config.ready.get("reason", ""))
    said = str(config.ready.get("message") or ready)
    if ready == INVALID:
        return Progress(Outcome.FAILED, f"{what} cannot be used: {said}")
    if config.phase == ROLLED_BACK:
        return Progress(Outcome.FAILED, f"{what} was rolled back{_why(config)}")
    if config.phase == PAUSED:
        return Progress(Outcome.FAILED, f"{what} is paused{_why(config)}{_counts(config)}")
    if config.phase in (SETTLED, "") and config.settled == config.target:
        if ready == NODES_FAILED:
            return Progress(Outcome.FAILED, f"{what} rolled out, but {said}")
        return Progress(
            Outcome.DONE,
            f"{what} successfully rolled out: revision {config.target}{_counts(config)}",
        )
    if config.phase in IN_TRIAL or config.phase == ROLLING_BACK:
        return Progress(
            Outcome.GOING, f"{_waiting(config)}: {config.phase}{_why(config)}{_counts(config)}"
        )
    why = f": {said}" if said else ""
    return Progress(Outcome.GOING, f"{_waiting(config)}: it has not begun{why}")


def _waiting(config: Config) -> str:
    revision = f" revision {config.target}" if config.seen and config.target else ""
    return f'Waiting for rollout of "{config.name}"{revision} to finish'


def _why(config: Config) -> str:
    return f": {config.message}" if config.message else ""


def _counts(config: Config) -> str:
    counts = config.counts
    if not counts:
        return ""
    total = int(counts.get("targeted", 0))
    parts = [f"{counts.get('applied', 0):,} of {plural(total, 'node')} run it"]
    absent = int(counts.get("absent", 0))
    others = {
        "failed": int(counts.get("failed", 0)),
        "pending": int(counts.get("pending", 0)) - absent,
        "not connected": absent,
    }
    parts += [f"{number:,} {what}" for what, number in others.items() if number > 0]
    return f" ({', '.join(parts)})"


def waits(config: Config, agents: Iterable[Mapping[str, Any]], now: float) -> list[str]:
    """Which nodes have the revision in trial and are not well with it: a line for each reason.

    Args:
        config: the AgentConfig.
        agents: all Agents; what they say may be some seconds old.
        now: seconds since the Unix epoch.
    """
    groups: dict[str, list[str]] = {}
    for agent in agents:
        report = report_of(agent, now)
        if (config.name, config.trial) not in report.parts:
            continue
        ill = next((p for p in report.plugins if p.get("healthy") is False), None)
        if report.away:
            groups.setdefault("its agent is not connected", []).append(_name(agent))
        elif report.phase == "Failed":
            groups.setdefault(f"Failed: {report.message}", []).append(_name(agent))
        elif report.phase != "Applied":
            groups.setdefault(report.phase or "never reported", []).append(_name(agent))
        elif ill is not None:
            text = f"plug-in {ill.get('name')}: {ill.get('message') or ill.get('phase')}"
            groups.setdefault(text, []).append(_name(agent))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"{plural(len(nodes), 'node')}: {why}: {_names(nodes)}" for why, nodes in ordered]


def _name(agent: Mapping[str, Any]) -> str:
    return str(agent["metadata"]["name"])


def _names(nodes: list[str]) -> str:
    more = len(nodes) - NAMED
    return ", ".join(sorted(nodes)[:NAMED]) + (f" and {more:,} more" if more > 0 else "")
