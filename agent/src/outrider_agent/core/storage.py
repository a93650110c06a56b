"""What the agent's parts need of the one who keeps things on disk, and what they exchange.

Lets tasks and uplink work without knowing the store. Holds shapes only.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.records import RecordClass
from outrider_agent.core.runs import RunKey


class StorageError(Exception):
    """The disk could not take or give something now, such as when full; worth another try."""


class JournalFullError(StorageError):
    """No room for another run, until results are acknowledged; the text says how many wait."""


class OutboxFullError(StorageError):
    """No room for another result, until results are acknowledged; the text says how much waits."""


@dataclass(frozen=True)
class Process:
    """The leader of a run's process group, in a way that survives the agent.

    Attributes:
        pid: Its process id, also the group's.
        start: When it began, clock ticks after boot: tells it from a later process of that id.
        boot_id: The boot it belongs to.
    """

    pid: int
    start: int
    boot_id: str


@dataclass(frozen=True)
class Unfinished:
    """A run that an earlier agent process left."""

    state: pb.RunState
    process: Process | None


@dataclass(frozen=True)
class Waiting:
    """A batch on its way to a server; `size` is what it counts against the window, bytes."""

    seq: int
    size: int
    batch: pb.RecordBatch
    record_class: RecordClass = RecordClass.TELEMETRY


@dataclass(frozen=True)
class Backlog:
    """What waits for an acknowledgement."""

    bytes: int
    batches: int


class Journal(Protocol):
    """The runs on disk. Every method raises StorageError where the disk fails."""

    async def accept_run(self, state: pb.RunState) -> pb.RunState | None:
        """Enter a new run; of a known one return its state. Raises JournalFullError."""
        ...

    async def update_run(self, state: pb.RunState, process: Process | None = None) -> None:
        """Write the new state of a run; one that has ended is left as it is."""
        ...

    async def bury_run(self, state: pb.RunState) -> None:
        """Remember a run as one not to be run any more."""
        ...

    async def find_run(self, key: RunKey) -> pb.RunState | None:
        """The state of a run, also of an acknowledged one."""
        ...

    async def run_states(self) -> list[pb.RunState]:
        """All runs whose result was not acknowledged."""
        ...

    async def unfinished_runs(self) -> list[Unfinished]:
        """All runs that have not ended."""
        ...

    async def ack_runs(self, keys: list[RunKey]) -> int:
        """Forget the results of ended runs; how many there were."""
        ...


class Outbox(Protocol):
    """The batches on disk. Every method raises StorageError where the disk fails."""

    @property
    def epoch(self) -> int:
        """Life of the file."""
        ...

    @property
    def backlog(self) -> Backlog:
        """What waits, as last known."""
        ...

    @property
    def last_seq(self) -> int:
        """The highest number that a batch was given; 0 before the first."""
        ...

    async def batches_after(
        self,
        seq: int,
        limit: int,
        *,
        upto: int | None = None,
        classes: Collection[RecordClass] | None = None,
        at_least_one: bool = False,
    ) -> list[Waiting]:
        """The batches that follow `seq`, oldest first, at most `limit` bytes of them.

        Args:
            seq: Those above this number.
            limit: Most bytes altogether.
            upto: Those up to this number only.
            classes: Those of these classes only.
            at_least_one: The first comes whatever its size.
        """
        ...

    async def split_batch(self, epoch: int, seq: int, max_bytes: int) -> int:
        """Put smaller batches with new numbers in a batch's place; how many, 0: nothing to split.

        A batch of one record is left as it is; another one becomes two at least, so that whatever
        a server does not take gets smaller. Records that were in it stay in their order.
        """
        ...

    async def ack_batches(self, epoch: int, first: int, last: int) -> int:
        """Forget batches; how many there were."""
        ...
