"""What agents say of their runs, put into the rows of a task; and what they may forget then.

Reports come late, twice and out of order: a row only ever moves as the table of phases allows, so
the result is the same. Nothing is acknowledged here: the caller does, after the rows are written.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from outrider_proto.v1.agent_pb2 import RunPhase, RunState

from outrider_operator.core.model import (
    FINAL,
    IN_FLIGHT,
    TRANSITIONS,
    NodeRun,
    Phase,
    Rows,
)

#: What an agent's phases are in a report; ACCEPTED is Dispatched: it has not begun.
PHASES: Final = {
    RunPhase.RUN_PHASE_ACCEPTED: Phase.DISPATCHED,
    RunPhase.RUN_PHASE_RUNNING: Phase.RUNNING,
    RunPhase.RUN_PHASE_SUCCEEDED: Phase.SUCCEEDED,
    RunPhase.RUN_PHASE_FAILED: Phase.FAILED,
    RunPhase.RUN_PHASE_TIMED_OUT: Phase.TIMED_OUT,
    RunPhase.RUN_PHASE_CANCELLED: Phase.CANCELLED,
    RunPhase.RUN_PHASE_INTERRUPTED: Phase.INTERRUPTED,
    RunPhase.RUN_PHASE_REJECTED: Phase.REJECTED,
}
#: Attempts of one node whose states are kept until they are written.
MAX_ATTEMPTS: Final = 16
REASON_BYTES: Final = 128
MESSAGE_CHARACTERS: Final = 1024


@dataclass
class Pending:
    """What one node reported and no report holds yet: the newest state of each attempt."""

    states: dict[int, RunState] = field(default_factory=dict)
    complete: bool = False

    def add(self, states: Iterable[RunState], complete: bool) -> None:
        """Take in newer states. An end is never replaced by what came before it."""
        for state in states:
            known = self.states.get(state.id.attempt)
            if known is None or not is_final(known):
                self.states[state.id.attempt] = state
        while len(self.states) > MAX_ATTEMPTS:
            del self.states[min(self.states)]
        self.complete = self.complete or complete


@dataclass(frozen=True)
class Report:
    """What one agent said of one task.

    Attributes:
        node: the agent's node.
        states: states of the task's runs there, oldest first.
        complete: no other run of the task is known to the agent, and what it said is not older
            than its present stream.
    """

    node: str
    states: Sequence[RunState]
    complete: bool = False


@dataclass(frozen=True)
class Merged:
    """Rows with reports put into them.

    Attributes:
        rows: all rows.
        heard: nodes that said something about their run.
        ended: nodes and attempts that ended: to be acknowledged once the rows are written.
    """

    rows: dict[str, NodeRun]
    heard: frozenset[str]
    ended: tuple[tuple[str, int], ...]


def merge(rows: Rows, reports: Iterable[Report]) -> Merged:
    """Put reports into rows."""
    merged = dict(rows)
    heard: set[str] = set()
    ended: dict[tuple[str, int], None] = {}
    for report in reports:
        row = merged.get(report.node)
        for state in report.states:
            attempt = state.id.attempt
            if row is not None and attempt == row.attempt:
                row = merged[report.node] = _advance(row, state)
                heard.add(report.node)
            if is_final(state) and _settled(row, attempt):
                ended[report.node, attempt] = None
        if report.complete and row is not None:
            merged[report.node] = _forgotten(row, report.states)
    return Merged(merged, frozenset(heard), tuple(ended))


def is_final(state: RunState) -> bool:
    """Whether a run has ended."""
    return PHASES.get(state.phase, Phase.PENDING) in FINAL


def _settled(row: NodeRun | None, attempt: int) -> bool:
    """Whether the report needs nothing more of an attempt: it is final there, or superseded."""
    if row is None or attempt < row.attempt:
        return True
    # A row that waits for its next attempt holds the end of its last one.
    over = row.phase in FINAL - {Phase.LOST} or row.phase is Phase.PENDING
    return attempt == row.attempt and over


def _advance(row: NodeRun, state: RunState) -> NodeRun:
    phase = PHASES.get(state.phase)
    # Out of Pending only the planner leads: what is told twice must not end a row that waits.
    if phase is None or row.phase is Phase.PENDING or phase not in TRANSITIONS[row.phase]:
        return row
    fields: dict[str, Any] = {"started_nanos": max(0, state.started_unix_nanos)}
    if phase not in IN_FLIGHT:
        fields.update(
            exit_code=state.exit_code if state.HasField("exit_code") else None,
            signal=max(0, state.signal),
            finished_nanos=max(0, state.finished_unix_nanos),
            preview=state.preview.decode("utf-8", "replace"),
            output_bytes=min(state.output_bytes, 2**63 - 1),
            output_truncated=state.output_truncated,
        )
    return row.to(phase, state.reason[:REASON_BYTES], state.message[:MESSAGE_CHARACTERS], **fields)


def _forgotten(row: NodeRun, states: Sequence[RunState]) -> NodeRun:
    """A run that was under way and that its agent no longer knows will never report its end."""
    known = any(state.id.attempt == row.attempt for state in states)
    if row.phase is not Phase.RUNNING or known:
        return row
    message = "the agent has lost what it knew of the run; whether it ended is not known"
    return row.to(Phase.INTERRUPTED, "AgentLostState", message)
