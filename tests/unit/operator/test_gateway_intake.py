"""The way into the sink: the bound is never passed, nothing leaks, every batch gets its answer."""

import asyncio
import functools
from collections.abc import AsyncIterator

import pytest
from fakes.gateway import eventually, make_batch
from fakes.memory_sink import MemorySink
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.batch import Batch, message_of
from outrider_operator.core.sink import (
    Origin,
    SinkError,
    SinkRejectedError,
    SinkUnavailableError,
)
from outrider_operator.gateway.aside import AT_ONCE
from outrider_operator.gateway.budget import ByteBudget
from outrider_operator.gateway.intake import BATCH_COST_BYTES, RETURN_BYTES, Intake
from outrider_operator.metrics import ServerMetrics
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import RecordBatch
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
        budget = ByteBudget(10)

        async def use(size: int) -> None:
            nonlocal most
            await budget.take(size)
            try:
                most = max(most, budget.held)
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


class Sender:
    """An owner of batches that writes down what it is told."""

    def __init__(self, *, splits: bool = True) -> None:
        self.closed = False
        self.splits = splits
        self.told: list[tuple[str, int]] = []

    def stored(self, batch: Batch, size: int) -> None:
        assert size == message_of(batch).ByteSize()
        self.told.append(("stored", batch.seq))

    def split(self, batch: Batch, size: int, max_bytes: int) -> None:
        self.told.append((f"split {max_bytes}", batch.seq))

    def dropped(self, batch: Batch, size: int) -> None:
        self.told.append(("dropped", batch.seq))

    def rejected(self, batch: Batch, error: str) -> None:
        self.told.append((f"rejected {error}", batch.seq))


class Case:
    """An intake with its parts."""

    def __init__(self, limit: int = 2_000_000) -> None:
        self.registry = CollectorRegistry()
        self.sink = MemorySink()
        self.sender = Sender()
        self.intake = Intake(self.sink, limit, ServerMetrics(self.registry))

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"outrider_server_{name}", labels) or 0.0

    async def put(self, *batches: RecordBatch, patience: float | None = 0) -> bool:
        sized = [(batch, batch.ByteSize()) for batch in batches]
        if not await self.intake.admit(sized, patience=patience):
            return False
        self.intake.store(self.sender, Origin("a", "n", 1), sized)
        return True


@pytest.fixture
async def case() -> AsyncIterator[Case]:
    made = Case()
    yield made
    made.intake.close()


def many(seq: int, size: int = 10) -> RecordBatch:
    """A batch that states more than one record."""
    batch = make_batch(seq, size=size)
    batch.count = 2
    return batch


async def test_small_batches_are_bounded_by_the_memory_they_take() -> None:
    case = Case(100 * BATCH_COST_BYTES)
    case.sink.open.clear()
    held = 0
    while held < 1000 and await case.put(make_batch(held + 1, size=1)):
        held += 1
    assert 70 <= held < 75  # a quarter is for those who wait
    assert case.intake.held <= 100 * BATCH_COST_BYTES
    case.sink.open.set()
    await eventually(lambda: case.intake.held == 0)
    assert case.metric("batches_total", result="stored") == held
    assert case.metric("records_total") == held


async def test_told_when_there_is_room_again() -> None:
    case = Case(10_000)
    case.sink.open.clear()
    assert await case.put(make_batch(1, size=900))
    assert not await case.put(make_batch(2, size=9000), patience=0.01)
    assert not await case.put(make_batch(2, size=9000))
    assert case.metric("batches_total", result="let_go") == 2
    told: list[str] = []
    case.intake.when_room(lambda: told.append("first"))
    gone = lambda: told.append("gone")  # noqa: E731 - compared by identity
    case.intake.when_room(gone)
    case.intake.forget(gone)
    await ticks()
    assert told == []
    case.sink.open.set()
    await ticks()
    assert await case.put(make_batch(3))
    await eventually(lambda: told == ["first"])
    assert case.metric("batches_inflight_bytes") == 0
    case.intake.close()


async def test_what_waits_for_room_is_within_the_bound_too() -> None:
    case = Case(40 * limits.KIB)
    case.sink.open.clear()
    assert await case.put(make_batch(1, size=15 * limits.KIB))
    first = asyncio.create_task(case.put(make_batch(2, size=9 * limits.KIB), patience=20))
    await ticks()
    assert not first.done()
    assert case.intake.held > 30 * limits.KIB
    # A quarter is for those who wait: this one would, but for its size, and is let go at once.
    assert not await case.put(make_batch(3, size=2 * limits.KIB), patience=20)
    assert case.intake.held <= 40 * limits.KIB
    case.sink.open.set()
    await eventually(first.done)
    assert first.result()
    await eventually(lambda: case.intake.held == 0)


async def test_the_copy_of_the_sink_counts() -> None:
    case = Case(100 * limits.KIB)
    case.sink.copies = True
    case.sink.open.clear()
    assert await case.put(make_batch(1, size=30 * limits.KIB))
    assert case.intake.held > 60 * limits.KIB
    assert not await case.put(make_batch(2, size=10 * limits.KIB))
    case.sink.open.set()
    await eventually(lambda: case.intake.held == 0)


async def test_no_more_are_called_back_than_there_is_room_for() -> None:
    case = Case(16 * RETURN_BYTES)
    case.sink.open.clear()
    told: list[int] = []
    for number in range(10):
        case.intake.when_room(functools.partial(told.append, number))
    assert await case.put(*(make_batch(seq, size=limits.RECORD_BYTES // 2) for seq in range(1, 11)))
    case.sink.release(1)
    await ticks()
    assert told == []  # more than half is held still
    case.sink.open.set()
    await eventually(lambda: case.intake.held == 0)
    await eventually(lambda: len(told) == 6)  # 12 units of room for half of it, two for each
    assert told == list(range(3)) + list(range(3, 6))
    await eventually(lambda: len(told) == 10)
    case.intake.close()


async def test_agents_are_told_to_pause_before_there_is_no_room() -> None:
    case = Case(20 * BATCH_COST_BYTES)
    case.sink.open.clear()
    seq = 0
    while not case.intake.pressure():
        seq += 1
        assert await case.put(make_batch(seq, size=1))
    assert 11 <= seq <= 13
    case.sink.open.set()
    await ticks()
    assert case.intake.pressure() == 0


async def test_what_the_sink_does_not_take_now_is_tried_again_in_order(case: Case) -> None:
    case.sink.error = SinkUnavailableError("away")
    await case.put(*(make_batch(seq) for seq in range(1, 101)))
    await eventually(lambda: case.metric("batches_total", result="unavailable") > 100)
    assert case.sender.told == []
    assert case.intake.held > 100 * BATCH_COST_BYTES
    assert case.metric("batches_retrying") > 0
    await case.put(make_batch(101))  # waits behind the others
    case.sink.error = None
    await eventually(lambda: len(case.sender.told) == 101, 30)
    assert [seq for _, seq in case.sender.told] == list(range(1, 102))
    assert [batch.seq for _, batch in case.sink.stored] == list(range(1, 102))
    assert case.intake.held == 0


async def test_those_that_are_gone_do_not_hold_up_the_others(case: Case) -> None:
    case.sink.error = SinkUnavailableError("away")
    for number in range(100):  # an agent each, so that each has a turn
        batch = make_batch(1)
        sized = [(batch, batch.ByteSize())]
        assert await case.intake.admit(sized, patience=0)
        case.intake.store(case.sender, Origin(f"agent-{number}", "n", 1), sized)
    await ticks()
    assert case.metric("batches_retrying") == 100
    case.sender.closed = True
    case.sink.error = None
    case.sender, gone = Sender(), case.sender
    assert await case.put(make_batch(7))
    # The second try comes within 0.4 s. One for each turn of those that are gone takes minutes.
    await eventually(lambda: case.sender.told == [("stored", 7)], 5)
    assert len(gone.told) == 100
    assert case.intake.held == 0


async def test_an_agent_whose_batches_always_fail_holds_up_no_other(case: Case) -> None:
    case.sink.refuse = lambda batch: SinkUnavailableError("no") if batch.epoch == 666 else None
    case.sink.error = SinkUnavailableError("away")
    for name, epoch in (("bad", 666), ("good", 7)):
        sized = [(batch, batch.ByteSize()) for batch in (make_batch(1, epoch=epoch),)]
        assert await case.intake.admit(sized, patience=0)
        case.intake.store(case.sender, Origin(name, "n", 1), sized)
    await ticks()
    case.sink.error = None
    await eventually(lambda: case.sender.told == [("stored", 1)])
    assert case.sink.stored[0][0].agent_id == "good"
    assert case.metric("batches_retrying") == 1


async def test_what_fails_again_keeps_its_place(case: Case) -> None:
    """All fail once more, out of order and with others behind them."""
    case.sink.error = SinkUnavailableError("away")
    await case.put(*(make_batch(seq) for seq in range(1, 9)))
    await ticks()
    case.sink.open.clear()
    await eventually(lambda: case.sink.waiting == 8)  # they are tried
    await case.put(make_batch(9))
    case.sink._inside.reverse()
    case.sink.open.set()
    await eventually(lambda: case.metric("batches_retrying") == 9)
    case.sink.error = None
    await eventually(lambda: len(case.sender.told) == 9)
    assert [seq for _, seq in case.sender.told] == list(range(1, 10))


async def test_called_back_also_when_what_was_in_the_way_is_dropped() -> None:
    case = Case(200_000)
    case.sink.error = SinkUnavailableError("away")
    seq = 1
    while await case.put(make_batch(seq)):
        seq += 1
    told: list[str] = []
    case.intake.when_room(lambda: told.append("told"))
    await ticks()
    case.sender.closed = True
    await eventually(lambda: case.intake.held == 0)
    assert ("dropped", 1) in case.sender.told
    await eventually(lambda: told == ["told"], 5)
    case.intake.close()


async def test_called_back_where_all_was_given_back_before_it_was_asked_for(case: Case) -> None:
    told: list[str] = []
    case.intake.when_room(lambda: told.append("told"))
    await eventually(lambda: told == ["told"], 5)


async def test_a_sink_that_raises_loses_nothing_and_is_tried_again(case: Case) -> None:
    class Broken(Exception):
        pass

    store = case.sink.store
    faults = [Broken(), Broken(), Broken()]

    def raising(origin: Origin, batch: Batch) -> "asyncio.Future[None]":
        if faults:
            raise faults.pop()
        return store(origin, batch)

    case.sink.store = raising  # type: ignore[method-assign]  # a fault, not a feature of the fake
    await case.put(make_batch(1), make_batch(2))
    await eventually(lambda: case.sender.told == [("stored", 1), ("stored", 2)])
    assert case.intake.held == 0


async def test_nothing_is_tried_after_the_end(case: Case) -> None:
    case.sink.open.clear()
    await case.put(make_batch(1))
    case.sink.error = SinkUnavailableError("away")
    case.intake.close()
    case.sink.open.set()
    await ticks()
    assert case.sender.told == [("dropped", 1)]
    assert case.intake._timer is None
    assert case.intake.held == 0


async def test_what_waits_at_the_end_is_dropped(case: Case) -> None:
    case.sink.error = SinkUnavailableError("away")
    await case.put(make_batch(1), make_batch(2))
    await ticks()
    case.intake.close()
    assert case.sender.told == [("dropped", 1), ("dropped", 2)]
    assert case.intake.held == 0


async def test_nothing_is_tried_again_for_who_has_gone(case: Case) -> None:
    case.sink.error = SinkUnavailableError("away")
    await case.put(make_batch(1), make_batch(2))
    await eventually(lambda: case.metric("batches_retrying") == 2)
    case.sender.closed = True
    await eventually(lambda: case.intake.held == 0)
    assert sorted(case.sender.told) == [("dropped", 1), ("dropped", 2)]
    assert case.metric("batches_retrying") == 0


async def test_too_large_goes_back_to_be_split(case: Case) -> None:
    case.sink.error = SinkRejectedError("too large", max_bytes=77)
    await case.put(many(1))
    await ticks()
    assert case.sender.told == [("split 77", 1)]
    assert case.sink.aside == []
    assert case.intake.held == 0
    assert case.metric("batch_rejects_total", reason="too_large", action="split") == 1


@pytest.mark.parametrize(
    ("batch", "splits", "max_bytes", "reason"),
    [
        (make_batch(1), True, 77, "too_large"),  # one record cannot be split
        (many(1), False, 77, "too_large"),  # an agent that knows nothing of it
        (many(1), True, 0, "other"),
    ],
)
async def test_poison_is_set_aside_and_then_done_with(
    case: Case, batch: RecordBatch, splits: bool, max_bytes: int, reason: str
) -> None:
    case.sender.splits = splits
    case.sink.aside_error = SinkUnavailableError("away")
    case.sink.error = SinkRejectedError("bad", max_bytes=max_bytes)
    await case.put(batch)
    await ticks()
    assert case.sender.told == [("rejected bad", 1)]  # not acknowledged before it is safe
    assert case.intake.held > 0
    case.sink.aside_error = None
    await eventually(lambda: case.sender.told == [("rejected bad", 1), ("stored", 1)])
    assert [(batch.seq, reason) for _, batch, reason in case.sink.aside] == [(1, "bad")]
    assert case.intake.held == 0
    assert case.metric("batch_rejects_total", reason=reason, action="set_aside") == 1


async def test_poison_that_cannot_be_set_aside_holds_up_no_other(case: Case) -> None:
    set_aside = case.sink.set_aside

    async def picky(origin: Origin, batch: Batch, reason: str) -> None:
        if batch.seq <= AT_ONCE:
            raise SinkUnavailableError("not this one")
        await set_aside(origin, batch, reason)

    case.sink.set_aside = picky  # type: ignore[method-assign]  # for some batches only
    case.sink.error = SinkRejectedError("bad")
    await case.put(*(make_batch(seq) for seq in range(1, AT_ONCE + 1)))
    await ticks()
    case.sender, first = Sender(), case.sender
    await case.put(make_batch(99))
    await eventually(lambda: ("stored", 99) in case.sender.told, 5)
    first.closed = True  # their agent keeps them
    await eventually(lambda: case.intake.held == 0)
    assert [seq for what, seq in first.told if what == "dropped"]
    assert not [seq for what, seq in first.told if what == "stored"]


async def test_poison_does_not_hold_up_its_neighbours(case: Case) -> None:
    def refuse(batch: RecordBatch) -> SinkError | None:
        return SinkRejectedError("bad") if batch.seq == 2 else None

    case.sink.refuse = refuse
    case.sink.aside_error = SinkUnavailableError("away")
    await case.put(*(make_batch(seq) for seq in (1, 2, 3)))
    await ticks()
    assert [name for name in case.sender.told if name[0] == "stored"] == [
        ("stored", 1),
        ("stored", 3),
    ]


@given(st.data())
def test_every_batch_gets_one_answer_whatever_the_sink_does(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    answers = data.draw(
        st.dictionaries(st.integers(1, count), st.sampled_from(["away", "bad", "large"]))
    )

    async def scenario() -> None:
        case = Case()
        case.intake._backoff._base = 0.001
        case.intake._backoff._cap = 0.001
        away = {seq for seq, what in answers.items() if what == "away"}

        def refuse(batch: RecordBatch) -> SinkError | None:
            if batch.seq in away:
                away.discard(batch.seq)  # the second time it is taken
                return SinkUnavailableError("away")
            what = answers.get(batch.seq)
            if what == "bad":
                return SinkRejectedError("bad")
            return SinkRejectedError("large", max_bytes=5) if what == "large" else None

        case.sink.refuse = refuse
        await case.put(*(many(seq) for seq in range(1, count + 1)))
        await eventually(lambda: case.intake.held == 0)
        final = [(what, seq) for what, seq in case.sender.told if "rejected" not in what]
        assert sorted(seq for _, seq in final) == list(range(1, count + 1))
        assert {seq for what, seq in final if what == "split 5"} == {
            seq for seq, what in answers.items() if what == "large"
        }
        case.intake.close()

    asyncio.run(scenario())
