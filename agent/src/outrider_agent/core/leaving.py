"""How an agent goes away because a task says so, and what becomes of that task's run afterwards.

The run cannot end while the agent that carries it out is still there, so the next one ends it:
what it finds in the journal, and for Shutdown the marker, tells. Stores nothing.
"""

from dataclasses import dataclass

import msgspec
from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.outcome import Outcome

#: Reasons of runs that have begun and whose end is the agent's own.
RESTARTING = "Restarting"
SHUTTING_DOWN = "ShuttingDown"

#: The product name that tasks in the form of other servers use for the agent itself.
OBJECT_NAME = "outrider-agent"
#: Their data type that shuts the agent down.
SHUTDOWN_TYPE = 1060


@dataclass(frozen=True)
class Absence:
    """That the agent is to stay away.

    Attributes:
        pod_uid: Until its Pod is not this one any more.
        by: The run that wanted it, as "TASK_UID/ATTEMPT", or a word for what else did.
        since: When it began, seconds since the Unix epoch.
    """

    pod_uid: str
    by: str
    since: int


def write(absence: Absence) -> bytes:
    """An absence as the content of its marker file."""
    return msgspec.json.encode(absence)


def read(content: bytes) -> Absence | None:
    """The absence that a marker file tells of; None if it is damaged."""
    try:
        return msgspec.json.decode(content, type=Absence)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def stays_away(absence: Absence | None, pod_uid: str) -> bool:
    """Whether an agent in this Pod is not to work."""
    return absence is not None and bool(pod_uid) and absence.pod_uid == pod_uid


def outcome_after(state: pb.RunState, run: str, absence: Absence | None) -> Outcome | None:
    """How a run that an earlier agent left has ended by that agent's end; None: it has not.

    Args:
        state: As the journal has it.
        run: Its name, as in Absence.by.
        absence: What the marker told, if there was one.
    """
    if state.phase != pb.RUN_PHASE_RUNNING:
        return None
    if state.reason == RESTARTING:
        return Outcome(pb.RUN_PHASE_SUCCEEDED, "", "restarted")
    if state.reason == SHUTTING_DOWN and absence is not None and absence.by == run:
        return Outcome(pb.RUN_PHASE_SUCCEEDED, "", "shut down; its Pod was made anew since")
    return None


def is_shutdown(task: pb.Task) -> bool:
    """Whether a task in the form of other servers shuts this agent down."""
    return task.data_type == SHUTDOWN_TYPE and task.object_name == OBJECT_NAME
