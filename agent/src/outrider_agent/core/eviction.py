"""What the outbox gives up when it is full: the oldest of the lowest class first, results never.

Decides on totals and sizes; deletes nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from outrider_agent.core.records import RecordClass


@dataclass(frozen=True)
class BatchInfo:
    """What is known of a stored batch without reading it."""

    seq: int
    record_class: RecordClass
    size: int
    records: int


@dataclass
class Loss:
    """What was given up of one class."""

    batches: int = 0
    records: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0

    def add(self, batch: BatchInfo) -> None:
        """Count one more batch."""
        self.merge(Loss(1, batch.records, batch.size, batch.seq, batch.seq))

    def merge(self, other: "Loss") -> None:
        """Count what another one counted."""
        self.batches += other.batches
        self.records += other.records
        self.bytes += other.bytes
        self.first_seq = min(self.first_seq or other.first_seq, other.first_seq)
        self.last_seq = max(self.last_seq, other.last_seq)


@dataclass
class Losses:
    """What was given up, by class."""

    by_class: dict[RecordClass, Loss] = field(default_factory=dict)

    def add(self, batch: BatchInfo) -> None:
        """Count one more batch."""
        self.by_class.setdefault(batch.record_class, Loss()).add(batch)

    def merge(self, other: "Losses") -> None:
        """Count what another one counted."""
        for record_class, loss in other.by_class.items():
            self.by_class.setdefault(record_class, Loss()).merge(loss)

    def __bool__(self) -> bool:
        return bool(self.by_class)


@dataclass(frozen=True)
class Disk:
    """The disk that the outbox is on, bytes."""

    size: int
    free: int


@dataclass(frozen=True)
class Bounds:
    """How much the outbox may hold.

    Attributes:
        max_bytes: Most bytes of batches.
        result_reserve: How many bytes of results may be beyond it.
        min_free_bytes: Free bytes to leave on the disk.
        min_free_percent: The same in percent of its size; the larger one counts.
    """

    max_bytes: int
    result_reserve: int = 0
    min_free_bytes: int = 0
    min_free_percent: float = 0.0

    def shortage(self, disk: Disk) -> int:
        """Bytes of free space that are missing on the disk; below 0: what is left of it."""
        keep = max(self.min_free_bytes, int(disk.size * self.min_free_percent / 100))
        return keep - disk.free

    def limit(self, disk: Disk, *, held: int, spare: int) -> int:
        """Most bytes that the outbox may hold on this disk now, results apart.

        Args:
            disk: The disk.
            held: Bytes that it holds.
            spare: Bytes of its file that hold nothing: new batches go there first, and the disk
                gets them back.
        """
        return max(0, min(self.max_bytes, held + spare - self.shortage(disk)))

    def results_fit(self, held: int, size: int) -> bool:
        """Whether results of that size fit beside the results that are held."""
        return held + size <= self.max_bytes + self.result_reserve


def crowded_out(totals: Mapping[RecordClass, int], limit: int) -> frozenset[RecordClass]:
    """Classes that have no room because of worthier ones alone. Results have a bound of their own.

    Args:
        totals: Bytes that are held, by class.
        limit: Most bytes altogether.
    """
    return frozenset(
        record_class
        for record_class in RecordClass
        if record_class is not RecordClass.RESULT
        and sum(size for other, size in totals.items() if other > record_class) >= limit
    )


def class_order(totals: Mapping[RecordClass, int]) -> list[RecordClass]:
    """Classes that hold anything and may be given up, the first to go first."""
    return sorted(c for c, size in totals.items() if size > 0 and c is not RecordClass.RESULT)


def choose(candidates: Iterable[BatchInfo], excess: int) -> list[BatchInfo]:
    """The first candidates whose sizes make up for the excess, bytes; none if there is none.

    Args:
        candidates: Batches in the order in which they may go.
        excess: Bytes to free.
    """
    chosen: list[BatchInfo] = []
    for batch in candidates:
        if excess <= 0:
            break
        chosen.append(batch)
        excess -= batch.size
    return chosen
