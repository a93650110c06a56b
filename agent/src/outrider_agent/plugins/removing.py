"""Removes a folder with all in it, however deep somebody nested it.

What a plug-in made is removed with it, and a plug-in may nest folders deeper than Python calls
nest, than descriptors last and than a path is long. So each folder with something in it is moved
to the top first: two descriptors at a time do. Never follows a link. Blocks.
"""

import contextlib
import errno
import os
import secrets
import sys
from pathlib import Path
from typing import Final

#: Most files and folders that are removed in one go: whoever waits for it has other things to do.
ENTRIES: Final = 200_000
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(path: Path, entries: int = ENTRIES) -> None:
    """Remove a folder or a file.

    Raises:
        OSError: Something of it cannot be removed, or it has more entries than are removed in one
            go (EAGAIN); much of it may be gone, and another call goes on.
    """
    try:
        top = os.open(path, _FOLDER)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        path.unlink(missing_ok=True)  # a file or a link
        return
    try:
        pending, count = _empty(top, top, entries)
        while pending:
            name = pending.pop()
            folder = os.open(name, _FOLDER, dir_fd=top)
            try:
                moved, count = _empty(folder, top, count)
            finally:
                os.close(folder)
            pending += moved
            os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)
    path.rmdir()


def discard(path: Path) -> None:
    """Remove a folder with all in it, whatever it takes; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        remove(path, sys.maxsize)


def _empty(folder: int, top: int, left: int) -> tuple[list[str], int]:
    """Remove the files of a folder and move its folders to the top.

    Args:
        folder: Its descriptor.
        top: That of the folder that is removed; may be the same.
        left: How many entries may be gone through still.

    Returns:
        Names of the folders, at the top; and how many entries may be gone through then.
    """
    folders = []
    with os.scandir(folder) as found:
        for entry in found:
            if left == 0:
                raise OSError(errno.EAGAIN, "it has very many files; the rest is removed later")
            left -= 1
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=folder)
                continue
            name = entry.name
            if folder != top:
                name = f"{secrets.token_hex(8)}.gone"
                os.rename(entry.name, name, src_dir_fd=folder, dst_dir_fd=top)
            folders.append(name)
    return folders, left
