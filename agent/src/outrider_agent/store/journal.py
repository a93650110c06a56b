"""The journal of runs: what was accepted, what runs, what ended, what was acknowledged.

Plain functions on a connection, each to be called inside a transaction. Decides no phase: see
core.runs.
"""

import sqlite3

from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.runs import RunKey, is_final, key_of, tombstone
from outrider_agent.core.storage import JournalFullError, Process, Unfinished
from outrider_agent.store.database import checksum

#: Most runs whose result was not acknowledged; a complete report of them fits into one message.
MAX_RUNS = 1000


def accept(db: sqlite3.Connection, state: pb.RunState, now: int) -> pb.RunState | None:
    """Enter a new run; the state of the known one if it is not new.

    Args:
        db: Inside a transaction.
        state: Accepted, or rejected already.
        now: Seconds since the Unix epoch.

    Raises:
        JournalFullError: Too many results wait for their acknowledgement.
    """
    key = key_of(state.id)
    known = find(db, key)
    if known is not None:
        return known
    (count,) = db.execute("SELECT count(*) FROM runs").fetchone()
    if count >= MAX_RUNS:
        raise JournalFullError(f"{count} results wait for their acknowledgement")
    _write(db, key, state)
    return None


def find(db: sqlite3.Connection, key: RunKey) -> pb.RunState | None:
    """The state of a run that is known, also of one that was acknowledged."""
    for table in ("runs", "tombstones"):
        row = db.execute(
            f"SELECT state FROM {table} WHERE task_uid = ? AND attempt = ?",  # noqa: S608 - a constant
            key,
        ).fetchone()
        if row:
            return pb.RunState.FromString(row[0])
    return None


def update(db: sqlite3.Connection, state: pb.RunState, process: Process | None = None) -> None:
    """Write the new state of a run that has not ended yet; of another one nothing is written."""
    key = key_of(state.id)
    row = db.execute("SELECT final FROM runs WHERE task_uid = ? AND attempt = ?", key).fetchone()
    if row and not row[0]:
        _write(db, key, state, process)


def _write(
    db: sqlite3.Connection, key: RunKey, state: pb.RunState, process: Process | None = None
) -> None:
    blob = state.SerializeToString()
    where = (process.pid, process.start, process.boot_id) if process else (0, 0, "")
    db.execute(
        "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (*key, blob, checksum(key, blob), is_final(state), *where),
    )


def states(db: sqlite3.Connection) -> list[pb.RunState]:
    """All runs whose result was not acknowledged."""
    return [pb.RunState.FromString(blob) for (blob,) in db.execute("SELECT state FROM runs")]


def unfinished(db: sqlite3.Connection) -> list[Unfinished]:
    """All runs that have not ended."""
    rows = db.execute("SELECT state, pid, pid_start, boot_id FROM runs WHERE NOT final")
    return [
        Unfinished(pb.RunState.FromString(blob), Process(pid, start, boot) if pid else None)
        for blob, pid, start, boot in rows
    ]


def acknowledge(
    db: sqlite3.Connection, keys: list[RunKey], *, expires: int, now: int, max_tombstones: int
) -> int:
    """Turn ended runs into tombstones; how many there were. Others are left as they are.

    Args:
        db: Inside a transaction.
        keys: The runs.
        expires: When the tombstones may go, seconds since the Unix epoch.
        now: The time, likewise.
        max_tombstones: Most of them; beyond it the oldest go early.
    """
    count = 0
    for key in keys:
        row = db.execute(
            "SELECT state FROM runs WHERE task_uid = ? AND attempt = ? AND final", key
        ).fetchone()
        if row is None:
            continue
        db.execute("DELETE FROM runs WHERE task_uid = ? AND attempt = ?", key)
        bury(db, pb.RunState.FromString(row[0]), expires=expires)
        count += 1
    db.execute("DELETE FROM tombstones WHERE expires < ?", (now,))
    db.execute(
        "DELETE FROM tombstones WHERE (task_uid, attempt) IN (SELECT task_uid, attempt "
        "FROM tombstones ORDER BY expires LIMIT max(0, (SELECT count(*) FROM tombstones) - ?))",
        (max_tombstones,),
    )
    return count


def bury(db: sqlite3.Connection, state: pb.RunState, *, expires: int) -> None:
    """Keep no more of a run than that it was, and how it ended."""
    key = key_of(state.id)
    blob = tombstone(state).SerializeToString()
    db.execute(
        "INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?, ?, ?)",
        (*key, blob, checksum(key, blob), expires),
    )
