"""The bound on batches in flight: never passed, first come, first served, nothing leaks."""

import asyncio

import pytest
from fakes.gateway import make_batch
from fakes.memory_sink import MemorySink
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.sink import Origin
from outrider_operator.gateway.intake import BATCH_COST_BYTES, ByteBudget, Intake
from outrider_operator.metrics import ServerMetrics
from prometheus_client import CollectorRegistry


async def ticks() -> None:
    """Let everything that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_waits_until_there_is_room() -> None:
    budget = ByteBudget(10)
    await budget.take(6)
    second = asyncio.create_task(budget.take(6))
    small = asyncio.create_task(budget.take(1))
    await ticks()
    assert not second.done()
    assert not small.done()  # it came later: a large one must not starve
    budget.give_back(6)
    await ticks()
    assert second.done()
    assert small.done()
    assert budget.held == 7


async def test_one_alone_may_be_larger_than_the_bound() -> None:
    budget = ByteBudget(10)
    await asyncio.wait_for(budget.take(50), 5)
    other = asyncio.create_task(budget.take(1))
    await ticks()
    assert not other.done()
    budget.give_back(50)
    await asyncio.wait_for(other, 5)


async def test_one_that_gives_up_lets_the_next_in() -> None:
    budget = ByteBudget(10)
    await budget.take(5)
    large = asyncio.create_task(budget.take(9))
    small = asyncio.create_task(budget.take(2))
    await ticks()
    large.cancel()
    await ticks()
    assert small.done()
    assert budget.held == 7


async def test_cancelled_at_the_moment_it_is_granted_leaks_nothing() -> None:
    budget = ByteBudget(10)
    await budget.take(10)
    waiting = asyncio.create_task(budget.take(10))
    await ticks()
    budget.give_back(10)
    waiting.cancel()  # granted already, and not run since
    await ticks()
    assert budget.held == (10 if not waiting.cancelled() else 0)


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=40))
def test_bound_holds_and_all_is_given_back(sizes: list[tuple[int, bool]]) -> None:
    async def scenario() -> None:
        most = 0

        def note(held: int) -> None:
            nonlocal most
            most = max(most, held)

        budget = ByteBudget(10, note)

        async def use(size: int) -> None:
            await budget.take(size)
            try:
                await asyncio.sleep(0)
            finally:
                budget.give_back(size)

        tasks = [(asyncio.create_task(use(size)), cancel) for size, cancel in sizes]
        await asyncio.sleep(0)
        for task, cancel in tasks:
            if cancel:
                task.cancel()
        await asyncio.wait_for(
            asyncio.gather(*(task for task, _ in tasks), return_exceptions=True), 5
        )
        assert budget.held == 0
        assert most <= max([10, *(size for size, _ in sizes)])

    asyncio.run(scenario())


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


async def test_small_batches_are_bounded_by_the_memory_they_take(
    registry: CollectorRegistry,
) -> None:
    intake = Intake(MemorySink(), 100 * BATCH_COST_BYTES, ServerMetrics(registry))
    held = 0
    while held < 1000 and await intake.admit(make_batch(held + 1, size=1), at_once=True):
        held += 1
    assert 90 <= held < 100


async def test_told_when_there_is_room_again(registry: CollectorRegistry) -> None:
    sink = MemorySink()
    intake = Intake(sink, 1000, ServerMetrics(registry))
    intake.patience = 0.01
    batch = make_batch(1, size=900)
    assert await intake.admit(batch)
    assert not await intake.admit(batch)
    assert not await intake.admit(batch, at_once=True)
    told: list[str] = []
    intake.when_room(lambda: told.append("first"))
    gone = lambda: told.append("gone")  # noqa: E731 - compared by identity
    intake.when_room(gone)
    intake.forget(gone)
    assert told == []
    await intake.store(Origin("a", "n", 1), batch)
    await intake.store(Origin("a", "n", 1), batch)
    assert told == ["first"]
    intake.release(batch)
    assert registry.get_sample_value("outrider_server_batches_inflight_bytes") == 0
