"""Work to do, by key: each at most once in the queue, and never at two workers at a time.

What is added while its key is being worked on comes again afterwards, so nothing is missed and
bursts become one piece of work. Knows nothing of what the work is.
"""

import asyncio
import heapq
from collections.abc import Callable


class WorkQueue:
    """Keys with the time each is due. As large as the number of different keys.

    Args:
        clock: monotonic seconds; the loop's clock.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self._busy: set[str] = set()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def add(self, key: str, delay: float = 0.0) -> None:
        """Have a key worked on in `delay` seconds, or sooner if it is due sooner already."""
        at = self._clock() + delay
        if at < self._due.get(key, float("inf")):
            self._due[key] = at
            if key not in self._busy:
                heapq.heappush(self._heap, (at, key))
                self._changed.set()

    def discard(self, key: str) -> None:
        """Forget a key."""
        self._due.pop(key, None)

    async def get(self) -> str:
        """Wait for the next key that is due; `done` must be called with it."""
        while True:
            self._changed.clear()
            wait = self._next_wait()
            if wait is not None and wait <= 0:
                _, key = heapq.heappop(self._heap)
                del self._due[key]
                self._busy.add(key)
                return key
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _next_wait(self) -> float | None:
        while self._heap:
            at, key = self._heap[0]
            if self._due.get(key) == at and key not in self._busy:
                return at - self._clock()
            heapq.heappop(self._heap)  # overtaken by a sooner one, taken, or forgotten
        return None

    def done(self, key: str) -> None:
        """A worker is finished with a key."""
        self._busy.discard(key)
        if key in self._due:
            heapq.heappush(self._heap, (self._due[key], key))
        self._changed.set()
