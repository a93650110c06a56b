"""What the uplink relies on in an outbox: the agent's file and the one of its tests alike."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes.agent_parts import batch_of, store_in
from fakes.memory_outbox import MemoryOutbox
from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import Outbox
from outrider_proto import batches, records
from outrider_proto.v1 import agent_pb2 as pb

RESULT, LOG, TELEMETRY = RecordClass.RESULT, RecordClass.LOG, RecordClass.TELEMETRY


@dataclass
class Bench:
    """An outbox; `add` puts a batch of so many records into it; `calls` counts its news."""

    outbox: Outbox
    add: Callable[..., Awaitable[int]]
    calls: list[int]


@pytest.fixture(params=["memory", "file"])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    calls: list[int] = []
    if request.param == "memory":
        memory = MemoryOutbox()
        memory.on_append = lambda: calls.append(memory.last_seq)

        async def add(record_class: RecordClass = LOG, count: int = 1) -> int:
            made = batches.encode(
                [
                    records.payload(records.AGENT_LOG, 1, {"text": f"{n:0500}"})
                    for n in range(count)
                ],
                epoch=memory.epoch,
                seq=1,
                codec=pb.CODEC_NONE,
                created_unix_nanos=1,
            )
            return memory.add(record_class=record_class, count=count, content=made.records)

        yield Bench(memory, add, calls)
        return
    async with store_in(tmp_path) as store:
        store.on_append = lambda: calls.append(store.last_seq)

        async def append(record_class: RecordClass = LOG, count: int = 1) -> int:
            return (await store.append_batch(batch_of("x" * 500, record_class, count))).seq

        yield Bench(store, append, calls)


async def seqs(outbox: Outbox, seq: int = 0, limit: int = 10**9, **more: object) -> list[int]:
    return [item.seq for item in await outbox.batches_after(seq, limit, **more)]  # type: ignore[arg-type] # the tests' own names


async def test_what_was_told_can_be_read_and_has_its_class(bench: Bench) -> None:
    assert bench.outbox.last_seq == 0
    for record_class in (LOG, RESULT, TELEMETRY):
        await bench.add(record_class)
    assert bench.outbox.last_seq == 3
    # Told of once it can be read, and after the number is known.
    assert bench.calls == [1, 2, 3]
    found = await bench.outbox.batches_after(0, 10**9)
    assert [(item.seq, item.record_class) for item in found] == [
        (1, LOG),
        (2, RESULT),
        (3, TELEMETRY),
    ]
    assert all(item.batch.seq == item.seq for item in found)
    assert all(item.batch.epoch == bench.outbox.epoch for item in found)
    assert bench.outbox.backlog.batches == 3


async def test_a_look_is_bounded_by_numbers_classes_and_bytes(bench: Bench) -> None:
    for record_class in (LOG, RESULT, TELEMETRY, RESULT, LOG):
        await bench.add(record_class)
    assert await seqs(bench.outbox, 2) == [3, 4, 5]
    assert await seqs(bench.outbox, 1, upto=4) == [2, 3, 4]
    assert await seqs(bench.outbox, 0, classes={RESULT}) == [2, 4]
    assert await seqs(bench.outbox, 2, upto=4, classes={LOG, TELEMETRY}) == [3]
    assert await seqs(bench.outbox, 5) == []
    size = (await bench.outbox.batches_after(0, 10**9))[0].size
    assert await seqs(bench.outbox, 0, size * 2) == [1, 2]
    assert await seqs(bench.outbox, 0, 1) == []
    assert await seqs(bench.outbox, 0, 1, at_least_one=True) == [1]


async def test_what_is_acknowledged_is_gone_and_nothing_else(bench: Bench) -> None:
    for _ in range(5):
        await bench.add()
    epoch = bench.outbox.epoch
    assert await bench.outbox.ack_batches(epoch + 1, 1, 5) == 0
    assert await bench.outbox.ack_batches(epoch, 2, 3) == 2
    assert await bench.outbox.ack_batches(epoch, 2, 3) == 0
    assert await seqs(bench.outbox) == [1, 4, 5]
    await bench.outbox.ack_batches(epoch, 5, 5)
    assert bench.outbox.last_seq == 5
    assert await bench.add() == 6


async def test_a_split_batch_comes_again_in_pieces_with_new_numbers(bench: Bench) -> None:
    await bench.add(RESULT, count=8)
    await bench.add(LOG)
    (large, _) = await bench.outbox.batches_after(0, 10**9)
    epoch, most = bench.outbox.epoch, len(large.batch.records) // 3
    assert await bench.outbox.split_batch(epoch, 2, 1) == 0
    assert await bench.outbox.split_batch(epoch + 1, 1, most) == 0
    assert await bench.outbox.split_batch(epoch, 9, most) == 0
    before = len(bench.calls)
    pieces = await bench.outbox.split_batch(epoch, 1, most)
    assert pieces >= 3
    assert len(bench.calls) > before
    assert bench.outbox.last_seq == 2 + pieces
    assert await seqs(bench.outbox) == list(range(2, 3 + pieces))
    found = await bench.outbox.batches_after(2, 10**9)
    assert {item.record_class for item in found} == {RESULT}
    assert b"".join(item.batch.records for item in found) == large.batch.records
    assert sum(item.batch.count for item in found) == 8


async def test_one_that_would_fit_is_split_all_the_same(bench: Bench) -> None:
    """The server does not take it, whatever it says."""
    await bench.add(count=2)
    assert await bench.outbox.split_batch(bench.outbox.epoch, 1, 10**9) == 2
