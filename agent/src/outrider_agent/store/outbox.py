"""The outbox: record batches that wait for a server's acknowledgement, within a bound.

Plain functions on a connection, each to be called inside a transaction. Which batches go when it
is full is decided in core.eviction.

A number is never given twice: a batch that a server has seen must not share its name with a later
one, or readers would drop that as a repeat. Where commits may be lost in a power loss (durability
`relaxed`) numbers are therefore reserved first, in a commit that waits for the disk, and all that
were reserved are skipped when the file is opened after an agent that did not close it.
"""

import heapq
import sqlite3
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from outrider_proto import batches
from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.batching import Held, halves, pieces
from outrider_agent.core.eviction import BatchInfo, Bounds, Losses, choose, class_order
from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import OutboxFullError, StorageError, Waiting

#: Numbers that are reserved at a time.
RESERVED = 65_536
#: Fewer than this many that are left make for another reservation.
RESERVE_BELOW = 32_768
#: Most batches that are looked at in one reading.
READ_BATCHES = 1000


@dataclass(frozen=True)
class Totals:
    """What the outbox holds."""

    bytes: int
    batches: int
    by_class: Mapping[RecordClass, int]


@dataclass(frozen=True)
class Appended:
    """What became of new records; `seq` is the last number that was given."""

    seq: int
    losses: Losses
    totals: Totals


@dataclass
class Read:
    """Batches to send, and those that turned out to be damaged and were deleted."""

    batches: list[Waiting] = field(default_factory=list)
    damaged: Losses = field(default_factory=Losses)


@dataclass(frozen=True)
class Split:
    """What became of a batch that was to be split: number of its pieces, and the last of theirs."""

    pieces: int
    seq: int
    damaged: Losses
    totals: Totals


@dataclass(frozen=True)
class NewBatch:
    """Records that are to become a batch.

    Attributes:
        held: The records, at least one.
        record_class: Of all of them.
        codec: How they are compressed.
        created_unix_nanos: Now.
        max_bytes: Most bytes of them once compressed; several batches are made of more.
    """

    held: Held
    record_class: RecordClass
    codec: pb.Codec.ValueType
    created_unix_nanos: int
    max_bytes: int

    @property
    def records(self) -> int:
        """How many there are."""
        return len(self.held.entries)


@dataclass(frozen=True)
class Room:
    """What an append must keep to.

    Attributes:
        bounds: What the outbox may hold at most.
        limit: What it may hold on this disk now.
        reserved: Whether numbers have to be reserved before they are given.
    """

    bounds: Bounds
    limit: int
    reserved: bool = False


def append(db: sqlite3.Connection, new: NewBatch, room: Room, *, epoch: int) -> Appended:
    """Make a batch, give it the next number, and make room for it.

    Raises:
        BatchError: The batch would be beyond the limits of the wire.
        OutboxFullError: It holds results, and there are too many of them already.
        StorageError: No number is reserved for it.
    """
    results = 0
    if new.record_class is RecordClass.RESULT:
        results = totals(db).by_class.get(RecordClass.RESULT, 0)
        _check_results(room, results, 1)  # before all the work
    first = _value(db, "next_seq")
    whole = batches.pack(
        b"".join(new.held.entries),
        count=new.records,
        data_types=new.held.data_types,
        epoch=epoch,
        seq=first,
        codec=new.codec,
        created_unix_nanos=new.created_unix_nanos,
    )
    made = pieces(whole, new.max_bytes)
    if room.reserved and first + len(made) > _value(db, "reserved_seq"):
        raise StorageError("the numbers that were reserved for batches are used up")
    if new.record_class is RecordClass.RESULT:
        _check_results(room, results, sum(batch.ByteSize() for batch in made))
    _insert(db, made, new.record_class, first)
    losses = make_room(db, room.limit)
    return Appended(first + len(made) - 1, losses, totals(db))


def _check_results(room: Room, held: int, size: int) -> None:
    if not room.bounds.results_fit(held, size):
        raise OutboxFullError(f"{held} bytes of results wait for their acknowledgement")


def _insert(
    db: sqlite3.Connection, made: Sequence[pb.RecordBatch], record_class: RecordClass, first: int
) -> None:
    for seq, batch in enumerate(made, start=first):
        batch.seq = seq
        blob = batch.SerializeToString()
        db.execute(
            "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)",
            (seq, record_class, batch.count, len(blob), zlib.crc32(blob), blob),
        )
    db.execute("UPDATE meta SET value = ? WHERE name = 'next_seq'", (first + len(made),))


def _value(db: sqlite3.Connection, name: str) -> int:
    row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return int(row[0]) if row else 0


def last_seq(db: sqlite3.Connection) -> int:
    """The highest number that was given, or skipped."""
    return _value(db, "next_seq") - 1


def must_reserve(db: sqlite3.Connection) -> bool:
    """Whether numbers are to be reserved before more batches come."""
    return _value(db, "next_seq") + RESERVE_BELOW > _value(db, "reserved_seq")


def reserve(db: sqlite3.Connection) -> None:
    """Reserve numbers; the commit has to wait for the disk."""
    reserved = _value(db, "next_seq") + RESERVED
    db.execute("INSERT OR REPLACE INTO meta VALUES ('reserved_seq', ?)", (reserved,))


def give_up_reserved(db: sqlite3.Connection) -> None:
    """Have nothing skipped when the file is opened again: it is being closed in order."""
    db.execute(
        "UPDATE meta SET value = (SELECT value FROM meta WHERE name = 'next_seq') "
        "WHERE name = 'reserved_seq'"
    )


def make_room(db: sqlite3.Connection, limit: int) -> Losses:
    """Give up batches until what is left is within a limit, results apart."""
    losses = Losses()
    held = totals(db)
    excess = held.bytes - limit
    if excess <= 0:
        return losses
    for batch in choose(_oldest_first(db, held), excess):
        db.execute("DELETE FROM batches WHERE seq = ?", (batch.seq,))
        losses.add(batch)
    return losses


def _oldest_first(db: sqlite3.Connection, held: Totals) -> Iterator[BatchInfo]:
    for record_class in class_order(held.by_class):
        yield from _of_class(db, record_class, 0, None)


def _of_class(
    db: sqlite3.Connection, record_class: RecordClass, seq: int, upto: int | None
) -> Iterator[BatchInfo]:
    """Batches of one class above `seq`, oldest first; from the index alone."""
    for number, size, records in db.execute(
        "SELECT seq, size, records FROM batches WHERE class = ? AND seq > ? AND seq <= ? "
        "ORDER BY seq",
        (record_class, seq, 2**63 - 1 if upto is None else upto),
    ):
        yield BatchInfo(number, record_class, size, records)


def totals(db: sqlite3.Connection) -> Totals:
    """What the outbox holds now."""
    rows = db.execute("SELECT class, bytes, batches FROM totals").fetchall()
    return Totals(
        sum(size for _, size, _ in rows),
        sum(count for _, _, count in rows),
        {RecordClass(c): size for c, size, _ in rows},
    )


def after(
    db: sqlite3.Connection,
    seq: int,
    limit: int,
    *,
    upto: int | None = None,
    classes: Collection[RecordClass] | None = None,
    at_least_one: bool = False,
) -> Read:
    """The batches that follow a number, oldest first.

    Args:
        db: Inside a transaction.
        seq: The number.
        limit: Most bytes of them altogether.
        upto: Those up to this number only.
        classes: Those of these classes only.
        at_least_one: Take the first one whatever its size.
    """
    found = Read()
    lanes = [_of_class(db, c, seq, upto) for c in (RecordClass if classes is None else classes)]
    size = 0
    for info in heapq.merge(*lanes, key=lambda info: info.seq):
        if size + info.size > limit and (found.batches or not at_least_one):
            break
        batch = _load(db, info.seq)
        if batch is None:
            found.damaged.add(info)
        else:
            found.batches.append(Waiting(info.seq, info.size, batch, info.record_class))
            size += info.size
        if len(found.batches) >= READ_BATCHES:
            break
    _delete_damaged(db, found.damaged)
    return found


def _delete_damaged(db: sqlite3.Connection, damaged: Losses) -> None:
    """Only now: what a cursor goes over must not change under it."""
    for record_class, loss in damaged.by_class.items():
        for info in list(_of_class(db, record_class, loss.first_seq - 1, loss.last_seq)):
            if _load(db, info.seq) is None:
                db.execute("DELETE FROM batches WHERE seq = ?", (info.seq,))


def _load(db: sqlite3.Connection, seq: int) -> pb.RecordBatch | None:
    blob, crc = db.execute("SELECT batch, crc FROM batches WHERE seq = ?", (seq,)).fetchone()
    return pb.RecordBatch.FromString(blob) if zlib.crc32(blob) == crc else None


def split(db: sqlite3.Connection, seq: int, max_bytes: int) -> Split:
    """Put smaller batches with new numbers in a batch's place: two at least, if it can be split."""
    last, damaged = last_seq(db), Losses()
    row = db.execute("SELECT class, size, records FROM batches WHERE seq = ?", (seq,)).fetchone()
    if row is None:
        return Split(0, last, damaged, totals(db))
    record_class, size, records = row
    batch = _load(db, seq)
    made: list[pb.RecordBatch] = []
    if batch is None:
        damaged.add(BatchInfo(seq, RecordClass(record_class), size, records))
    elif batch.count <= 1:
        return Split(0, last, damaged, totals(db))
    else:
        made = [piece for half in halves(batch) for piece in pieces(half, max_bytes)]
    db.execute("DELETE FROM batches WHERE seq = ?", (seq,))
    _insert(db, made, RecordClass(record_class), last + 1)
    return Split(len(made), last + len(made), damaged, totals(db))


def acknowledge(db: sqlite3.Connection, first: int, last: int) -> tuple[int, Totals]:
    """Forget the batches from first to last; how many there were, and what is left."""
    cursor = db.execute("DELETE FROM batches WHERE seq BETWEEN ? AND ?", (first, last))
    return cursor.rowcount, totals(db)
