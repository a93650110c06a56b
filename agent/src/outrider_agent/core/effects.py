"""What a stream's session asks its shell to do, in answer to a message of the server.

Shapes only, and the bounds within which a server's terms are taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.runs import RunKey

#: The least largest batch that a server may ask for, bytes.
LEAST_BATCH_BYTES = limits.KIB


@dataclass(frozen=True)
class Welcomed:
    """The server took the stream.

    Attributes:
        server: Its name.
        version: Its version.
        agent_id: The agent's id.
        max_batch_bytes: Largest batch that it takes, bytes.
        groups: Data types that are to be in batches of their own; no type is in two of them.
    """

    server: str
    version: str
    agent_id: str
    max_batch_bytes: int = limits.BATCH_BYTES
    groups: tuple[frozenset[int], ...] = ()


@dataclass(frozen=True)
class BatchesAcked:
    """The outbox may forget these batches: ranges of numbers that were sent on this stream."""

    epoch: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BatchTooLarge:
    """A batch is to become smaller ones, of at most so many bytes each."""

    epoch: int
    seq: int
    max_bytes: int


@dataclass(frozen=True)
class BatchRefused:
    """The server does not take a batch, for a reason we do not know; it stays in the outbox."""

    epoch: int
    seq: int
    reason: int


@dataclass(frozen=True)
class PauseAsked:
    """The server wants no batches for a while."""

    seconds: float
    reason: str


@dataclass(frozen=True)
class RunsRequested:
    """Attempts to run."""

    commands: list[pb.RunCommand]


@dataclass(frozen=True)
class CancelsRequested:
    """Attempts to end."""

    keys: list[RunKey]


@dataclass(frozen=True)
class RunsAcked:
    """Results that the journal may forget."""

    keys: list[RunKey]


@dataclass(frozen=True)
class TaskRequested:
    """A task in the form of other servers."""

    task: pb.Task


@dataclass(frozen=True)
class ConfigRequested:
    """The configuration that the agent is to have."""

    config: pb.EffectiveConfig


@dataclass(frozen=True)
class Draining:
    """The server asked the agent to leave."""

    reason: str


Effect = (
    Welcomed
    | BatchesAcked
    | BatchTooLarge
    | BatchRefused
    | PauseAsked
    | RunsRequested
    | CancelsRequested
    | RunsAcked
    | TaskRequested
    | ConfigRequested
    | Draining
)


def terms_of(welcome: pb.Welcome) -> Welcomed:
    """A welcome, with its terms within their bounds."""
    return Welcomed(
        welcome.server,
        welcome.version,
        welcome.agent_id,
        max_batch_bytes=batch_bytes(welcome.max_batch_bytes or limits.BATCH_BYTES),
        groups=_groups(welcome.separate),
    )


def batch_bytes(wanted: int) -> int:
    """The largest batch that a server asks for, within our bounds, bytes."""
    return min(max(wanted, LEAST_BATCH_BYTES), limits.BATCH_BYTES)


def _groups(separate: Sequence[pb.DataTypes]) -> tuple[frozenset[int], ...]:
    """The groups within the contract's bounds; a type is in the first group that names it."""
    seen: set[int] = set()
    found: list[frozenset[int]] = []
    for group in separate[: limits.DATA_TYPE_GROUPS]:
        types = frozenset(group.data_types[: limits.BATCH_DATA_TYPES]) - seen
        if types:
            seen |= types
            found.append(types)
    return tuple(found)
