"""The life of one attempt of a run, as a table of phases.

Everything that changes a run's state goes through `advance`, so that no edge can invent a
transition. Starts, stores and sends nothing.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

Phase: TypeAlias = pb.RunPhase.ValueType


class RunKey(NamedTuple):
    """Names one attempt on this node."""

    task_uid: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.task_uid}/{self.attempt}"


class IllegalTransitionError(Exception):
    """A run cannot go from its phase to the one asked for: a fault of the agent."""


#: From each phase, where a run may go. Final phases lead nowhere.
TRANSITIONS: Final[Mapping[Phase, frozenset[Phase]]] = {
    pb.RUN_PHASE_ACCEPTED: frozenset(
        {
            pb.RUN_PHASE_RUNNING,
            pb.RUN_PHASE_FAILED,
            pb.RUN_PHASE_CANCELLED,
            pb.RUN_PHASE_INTERRUPTED,
            pb.RUN_PHASE_REJECTED,
        }
    ),
    pb.RUN_PHASE_RUNNING: frozenset(
        {
            pb.RUN_PHASE_SUCCEEDED,
            pb.RUN_PHASE_FAILED,
            pb.RUN_PHASE_TIMED_OUT,
            pb.RUN_PHASE_CANCELLED,
            pb.RUN_PHASE_INTERRUPTED,
        }
    ),
    pb.RUN_PHASE_SUCCEEDED: frozenset(),
    pb.RUN_PHASE_FAILED: frozenset(),
    pb.RUN_PHASE_TIMED_OUT: frozenset(),
    pb.RUN_PHASE_CANCELLED: frozenset(),
    pb.RUN_PHASE_INTERRUPTED: frozenset(),
    pb.RUN_PHASE_REJECTED: frozenset(),
}

FINAL: Final = frozenset(phase for phase, after in TRANSITIONS.items() if not after)


def key_of(run: pb.RunId) -> RunKey:
    """The key of a run."""
    return RunKey(run.task_uid, run.attempt)


def id_of(key: RunKey) -> pb.RunId:
    """The wire form of a key."""
    return pb.RunId(task_uid=key.task_uid, attempt=key.attempt)


def is_final(state: pb.RunState) -> bool:
    """Whether the run has ended for good."""
    return state.phase in FINAL


def phase_name(phase: Phase) -> str:
    """A phase as people write it: "TimedOut"."""
    words = pb.RunPhase.Name(phase).removeprefix("RUN_PHASE_").split("_")
    return "".join(word.capitalize() for word in words)


def accepted(run: pb.RunId) -> pb.RunState:
    """The state of a run that was taken and has not begun."""
    return pb.RunState(id=run, phase=pb.RUN_PHASE_ACCEPTED)


def clip(text: str, limit: int = limits.RUN_MESSAGE_BYTES) -> str:
    """The text, cut to `limit` bytes of UTF-8 at a character's border."""
    return text.encode()[:limit].decode(errors="ignore")


def advance(
    state: pb.RunState, phase: Phase, *, reason: str = "", message: str = ""
) -> pb.RunState:
    """A copy of the state in its next phase.

    Args:
        state: Where the run stands.
        phase: Where it goes.
        reason: CamelCase word for why; empty for a success.
        message: A sentence for people; cut to its limit.

    Raises:
        IllegalTransitionError: The table has no such step.
    """
    if phase not in TRANSITIONS.get(state.phase, frozenset()):
        raise IllegalTransitionError(
            f"run {key_of(state.id)}: no step from {phase_name(state.phase)} to {phase_name(phase)}"
        )
    after = pb.RunState()
    after.CopyFrom(state)
    after.phase = phase
    after.reason = reason
    after.message = clip(message)
    return after


def tombstone(state: pb.RunState) -> pb.RunState:
    """What is kept of a run whose result was acknowledged: all but its output."""
    kept = pb.RunState()
    kept.CopyFrom(state)
    kept.ClearField("preview")
    kept.ClearField("message")
    return kept
