"""How full the host's file systems are, whatever state their servers are in.

Asking a network file system whose server is gone waits for ever: each is asked with a time limit,
and one that did not answer is not asked again before it does. Blocks for a bounded time: use a
thread.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outrider_agent.collectors.hostinfo import TABLE_BYTES, HostPaths, read
from outrider_agent.collectors.limited import Limited
from outrider_agent.core import procfs
from outrider_agent.core.procfs import Mount

#: Most mounts that are looked at, and file systems that are asked.
MAX_MOUNTS = 4096
MAX_ASKED = 128
#: Longest wait for one file system and for all of them together, seconds.
ONE_SECONDS = 1.0
ALL_SECONDS = 3.0
#: File systems that hang, each with a thread; with more of them none is asked any more.
MAX_STUCK = 16
TIMEOUT = "mountpoint timeout"


@dataclass(frozen=True)
class FileSystem:
    """A mounted file system and how full it is; all 0 when `error` says why it is not known."""

    mount: Mount
    total_bytes: int = 0
    free_bytes: int = 0
    available_bytes: int = 0
    files: int = 0
    files_free: int = 0
    error: str = ""


class FileSystems:
    """Asks the host's file systems. Any thread may call.

    Args:
        paths: Where the host is.
        statvfs: As os.statvfs; for tests.
    """

    def __init__(
        self, paths: HostPaths, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
    ) -> None:
        self._paths = paths
        self._statvfs = statvfs
        self._asked: dict[str, Limited[os.statvfs_result]] = {}
        self._lock = threading.Lock()

    def mounts(self) -> list[Mount]:
        """All mounts that can be asked.

        With a root of the host's, those of process 1, which has the host's; else our own, for what
        others have mounted is not below our root.
        """
        proc, root = self._paths.proc, self._paths.root
        of_host = "" if root == Path("/") else read(proc / "1/mountinfo", TABLE_BYTES)
        text = of_host or read(Path("/proc/self/mountinfo"), TABLE_BYTES)
        return procfs.mounts(text, str(root), MAX_MOUNTS)

    def ask(self, mounts: list[Mount]) -> list[FileSystem]:
        """How full the first MAX_ASKED of these are; one of them never holds up the others long."""
        with self._lock:
            wanted = mounts[:MAX_ASKED]
            points = {mount.point for mount in wanted}
            self._asked = {p: a for p, a in self._asked.items() if p in points or a.stuck}
            deadline = time.monotonic() + ALL_SECONDS
            return [self._ask(mount, deadline) for mount in wanted]

    def _ask(self, mount: Mount, deadline: float) -> FileSystem:
        asked = self._asked.get(mount.point)
        if asked is None:
            path = self._paths.root / mount.point.lstrip("/")
            asked = Limited("statfs", lambda: self._statvfs(path))
            self._asked[mount.point] = asked
        seconds = min(ONE_SECONDS, deadline - time.monotonic())
        if seconds <= 0 or sum(a.stuck for a in self._asked.values()) >= MAX_STUCK:
            return FileSystem(mount, error=TIMEOUT)
        try:
            found = asked.call(seconds)
        except TimeoutError:
            return FileSystem(mount, error=TIMEOUT)
        except OSError as error:
            return FileSystem(mount, error=(error.strerror or "error").lower())
        return FileSystem(
            mount,
            total_bytes=found.f_blocks * found.f_frsize,
            free_bytes=found.f_bfree * found.f_frsize,
            available_bytes=found.f_bavail * found.f_frsize,
            files=found.f_files,
            files_free=found.f_ffree,
        )
