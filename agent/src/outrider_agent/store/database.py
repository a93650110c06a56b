"""Opens the agent's file: lock, checks, schema, and setting a damaged file aside.

The file must never be shared by two agents, and a damaged one must never stop a node from working:
it is renamed, what can still be read of the journal is carried over (so that no run begins twice),
and the agent goes on with a new one. Knows nothing of asyncio or threads.
"""

import contextlib
import fcntl
import os
import secrets
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger
from outrider_runtime.settings import SettingsError

from outrider_agent.core.runs import RunKey, accepted, id_of

log = get_logger("outrider.store")

FILE_NAME: Final = "agent.db"
LOCK_NAME: Final = "agent.lock"
#: Made when the file turned out to be damaged while it was in use: what a check at the start does
#: not find must not end the agent again and again.
SUSPECT_NAME: Final = "agent.db.suspect"
#: What is to take the place of a damaged file, until it does.
NEW_NAME: Final = "agent.db.new"
_COMPANIONS: Final = ("-wal", "-shm")
#: Damaged files that are kept for people to look at; older ones are deleted.
KEPT_DAMAGED: Final = 2
#: Bound of the write-ahead log after a checkpoint, bytes.
_WAL_BYTES: Final = 16 * 1024 * 1024
#: Length of the log at which it is moved into the file, pages of 4 KiB.
_WAL_PAGES: Final = 2048

#: Each entry takes the schema from the version of its index to the next one. Never changed once
#: released, only added to.
MIGRATIONS: Final = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE runs (
        task_uid TEXT NOT NULL, attempt INTEGER NOT NULL, state BLOB NOT NULL, crc INTEGER NOT NULL,
        final INTEGER NOT NULL, pid INTEGER NOT NULL, pid_start INTEGER NOT NULL,
        boot_id TEXT NOT NULL, PRIMARY KEY (task_uid, attempt)) WITHOUT ROWID;
    CREATE TABLE tombstones (
        task_uid TEXT NOT NULL, attempt INTEGER NOT NULL, state BLOB NOT NULL, crc INTEGER NOT NULL,
        expires INTEGER NOT NULL, PRIMARY KEY (task_uid, attempt)) WITHOUT ROWID;
    CREATE INDEX tombstones_by_expiry ON tombstones (expires);
    CREATE TABLE batches (
        seq INTEGER PRIMARY KEY, class INTEGER NOT NULL, records INTEGER NOT NULL,
        size INTEGER NOT NULL, crc INTEGER NOT NULL, batch BLOB NOT NULL);
    CREATE INDEX batches_by_class ON batches (class, seq, size, records);
    CREATE TABLE totals (
        class INTEGER PRIMARY KEY, bytes INTEGER NOT NULL, batches INTEGER NOT NULL);
    CREATE TRIGGER batch_added AFTER INSERT ON batches BEGIN
        INSERT INTO totals VALUES (new.class, new.size, 1) ON CONFLICT (class)
        DO UPDATE SET bytes = bytes + new.size, batches = batches + 1; END;
    CREATE TRIGGER batch_removed AFTER DELETE ON batches BEGIN
        UPDATE totals SET bytes = bytes - old.size, batches = batches - 1
        WHERE class = old.class; END;
    """,
)


class StoreDamagedError(Exception):
    """The file turned out to be damaged while it was in use; a restart sets it aside."""


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error says that the file's content is wrong."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def checksum(key: RunKey, state: bytes) -> int:
    """Checksum of a journal row: SQLite has none of its own for what is in its pages."""
    return zlib.crc32(state, zlib.crc32(str(key).encode()))


class _DamageError(Exception):
    """Why the file is to be set aside."""


@dataclass
class Salvage:
    """What could be read of a damaged file's journal."""

    runs: list[tuple[RunKey, bytes, bool, int, int, str]] = field(default_factory=list)
    tombstones: list[tuple[RunKey, bytes, int]] = field(default_factory=list)


@dataclass
class Opened:
    """The agent's file, ready for use by one thread.

    Attributes:
        connection: In autocommit mode; transactions are the user's.
        epoch: Life of the file, above 0.
        damaged: Where a damaged file was set aside to, None if there was none.
    """

    connection: sqlite3.Connection
    epoch: int
    damaged: Path | None


class Lock:
    """Keeps a second agent out of the state directory, for as long as this process lives."""

    def __init__(self, directory: Path) -> None:
        """Take the lock.

        Raises:
            SettingsError: Another agent has it, or the directory cannot be written to.
        """
        path = directory / LOCK_NAME
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsError(
                f'setting "state.directory": cannot use {directory}: {error.strerror or error}'
            ) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(self._fd, 32).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise SettingsError(
                f'setting "state.directory": {directory} is in use by another agent'
                + (f" (pid {owner})" if owner else "")
                + "; expected a directory of its own for each agent"
            ) from None
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Give the lock back."""
        os.close(self._fd)


def open_database(directory: Path, *, now: Callable[[], float] = time.time) -> Opened:
    """Open the file in a directory that is locked already; make it if there is none.

    Raises:
        SettingsError: The file cannot be opened at all, or was made by a newer agent.
    """
    path = directory / FILE_NAME
    suspect = directory / SUSPECT_NAME
    damaged: Path | None = None
    if not path.exists():
        _take_place(path)
    try:
        if suspect.exists() and path.exists():
            raise _DamageError("it failed the agent that used it before")
        connection = _open_checked(path, now)
    except _DamageError as damage:
        salvage = _salvage(path)
        # Whole before the old one goes: whenever the agent is killed, the journal is in one of the
        # two, or runs would begin twice.
        _make_new(path, salvage, now)
        damaged = _set_aside(path, now())
        _take_place(path)
        log.error(  # noqa: TRY400 - the problem is in the file; a traceback of ours tells nothing
            "the state file is damaged and was set aside; going on with a new one",
            file=str(path),
            kept_as=str(damaged),
            problem=str(damage),
            runs_saved=len(salvage.runs),
            tombstones_saved=len(salvage.tombstones),
            lost="record batches that waited for a server",
        )
        connection = _open_checked(path, now)
    suspect.unlink(missing_ok=True)
    # Numbers that an agent had reserved and did not give back: batches may have had them that were
    # sent and then lost with the machine's power; see store.outbox.
    connection.execute(
        "UPDATE meta SET value = max(value, coalesce("
        "(SELECT value FROM meta WHERE name = 'reserved_seq'), 0)) WHERE name = 'next_seq'"
    )
    (epoch,) = connection.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
    return Opened(connection, epoch, damaged)


def _open_checked(path: Path, now: Callable[[], float]) -> sqlite3.Connection:
    connection: sqlite3.Connection | None = None
    try:
        # The journal holds output of tasks: for this user only. SQLite gives its other files the
        # same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        _prepare(connection)
        _migrate(connection, int(now()))
        _verify(connection)
    except (sqlite3.Error, OSError, _DamageError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, OSError) or (
            isinstance(error, sqlite3.Error) and not is_damage(error)
        ):
            raise SettingsError(
                f'setting "state.directory": cannot use {path}: {error}; expected a directory '
                "on a local disk with free space that the agent may write to"
            ) from None
        raise _DamageError(str(error)) from error
    except BaseException:
        if connection is not None:
            connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection) -> None:
    # Of a new file only, and before anything is in it: space can be given back to a full disk.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    # FULL: what was acknowledged to a caller survives a power cut, not just a kill. The thread
    # that owns the connection switches it where less will do; see store.worker.
    connection.execute("PRAGMA synchronous = FULL")
    # Batches that are soon acknowledged never reach the file itself, if their log is long enough.
    connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    connection.execute("PRAGMA cache_size = -1024")
    connection.execute("PRAGMA busy_timeout = 2000")


def _migrate(connection: sqlite3.Connection, unix: int) -> None:
    connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, applied INTEGER)"
    )
    (version,) = connection.execute("SELECT coalesce(max(version), 0) FROM migrations").fetchone()
    if version > len(MIGRATIONS):
        raise SettingsError(
            f'setting "state.directory": its file has schema version {version}, this agent knows '
            f"up to {len(MIGRATIONS)}; expected a file of this agent's version or an older one"
        )
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        # One script, one transaction: executescript would commit on its own.
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in _statements(script):
                connection.execute(statement)
            connection.execute("INSERT INTO migrations VALUES (?, ?)", (number, unix))
            if number == 1:
                # 63 bits: SQLite's integers are signed.
                epoch = secrets.randbits(63) or 1
                connection.execute("INSERT INTO meta VALUES ('epoch', ?)", (epoch,))
                connection.execute("INSERT INTO meta VALUES ('next_seq', 1)")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for part in script.split(";"):
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            if statement.strip(" \n;"):
                yield statement
            statement = ""


def _verify(connection: sqlite3.Connection) -> None:
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise _DamageError(str(verdict))
    names = {name for (name,) in connection.execute("SELECT name FROM meta")}
    if not {"epoch", "next_seq"} <= names:
        raise _DamageError("the table meta is incomplete")
    for table in ("runs", "tombstones"):
        rows = connection.execute(f"SELECT task_uid, attempt, state, crc FROM {table}")  # noqa: S608 - a constant
        for uid, attempt, state, crc in rows:
            if not _intact(RunKey(uid, attempt), state, crc):
                raise _DamageError(f"a row of the table {table} has a wrong checksum")


def _intact(key: RunKey, state: object, crc: object) -> bool:
    if not isinstance(state, bytes) or checksum(key, state) != crc:
        return False
    with contextlib.suppress(DecodeError):
        pb.RunState.FromString(state)
        return True
    return False


def _salvage(path: Path) -> Salvage:
    """Read what can be read of the journal. Every error ends the reading of that table only."""
    found = Salvage()
    try:
        connection = sqlite3.connect(path, isolation_level=None)
    except sqlite3.Error:
        return found
    with contextlib.closing(connection):
        with contextlib.suppress(sqlite3.Error, TypeError, ValueError):
            for uid, attempt, state, crc, final, pid, start, boot in connection.execute(
                "SELECT task_uid, attempt, state, crc, final, pid, pid_start, boot_id FROM runs"
            ):
                key = RunKey(str(uid), int(attempt))
                intact = _intact(key, state, crc)
                # A run whose state cannot be read was taken once: it must not begin again.
                kept = state if intact else accepted(id_of(key)).SerializeToString()
                row = (key, kept, bool(final) and intact, int(pid), int(start), str(boot))
                found.runs.append(row)
        with contextlib.suppress(sqlite3.Error, TypeError, ValueError):
            for uid, attempt, state, crc, expires in connection.execute(
                "SELECT task_uid, attempt, state, crc, expires FROM tombstones"
            ):
                key = RunKey(str(uid), int(attempt))
                if _intact(key, state, crc):
                    found.tombstones.append((key, state, int(expires)))
    return found


def _make_new(path: Path, salvage: Salvage, now: Callable[[], float]) -> None:
    """Make the file that is to take the place of a damaged one, with all that was saved of it."""
    new = path.with_name(NEW_NAME)
    for suffix in ("", *_COMPANIONS):
        new.with_name(new.name + suffix).unlink(missing_ok=True)
    # Closing it moves all of the write-ahead log into the file, which is synced then.
    with contextlib.closing(_open_checked(new, now)) as connection:
        try:
            _carry_over(connection, salvage)
        except sqlite3.Error as error:
            raise SettingsError(
                f'setting "state.directory": cannot write {new}: {error}; expected free space'
            ) from None


def _take_place(path: Path) -> None:
    """Have the new file take its place, if there is one; an agent may have been killed before."""
    new = path.with_name(NEW_NAME)
    if new.exists():
        for suffix in _COMPANIONS:  # those of the file that was set aside
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        new.rename(path)


def _carry_over(connection: sqlite3.Connection, salvage: Salvage) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for key, state, final, pid, start, boot in salvage.runs:
        connection.execute(
            "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*key, state, checksum(key, state), final, pid, start, boot),
        )
    for key, state, expires in salvage.tombstones:
        connection.execute(
            "INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?, ?, ?)",
            (*key, state, checksum(key, state), expires),
        )
    connection.execute("COMMIT")


def _set_aside(path: Path, now: float) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    target = path.with_name(f"{path.name}.damaged-{stamp}")
    count = 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}.damaged-{stamp}-{count}")
    # Without its log it could pass for a sound one, so it goes first.
    path.rename(target)
    for suffix in _COMPANIONS:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(target.with_name(target.name + suffix))
    _forget_old(path, keep=target)
    return target


def _forget_old(path: Path, *, keep: Path) -> None:
    """Delete the oldest damaged files beyond the bound."""
    found = [p for p in path.parent.glob(f"{path.name}.damaged-*") if p != keep]
    mains = sorted(p for p in found if not p.name.endswith(_COMPANIONS))
    for old in mains[: max(0, len(mains) + 1 - KEPT_DAMAGED)]:
        for suffix in ("", *_COMPANIONS):
            old.with_name(old.name + suffix).unlink(missing_ok=True)
