"""Keeps what the C library's allocator holds, but nobody uses, small.

Messages of hundreds of kilobytes come and go beside small things that stay, and each thread of
grpc and librdkafka has a heap of its own: free memory between them would be as much again as the
bounds of the settings allow. Decides nothing about what is held. Where the C library is not
glibc, nothing happens.
"""

import asyncio
import ctypes
import os
from pathlib import Path
from typing import Any, Final

from outrider_proto import limits
from outrider_runtime.logs import get_logger

#: Heaps, whatever the number of threads: the main thread's and one more.
ARENAS: Final = 2
#: From glibc's malloc.h.
M_ARENA_MAX: Final = -8
#: Memory is looked at so often, seconds, and free parts given back when it grew by so many bytes
#: since they last were.
LOOK_SECONDS: Final = 2.0
GROWTH_BYTES: Final = 16 * limits.MIB
#: The program itself grows by about so much after its start, and stays so, bytes.
START_BYTES: Final = 48 * limits.MIB

log = get_logger(__name__)


def few_arenas() -> None:
    """Have few heaps; to be called before there are threads."""
    library = _glibc()
    if library is not None and not library.mallopt(M_ARENA_MAX, ARENAS):
        log.warning("the allocator's heaps are not bounded")


async def give_back() -> None:
    """Give free memory back to the system again and again, until cancelled."""
    library = _glibc()
    if library is None:
        return
    after, given = resident() + START_BYTES, False
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        now = resident()
        if now > after + GROWTH_BYTES:
            # It may take some tens of milliseconds; the interpreter is free meanwhile.
            await asyncio.to_thread(library.malloc_trim, 0)
            after, given = resident(), True
        elif given:
            after = min(after, now)


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _glibc() -> Any:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
