"""A flag that one task waits for: an asyncio.Event without the room for many.

A gateway has two of these for each of thousands of streams, and the queue of waiters that an Event
always holds takes 700 bytes of each.
"""

import asyncio


class Signal:
    """Set from anywhere on the event loop; one task at a time waits for it."""

    __slots__ = ("_set", "_waiter")

    def __init__(self) -> None:
        self._set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Set the flag and wake who waits."""
        self._set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def clear(self) -> None:
        """Take the flag down."""
        self._set = False

    async def wait(self) -> None:
        """Return once the flag is set, or at once if it is.

        Raises:
            RuntimeError: Another task waits already.
        """
        if self._set:
            return
        if self._waiter is not None:
            raise RuntimeError("two tasks wait for one Signal")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
