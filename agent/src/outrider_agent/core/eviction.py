"""Which batches go when the outbox is full: the oldest of the lowest class first.

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
        self.first_seq = min(self.first_seq or batch.seq, batch.seq)
        self.last_seq = max(self.last_seq, batch.seq)
        self.batches += 1
        self.records += batch.records
        self.bytes += batch.size


@dataclass
class Losses:
    """What was given up, by class."""

    by_class: dict[RecordClass, Loss] = field(default_factory=dict)

    def add(self, batch: BatchInfo) -> None:
        """Count one more batch."""
        self.by_class.setdefault(batch.record_class, Loss()).add(batch)

    def __bool__(self) -> bool:
        return bool(self.by_class)


def class_order(totals: Mapping[RecordClass, int]) -> list[RecordClass]:
    """Classes that hold anything, in the order in which they are given up."""
    return sorted(c for c, size in totals.items() if size > 0)


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
