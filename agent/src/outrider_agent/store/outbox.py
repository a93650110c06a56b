"""The outbox: record batches that wait for a server's acknowledgement, within a bound.

Plain functions on a connection, each to be called inside a transaction. Which batches go when it
is full is decided in core.eviction.
"""

import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from outrider_proto import batches
from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.eviction import BatchInfo, Losses, choose, class_order
from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import Waiting


@dataclass(frozen=True)
class Totals:
    """What the outbox holds."""

    bytes: int
    batches: int
    by_class: Mapping[RecordClass, int]


@dataclass(frozen=True)
class Appended:
    """What became of new records."""

    seq: int
    losses: Losses
    totals: Totals


@dataclass
class Read:
    """Batches to send, and those that turned out to be damaged and were deleted."""

    batches: list[Waiting] = field(default_factory=list)
    damaged: Losses = field(default_factory=Losses)


@dataclass(frozen=True)
class NewBatch:
    """Records that are to become a batch.

    Attributes:
        records: Oldest first, not empty.
        record_class: Of all of them.
        codec: How they are compressed.
        created_unix_nanos: Now.
    """

    records: Sequence[pb.EncodedRecord]
    record_class: RecordClass
    codec: pb.Codec.ValueType
    created_unix_nanos: int


def append(db: sqlite3.Connection, new: NewBatch, *, epoch: int, max_bytes: int) -> Appended:
    """Make a batch, give it the next number, and make room for it.

    Raises:
        BatchError: The batch would be beyond the limits of the wire.
    """
    (seq,) = db.execute("SELECT value FROM meta WHERE name = 'next_seq'").fetchone()
    batch = batches.encode(
        new.records,
        epoch=epoch,
        seq=seq,
        codec=new.codec,
        created_unix_nanos=new.created_unix_nanos,
    )
    blob = batch.SerializeToString()
    db.execute("UPDATE meta SET value = value + 1 WHERE name = 'next_seq'")
    db.execute(
        "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)",
        (seq, new.record_class, batch.count, len(blob), zlib.crc32(blob), blob),
    )
    losses = _make_room(db, max_bytes)
    return Appended(seq, losses, totals(db))


def _make_room(db: sqlite3.Connection, max_bytes: int) -> Losses:
    losses = Losses()
    held = totals(db)
    excess = held.bytes - max_bytes
    if excess <= 0:
        return losses
    for batch in choose(_oldest_first(db, held), excess):
        db.execute("DELETE FROM batches WHERE seq = ?", (batch.seq,))
        losses.add(batch)
    return losses


def _oldest_first(db: sqlite3.Connection, held: Totals) -> Iterator[BatchInfo]:
    for record_class in class_order(held.by_class):
        rows = db.execute(
            "SELECT seq, size, records FROM batches WHERE class = ? ORDER BY seq", (record_class,)
        )
        for seq, size, records in rows:
            yield BatchInfo(seq, record_class, size, records)


def totals(db: sqlite3.Connection) -> Totals:
    """What the outbox holds now."""
    rows = db.execute("SELECT class, bytes, batches FROM totals").fetchall()
    return Totals(
        sum(size for _, size, _ in rows),
        sum(count for _, _, count in rows),
        {RecordClass(c): size for c, size, _ in rows},
    )


def after(db: sqlite3.Connection, seq: int, limit: int, *, at_least_one: bool) -> Read:
    """The batches that follow a number, oldest first.

    Args:
        db: Inside a transaction.
        seq: The number.
        limit: Most bytes of them altogether.
        at_least_one: Take the first one whatever its size.
    """
    found = Read()
    size = 0
    for number, length, record_class, records in db.execute(
        "SELECT seq, size, class, records FROM batches WHERE seq > ? ORDER BY seq", (seq,)
    ).fetchmany(1000):
        if size + length > limit and (found.batches or not at_least_one):
            break
        batch = _load(db, number)
        if batch is None:
            db.execute("DELETE FROM batches WHERE seq = ?", (number,))
            found.damaged.add(BatchInfo(number, RecordClass(record_class), length, records))
            continue
        found.batches.append(Waiting(number, length, batch))
        size += length
    return found


def _load(db: sqlite3.Connection, seq: int) -> pb.RecordBatch | None:
    blob, crc = db.execute("SELECT batch, crc FROM batches WHERE seq = ?", (seq,)).fetchone()
    return pb.RecordBatch.FromString(blob) if zlib.crc32(blob) == crc else None


def acknowledge(db: sqlite3.Connection, first: int, last: int) -> tuple[int, Totals]:
    """Forget the batches from first to last; how many there were, and what is left."""
    cursor = db.execute("DELETE FROM batches WHERE seq BETWEEN ? AND ?", (first, last))
    return cursor.rowcount, totals(db)
