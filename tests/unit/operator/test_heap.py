"""Free memory goes back to the system: what is resident follows what is held."""

import subprocess
import sys

import pytest

#: In a process of its own: the heap of this one is full of what other tests left.
PROGRAM = """
import asyncio
from outrider_operator import heap
from outrider_proto import limits

async def until(most):
    async with asyncio.timeout(30):
        while heap.resident() >= most:
            await asyncio.sleep(0.05)

async def main():
    heap.LOOK_SECONDS = 0.02
    heap.few_arenas()
    before = heap.resident()
    giving = asyncio.create_task(heap.give_back())
    await asyncio.sleep(0)
    held = [bytearray(b"x") * (20 * limits.KIB) for _ in range(8000)]
    assert heap.resident() > before + 100 * limits.MIB
    # One in forty stays, so that no heap becomes shorter by itself.
    del held[0::40]
    held = held[::39]
    await until(before + 60 * limits.MIB)
    # What comes and goes afterwards is too little to count as growth, and is given back in the end.
    level = heap.resident()
    more = [bytearray(b"x") * (20 * limits.KIB) for _ in range(600)]
    full = heap.resident()
    assert level + 4 * limits.MIB < full < level + heap.GROWTH_BYTES
    del more[0::40]
    more = more[::39]
    await until(full - 3 * limits.MIB)
    giving.cancel()
    assert held and more

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
def test_free_memory_between_used_one_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
