"""When records become a batch: after a delay, or at a size; and how a batch becomes smaller ones.

Holds records, serialized already, and decides; stores nothing. Times are seconds of any steady
clock.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from outrider_proto import batches, limits
from outrider_proto.v1 import agent_pb2 as pb

#: Due at once.
_NOW = float("-inf")


@dataclass(frozen=True)
class BatchLimits:
    """When a batch is closed.

    Attributes:
        max_delay: Longest time its first record waits, seconds.
        max_bytes: Size before compression at which it is closed; it may be larger by one record.
        max_records: Number of records at which it is closed.
    """

    max_delay: float
    max_bytes: int
    max_records: int = limits.BATCH_RECORDS


@dataclass
class Held:
    """Records that are to become one batch, oldest first.

    Attributes:
        entries: Each as `batches.entry` makes it.
        data_types: The different types among them.
        size: Bytes of all.
        since: When the first one came.
        settled: Whether they were stored or given up; for whoever waits for that.
    """

    entries: list[bytes] = field(default_factory=list)
    data_types: set[int] = field(default_factory=set)
    size: int = 0
    since: float = 0.0
    settled: bool = False

    def add(self, entry: bytes, data_type: int) -> None:
        """Hold one more."""
        self.entries.append(entry)
        self.data_types.add(data_type)
        self.size += len(entry)


class Batcher:
    """Records on their way into batches, in the order in which they came."""

    def __init__(self, batch_limits: BatchLimits) -> None:
        self.limits = batch_limits
        self._closed: deque[Held] = deque()
        self._open = Held()

    def add(self, entry: bytes, data_type: int, now: float) -> bool:
        """Hold one more record; whether `due` is another one now.

        Args:
            entry: As `batches.entry` makes it.
            data_type: Its type.
            now: The time.
        """
        held = self._open
        first = not held.entries
        if first:
            held.since = now
        held.add(entry, data_type)
        if held.size >= self.limits.max_bytes or len(held.entries) >= self.limits.max_records:
            self.close()
            return True
        return first

    def close(self) -> None:
        """Have what is held go into no batch with what comes later, and be due at once."""
        if self._open.entries:
            self._closed.append(self._open)
            self._open = Held()

    @property
    def closed(self) -> Collection[Held]:
        """What was closed and not taken yet."""
        return self._closed

    def due(self) -> float | None:
        """When a batch is to be taken; None while there is none, the past if one is closed."""
        if self._closed:
            return _NOW
        return self._open.since + self.limits.max_delay if self._open.entries else None

    def take(self) -> Held:
        """Take out what is to be the next batch: the oldest closed one, else the open one."""
        if not self._closed:
            self.close()
        return self._closed.popleft()


def group_numbers(groups: Sequence[Collection[int]]) -> dict[int, int]:
    """Which group a data type belongs to, counted from 1; those in none are not in it.

    What is beyond the limits of the wire is left out: such types share batches with others.
    """
    numbers: dict[int, int] = {}
    for number, group in enumerate(groups[: limits.DATA_TYPE_GROUPS], start=1):
        for data_type in list(group)[: limits.BATCH_DATA_TYPES]:
            numbers.setdefault(data_type, number)
    return numbers


def pieces(batch: pb.RecordBatch, max_bytes: int) -> list[pb.RecordBatch]:
    """A batch as ones of at most so many bytes of records each, in order; numbers are its own.

    One that fits, or holds a single record, stays as it is.

    Raises:
        BatchError: It cannot be opened.
    """
    if len(batch.records) <= max_bytes or batch.count <= 1:
        return [batch]
    return [piece for half in halves(batch) for piece in pieces(half, max_bytes)]


def halves(batch: pb.RecordBatch) -> list[pb.RecordBatch]:
    """A batch as two, numbered as it is; or as one, if it holds a single record.

    Raises:
        BatchError: It cannot be opened.
    """
    if batch.count <= 1:
        return [batch]
    records = batches.decode(batch)
    middle = len(records) // 2
    return [
        batches.encode(
            half,
            epoch=batch.epoch,
            seq=batch.seq,
            codec=batch.codec,
            created_unix_nanos=batch.created_unix_nanos,
        )
        for half in (records[:middle], records[middle:])
    ]
