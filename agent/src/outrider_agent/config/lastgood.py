"""The last good configuration on disk: whole or not there, whatever happens while it is written.

A small file of its own: a line with the hash, then the content as it came. Written beside, synced,
then put in place by a rename. Knows no server, and puts nothing into force. All of it blocks.
"""

import contextlib
import os
from pathlib import Path
from typing import Final

from outrider_proto import limits
from outrider_proto.effective import digest
from outrider_proto.v1.agent_pb2 import EffectiveConfig

_MAGIC: Final = b"outrider-config 1 "
_HEAD_BYTES: Final = len(_MAGIC) + 65


class DamagedError(Exception):
    """The file is not as it was written; the text says how."""


class LastGood:
    """The file.

    Args:
        path: Where it is; its folder must be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._new = path.with_name(path.name + ".new")
        self._damaged = path.with_name(path.name + ".damaged")

    def read(self) -> EffectiveConfig | None:
        """What is kept; None: nothing.

        Raises:
            DamagedError: It is not as it was written.
            OSError: It cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                raw = file.read(_HEAD_BYTES + limits.CONFIG_BYTES + 1)
        except FileNotFoundError:
            return None
        head, _, content = raw.partition(b"\n")
        if not head.startswith(_MAGIC):
            raise DamagedError("it does not begin as such a file does")
        named = head.removeprefix(_MAGIC).decode("ascii", "replace")
        if digest(content) != named:
            raise DamagedError("its content does not have the hash that it names")
        return EffectiveConfig(hash=named, content=content)

    def prepare(self, config: EffectiveConfig) -> None:
        """Write a configuration beside the one that is kept, and have it on the disk.

        Raises:
            OSError: The disk does not take it.
        """
        with self._new.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)  # settings of plug-ins may hold secrets
            file.write(_MAGIC + config.hash.encode() + b"\n" + config.content)
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Keep what was prepared.

        Raises:
            OSError: The disk does not take it.
        """
        self._new.replace(self.path)
        self._sync_folder()

    def discard(self) -> None:
        """Forget what was prepared."""
        with contextlib.suppress(OSError):
            self._new.unlink()

    def set_aside(self) -> Path:
        """Move a damaged file away, in place of an earlier one; where to.

        Raises:
            OSError: It cannot be moved.
        """
        self.path.replace(self._damaged)
        self._sync_folder()
        return self._damaged

    def _sync_folder(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
