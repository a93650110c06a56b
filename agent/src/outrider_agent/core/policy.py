"""Whether the agent takes a run: its shape, its age, what this node allows, how busy the agent is.

The server checks much of this too; the agent trusts nobody with it. Decides only.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.outcome import Outcome

RESTART, SHUTDOWN = "builtin/Restart", "builtin/Shutdown"
#: What a node allows unless told otherwise: not what takes the agent itself away.
DEFAULT_KINDS = ("command", "script", "plugin", "builtin/Ping", "builtin/Facts")
#: What takes the agent itself away.
LEAVING = (RESTART, SHUTDOWN)
#: Every kind of run this agent can do, as named in Hello.run_kinds and in the settings.
RUN_KINDS = DEFAULT_KINDS + LEAVING
#: In a pattern, its last part: everything below.
BELOW = "**"
#: In the list of users: all of them.
EVERY_USER = "*"

#: Longest task UID, characters.
UID_LENGTH = 64

#: What a user may be called.
_USER = re.compile(r"[A-Za-z0-9_][-A-Za-z0-9_.@]*")

_BUILTINS = {
    pb.BUILTIN_PING: "builtin/Ping",
    pb.BUILTIN_FACTS: "builtin/Facts",
    pb.BUILTIN_RESTART: RESTART,
    pb.BUILTIN_SHUTDOWN: SHUTDOWN,
}


@dataclass(frozen=True)
class Policy:
    """What this node allows, whatever a server says.

    Attributes:
        kinds: Kinds of run, of RUN_KINDS.
        executables: Patterns of the paths of programs and interpreters; see `matches`.
        users: Names and numbers of users, EVERY_USER for all. The agent's own is always one.
        own: Name and number of the agent's own user.
        host: Whether runs may take place in the host's namespaces.
    """

    kinds: Collection[str]
    executables: Sequence[str] = (f"/{BELOW}",)
    users: Collection[str] = ()
    own: Collection[str] = ()
    host: bool = False


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


def refuse(command: pb.RunCommand, *, now_nanos: int, policy: Policy, load: Load) -> Outcome | None:
    """Why a run is not taken, or None if it is.

    The executable is not looked at: which file it is turns out only when the run begins; see
    `refuse_executable`.

    Args:
        command: The run.
        now_nanos: The agent's clock, nanoseconds since the Unix epoch.
        policy: What the node's settings allow.
        load: How busy the agent is.
    """
    kind = kind_of(command)
    if kind is None:
        return _rejected("UnknownKind", "this agent knows no such kind of run; a newer one may")
    fault = _fault(command)
    if fault:
        return _rejected("InvalidRun", fault)
    forbidden = _forbidden(command, kind, policy)
    if forbidden:
        return _rejected("NotAllowed", forbidden)
    if expired(command, now_nanos):
        return expiry(command, now_nanos)
    if load.held >= load.limit:
        text = (
            f"{load.held} runs are under way or wait already "
            "(settings tasks.maxConcurrent and tasks.maxQueued)"
        )
        return _rejected("TooManyRuns", text)
    return None


def _forbidden(command: pb.RunCommand, kind: str, policy: Policy) -> str | None:
    """Which setting of the node is against a run, as a sentence."""
    if kind not in policy.kinds:
        return f"the setting tasks.allowedKinds of this node lacks {kind}"
    if command.host and not policy.host:
        return "the setting tasks.allowHost of this node is false, and the run is for the host"
    if not user_allowed(command.user, policy):
        return f"the setting tasks.allowedUsers of this node lacks {command.user}"
    return None


def user_allowed(user: str, policy: Policy) -> bool:
    """Whether runs may be of a user; empty is the agent's own, which always may."""
    return not user or user in policy.own or user in policy.users or EVERY_USER in policy.users


def refuse_executable(path: str, policy: Policy) -> Outcome | None:
    """Why a program or interpreter is not to be started, or None if it may.

    Args:
        path: The file that would be started, with no link among its folders.
        policy: What the node's settings allow.
    """
    if any(matches(path, pattern) for pattern in policy.executables):
        return None
    text = f"no pattern in the setting tasks.allowedExecutables of this node fits {path}"
    return _rejected("NotAllowed", text)


def matches(path: str, pattern: str) -> bool:
    """Whether a path fits a pattern, part by part.

    In a part `*`, `?` and `[…]` stand for characters, never for "/". A last part of BELOW stands
    for everything in the folder and below.

    Args:
        path: Absolute, without "." and "..".
        pattern: Likewise; see `pattern_fault`.
    """
    parts, wanted = path.split("/")[1:], pattern.split("/")[1:]
    if wanted[-1] == BELOW:
        wanted.pop()
        if len(parts) <= len(wanted):
            return False
        parts = parts[: len(wanted)]
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def pattern_fault(pattern: str) -> str | None:
    """What is wrong with a pattern for paths, None if nothing is."""
    parts = pattern.split("/")
    if parts[0] or len(parts) < 2:
        return "it must begin with /"
    if any(part in ("", ".", "..") for part in parts[1:]):
        return 'it must have no empty part, "." or ".."'
    if any(BELOW in part for part in parts[:-1]) or (BELOW in parts[-1] and parts[-1] != BELOW):
        return f"{BELOW} can only be its whole last part"
    return None


def expired(command: pb.RunCommand, now_nanos: int) -> bool:
    """Whether the time to begin the run has passed."""
    return 0 < command.not_after_unix_nanos < now_nanos


def expiry(command: pb.RunCommand, now_nanos: int) -> Outcome:
    """The outcome of a run whose time to begin has passed."""
    late = (now_nanos - command.not_after_unix_nanos) / 1e9
    return _rejected("Expired", f"it was not to begin later than {late:.1f} s ago")


def user_name(text: str) -> bool:
    """Whether a text can be the name or number of a user."""
    return len(text) <= limits.USER_BYTES and _USER.fullmatch(text) is not None


def _rejected(reason: str, message: str) -> Outcome:
    return Outcome(pb.RUN_PHASE_REJECTED, reason, message)


def _fault(command: pb.RunCommand) -> str | None:
    """What is wrong with the shape of a run."""
    if not 0 < command.timeout_seconds <= limits.TIMEOUT_SECONDS:
        return f"timeout_seconds must be 1 to {limits.TIMEOUT_SECONDS}"
    if len(command.env) > limits.ENVIRONMENT:
        return f"it has more than {limits.ENVIRONMENT} environment variables"
    if command.user and not user_name(command.user):
        return f"its user is none: a name or a number of at most {limits.USER_BYTES} characters"
    if command.WhichOneof("run") == "builtin" and (command.user or command.host):
        return "a builtin is the agent's own doing: it can have no user, and is not for the host"
    if any(not n or "=" in n or "\0" in n or "\0" in v for n, v in command.env.items()):
        return "an environment variable has an empty name, or a NUL, or '=' in its name"
    if command.WhichOneof("run") == "plugin":
        return _plugin_fault(command)
    if command.WhichOneof("run") == "script":
        if len(command.script.source.encode()) > limits.SCRIPT_BYTES:
            return f"the script is larger than {limits.SCRIPT_BYTES} bytes"
        return _arguments_fault(command.script.interpreter)
    if command.WhichOneof("run") == "command":
        return _arguments_fault(command.command.argv)
    return None


def _plugin_fault(command: pb.RunCommand) -> str | None:
    if command.user or command.host or command.env:
        return "a plug-in has its own user, place and environment: its tasks can have none"
    if not command.plugin.name or command.plugin.data_type < 1:
        return "a task for a plug-in needs its name, and a data type of 1 or more"
    if len(command.plugin.data.encode()) > limits.SCRIPT_BYTES:
        return f"the data for the plug-in is larger than {limits.SCRIPT_BYTES} bytes"
    return None


def _arguments_fault(argv: Collection[str]) -> str | None:
    if not 0 < len(argv) <= limits.ARGUMENTS or not next(iter(argv)):
        return f"it must have 1 to {limits.ARGUMENTS} arguments, the first not empty"
    if sum(len(a.encode()) for a in argv) > limits.ARGUMENT_BYTES:
        return f"its arguments are larger than {limits.ARGUMENT_BYTES} bytes"
    if any("\0" in a for a in argv):
        return "an argument holds a NUL"
    return None
