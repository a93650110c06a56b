"""Tells the outbox which batches it may forget, while the stream goes on.

What is acknowledged while the disk is busy goes together: one deletion for a range, not for each
batch. Decides nothing about what counts as acknowledged.
"""

import asyncio
import contextlib

from outrider_agent.core.storage import Outbox, StorageError

#: Most ranges that wait for the disk; the stream is not read meanwhile.
MOST_WAITING = 1024
#: Ranges that are handed to the disk at once: they share a commit.
TOGETHER = 64
#: Longest wait for the disk at the end of a stream, seconds.
FLUSH_SECONDS = 2.0

Range = tuple[int, int]


class Acks:
    """The acknowledgements of one stream on their way to the outbox.

    Args:
        outbox: Where the batches are.
        epoch: Life of its file, for all of them.
    """

    def __init__(self, outbox: Outbox, epoch: int) -> None:
        self._outbox = outbox
        self._epoch = epoch
        self._ranges: list[Range] = []
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def add(self, ranges: tuple[Range, ...]) -> None:
        """These may be forgotten; waits while the disk is far behind."""
        await self._room.wait()
        self._ranges += ranges
        self._news.set()
        if len(self._ranges) >= MOST_WAITING:
            self._room.clear()

    async def run(self) -> None:
        """Pass them on for ever. Raises StorageError where the disk fails."""
        while True:
            await self._news.wait()
            self._news.clear()
            await self._pass_on()

    async def flush(self) -> None:
        """At the end of a stream: pass on what is left, else it would be sent again.

        Without an error where the disk fails: the batches stay, which loses nothing.
        """
        with contextlib.suppress(StorageError, TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._pass_on()

    async def _pass_on(self) -> None:
        left = merged(self._ranges)
        self._ranges = []
        self._room.set()
        try:
            while left:
                await self._acknowledge(left[:TOGETHER])
                del left[:TOGETHER]
        finally:
            self._ranges += left

    async def _acknowledge(self, ranges: list[Range]) -> None:
        if len(ranges) == 1:  # as nearly always: without a task
            await self._outbox.ack_batches(self._epoch, *ranges[0])
            return
        await asyncio.gather(*(self._outbox.ack_batches(self._epoch, *r) for r in ranges))


def merged(ranges: list[Range]) -> list[Range]:
    """Ranges that touch as one, ascending."""
    found: list[Range] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found
