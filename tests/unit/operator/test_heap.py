"""Free memory goes back to the system: what is resident follows what is held."""

import asyncio
import sys

import pytest
from fakes.gateway import eventually
from outrider_operator import heap
from outrider_proto import limits


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is another one")
async def test_free_memory_between_used_one_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "LOOK_SECONDS", 0.02)
    heap.few_arenas()
    before = heap.resident()
    giving = asyncio.create_task(heap.give_back())
    await asyncio.sleep(0)
    held = [bytearray(b"x") * (20 * limits.KIB) for _ in range(8000)]
    assert heap.resident() > before + 100 * limits.MIB
    # One in forty stays, so that no heap becomes shorter by itself.
    del held[0::40]
    held = held[::39]
    await eventually(lambda: heap.resident() < before + 60 * limits.MIB)
    # What comes and goes afterwards is too little to count as growth, and is given back in the end.
    level = heap.resident()
    more = [bytearray(b"x") * (20 * limits.KIB) for _ in range(600)]
    full = heap.resident()
    assert level + 4 * limits.MIB < full < level + heap.GROWTH_BYTES
    del more[0::40]
    more = more[::39]
    await eventually(lambda: heap.resident() < full - 3 * limits.MIB)
    giving.cancel()
    await asyncio.gather(giving, return_exceptions=True)
    assert held
    assert more
