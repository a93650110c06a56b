"""What the processes of plug-ins use: processor time, memory, bytes read and written, descriptors.

Blocks, for moments; reads /proc of the agent's own process namespace.
"""

import os
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
            stat = (folder / "stat").read_bytes()
            fields = stat[stat.rfind(b")") + 2 :].split()
            # With its ended children: work done by many short ones is not to vanish.
            cpu += sum(map(int, fields[11:15])) / _TICKS
            rss += int((folder / "statm").read_bytes().split()[1]) * _PAGE
        except (OSError, IndexError, ValueError):
            continue
        count += 1
        try:
            descriptors += len(os.listdir(folder / "fd"))  # noqa: PTH208 - only the number
            io = dict(
                line.split(b": ", 1)
                for line in (folder / "io").read_bytes().splitlines()
                if b": " in line
            )
            read += int(io.get(b"read_bytes", 0))
            written += int(io.get(b"write_bytes", 0))
        except (OSError, ValueError):
            continue  # another user's, and we may not look
    return Usage(cpu, rss, read, written, descriptors, count)


#: Most files whose size is added up.
FILES: Final = 10_000


def disk_use(folder: Path) -> int:
    """Bytes that the files below a folder take on disk; the first FILES of them."""
    total = count = 0
    for path in folder.rglob("*"):
        count += 1
        if count > FILES:
            break
        try:
            total += path.lstat().st_blocks * 512
        except OSError:
            continue  # gone meanwhile
    return total
