"""A batch on its way from its agent to the sink.

Most never become a message of protobuf: what is known of them is read at a glance, and their
records are copied once instead of three times. Nothing here opens a batch.
"""

from collections.abc import Sequence
from typing import Protocol

from outrider_proto.v1.agent_pb2 import RecordBatch


class Batch(Protocol):
    """What the way to the sink needs to know of a batch; a RecordBatch is one."""

    @property
    def epoch(self) -> int:
        """As in RecordBatch, like all others here."""

    @property
    def seq(self) -> int:
        """Its number."""

    @property
    def codec(self) -> int:
        """How `records` is compressed."""

    @property
    def records(self) -> bytes:
        """Its content."""

    @property
    def count(self) -> int:
        """Number of records."""

    @property
    def decompressed_bytes(self) -> int:
        """Size before compression, bytes."""

    @property
    def data_types(self) -> Sequence[int]:
        """The different data types inside."""


class SeenBatch:
    """A batch that was read at a glance; see `Batch` for what it holds.

    Args:
        tail: the serialized fields that nobody on the way needs.
    """

    __slots__ = (
        "_tail",
        "codec",
        "count",
        "data_types",
        "decompressed_bytes",
        "epoch",
        "records",
        "seq",
    )

    def __init__(
        self,
        epoch: int,
        seq: int,
        codec: int,
        records: bytes,
        count: int,
        decompressed_bytes: int,
        data_types: tuple[int, ...],
        tail: bytes,
    ) -> None:
        self.epoch = epoch
        self.seq = seq
        self.codec = codec
        self.records = records
        self.count = count
        self.decompressed_bytes = decompressed_bytes
        self.data_types = data_types
        self._tail = tail

    @classmethod
    def of(cls, message: RecordBatch) -> "SeenBatch":
        """The same as a message, which is of no use afterwards."""
        found = (
            message.epoch,
            message.seq,
            int(message.codec),
            message.records,
            message.count,
            message.decompressed_bytes,
            tuple(message.data_types),
        )
        for field in cls.__slots__:
            if field != "_tail":
                message.ClearField(field)  # type: ignore[arg-type]  # they are named alike
        return cls(*found, tail=message.SerializeToString())

    def message(self) -> RecordBatch:
        """The same as the agent's message."""
        made = RecordBatch(
            epoch=self.epoch,
            seq=self.seq,
            codec=self.codec,  # type: ignore[arg-type]  # a number is an enum's value
            records=self.records,
            count=self.count,
            decompressed_bytes=self.decompressed_bytes,
            data_types=self.data_types,
        )
        made.MergeFromString(self._tail)
        return made


def message_of(batch: Batch) -> RecordBatch:
    """A batch as a message, for those who open or keep it."""
    if isinstance(batch, SeenBatch):
        return batch.message()
    assert isinstance(batch, RecordBatch)
    return batch
