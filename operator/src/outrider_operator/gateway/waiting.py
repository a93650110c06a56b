"""A batch on its way into the sink, whom it came from, and the line of those to be tried again.

Only holds them: when they are tried, and what becomes of them, is the intake's to say.
"""

import bisect
import operator
from collections import OrderedDict
from typing import Protocol

from outrider_operator.core.batch import Batch
from outrider_operator.core.sink import Origin


class Owner(Protocol):
    """Whom batches came from. No method raises or waits."""

    @property
    def closed(self) -> bool:
        """Nobody waits for the answer any more, and the batch is kept elsewhere."""

    @property
    def splits(self) -> bool:
        """A batch that is too large can be given back, to come again as smaller ones."""

    def stored(self, batch: Batch, size: int) -> None:
        """A batch is safe; `size` is what it was counted as."""

    def split(self, batch: Batch, size: int, max_bytes: int) -> None:
        """A batch is to come again, as batches of at most `max_bytes`."""

    def dropped(self, batch: Batch, size: int) -> None:
        """A batch was not stored, and is not held any more: its owner, or the server, is closed."""

    def rejected(self, batch: Batch, error: str) -> None:
        """A batch can never be stored and is set aside; for the log, `stored` follows."""


class Waiting:
    """One batch on its way into the sink.

    Attributes:
        number: those that came later have higher ones.
    """

    __slots__ = ("batch", "began", "cost", "number", "origin", "owner", "size")

    def __init__(
        self,
        owner: Owner,
        origin: Origin,
        batch: Batch,
        size: int,
        cost: int,
        began: float,
        number: int,
    ) -> None:
        self.owner = owner
        self.origin = origin
        self.batch = batch
        self.size = size
        self.cost = cost
        self.began = began
        self.number = number


_number = operator.attrgetter("number")


class Again:
    """Batches to be tried again: those of an agent in the order they came, the agents in turn.

    All of an agent's are tried together, so that those which a sink takes are not held up by others
    that it does not: its windows bound how many there are.
    """

    __slots__ = ("_lines", "_size")

    def __init__(self) -> None:
        self._lines: OrderedDict[str, list[Waiting]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, waiting: Waiting) -> None:
        """Put a batch where it belongs among its agent's; an agent that had none comes last."""
        line = self._lines.setdefault(waiting.origin.agent_id, [])
        if line and line[-1].number > waiting.number:
            bisect.insort(line, waiting, key=_number)
        else:
            line.append(waiting)
        self._size += 1

    def take(self) -> list[Waiting]:
        """All batches of the agent whose turn it is, in order.

        Raises:
            KeyError: there are none.
        """
        _, line = self._lines.popitem(last=False)
        self._size -= len(line)
        return line
