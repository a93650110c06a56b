"""What every sink has to do: each sink's own test module runs these with its own fixtures.

A module imports SinkSuite, subclasses it, and gives a fixture `sink_case`.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from outrider_operator.core.sink import Origin, Storing
from outrider_operator.sinks.base import RunnableSink
from outrider_proto import batches
from outrider_proto.records import Decoded
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD, EncodedRecord, RecordBatch
from outrider_runtime.health import Health


@dataclass
class SinkCase:
    """A sink that runs, and how to read what it has stored and what it has set aside."""

    sink: RunnableSink
    health: Health
    read: Callable[[], Awaitable[list[Decoded]]]
    stop: asyncio.Event
    task: asyncio.Task[None]
    read_aside: Callable[[], Awaitable[list[Decoded]]]


def batch(seq: int, text: bytes = b"x", *, epoch: int = 3, records: int = 2) -> RecordBatch:
    made = [EncodedRecord(data_type=1000 + n, timestamp=n, data=text) for n in range(records)]
    return batches.encode(
        made, epoch=epoch, seq=seq, codec=CODEC_ZSTD, created_unix_nanos=time.time_ns()
    )


def origin(agent: str = "uid-1") -> Origin:
    return Origin(agent, f"node-of-{agent}", time.time_ns())


def names(found: list[Decoded]) -> set[tuple[str, int, int]]:
    return {(item.agent_id, item.epoch, item.seq) for item in found}


class SinkSuite:
    """The tests; `sink_case` is a fixture of the subclass's module."""

    async def test_what_is_stored_can_be_read_back(self, sink_case: SinkCase) -> None:
        where = origin()
        await sink_case.sink.store(where, batch(1, b"hello"))
        (found,) = await sink_case.read()
        assert (found.agent_id, found.node) == (where.agent_id, where.node)
        assert (found.epoch, found.seq) == (3, 1)
        assert found.server_unix_nanos == where.received_unix_nanos
        assert [record.data for record in found.records] == [b"hello", b"hello"]

    async def test_many_at_once(self, sink_case: SinkCase) -> None:
        wanted = {(f"uid-{agent}", 3, seq) for agent in range(5) for seq in range(1, 41)}
        await asyncio.gather(
            *(sink_case.sink.store(origin(agent), batch(seq)) for agent, _, seq in wanted)
        )
        assert names(await sink_case.read()) == wanted

    async def test_ready_while_it_takes_batches(self, sink_case: SinkCase) -> None:
        await sink_case.sink.store(origin(), batch(1))
        (condition,) = sink_case.health.readiness()
        assert (condition.name, condition.ok) == ("sink", True)

    async def test_stop_stores_what_was_handed_over(self, sink_case: SinkCase) -> None:
        storing = [
            asyncio.ensure_future(sink_case.sink.store(origin(), batch(seq)))
            for seq in range(1, 51)
        ]
        await asyncio.sleep(0)  # all are handed over, none is stored
        sink_case.stop.set()
        await sink_case.task
        results = await asyncio.gather(*storing, return_exceptions=True)
        stored = {("uid-1", 3, seq) for seq, result in enumerate(results, 1) if result is None}
        assert len(stored) == 50
        assert names(await sink_case.read()) == stored
        assert not sink_case.health.ready

    async def test_cancelled_store_harms_no_other(self, sink_case: SinkCase) -> None:
        gone = asyncio.ensure_future(sink_case.sink.store(origin(), batch(1)))
        await asyncio.sleep(0)
        gone.cancel()
        await sink_case.sink.store(origin(), batch(2))
        assert ("uid-1", 3, 2) in names(await sink_case.read())

    async def test_store_returns_a_future_at_once(self, sink_case: SinkCase) -> None:
        """There is a call for each batch: a coroutine would need a task of its own."""
        storing = sink_case.sink.store(origin(), batch(1))
        assert not asyncio.iscoroutine(storing)
        assert not storing.done()
        told: asyncio.Future[Storing] = asyncio.get_running_loop().create_future()
        storing.add_done_callback(told.set_result)
        assert not told.done()
        assert await told is storing
        assert storing.done()
        assert not storing.cancelled()
        assert storing.exception() is None
        await storing

    async def test_set_aside_keeps_batch_and_reason(self, sink_case: SinkCase) -> None:
        where = origin()
        await sink_case.sink.store(where, batch(1))
        await sink_case.sink.set_aside(where, batch(2, b"poison"), "cannot be opened")
        (found,) = await sink_case.read_aside()
        assert (found.agent_id, found.node, found.seq) == (where.agent_id, where.node, 2)
        assert found.reason == "cannot be opened"
        assert [record.data for record in found.records] == [b"poison", b"poison"]
        assert names(await sink_case.read()) == {("uid-1", 3, 1)}

    async def test_largest_batch(self, sink_case: SinkCase) -> None:
        large = batch(1, os.urandom(1_040_000), records=4)
        assert len(large.records) > 4_000_000
        await sink_case.sink.store(origin(), large)
        (found,) = await sink_case.read()
        assert len(found.records) == 4
