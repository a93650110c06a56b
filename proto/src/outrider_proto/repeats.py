"""Tells repeats from what is new, for streams of records that never end, in bounded memory.

Sinks may store a batch twice, never not at all: who counts records drops what came before. The
bound means that something may be forgotten, and then comes twice; nothing new is ever dropped.
"""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from typing import Final

from outrider_proto import limits

#: Lives of agents that are remembered.
MAX_LIVES: Final = 20_000
#: Ranges of batches that are remembered for each: one, but for what is on its way twice or missing.
MAX_RANGES: Final = 64
#: Room for the records of a batch in the numbering of all records of a life.
_SPAN: Final = limits.BATCH_RECORDS


class Repeats:
    """Remembers which batches and records came.

    A batch is named by (agent, epoch, seq), a record by its index in it besides. All of a life
    (agent, epoch) that came without a gap is one range, and costs as much as one batch. Beyond
    the bounds the life that was silent longest, and the lowest range of a life, are forgotten.

    Args:
        max_lives: Lives that are remembered.
        max_ranges: Ranges that are remembered of each.
    """

    def __init__(self, max_lives: int = MAX_LIVES, max_ranges: int = MAX_RANGES) -> None:
        self._max_lives = max(1, max_lives)
        self._max_ranges = max(2, max_ranges)
        self._lives: OrderedDict[tuple[str, int], _Ranges] = OrderedDict()

    def __len__(self) -> int:
        """How many lives are remembered."""
        return len(self._lives)

    @property
    def ranges(self) -> int:
        """How many ranges are remembered, of all lives together."""
        return sum(map(len, self._lives.values()))

    def is_new(
        self, agent_id: str, epoch: int, seq: int, index: int | None = None, count: int = 0
    ) -> bool:
        """Whether this did not come before, as far as is remembered; it has come then.

        Args:
            agent_id: Which agent.
            epoch: Its epoch.
            seq: Number of the batch.
            index: Place of a single record in its batch; None for the whole batch.
            count: With an index: how many records the batch has, where that is known.
        """
        first = seq * _SPAN + (index or 0)
        whole = index is None or index == count - 1
        last = (seq + 1) * _SPAN - 1 if whole else first
        life = self._lives.get((agent_id, epoch))
        if life is None:
            life = self._lives[agent_id, epoch] = _Ranges()
            if len(self._lives) > self._max_lives:
                self._lives.popitem(last=False)
        else:
            self._lives.move_to_end((agent_id, epoch))
        return life.add(first, last, self._max_ranges)


class _Ranges:
    """Disjoint ranges of numbers, ends included, none next to another."""

    __slots__ = ("_firsts", "_lasts")

    def __init__(self) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []

    def __len__(self) -> int:
        return len(self._firsts)

    def add(self, first: int, last: int, bound: int) -> bool:
        """Add a range; False if all of it was there."""
        firsts, lasts = self._firsts, self._lasts
        # Ranges begin to end-1 touch the new one.
        begin, end = bisect_left(lasts, first - 1), bisect_right(firsts, last + 1)
        if begin < end:
            if firsts[begin] <= first and last <= lasts[begin]:
                return False
            first, last = min(first, firsts[begin]), max(last, lasts[end - 1])
        firsts[begin:end] = [first]
        lasts[begin:end] = [last]
        if len(firsts) > bound:
            oldest = 1 if begin == 0 else 0  # what came just now is not the oldest
            del firsts[oldest], lasts[oldest]
        return True
