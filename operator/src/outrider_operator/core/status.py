"""The status of a task, made from its rows: phase, counts, like outcomes together, conditions.

A task has Succeeded only when it did on every node; maxFailures says when to stop trying, as
maxFailedIndexes does in a Job, and not how many failures are called a success. Writes nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from outrider_operator.core.model import (
    DEADLINE_EXCEEDED,
    FAILURES,
    FINAL,
    TASK_FINAL,
    TOO_MANY_FAILURES,
    NodeRun,
    Phase,
    Rows,
    Task,
    TaskPhase,
    resolve,
)
from outrider_operator.core.times import seconds

MAX_OUTCOMES: Final = 10
PREVIEW_CHARACTERS: Final = 256


@dataclass(frozen=True)
class Verdict:
    """Where a task stands: phase, a CamelCase word for why, and a sentence for people."""

    phase: TaskPhase
    reason: str
    message: str


def verdict(task: Task, rows: Rows) -> Verdict:
    """Where a task that has started stands, from its rows."""
    phases = Counter(row.phase for row in rows.values())
    done, total = phases[Phase.SUCCEEDED], len(rows)
    if any(phase not in FINAL for phase in phases):
        return _unfinished(task, rows)
    told = f"{done} of {total} nodes succeeded"
    failures = sum(phases[phase] for phase in FAILURES)
    if done == total:
        return Verdict(TaskPhase.SUCCEEDED, "AllNodesSucceeded", told)
    if task.spec.cancel or task.deleting:
        return Verdict(TaskPhase.CANCELLED, "TaskCancelled", told)
    # What was skipped says why; late results may have changed the number of failures since.
    if any(row.reason == TOO_MANY_FAILURES for row in rows.values() if row.phase is Phase.SKIPPED):
        allowed = resolve(task.spec.rollout.max_failures, total, up=False)
        message = f"{told}; {failures} failed, and spec.rollout.maxFailures allows {allowed}"
        return Verdict(TaskPhase.FAILED, TOO_MANY_FAILURES, message)
    if phases[Phase.SKIPPED] or phases[Phase.CANCELLED]:
        message = f"{told} within {task.spec.active_deadline_seconds} s"
        return Verdict(TaskPhase.FAILED, DEADLINE_EXCEEDED, message)
    return Verdict(TaskPhase.FAILED, "NodesFailed", f"{told}; {failures} failed")


def _unfinished(task: Task, rows: Rows) -> Verdict:
    begun = sum(row.begun for row in rows.values())
    told = f"{begun} of {len(rows)} nodes have begun"
    if task.spec.cancel or task.deleting:
        return Verdict(TaskPhase.RUNNING, "Cancelling", told)
    if task.spec.suspend:
        return Verdict(TaskPhase.SUSPENDED, "Suspended", f"{told}; spec.suspend is set")
    if begun == 0:
        return Verdict(TaskPhase.PENDING, "WaitingForAgents", "no node has begun yet")
    return Verdict(TaskPhase.RUNNING, "InProgress", told)


def counts(rows: Rows) -> dict[str, int]:
    """Number of nodes in all, and in each phase."""
    phases = Counter(row.phase for row in rows.values())
    by_name = {phase.value[0].lower() + phase.value[1:]: phases[phase] for phase in Phase}
    return {"targeted": len(rows), **by_name}


def outcomes(rows: Rows) -> list[dict[str, Any]]:
    """Like results together, those of most nodes first; at most MAX_OUTCOMES kinds."""
    groups: dict[tuple[Any, ...], list[NodeRun]] = {}
    for row in rows.values():
        if row.phase in FINAL or row.reason:
            preview = row.preview[:PREVIEW_CHARACTERS]
            groups.setdefault((row.phase, row.exit_code, row.reason, preview), []).append(row)
    largest = sorted(groups.items(), key=lambda group: (-len(group[1]), group[1][0].node))
    return [_outcome(key, members) for key, members in largest[:MAX_OUTCOMES]]


def _outcome(key: tuple[Any, ...], members: Sequence[NodeRun]) -> dict[str, Any]:
    phase, exit_code, reason, preview = key
    found: dict[str, Any] = {
        "nodes": len(members),
        "phase": phase.value,
        "example": min(row.node for row in members),
    }
    if exit_code is not None:
        found["exitCode"] = exit_code
    if reason:
        found["reason"] = reason
    if preview:
        found["preview"] = preview
    return found


def status(
    task: Task, rows: Rows, found: Verdict, previous: Mapping[str, Any], now: float
) -> dict[str, Any]:
    """The whole status of a task, to replace `previous`.

    Args:
        task: the task.
        rows: its rows as they are written; empty for one that never began.
        found: where it stands.
        previous: the status as it is, for times that stay.
        now: seconds since the Unix epoch.
    """
    made: dict[str, Any] = {
        "observedGeneration": task.generation,
        "phase": found.phase.value,
        "reason": found.reason,
        "counts": counts(rows),
        "outcomes": outcomes(rows),
        "conditions": _conditions(task, found, previous.get("conditions", []), now),
    }
    if task.started is not None:
        made["startTime"] = seconds(task.started)
    if found.phase in TASK_FINAL:
        made["completionTime"] = previous.get("completionTime") or seconds(now)
    return made


def _conditions(
    task: Task, found: Verdict, previous: Sequence[Mapping[str, Any]], now: float
) -> list[dict[str, Any]]:
    """Complete, Failed and Suspended, as a Job has them, and Cancelled."""
    holds = {
        "Complete": found.phase is TaskPhase.SUCCEEDED,
        "Failed": found.phase is TaskPhase.FAILED,
        "Suspended": found.phase is TaskPhase.SUSPENDED,
        "Cancelled": found.phase is TaskPhase.CANCELLED,
    }
    before = {item.get("type"): item for item in previous}
    return [
        condition(name, value, found.reason, found.message, task.generation, before.get(name), now)
        for name, value in holds.items()
    ]


def condition(
    name: str,
    holds: bool,
    reason: str,
    message: str,
    generation: int,
    previous: Mapping[str, Any] | None,
    now: float,
) -> dict[str, Any]:
    """A condition as metav1.Condition; its time changes only with its status."""
    state = "True" if holds else "False"
    since = seconds(now)
    if previous is not None and previous.get("status") == state:
        since = previous.get("lastTransitionTime", since)
    return {
        "type": name,
        "status": state,
        "reason": reason,
        "message": message,
        "observedGeneration": generation,
        "lastTransitionTime": since,
    }
