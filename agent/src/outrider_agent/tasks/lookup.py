"""Finds files as a process with another root folder would: links are followed inside that root.

The agent sees the host's files below /proc/1/root, where the kernel would follow an absolute link
into the agent's own container. Blocks; starts nothing.
"""

import os
import stat
from pathlib import Path
from typing import Final

#: Most links on the way to a file, as in the kernel.
MAX_LINKS: Final = 40
#: Largest file that is read, bytes: passwd and group files of large sites are below it.
MAX_FILE_BYTES: Final = 4 * 1024 * 1024


def resolve(path: str, root: str = "") -> str:
    """The path without links, "." and "..", as seen from `root`; what does not exist stays.

    Args:
        path: Absolute.
        root: Folder that stands for "/"; empty for the root of this process.

    Raises:
        OSError: Too many links.
    """
    todo = path.split("/")[::-1]
    done: list[str] = []
    links = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            del done[-1:]
            continue
        target = _link(root + "/" + "/".join([*done, part]))
        if target is None:
            done.append(part)
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(f"too many links in {path}")
        if target.startswith("/"):
            done.clear()
        todo += target.split("/")[::-1]
    return "/" + "/".join(done)


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)  # noqa: PTH115 - strings throughout: a Path drops what matters here
    except OSError:
        return None  # no link, or nothing at all: who opens it learns why


def locate(name: str, search: str, root: str = "") -> str | None:
    """The file of a program: an executable one first, else one whose error explains itself.

    Args:
        name: A path, relative ones to "/", or a name to look for.
        search: Folders to look in, as in PATH.
        root: See `resolve`.

    Returns:
        Its path seen from `root` with no link among its folders, None if there is none. Its last
        part is as it was named: programs look at it, and `python3` is a better name than what it
        leads to.
    """
    folders = [""] if "/" in name else search.split(os.pathsep)
    other = None
    for folder in folders:
        parent, _, base = f"/{folder}/{name}".rpartition("/")
        if base in ("", ".", ".."):
            return None
        try:
            found = resolve(parent, root).rstrip("/") + "/" + base
        except OSError:  # links that lead in a circle: nothing can be there
            continue
        kind = _kind(found, root)
        if kind is not None and stat.S_ISREG(kind) and kind & 0o111:
            return found
        if kind is not None and other is None and not (stat.S_ISDIR(kind) and "/" not in name):
            other = found
    return other


def _kind(path: str, root: str) -> int | None:
    """The mode of what a path leads to, None if that is nothing."""
    try:
        return os.stat(root + resolve(path, root)).st_mode  # noqa: PTH116 - as above
    except OSError:
        return None


def executable(path: str, root: str) -> bool:
    """Whether what a path leads to is a file that somebody may execute."""
    kind = _kind(path, root)
    return kind is not None and stat.S_ISREG(kind) and bool(kind & 0o111)


def text_of(path: str, root: str) -> str:
    """Content of a small file seen from `root`, empty where it cannot be read."""
    try:
        with Path(root + resolve(path, root)).open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
