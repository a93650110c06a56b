"""What a task is and where it stands on each node: the types all decisions are made on.

The table TRANSITIONS is the only place that says which phase may follow which. Nothing here reads
a clock, does input or output, or knows the API server; objects come in as plain mappings.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

import msgspec

#: A count as users write it: a number, or a percentage such as "25%".
Amount = int | str


class Phase(StrEnum):
    """Where a task stands on one node."""

    PENDING = "Pending"
    DISPATCHED = "Dispatched"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    TIMED_OUT = "TimedOut"
    CANCELLED = "Cancelled"
    INTERRUPTED = "Interrupted"
    LOST = "Lost"
    SKIPPED = "Skipped"
    REJECTED = "Rejected"

    # Phases are looked up some twenty times a row and step; an Enum's own hash is Python code.
    __hash__ = str.__hash__


#: Ends that only an agent can tell.
REPORTED: Final = frozenset(
    {
        Phase.SUCCEEDED,
        Phase.FAILED,
        Phase.TIMED_OUT,
        Phase.CANCELLED,
        Phase.INTERRUPTED,
        Phase.REJECTED,
    }
)
IN_FLIGHT: Final = frozenset({Phase.DISPATCHED, Phase.RUNNING})
FINAL: Final = REPORTED | {Phase.LOST, Phase.SKIPPED}
#: Ends that count against maxFailures.
FAILURES: Final = frozenset(
    {Phase.FAILED, Phase.TIMED_OUT, Phase.INTERRUPTED, Phase.LOST, Phase.REJECTED}
)

#: Why nodes are skipped.
TOO_MANY_FAILURES: Final = "TooManyFailures"
DEADLINE_EXCEEDED: Final = "DeadlineExceeded"
#: Ends after which a node tries again where spec.retries leaves it an attempt.
RETRIED: Final = frozenset({Phase.FAILED, Phase.TIMED_OUT, Phase.INTERRUPTED})

#: What may follow what; anything else is refused. Lost is an assumption about an agent that is
#: away, so what the agent says when it is back replaces it; one that had never begun may get its
#: turn after all. Back to Pending go nodes that try again; those that then get no other attempt
#: end as their last one did.
TRANSITIONS: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.PENDING: RETRIED | {Phase.DISPATCHED, Phase.CANCELLED, Phase.SKIPPED, Phase.LOST},
    Phase.DISPATCHED: REPORTED | {Phase.RUNNING, Phase.LOST},
    Phase.RUNNING: REPORTED | {Phase.LOST},
    Phase.LOST: REPORTED | {Phase.PENDING},
    Phase.SUCCEEDED: frozenset(),
    Phase.FAILED: frozenset({Phase.PENDING}),
    Phase.TIMED_OUT: frozenset({Phase.PENDING}),
    Phase.CANCELLED: frozenset(),
    Phase.INTERRUPTED: frozenset({Phase.PENDING}),
    Phase.SKIPPED: frozenset(),
    Phase.REJECTED: frozenset(),
}


class TaskPhase(StrEnum):
    """Where a task stands as a whole."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


TASK_FINAL: Final = frozenset({TaskPhase.SUCCEEDED, TaskPhase.FAILED, TaskPhase.CANCELLED})


class NodeRun(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a report: where the task stands on one node.

    Times are nanoseconds since the Unix epoch, 0 for none; by the node's clock, but for
    `retry_nanos`, which is by the leader's.

    Attributes:
        attempt: the attempt this is about, counted from 1; 0: none has begun. While the row waits
            for another attempt it is about the last one.
        last_phase: how the attempt before ended, or the last one of a row that waits.
        last_reason: why it ended so.
        retry_nanos: the next attempt begins no earlier.
        node_state: "Cordoned", "NotReady" or both: of the Node, when the row last had a change.
    """

    node: str
    phase: Phase = Phase.PENDING
    reason: str = ""
    message: str = ""
    attempt: int = 0
    exit_code: int | None = None
    signal: int = 0
    started_nanos: int = 0
    finished_nanos: int = 0
    preview: str = ""
    output_bytes: int = 0
    output_truncated: bool = False
    last_phase: Phase | None = None
    last_reason: str = ""
    retry_nanos: int = 0
    node_state: str = ""

    @property
    def begun(self) -> bool:
        """Whether an attempt has begun, or none ever will."""
        return self.phase is not Phase.PENDING or self.attempt > 0

    def to(self, phase: Phase, reason: str = "", message: str = "", **fields: Any) -> "NodeRun":
        """This row in another phase.

        Raises:
            ValueError: The table does not allow it.
        """
        if phase not in TRANSITIONS[self.phase]:
            raise ValueError(f"{self.node}: {phase} cannot follow {self.phase}")
        changes = {"phase": phase, "reason": reason, "message": message, **fields}
        return msgspec.structs.replace(self, **changes)

    def noting(self, reason: str, message: str) -> "NodeRun":
        """This row in the same phase, with another reason."""
        return msgspec.structs.replace(self, reason=reason, message=message)


#: Rows by node name, in the order in which nodes get their turn.
Rows = Mapping[str, NodeRun]


class _Spec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of the parts of a spec. Fields this version does not know are passed over."""


class Requirement(_Spec, frozen=True, kw_only=True):
    """A condition on one label, as in every Kubernetes label selector."""

    key: str
    operator: str
    values: list[str] = []


class LabelSelector(_Spec, frozen=True, kw_only=True):
    """Labels of nodes; empty selects all."""

    match_labels: dict[str, str] = {}
    match_expressions: list[Requirement] = []

    @property
    def empty(self) -> bool:
        """True when it asks for nothing."""
        return not self.match_labels and not self.match_expressions


class Target(_Spec, frozen=True, kw_only=True):
    """Which nodes a task is for."""

    node_selector: LabelSelector = msgspec.field(default_factory=LabelSelector)
    node_names: list[str] = []
    sample: Amount | None = None


class Script(_Spec, frozen=True, kw_only=True):
    """A script for an interpreter."""

    source: str
    interpreter: list[str] = msgspec.field(default_factory=lambda: ["/bin/sh", "-eu"])


class PluginTask(_Spec, frozen=True, kw_only=True):
    """A task for a plug-in that runs beside the agent."""

    name: str
    data_type: int
    data: str = ""


class Run(_Spec, frozen=True, kw_only=True):
    """What is run: exactly one of the fields is set."""

    command: list[str] | None = None
    script: Script | None = None
    plugin: PluginTask | None = None
    builtin: str | None = None


class Rollout(_Spec, frozen=True, kw_only=True):
    """How many nodes at a time, and when to stop."""

    max_concurrent: Amount = "25%"
    max_failures: Amount = "10%"
    waves: list[Amount] = msgspec.field(default_factory=lambda: [1, 5, "20%", "100%"])
    wave_interval_seconds: int = 0


class Output(_Spec, frozen=True, kw_only=True):
    """How much output is kept, in bytes."""

    preview_bytes: int = 2048
    max_bytes: int = 1048576


class TaskSpec(_Spec, frozen=True, kw_only=True):
    """spec of an AgentTask; the definition of the resource has the meaning of each field."""

    run: Run
    target: Target = msgspec.field(default_factory=Target)
    where: str = "Container"
    user: str = ""
    env: dict[str, str] = {}
    timeout_seconds: int = 30
    retries: int = 0
    rollout: Rollout = msgspec.field(default_factory=Rollout)
    late_nodes: str = "Skip"
    active_deadline_seconds: int = 3600
    suspend: bool = False
    cancel: bool = False
    output: Output = msgspec.field(default_factory=Output)
    ttl_seconds_after_finished: int | None = None


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """An AgentTask as the planner sees it. Times are seconds since the Unix epoch."""

    uid: str
    namespace: str
    name: str
    generation: int
    spec: TaskSpec
    #: When its nodes were fixed and written; None: not begun.
    started: float | None = None
    #: When it reached its end.
    completed: float | None = None
    phase: TaskPhase = TaskPhase.PENDING
    #: Its deletion was asked for: end what runs.
    deleting: bool = False


def resolve(amount: Amount, total: int, *, up: bool) -> int:
    """A number of nodes from a number or a percentage of `total`.

    Args:
        amount: 7 or "25%".
        total: What 100% is.
        up: Round percentages up, else down.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(amount, int):
        return amount
    if not amount.endswith("%") or not amount[:-1].isdigit():
        raise ValueError(f"expected a number or a percentage, got {amount!r}")
    parts = int(amount[:-1]) * total
    return -(-parts // 100) if up else parts // 100


def parse_spec(spec: Mapping[str, Any]) -> TaskSpec:
    """The typed form of an AgentTask's spec.

    Raises:
        ValueError: It does not have the form the resource definition demands.
    """
    try:
        return msgspec.convert(spec, TaskSpec)
    except msgspec.ValidationError as error:
        raise ValueError(f"spec: {error}") from error


def unsupported(spec: TaskSpec) -> str | None:
    """Why this version cannot carry out a spec: a sentence that names the field, or None."""
    if spec.run.builtin not in (None, "Ping", "Facts", "Restart", "Shutdown"):
        return f"spec.run.builtin: this version has no {spec.run.builtin}"
    if spec.where not in ("Container", "Host"):
        return f"spec.where: this version has no {spec.where}; use Container or Host"
    run = spec.run
    kinds = (run.command, run.script, run.plugin, run.builtin)
    if sum(kind is not None for kind in kinds) != 1:
        return "spec.run: this version needs exactly one of command, script, plugin and builtin"
    if run.plugin is not None and (spec.user or spec.env or spec.where == "Host"):
        return "spec.run.plugin: a plug-in has its own user, place and environment; give none"
    return None
