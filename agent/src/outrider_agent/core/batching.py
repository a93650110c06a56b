"""When records become a batch: after a delay, or at a size. One batcher for each record class.

Holds records and decides; compresses and stores nothing. Times are seconds of any steady clock.
"""

from dataclasses import dataclass, field

from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

#: What a record's frame in the list costs at most, besides its data.
_FRAME_BYTES = 32


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
class Batcher:
    """Records on their way into a batch."""

    limits: BatchLimits
    _records: list[pb.EncodedRecord] = field(default_factory=list)
    _bytes: int = 0
    _since: float = 0.0

    @property
    def bytes(self) -> int:
        """Size of what is held."""
        return self._bytes

    def add(self, record: pb.EncodedRecord, now: float) -> None:
        """Hold one more record."""
        if not self._records:
            self._since = now
        self._records.append(record)
        self._bytes += size_of(record)

    def due(self) -> float | None:
        """When the batch is to be closed; None while it is empty, the past if it is full."""
        if not self._records:
            return None
        if self._bytes >= self.limits.max_bytes or len(self._records) >= self.limits.max_records:
            return float("-inf")
        return self._since + self.limits.max_delay

    def take(self, now: float) -> list[pb.EncodedRecord]:
        """Take out one batch's records, oldest first; what is beyond its limits stays."""
        count = size = 0
        for record in self._records:
            if count >= self.limits.max_records or (count and size >= self.limits.max_bytes):
                break
            count += 1
            size += size_of(record)
        taken, self._records = self._records[:count], self._records[count:]
        self._bytes -= size
        self._since = now
        return taken


def size_of(record: pb.EncodedRecord) -> int:
    """What a record counts against every bound, bytes."""
    return len(record.data) + _FRAME_BYTES
