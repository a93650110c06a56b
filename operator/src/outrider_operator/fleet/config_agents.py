"""Has Agent objects written that are to say something else of their configuration, by and by.

A change that reaches thousands of agents must not wait for thousands of writes: they begin when
nothing has happened for a while, and are few at a time. Knows nothing of what is written.
"""

import asyncio
from collections.abc import Callable
from typing import Final

#: The writes wait for so much quiet, but no longer than so long, seconds.
QUIET_SECONDS: Final = 10.0
LONGEST_SECONDS: Final = 30.0
#: Agents that are written in one second.
PER_SECOND: Final = 100


class ConfigAgents:
    """The nodes whose Agent objects wait. As many as there are nodes, at most.

    Args:
        write: has the Agent of a node written.
        clock: monotonic seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._write = write
        self._clock = clock
        self._waiting: dict[str, float] = {}
        self._last = clock()

    def changed(self, node: str) -> None:
        """The Agent of a node is to say something else."""
        self._last = self._clock()
        self._waiting.setdefault(node, self._last)

    async def run(self) -> None:
        """Have them written, for ever."""
        while True:
            await asyncio.sleep(1.0)
            self.work()

    def work(self) -> None:
        """Have those written that it is time for; called once a second."""
        now = self._clock()
        quiet = now - self._last >= QUIET_SECONDS
        for node in list(self._waiting)[:PER_SECOND]:
            # They wait in the order in which they came.
            if not quiet and now - self._waiting[node] < LONGEST_SECONDS:
                return
            del self._waiting[node]
            self._write(node)
