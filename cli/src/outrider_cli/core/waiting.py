"""How far a task is, and what it waits for: node names and reasons, never just "waiting"."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from outrider_cli.core.rows import TASK_ENDS, Row, names
from outrider_cli.core.text import plural, printable

#: Counts of nodes that came to an end, in the order in which they are told.
ENDS: Final = (
    *("succeeded", "failed", "timedOut", "interrupted", "lost", "rejected"),
    *("cancelled", "skipped"),
)
#: So many nodes that make a task wait are named in a line.
NAMED: Final = 20

_WORDS: Final = {"timedOut": "timed out"}
_STATES: Final = {
    "Pending": "waiting for a turn",
    "Dispatched": "sent the command, without an answer yet",
    "Running": "running it",
}


@dataclass(frozen=True)
class Snapshot:
    """A task at one moment.

    Attributes:
        phase: Of the task; "" before a server has begun with it.
        reason: Why, or "".
        total: Nodes it is for.
        done: Nodes that came to an end.
        counts: As in the status.
        message: What its conditions say of its end, or "".
    """

    phase: str
    reason: str
    total: int
    done: int
    counts: Mapping[str, int]
    message: str = ""

    @property
    def ended(self) -> bool:
        """Whether the task as a whole came to its end."""
        return self.phase in TASK_ENDS


def snapshot(task: Mapping[str, Any]) -> Snapshot:
    """Where an AgentTask stands by its status."""
    status = task.get("status") or {}
    counts: dict[str, int] = {
        name: int(count) for name, count in (status.get("counts") or {}).items()
    }
    messages = [
        str(condition.get("message", ""))
        for condition in status.get("conditions") or []
        if condition.get("status") == "True"
    ]
    return Snapshot(
        phase=str(status.get("phase", "")),
        reason=str(status.get("reason", "")),
        total=counts.get("targeted", 0),
        done=sum(counts.get(name, 0) for name in ENDS),
        counts=counts,
        message=messages[0] if messages else "",
    )


def progress(found: Snapshot) -> str:
    """How far a task is: "3 of 5 nodes done: 2 succeeded, 1 failed; 2 running"."""
    if not found.total:
        return found.phase or "not begun"
    ended = _told(found, ENDS)
    open_ = _told(found, ("running", "dispatched", "pending"))
    text = f"{found.done:,} of {plural(found.total, 'node')} done"
    return text + (f": {ended}" if ended else "") + (f"; {open_}" if open_ else "")


def _told(found: Snapshot, which: Sequence[str]) -> str:
    return ", ".join(
        f"{found.counts[name]:,} {_WORDS.get(name, name)}"
        for name in which
        if found.counts.get(name)
    )


def reasons(found: Snapshot, rows: Sequence[Row], cancelling: bool = False) -> list[str]:
    """What a task that goes on waits for, a sentence each; the most telling first.

    Args:
        found: The task.
        rows: Its rows as far as they are known.
        cancelling: Its cancel was asked for.
    """
    if found.ended:
        return []
    if not found.phase:
        return [
            "no server has begun with the task: "
            "see that one of them leads (kubectl get lease -A) and what its log says"
        ]
    if found.phase == "Suspended":
        return ["the task is suspended: spec.suspend is true"]
    told: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if not row.final:
            told.setdefault((row.phase, row.reason), []).append(row)
    # Those that have a reason of their own hold a task up; the others only take their time.
    ordered = sorted(told.items(), key=lambda item: (not item[0][1], -len(item[1])))
    return [_reason(members, cancelling) for _, members in ordered]


def _reason(members: Sequence[Row], cancelling: bool) -> str:
    first = members[0]
    if first.reason:
        said = printable(first.message, line=True) or "no message"
        return f"{plural(len(members), 'node')} {first.reason} ({said}): {names(members, NAMED)}"
    state = _STATES.get(first.phase, first.phase)
    if cancelling and first.phase == "Running":
        state = "ending it"
    return f"{plural(len(members), 'node')} {state}: {names(members, NAMED)}"


def verdict(found: Snapshot) -> str:
    """How a task ended, or stands, in a line."""
    state = f"{found.phase or 'Pending'}{f' ({found.reason})' if found.reason else ''}"
    if found.ended and not found.total and found.message:
        return f"{state}: {printable(found.message, line=True)}"
    return f"{state}: {progress(found)}"
