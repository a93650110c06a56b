"""Work by key: once in the queue, never twice at a time, nothing missed."""

import asyncio

from outrider_operator.fleet.queue import WorkQueue


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_bursts_become_one_piece_of_work() -> None:
    queue = WorkQueue(Clock())
    for _ in range(5):
        queue.add("a")
    queue.add("b")
    assert [await queue.get(), await queue.get()] == ["a", "b"]
    assert len(queue) == 0


async def test_what_is_added_meanwhile_comes_afterwards_and_not_at_the_same_time() -> None:
    queue = WorkQueue(Clock())
    queue.add("a")
    assert await queue.get() == "a"
    queue.add("a")
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.done("a")
    assert await waiting == "a"


async def test_the_sooner_time_counts() -> None:
    clock = Clock()
    queue = WorkQueue(clock)
    queue.add("late", 100.0)
    queue.add("late", 5.0)
    queue.add("late", 50.0)
    queue.add("other", 20.0)
    clock.now = 6.0
    assert await queue.get() == "late"
    queue.done("late")
    assert len(queue) == 1
    clock.now = 20.0
    assert await queue.get() == "other"


async def test_forgotten_keys_do_not_come() -> None:
    queue = WorkQueue(Clock())
    queue.add("a")
    queue.add("b")
    queue.discard("a")
    assert await queue.get() == "b"


async def test_waits_until_something_is_due() -> None:
    queue = WorkQueue(asyncio.get_running_loop().time)
    queue.add("a", 0.05)
    async with asyncio.timeout(5):
        assert await queue.get() == "a"
