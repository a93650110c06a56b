"""Ends of pipes to a plug-in, without blocking and closed once.

Not `loop.connect_read_pipe`: uvloop closes the descriptor in C and then once more as a Python
file, and in between another thread may have got the same number for a file of its own.
"""

import asyncio
import os
from typing import Final

#: Bytes read at once: what a pipe holds.
READ_BYTES: Final = 64 * 1024


class ReadEnd:
    """The end of a pipe that we read."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._closed = False

    def read(self) -> bytes | None:
        """What is there, at most READ_BYTES; empty at the end, None where nothing is there."""
        if self._closed:
            return b""
        try:
            return os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return None

    async def readable(self, gone: asyncio.Event) -> None:
        """Wait until something is there, it is at its end, or `gone` is set."""
        loop = asyncio.get_running_loop()
        either = asyncio.Event()
        loop.add_reader(self._fd, either.set)
        waiter = asyncio.ensure_future(gone.wait())
        waiter.add_done_callback(lambda _: either.set())
        try:
            await either.wait()
        finally:
            waiter.cancel()
            if not self._closed:
                loop.remove_reader(self._fd)

    def close(self) -> None:
        """Close it; again: nothing."""
        if not self._closed:
            self._closed = True
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)


class WriteEnd:
    """The end of a pipe that we write. For one writer at a time."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._closed = False

    async def write(self, data: bytes) -> None:
        """Write all of it; waits while there is no room.

        Raises:
            BrokenPipeError: Nobody reads any more, or it was closed.
        """
        view = memoryview(data)
        while view:
            if self._closed:
                raise BrokenPipeError
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await self._writable()

    async def _writable(self) -> None:
        loop, writable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_writer(self._fd, writable.set)
        try:
            await writable.wait()
        finally:
            if not self._closed:
                loop.remove_writer(self._fd)

    def close(self) -> None:
        """Close it; again: nothing. Whoever writes must have been cancelled."""
        if not self._closed:
            self._closed = True
            asyncio.get_running_loop().remove_writer(self._fd)
            os.close(self._fd)
