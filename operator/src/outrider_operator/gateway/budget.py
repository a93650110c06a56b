"""A bound on bytes that are held at once, first come, first served.

Knows nothing of what is held. Fair between those who wait when each waits for one thing at a time.
"""

import asyncio
from collections import deque


class ByteBudget:
    """So many bytes may be held at once; more wait, first come, first served.

    Args:
        limit: bytes; one holding alone may be larger.
    """

    __slots__ = ("_limit", "_waiting", "held")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.held = 0

    def take_at_once(self, size: int) -> bool:
        """Hold `size` bytes more if they fit and nobody waits; False: they are not held."""
        if self._waiting or not self._fits(size):
            return False
        self.held += size
        return True

    async def take(self, size: int) -> None:
        """Hold `size` bytes more; waits until they fit."""
        if self.take_at_once(size):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size, future)
        self._waiting.append(entry)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.give_back(size)  # it was granted, and nobody is there to use it
            else:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                self._grant()
            raise

    def give_back(self, size: int) -> None:
        """Hold `size` bytes less."""
        self.held -= size
        if self._waiting:
            self._grant()

    def _fits(self, size: int) -> bool:
        return self.held == 0 or self.held + size <= self._limit

    def _grant(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            size, future = self._waiting.popleft()
            if not future.done():
                self.held += size
                future.set_result(None)
