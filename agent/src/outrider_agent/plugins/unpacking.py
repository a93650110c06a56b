"""Unpacks a plug-in's package into a folder, and lets nothing out of it.

Devices, absolute paths and links that lead out are refused, nothing is written through a link, and
members, bytes and headers are bounded: an archive can claim anything. tarfile's own filter would do
a part of it, where there is one: the Python of Debian 12 has none. Runs in a process of its own,
see `preparing`.
"""

import copy
import gzip
import posixpath
import shutil
import stat
import tarfile
import zlib
from pathlib import Path
from typing import Final

#: Most files and folders of a package.
MEMBERS: Final = 10_000
#: Largest piece that is read at once, bytes: a header that claims more is an attack.
PIECE_BYTES: Final = 1024 * 1024


class UnpackError(Exception):
    """A package that is not unpacked, and why."""


class _Bounded(gzip.GzipFile):
    """Reads a gzip file, up to a bound of what comes out of it."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        super().__init__(path, "rb")
        # Headers and padding are not in the sizes of members.
        self._most = max_bytes + (MEMBERS + 20) * 2048

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= PIECE_BYTES:
            raise UnpackError(f"a header of it claims {size} bytes")
        data = super().read(size)
        if self.tell() > self._most:
            raise UnpackError("it holds more bytes than its members tell")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset > self._most:
            raise UnpackError("a member of it claims to end beyond the largest size")
        return super().seek(offset, whence)


def unpack(package: Path, kind: str, name: str, folder: Path, max_bytes: int) -> Path:
    """Put a package's content into a folder.

    Args:
        package: The file, whose content was checked.
        kind: "plain" or "tar.gz".
        name: Path of the executable in it.
        folder: Must not exist.
        max_bytes: Most bytes of all files.

    Returns:
        The executable.

    Raises:
        UnpackError: It is no such package, or a member of it is not allowed.
        OSError: It cannot be written.
    """
    folder.mkdir(mode=0o755, parents=True)
    folder.chmod(0o755)  # whatever the umask is: the plug-in may be another user's
    executable = folder / posixpath.normpath(name)
    if folder not in executable.parents or posixpath.normpath(name).startswith(".."):
        raise UnpackError(f"its executable {name!r} is outside of it")
    if kind == "plain":
        shutil.copyfile(package, executable)
        executable.chmod(0o755)
        return executable
    try:
        with _Bounded(package, max_bytes) as packed, tarfile.open(fileobj=packed, mode="r:") as tar:
            # Used where it is there, and not asked for where it is not.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            _extract(tar, folder, max_bytes)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UnpackError(f"it is no tar.gz that may be unpacked: {error}") from None
    if executable.is_symlink() or not executable.is_file():
        raise UnpackError(f"it holds no file {name!r} (source.executable)")
    executable.chmod(stat.S_IMODE(executable.stat().st_mode) | 0o555)
    return executable


def _extract(tar: tarfile.TarFile, folder: Path, max_bytes: int) -> None:
    total = 0
    links: set[str] = set()
    for count, member in enumerate(tar):
        if count >= MEMBERS:
            raise UnpackError(f"it has more than {MEMBERS} members")
        total += max(0, member.size)
        if total > max_bytes:
            raise UnpackError(
                f"its files have more than {max_bytes} bytes (the setting plugins.maxUnpackedBytes)"
            )
        path = posixpath.normpath(member.name)
        if path.startswith(("/", "..")):
            raise UnpackError(f"its member {member.name!r} is outside of it")
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            raise UnpackError(f"its member {member.name!r} is no file, folder or link")
        if member.issparse():
            raise UnpackError(f"its member {member.name!r} is sparse")
        if path in links or any(parent in links for parent in _parents(path)):
            raise UnpackError(f"its member {member.name!r} would be written through a link")
        if member.issym():
            _check_link(member, posixpath.join(posixpath.dirname(path), member.linkname))
            links.add(path)
        elif member.islnk():
            _check_link(member, member.linkname)
            target = posixpath.normpath(member.linkname)
            if target in links or any(parent in links for parent in _parents(target)):
                raise UnpackError(f"its member {member.name!r} is a hard link to a link")
        _extract_one(tar, member, path, folder)


def _extract_one(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, folder: Path) -> None:
    """Write a member that was checked, by the name that was checked, with modes of our own."""
    checked = copy.copy(member)
    checked.name = path
    if member.islnk():
        checked.linkname = posixpath.normpath(member.linkname)
    tar.extract(checked, folder, set_attrs=False)
    if member.isdir():
        (folder / path).chmod(0o755)
    elif member.isreg():
        (folder / path).chmod(0o755 if member.mode & stat.S_IXUSR else 0o644)


def _check_link(member: tarfile.TarInfo, target: str) -> None:
    parts = [part for part in member.linkname.split("/") if part not in ("", ".")]
    while member.issym() and parts and parts[0] == "..":
        del parts[0]
    # Further ones would go up from where another link leads, and that can be anywhere.
    outside = ".." in parts or posixpath.normpath(target).startswith(("/", ".."))
    if member.linkname.startswith("/") or outside:
        raise UnpackError(f"its member {member.name!r} is a link that leads out of it")


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]
