"""Whether the agent takes a run: its shape, its age, what this node allows, how busy the agent is.

The server checks much of this too; the agent trusts nobody with it. Decides only.
"""

from collections.abc import Collection
from dataclasses import dataclass

from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.outcome import Outcome

#: Every kind of run this agent can do, as named in Hello.run_kinds and in the settings.
RUN_KINDS = ("command", "script", "builtin/Ping", "builtin/Facts")

#: Longest task UID, characters.
UID_LENGTH = 64

_BUILTINS = {pb.BUILTIN_PING: "builtin/Ping", pb.BUILTIN_FACTS: "builtin/Facts"}


@dataclass(frozen=True)
class Load:
    """How busy the agent is.

    Attributes:
        held: Runs accepted and not ended.
        limit: Most of them: those that may run at once and those that may wait.
    """

    held: int
    limit: int


def kind_of(command: pb.RunCommand) -> str | None:
    """Which of RUN_KINDS a command is; None for none of them."""
    which = command.WhichOneof("run")
    if which == "builtin":
        return _BUILTINS.get(command.builtin)
    return which


def nameless(command: pb.RunCommand) -> bool:
    """Whether a run has no name that could be reported: then nothing can be said of it at all."""
    return not 0 < len(command.id.task_uid) <= UID_LENGTH or command.id.attempt < 1


def refuse(
    command: pb.RunCommand, *, now_nanos: int, allowed: Collection[str], load: Load
) -> Outcome | None:
    """Why a run is not taken, or None if it is.

    Args:
        command: The run.
        now_nanos: The agent's clock, nanoseconds since the Unix epoch.
        allowed: Kinds that the node's settings allow.
        load: How busy the agent is.
    """
    kind = kind_of(command)
    if kind is None:
        return _rejected("UnknownKind", "this agent knows no such kind of run; a newer one may")
    if kind not in allowed:
        return _rejected("NotAllowed", f"the setting tasks.allowedKinds of this node lacks {kind}")
    fault = _fault(command)
    if fault:
        return _rejected("InvalidRun", fault)
    if expired(command, now_nanos):
        return expiry(command, now_nanos)
    if load.held >= load.limit:
        text = (
            f"{load.held} runs are under way or wait already "
            "(settings tasks.maxConcurrent and tasks.maxQueued)"
        )
        return _rejected("TooManyRuns", text)
    return None


def expired(command: pb.RunCommand, now_nanos: int) -> bool:
    """Whether the time to begin the run has passed."""
    return 0 < command.not_after_unix_nanos < now_nanos


def expiry(command: pb.RunCommand, now_nanos: int) -> Outcome:
    """The outcome of a run whose time to begin has passed."""
    late = (now_nanos - command.not_after_unix_nanos) / 1e9
    return _rejected("Expired", f"it was not to begin later than {late:.1f} s ago")


def _rejected(reason: str, message: str) -> Outcome:
    return Outcome(pb.RUN_PHASE_REJECTED, reason, message)


def _fault(command: pb.RunCommand) -> str | None:
    """What is wrong with the shape of a run."""
    if not 0 < command.timeout_seconds <= limits.TIMEOUT_SECONDS:
        return f"timeout_seconds must be 1 to {limits.TIMEOUT_SECONDS}"
    if len(command.env) > limits.ENVIRONMENT:
        return f"it has more than {limits.ENVIRONMENT} environment variables"
    if any(not n or "=" in n or "\0" in n or "\0" in v for n, v in command.env.items()):
        return "an environment variable has an empty name, or a NUL, or '=' in its name"
    if command.WhichOneof("run") == "script":
        if len(command.script.source.encode()) > limits.SCRIPT_BYTES:
            return f"the script is larger than {limits.SCRIPT_BYTES} bytes"
        return _arguments_fault(command.script.interpreter)
    if command.WhichOneof("run") == "command":
        return _arguments_fault(command.command.argv)
    return None


def _arguments_fault(argv: Collection[str]) -> str | None:
    if not 0 < len(argv) <= limits.ARGUMENTS or not next(iter(argv)):
        return f"it must have 1 to {limits.ARGUMENTS} arguments, the first not empty"
    if sum(len(a.encode()) for a in argv) > limits.ARGUMENT_BYTES:
        return f"its arguments are larger than {limits.ARGUMENT_BYTES} bytes"
    if any("\0" in a for a in argv):
        return "an argument holds a NUL"
    return None
