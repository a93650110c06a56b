"""From how a process ended to the phase, reason and sentence of its run.

One place decides what counts as a success. Looks at no process itself.
"""

import errno
import signal
from dataclasses import dataclass
from enum import Enum

from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.runs import Phase, advance


class Cause(Enum):
    """Why a process ended, as far as the agent had a hand in it."""

    ITSELF = "itself"
    TIMEOUT = "timeout"
    CANCEL = "cancel"
    STOP = "stop"


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        cause: Who ended it.
        exit_code: Its exit code, None where a signal ended it or it did not end.
        signal: The signal that ended it, 0 for none.
        stuck: It was still there some seconds after KILL.
    """

    cause: Cause = Cause.ITSELF
    exit_code: int | None = None
    signal: int = 0
    stuck: bool = False


@dataclass(frozen=True)
class Outcome:
    """The final word on a run."""

    phase: Phase
    reason: str = ""
    message: str = ""


#: What becomes of a run that is ended before it began.
NOT_BEGUN = {
    Cause.CANCEL: Outcome(pb.RUN_PHASE_CANCELLED, "Cancelled", "cancelled before it began"),
    Cause.STOP: Outcome(
        pb.RUN_PHASE_INTERRUPTED, "AgentStopped", "the agent stopped before it began"
    ),
}


def ended(state: pb.RunState, outcome: Outcome, now_nanos: int) -> pb.RunState:
    """A run's state with its outcome.

    Args:
        state: Where the run stands.
        outcome: How it ended.
        now_nanos: When, nanoseconds since the Unix epoch; noted only if it had begun.

    Raises:
        IllegalTransitionError: It cannot end so from there.
    """
    after = advance(state, outcome.phase, reason=outcome.reason, message=outcome.message)
    if state.started_unix_nanos:
        after.finished_unix_nanos = now_nanos
    return after


def classify(ending: Ending, *, timeout_seconds: float) -> Outcome:
    """What the end of a process means for its run."""
    left = "; a process of it did not go away after KILL" if ending.stuck else ""
    if ending.cause is Cause.TIMEOUT:
        text = f"ended by the agent after its timeout of {timeout_seconds:g} s{left}"
        return Outcome(pb.RUN_PHASE_TIMED_OUT, "DeadlineExceeded", text)
    if ending.cause is Cause.CANCEL:
        return Outcome(pb.RUN_PHASE_CANCELLED, "Cancelled", f"ended by the agent as told{left}")
    if ending.cause is Cause.STOP:
        text = f"the agent was stopped before the run ended, and ended it{left}"
        return Outcome(pb.RUN_PHASE_INTERRUPTED, "AgentStopped", text)
    if ending.signal:
        return Outcome(
            pb.RUN_PHASE_FAILED, "Signalled", f"ended by signal {signal_name(ending.signal)}"
        )
    if ending.exit_code == 0:
        return Outcome(pb.RUN_PHASE_SUCCEEDED)
    return Outcome(pb.RUN_PHASE_FAILED, "NonZeroExit", f"ended with exit code {ending.exit_code}")


def signal_name(number: int) -> str:
    """The name of a signal, "SIGKILL" for 9; the number itself where it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


#: What the errors of execve mean to the person who wrote the task.
_START_ERRORS = {
    errno.ENOENT: ("CommandNotFound", "not found (or its interpreter is missing)"),
    errno.ENOTDIR: ("CommandNotFound", "not found: a part of its path is no directory"),
    errno.EACCES: ("NotExecutable", "is not executable, or lies where that is not allowed"),
    errno.ENOEXEC: ("NotExecutable", "is no program of a form this system runs"),
    errno.EISDIR: ("NotExecutable", "is a directory"),
    errno.E2BIG: ("ArgumentsTooLong", "arguments and environment are larger than the system takes"),
    errno.EAGAIN: ("NoResources", "the system is out of processes; try again later"),
    errno.ENOMEM: ("NoResources", "the system is out of memory; try again later"),
}


def start_failure(program: str, number: int | None, detail: str) -> Outcome:
    """The outcome of a program that could not be started.

    Args:
        program: What was to be started.
        number: The errno, if there is one.
        detail: The system's words, used where the number is not one we explain.
    """
    reason, text = _START_ERRORS.get(
        number or 0, ("StartFailed", f"could not be started: {detail}")
    )
    return Outcome(pb.RUN_PHASE_FAILED, reason, f"{program!r}: {text}")


def user_failure(program: str, user: str) -> Outcome:
    """The outcome of a program that could not be started because the agent may not be that user."""
    text = (
        f"{program!r}: the agent may not become user {user}: its container lacks the capabilities "
        "SETUID and SETGID, or is not root"
    )
    return Outcome(pb.RUN_PHASE_FAILED, "UserNotPermitted", text)
