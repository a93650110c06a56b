"""Where a plug-in works, and what it finds there: its directory, its environment, its user.

Blocks, for moments.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Final

from outrider_proto.effective import Plugin

from outrider_agent.core import accounts
from outrider_agent.core.accounts import Account
from outrider_agent.core.plugins import PluginError
from outrider_agent.plugins.fetched import sha256_of
from outrider_agent.plugins.packages import Package
from outrider_agent.plugins.removing import remove
from outrider_agent.tasks import lookup, processes
from outrider_agent.tasks.placing import DEFAULT_PATH

_MARKED: Final = "plugin/"
#: Most folders that cannot be removed that are told.
MOST_PROBLEMS: Final = 16


def account_of(plugin: Plugin, own: tuple[str, ...], directory: Path) -> Account | None:
    """Whom a plug-in is to become; None: nobody else.

    Args:
        plugin: The plug-in.
        own: Name and number of the agent's own user.
        directory: Where its files will be.

    Raises:
        PluginError: There is no such user, or it cannot reach its files.
    """
    if not plugin.user or plugin.user in own:
        return None
    found = accounts.find(
        plugin.user,
        passwd=lookup.text_of("/etc/passwd", ""),
        group=lookup.text_of("/etc/group", ""),
    )
    if found is None:
        text = f"user {plugin.user}: not in /etc/passwd of the agent's container; give a number"
        raise PluginError(plugin.name, "UserNotFound", text)
    closed = _closed(directory, found)
    if closed is not None:
        text = (
            f"user {plugin.user} may not enter {closed}, where its files are; let others enter it "
            "(chmod o+x), or name another place in the setting plugins.directory"
        )
        raise PluginError(plugin.name, "UserNotPermitted", text)
    return found


def _closed(directory: Path, account: Account) -> Path | None:
    """The first folder on the way that a user may not enter."""
    for folder in [*reversed(directory.absolute().parents), directory.absolute()]:
        try:
            status = folder.stat()
        except OSError:
            return None  # ours to make
        if status.st_uid == account.uid:
            allowed = status.st_mode & stat.S_IXUSR
        elif status.st_gid in (account.gid, *account.groups):
            allowed = status.st_mode & stat.S_IXGRP
        else:
            allowed = status.st_mode & stat.S_IXOTH
        if not allowed and account.uid != 0:
            return folder
    return None


def mark_of(name: str, directory: Path, node: str) -> str:
    """The mark of a plug-in's processes: agents that share a system have folders of their own."""
    place = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
    return processes.mark_for(f"{_MARKED}{name}/{place}", node)


def is_mark(mark: str, directory: Path, node: str) -> bool:
    """Whether a mark is one of a plug-in of this agent, of whatever name."""
    return mark.startswith(_MARKED) and mark.endswith(mark_of("", directory, node)[len(_MARKED) :])


def environment(
    plugin: Plugin, node: str, mark: str, directory: Path, account: Account | None
) -> dict[str, str]:
    """The whole environment of a plug-in; little of it is the agent's, and no secret of its."""
    own = {
        processes.MARK: mark,  # first: it is looked for in every process
        "DETAIL": plugin.detail,
        "OUTRIDER_NODE": node,
        "OUTRIDER_PLUGIN": plugin.name,
        "OUTRIDER_PLUGIN_VERSION": plugin.version,
    }
    base = {
        "PATH": DEFAULT_PATH,
        "HOME": str(directory),
        "LANG": os.environ.get("LANG", "C.UTF-8"),
    }
    if account is not None:
        base |= {"USER": account.name, "LOGNAME": account.name}
    return {**own, **base, **plugin.env, **own}


def work_directory(root: Path, name: str, account: Account | None, package: Package) -> Path:
    """The plug-in's own folder, which outlives its versions; its package's files are linked there.

    Raises:
        OSError: It cannot be made.
    """
    above = root / "work"
    above.mkdir(mode=0o755, parents=True, exist_ok=True)
    above.chmod(0o755)
    directory = above / name
    directory.mkdir(mode=0o700, exist_ok=True)
    if account is not None:
        os.chown(directory, account.uid, account.gid)
    else:
        os.chown(directory, os.geteuid(), os.getegid())
    for entry in directory.iterdir():
        if entry.is_symlink() and "/unpacked/" in str(entry.readlink()):
            entry.unlink()  # of an earlier version
    for entry in package.folder.iterdir():
        with contextlib.suppress(FileExistsError):
            (directory / entry.name).symlink_to(entry.absolute())
    return directory


def keep_only(root: Path, names: Collection[str]) -> list[str]:
    """Remove the working directories of all other plug-ins, also of those an earlier agent had.

    Returns:
        What could not be removed (yet) and why, as sentences; to be tried again later.
    """
    problems = []
    try:
        others = sorted(path for path in (root / "work").iterdir() if path.name not in names)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{root / 'work'}: {error.strerror}"]
    for folder in others:
        try:
            remove(folder)
        except OSError as error:
            problems.append(f"{folder} cannot be removed: {error.strerror}")
    return problems[:MOST_PROBLEMS]


def intact(package: Package) -> bool:
    """Whether the executable is the one that was unpacked."""
    try:
        return sha256_of(package.executable) == package.sha256
    except OSError:
        return False
