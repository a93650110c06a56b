"""What is on its way without an acknowledgement, and how much of that each lane may be.

The server bounds bytes and batches. Within them a part is kept free for what is more urgent, so
that a server that acknowledges slowly is never full of old records when a result or a fresh record
is to go. Sends nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum

from outrider_proto import limits

#: The window where the server names none.
DEFAULT_WINDOW_BYTES = 4 * limits.MIB
DEFAULT_WINDOW_BATCHES = 1024
#: What all but results may fill, and what the backlog alone may fill, as a share of the window.
JOINT_SHARE = 7 / 8
BACKLOG_SHARE = 3 / 4
#: A backlog that has its share rests until it has this part of it: else each acknowledgement would
#: make room for one batch, and every batch be a message of its own.
RESUME_SHARE = 3 / 4


class Lane(IntEnum):
    """What a batch belongs to on a stream."""

    #: Output and outcome of runs.
    RESULTS = 0
    #: Other records that came after the stream was opened.
    LIVE = 1
    #: Other records that waited when it was opened.
    BACKLOG = 2


class Room(Enum):
    """Whether a batch may go."""

    FITS = "fits"
    #: The lane has its own share; another one may go in its place.
    SHARE = "share"
    #: The window is full: to wait for acknowledgements, so that others do not take each place
    #: that becomes free.
    FULL = "full"


@dataclass
class _Held:
    """What is in flight."""

    bytes: int = 0
    batches: int = 0

    def add(self, size: int) -> None:
        self.bytes += size
        self.batches += 1

    def remove(self, size: int) -> None:
        self.bytes -= size
        self.batches -= 1

    def fits(self, size: int, most_bytes: float, most_batches: float) -> bool:
        """Whether one more would be within both."""
        return self.bytes + size <= most_bytes and self.batches + 1 <= max(1, most_batches)


class Window:
    """The batches in flight.

    Args:
        most_bytes: Most bytes of them; 0: the default. A single batch may have more.
        most_batches: Most of them; 0: the default.
    """

    def __init__(self, most_bytes: int = 0, most_batches: int = 0) -> None:
        self._bytes = most_bytes or DEFAULT_WINDOW_BYTES
        self._batches = most_batches or DEFAULT_WINDOW_BATCHES
        self._flight: dict[int, tuple[Lane, int]] = {}
        self._all = _Held()
        self._backlog = _Held()
        self._resting = False

    def resize(self, most_bytes: int) -> None:
        """Have another bound from now on, for what is sent; 0: the same."""
        self._bytes = most_bytes or self._bytes

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of batches that were neither acknowledged nor refused."""
        return self._all.bytes

    def room(self, lane: Lane, size: int) -> Room:
        """Whether a batch of this size may go now. With nothing in flight, one always may."""
        if not self._flight:
            return Room.FITS
        joint = 1.0 if lane is Lane.RESULTS else JOINT_SHARE
        # Its first one counts against the others' share only: else one larger than its own share
        # could wait for ever.
        if lane is Lane.BACKLOG and self._backlog.batches and not self._backlog_may(size):
            return Room.SHARE
        if not self._all.fits(size, self._bytes * joint, self._batches * joint):
            return Room.FULL
        return Room.FITS

    def _backlog_may(self, size: int) -> bool:
        held, share = self._backlog, BACKLOG_SHARE
        if self._resting:
            resume = share * RESUME_SHARE
            self._resting = (
                held.bytes > self._bytes * resume or held.batches > self._batches * resume
            )
        self._resting = self._resting or not held.fits(
            size, self._bytes * share, self._batches * share
        )
        return not self._resting

    def sent(self, seq: int, lane: Lane, size: int) -> None:
        """A batch goes."""
        if seq in self._flight:
            raise ValueError(f"batch {seq} goes twice on one stream")
        self._flight[seq] = (lane, size)
        self._all.add(size)
        if lane is Lane.BACKLOG:
            self._backlog.add(size)

    def acknowledged(self, first: int, last: int) -> list[int]:
        """These came to an end: the numbers of those that were in flight, ascending."""
        if last - first < len(self._flight):
            found: Iterable[int] = (n for n in range(first, last + 1) if n in self._flight)
        else:
            found = sorted(n for n in self._flight if first <= n <= last)
        gone = list(found)
        for seq in gone:
            self._forget(seq)
        return gone

    def refused(self, seq: int) -> int | None:
        """The server does not take one: its size, None where it was not in flight."""
        return self._forget(seq) if seq in self._flight else None

    def _forget(self, seq: int) -> int:
        lane, size = self._flight.pop(seq)
        self._all.remove(size)
        if lane is Lane.BACKLOG:
            self._backlog.remove(size)
        return size


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges without gaps, both ends included."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] + 1 >= number:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
