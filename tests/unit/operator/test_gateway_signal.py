"""The flag that streams wait for."""

import asyncio

import pytest
from outrider_operator.gateway.signal import Signal


async def test_wakes_who_waits_and_stays_set() -> None:
    signal = Signal()
    waiter = asyncio.create_task(signal.wait())
    await asyncio.sleep(0)
    assert not waiter.done()
    signal.set()
    signal.set()
    await waiter
    await asyncio.wait_for(signal.wait(), 1)


async def test_waits_again_once_cleared() -> None:
    signal = Signal()
    signal.set()
    signal.clear()
    waiter = asyncio.create_task(signal.wait())
    await asyncio.sleep(0)
    assert not waiter.done()
    signal.set()
    await waiter


async def test_a_waiter_that_is_cancelled_leaves_room_for_another() -> None:
    signal = Signal()
    waiter = asyncio.create_task(signal.wait())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.wait([waiter])
    signal.set()
    await asyncio.wait_for(signal.wait(), 1)


async def test_only_one_may_wait() -> None:
    signal = Signal()
    waiter = asyncio.create_task(signal.wait())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="two tasks"):
        await signal.wait()
    signal.set()
    await waiter
