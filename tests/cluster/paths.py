"""Where the test cluster keeps what it makes: a cache that lasts, and state that does not.

Why it exists: everything slow (Kubernetes, jars, base images) is made once and found again by a key
of what it was made from, outside the source tree, so that a fresh clone on a warm machine is fast.
It must not make anything itself, and it knows no tool.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The root of the source tree."""

TOOLS = ROOT / "tests" / "cluster" / "tools"
"""The committed descriptions (go.mod, pom.xml) of everything that is built or fetched."""

KEY_LENGTH = 16
KEPT_VERSIONS = 3


def cache() -> Path:
    """Return $OUTRIDER_CACHE, else $XDG_CACHE_HOME/outrider, else ~/.cache/outrider."""
    own = os.environ.get("OUTRIDER_CACHE")
    if own:
        return Path(own).absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "outrider"


def state(name: str) -> Path:
    """Return the folder of one running thing (a demo, a cluster); its end removes it."""
    return cache() / "state" / name


def key_of(*parts: str | Path) -> str:
    """Return 16 hexadecimal digits of the sha256 over the parts: texts, and the contents of files.

    The file's place is not part of the key, so that two clones share what they build.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(len(content).to_bytes(8, "big"))  # so that "ab","c" and "a","bc" differ
        digest.update(content)
    return digest.hexdigest()[:KEY_LENGTH]


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the file lock at `path`: two runs on one machine never make the same thing at once.

    The lock dies with the process, so that a killed run blocks nobody.

    Args:
        path: the lock file; it is made, and left behind empty.
        waiting: called once if another process holds the lock, before waiting for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def keep_newest(candidates: Iterable[Path], kept: int = KEPT_VERSIONS) -> None:
    """Remove all but the most recently used of some cache folders: the cache's bound.

    Use is told by the folder's modification time; see `mark_used`.
    """
    folders = sorted(candidates, key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[kept:]:
        shutil.rmtree(folder, ignore_errors=True)


def mark_used(folder: Path) -> None:
    """Note that a cache folder was used now, so that `keep_newest` spares it."""
    os.utime(folder)
