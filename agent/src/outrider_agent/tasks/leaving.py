"""Takes the agent away when a task says so: Restart and Shutdown.

Asks main to leave, which stops everything in order; keeps the marker of a Shutdown on disk. Whether
a run may ask for it is the policy's matter.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from outrider_runtime.logs import get_logger

from outrider_agent.core import leaving
from outrider_agent.core.leaving import Absence
from outrider_agent.core.runs import RunKey

log = get_logger("outrider.tasks")

#: Name of the marker in the state directory.
MARKER_NAME = "shutdown.json"
#: Longest wait for the server to take the result of a Shutdown, seconds.
ACKNOWLEDGE_SECONDS = 10.0
_MAX_MARKER_BYTES = 4096


class Leave(Enum):
    """Why the agent leaves of its own will."""

    RESTART = "Restart"
    SHUTDOWN = "Shutdown"


class Marker:
    """The file that keeps an agent away from its Pod. All methods block."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / MARKER_NAME

    def read(self) -> Absence | None:
        """What it tells; None without a marker, or with one that tells nothing."""
        try:
            with self._path.open("rb") as file:
                content = file.read(_MAX_MARKER_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("the marker of a shutdown cannot be read", error=str(error))
            return None
        absence = leaving.read(content)
        if absence is None:
            log.warning("the marker of a shutdown is damaged, and passed over", path=self._path)
        return absence

    def write(self, absence: Absence) -> None:
        """Have it on disk, whole or not at all.

        Raises:
            OSError: The disk does not take it.
        """
        new = self._path.with_suffix(".new")
        with new.open("wb") as file:
            file.write(leaving.write(absence))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self) -> None:
        """Have none. One that stays does no harm: it names another Pod."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


@dataclass
class Exit:
    """The agent's way out.

    Attributes:
        marker: Keeps it away.
        pod_uid: The Pod it is in; empty where there is none: then it stays away while the process
            lives.
        leave: Has main stop everything in order.
        before: What an earlier agent left in the marker.
    """

    marker: Marker
    pod_uid: str
    leave: Callable[[Leave], None]
    before: Absence | None = None
    _awaited: RunKey | None = None
    _acknowledged: asyncio.Event = field(default_factory=asyncio.Event)

    def restart(self) -> None:
        """Stop in order, and begin anew."""
        self.leave(Leave.RESTART)

    async def keep_away(self, by: str) -> None:
        """From now on an agent in this Pod does not work.

        Raises:
            OSError: The disk does not take it: then the agent must not go.
        """
        absence = Absence(self.pod_uid, by, int(time.time()))
        if self.pod_uid:
            await asyncio.to_thread(self.marker.write, absence)
        log.warning("the agent shuts down until its Pod is made anew", by=by)

    async def shut_down(self, run: RunKey | None) -> None:
        """Stop in order and stay, once the run's result was taken, or after a time."""
        self._awaited = run
        if run is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ACKNOWLEDGE_SECONDS):
                    await self._acknowledged.wait()
        self.leave(Leave.SHUTDOWN)

    def acknowledged(self, keys: Collection[RunKey]) -> None:
        """Results were taken."""
        if self._awaited in keys:
            self._acknowledged.set()
