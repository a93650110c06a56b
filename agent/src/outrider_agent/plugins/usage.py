"""What the processes of plug-ins use: processor time, memory, bytes read and written, descriptors.

Blocks, for moments; reads /proc of the agent's own process namespace.
"""

import contextlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """Totals over some processes: seconds of processor time, bytes, numbers."""

    cpu_seconds: float = 0.0
    rss: int = 0
    read: int = 0
    written: int = 0
    descriptors: int = 0
    processes: int = 0


def of(pids: Iterable[int]) -> Usage:
    """What these processes use; those that are gone, and what may not be read, count nothing."""
    cpu, rss, read, written, descriptors, count = 0.0, 0, 0, 0, 0, 0
    for pid in pids:
        folder = Path("/proc") / str(pid)
        try:
            line = (folder / "stat").read_bytes()
            fields = line[line.rfind(b")") + 2 :].split()
            # With its ended children: work done by many short ones is not to vanish.
            cpu += sum(map(int, fields[11:15])) / _TICKS
            rss += int((folder / "statm").read_bytes().split()[1]) * _PAGE
        except (OSError, IndexError, ValueError):
            continue
        count += 1
        try:
            descriptors += len(os.listdir(folder / "fd"))  # noqa: PTH208 - only the number
            io = dict(
                entry.split(b": ", 1)
                for entry in (folder / "io").read_bytes().splitlines()
                if b": " in entry
            )
            read += int(io.get(b"read_bytes", 0))
            written += int(io.get(b"write_bytes", 0))
        except (OSError, ValueError):
            continue  # another user's, and we may not look
    return Usage(cpu, rss, read, written, descriptors, count)


#: Most files and folders whose size is added up, and levels of folders that are gone down.
FILES: Final = 10_000
DEPTH: Final = 64


def disk_use(folder: Path) -> int:
    """Bytes that the files below a folder take on disk.

    The first FILES of them, not deeper than DEPTH. What is gone meanwhile or may not be read counts
    nothing: the plug-in is at work there.
    """
    total = count = 0
    pending = [(os.fspath(folder), 0)]
    while pending:
        path, depth = pending.pop()
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                count += 1
                if count > FILES:
                    return total
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    total += status.st_blocks * 512
                    if stat.S_ISDIR(status.st_mode) and depth < DEPTH:
                        pending.append((entry.path, depth + 1))
    return total
