"""Keeps free space on the disk of the outbox: what it may hold now, and giving space back.

Runs in the store's thread. A file does not get smaller by deleting what is in it: new batches go
where old ones were, and the disk gets the rest back by a vacuum, some at a time.
"""

import os
import sqlite3
from pathlib import Path

from outrider_agent.core.eviction import Bounds, Disk
from outrider_agent.store import outbox

#: Time between two looks at the disk, seconds.
LOOK_SECONDS = 2.0
#: Most pages that are given back at a time: 8 MiB, some tens of milliseconds.
VACUUM_PAGES = 2048


def disk_of(directory: Path) -> Disk:
    """The disk that a directory is on.

    Raises:
        OSError: It cannot be asked.
    """
    found = os.statvfs(directory)
    return Disk(size=found.f_blocks * found.f_frsize, free=found.f_bavail * found.f_frsize)


def limit(db: sqlite3.Connection, bounds: Bounds, disk: Disk) -> int:
    """What the outbox may hold on this disk now, bytes."""
    return bounds.limit(disk, held=outbox.totals(db).bytes, spare=_spare(db))


def _spare(db: sqlite3.Connection) -> int:
    return _pragma(db, "freelist_count") * _pragma(db, "page_size")


def give_back(db: sqlite3.Connection, shortage: int) -> None:
    """Give space that is not used back to the disk, at most `shortage` bytes and VACUUM_PAGES.

    Outside of a transaction. Files of before that was possible keep their size.

    Raises:
        sqlite3.Error: The disk did not take what has to be written for that.
    """
    pages = min(_pragma(db, "freelist_count"), VACUUM_PAGES, shortage // _pragma(db, "page_size"))
    if pages > 0 and _pragma(db, "auto_vacuum"):
        db.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])
