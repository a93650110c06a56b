"""What all streams of plain records hold together: messages that are being taken, and what is lost.

Their agents neither wait when asked nor send again. So messages that are open at once are bounded
here, beside the intake's bound, and what was read and is not stored yet is counted until it is.
"""

import asyncio
from typing import Final

from outrider_proto import limits

from outrider_operator.gateway.budget import ByteBudget
from outrider_operator.metrics import ServerMetrics

#: Messages that are taken at once hold at most such a part of the intake's bound, or are one.
SHARE: Final = 0.25
#: A message takes so many times its size while it is taken: its records, and what is made of them.
OPEN_FACTOR: Final = 2


class PlainRoom:
    """Room for plain messages, and the count of plain records that are not stored.

    Args:
        limit: most bytes that the intake holds.
        metrics: where they are counted.

    Attributes:
        unstored: records handed over of which it is not known yet what became of them.
        lost: records that were read and given up.
    """

    def __init__(self, limit: int, metrics: ServerMetrics) -> None:
        self._budget = ByteBudget(int(limit * SHARE))
        self._lost = metrics.plain_lost
        self._none_left = asyncio.Event()
        self._none_left.set()
        self.unstored = 0
        self.lost = 0
        metrics.plain_held_bytes.set_function(lambda: self._budget.held)

    def take_at_once(self, size: int) -> bool:
        """Hold a message of so many bytes if there is room; False: it is not held."""
        return self._budget.take_at_once(OPEN_FACTOR * size)

    async def take(self, size: int) -> None:
        """Hold a message of so many bytes; waits for room, first come, first served."""
        await self._budget.take(OPEN_FACTOR * size)

    def give_back(self, size: int) -> None:
        """A message is not held any more."""
        self._budget.give_back(OPEN_FACTOR * size)

    def handed_over(self, records: int) -> None:
        """Records are on their way into the sink; `settled` must follow."""
        self.unstored += records
        self._none_left.clear()

    def settled(self, records: int) -> None:
        """They are safe, or were given up."""
        self.unstored -= records
        if not self.unstored:
            self._none_left.set()

    def lose(self, records: int) -> None:
        """Count records that were read and are given up."""
        self.lost += records
        self._lost.inc(records)

    async def all_settled(self) -> None:
        """Wait until nothing is on its way."""
        await self._none_left.wait()


def size_of(data: bytes) -> int:
    """Bytes of a message when it is open, as far as it says: of one in gzip, the last four."""
    if not data.startswith(b"\x1f\x8b"):
        return len(data)
    return max(len(data), min(limits.MESSAGE_BYTES, int.from_bytes(data[-4:], "little")))
