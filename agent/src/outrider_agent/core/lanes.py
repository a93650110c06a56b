"""Which batch goes next: results first, then fresh records and the backlog in fair turns.

Knows what was read from the outbox and not sent yet, and says what is to be read next; reads and
sends nothing. Turns are fair by bytes (start-time fair queuing: Goyal, Vin and Cheng, 1996): of
the lanes that have something, the one that was given least goes, and one that had nothing for a
while gets no credit for it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outrider_proto import limits

from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import Waiting
from outrider_agent.core.window import Lane, Room

#: Most bytes of batches that are read from the outbox at once, but for a single larger one.
READ_BYTES = 512 * limits.KIB

RESULT_CLASS = frozenset({RecordClass.RESULT})
OTHER_CLASSES = frozenset(RecordClass) - RESULT_CLASS

#: The order of turns, by whether the backlog was given less.
_TURNS = ((Lane.LIVE, Lane.BACKLOG), (Lane.BACKLOG, Lane.LIVE))

#: Whether a batch of this lane and size may go.
Fits = Callable[[Lane, int], Room]


@dataclass(frozen=True)
class Look:
    """What is to be read from the outbox; see Outbox.batches_after.

    Attributes:
        lane: Whom it is for; LIVE with all classes is for results as well.
    """

    lane: Lane
    after: int
    upto: int | None
    classes: frozenset[RecordClass] | None


@dataclass
class _Line:
    """One lane.

    Attributes:
        cursor: The highest number that was read.
        upto: The highest number that belongs to it; None: no end.
        more: Whether the outbox may have more of it.
        given: Bytes that it was given, in the time of the turns.
        items: Read and not sent yet.
    """

    cursor: int
    upto: int | None = None
    more: bool = True
    given: int = 0
    items: deque[Waiting] = field(default_factory=deque)

    @property
    def hungry(self) -> bool:
        return self.more and not self.items


class Lanes:
    """The three lanes of a stream.

    Args:
        last_seq: The highest number in the outbox: what has it or one below is backlog. All up to
            it can be read.
    """

    def __init__(self, last_seq: int) -> None:
        self._results = _Line(0)
        self._live = _Line(last_seq)
        self._backlog = _Line(0, upto=last_seq, more=last_seq > 0)
        self._lines = (self._results, self._live, self._backlog)  # by lane
        #: What the lane in turn had been given when its turn began.
        self._turn = 0

    @property
    def waiting(self) -> bool:
        """Whether something may be there to send or to read, besides results."""
        return any(line.items or line.more for line in (self._live, self._backlog))

    # Reading.

    def appended(self) -> None:
        """The outbox has more."""
        self._results.more = self._live.more = True

    def look(self, fits: Fits) -> Look | None:
        """What is to be read before anything can be sent; None: nothing."""

        def wanted(lane: Lane) -> bool:
            return self._lines[lane].hungry and fits(lane, 1) is Room.FITS

        if wanted(Lane.RESULTS):
            # Where the results are as far as the fresh records, one look finds both.
            if wanted(Lane.LIVE) and self._results.cursor >= self._live.cursor:
                return Look(Lane.LIVE, self._live.cursor, None, None)
            return Look(Lane.RESULTS, self._results.cursor, None, RESULT_CLASS)
        for lane in (Lane.LIVE, Lane.BACKLOG):
            if wanted(lane):
                line = self._lines[lane]
                return Look(lane, line.cursor, line.upto, OTHER_CLASSES)
        return None

    def begin(self, look: Look) -> None:
        """It is being read; what is appended meanwhile counts."""
        for line in self._about(look):
            line.more = False

    def fill(self, look: Look, found: Sequence[Waiting], last_seq: int) -> None:
        """It was read.

        Args:
            look: What was looked for.
            found: Some of it, oldest first; empty: there is none.
            last_seq: The highest number in the outbox by now.
        """
        lines = self._about(look)
        if not found:
            # Numbers become readable in order: whatever lies before a fresh record that was
            # read would have been found.
            if look.lane is Lane.RESULTS:
                self._results.cursor = max(self._results.cursor, self._live.cursor)
            return
        for item in found:
            mine = self._results if item.record_class is RecordClass.RESULT else self._live
            line = mine if look.classes is None else lines[0]
            if item.seq > line.cursor:
                self._put(line, item)
        last = found[-1].seq
        for line in lines:
            line.cursor = max(line.cursor, last)
            end = last_seq if line.upto is None else line.upto
            line.more = line.more or last < end

    def _about(self, look: Look) -> list[_Line]:
        return [self._results, self._live] if look.classes is None else [self._lines[look.lane]]

    def _put(self, line: _Line, item: Waiting) -> None:
        if not line.items:
            line.given = max(line.given, self._turn)
        line.items.append(item)

    # Sending.

    def pick(self, fits: Fits, *, urgent_only: bool = False) -> Lane | None:
        """The lane whose first batch goes now; None: none, until something changes.

        Args:
            fits: Whether a batch may go.
            urgent_only: Results only.
        """
        if self._results.items:
            fit = fits(Lane.RESULTS, self._results.items[0].size)
            return Lane.RESULTS if fit is Room.FITS else None
        if self._results.more or urgent_only:
            return None
        for lane in _TURNS[self._backlog.given < self._live.given]:
            line = self._lines[lane]
            if not line.items and not line.more:
                continue
            room = fits(lane, line.items[0].size if line.items else 1)
            if room is Room.FITS and line.items:
                return lane
            if room is not Room.SHARE:
                return None  # to be read first, or the turn is kept until there is room
        return None

    def head(self, lane: Lane) -> Waiting:
        """The batch of a lane that goes next. Raises IndexError where there is none."""
        return self._lines[lane].items[0]

    def take(self, lane: Lane) -> Waiting:
        """Its first batch, which goes. Raises IndexError where there is none."""
        line = self._lines[lane]
        item = line.items.popleft()
        if lane is not Lane.RESULTS:
            self._turn = line.given
            line.given += item.size
        return item
