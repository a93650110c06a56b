"""Results of single nodes, as the reports of a task hold them.

Reads fields leniently: a newer server may write more of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

SUCCEEDED: Final = "Succeeded"
#: Phases of a node that are no end.
UNFINISHED: Final = frozenset({"Pending", "Dispatched", "Running"})
#: Ends that are no success and that nobody asked for.
FAILURES: Final = frozenset({"Failed", "TimedOut", "Interrupted", "Lost", "Rejected"})
#: Why a node cannot even begin.
ABSENT_REASONS: Final = frozenset({"AgentNotConnected", "NodeNotFound"})
#: Phases of a task that are its end.
TASK_ENDS: Final = frozenset({"Succeeded", "Failed", "Cancelled"})


@dataclass(frozen=True)
class Row:
    """Where a task stands on one node.

    Attributes:
        node: Name of the Node.
        phase: Pending, Running, Succeeded, ...
        reason: CamelCase word for why, or "".
        message: A sentence for people, or "".
        attempt: Which attempt, from 1; 0 before the first.
        exit_code: None where no process ended by itself.
        started: By the node's clock, RFC 3339, or "".
        finished: As `started`.
        preview: The beginning of the output.
        output_bytes: How much was printed in all.
        truncated: Output beyond spec.output.maxBytes was thrown away.
        node_state: Such as "Cordoned", or "".
        raw: The entry as it stands in the report.
    """

    node: str
    phase: str
    reason: str = ""
    message: str = ""
    attempt: int = 0
    exit_code: int | None = None
    started: str = ""
    finished: str = ""
    preview: str = ""
    output_bytes: int = 0
    truncated: bool = False
    node_state: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def final(self) -> bool:
        """Whether it came to an end."""
        return self.phase not in UNFINISHED

    @property
    def failed(self) -> bool:
        """Whether it ended without success, and not because someone stopped the task."""
        return self.phase in FAILURES

    @property
    def absent(self) -> bool:
        """Whether its node could not be reached: no result, and none is on its way."""
        if self.phase == "Lost":
            return True
        return self.phase in {"Pending", "Skipped"} and self.reason in ABSENT_REASONS


def row_of(entry: Mapping[str, Any]) -> Row:
    """A row from its entry in a report."""
    return Row(
        node=str(entry.get("node", "")),
        phase=str(entry.get("phase", "Pending")),
        reason=str(entry.get("reason", "")),
        message=str(entry.get("message", "")),
        attempt=int(entry.get("attempt", 0)),
        exit_code=entry.get("exitCode"),
        started=str(entry.get("startTime", "")),
        finished=str(entry.get("finishTime", "")),
        preview=str(entry.get("preview", "")),
        output_bytes=int(entry.get("outputBytes", 0)),
        truncated=bool(entry.get("outputTruncated", False)),
        node_state=str(entry.get("nodeState", "")),
        raw=entry,
    )


def rows_of(reports: Iterable[Mapping[str, Any]], uid: str) -> list[Row]:
    """The rows of a task by node name, from reports; those of other tasks are passed over."""
    entries = [
        entry
        for report in reports
        if report.get("task", {}).get("uid") == uid
        for entry in report.get("nodes") or []
    ]
    return sorted(map(row_of, entries), key=lambda row: row.node)


def names(rows: Iterable[Row], limit: int = 0) -> str:
    """Node names for people: the first ones and how many more; `limit` 0 names all."""
    found = sorted(row.node for row in rows)
    if not limit or len(found) <= limit:
        return ", ".join(found)
    return f"{', '.join(found[:limit])} and {len(found) - limit:,} more"
