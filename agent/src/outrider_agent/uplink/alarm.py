"""Wakes a stream's tasks: because something happened, or because it is time.

An event and a timer in one, since a stream looks many times a second at when to look next. Knows
nothing of streams.
"""

import asyncio
import time

#: The shortest time for which a timer is set, seconds: less would be a busy loop.
LEAST_WAIT_SECONDS = 0.01


class Alarm:
    """An event with a time.

    To wait takes no timer of its own: one that rings too early does no harm.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0

    def set(self) -> None:
        """Wake who waits."""
        self._event.set()

    async def wait(self, when: float) -> None:
        """Wait until it is set, or until a time of the steady clock at the latest."""
        if self._timer is None or when < self._rings_at:
            self.cancel()
            seconds = max(LEAST_WAIT_SECONDS, when - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(seconds, self._ring)
            self._rings_at = when
        await self._event.wait()
        self._event.clear()

    def cancel(self) -> None:
        """Drop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        self._event.set()
