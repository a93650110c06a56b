"""Records on their way into the outbox: bounded, batched, and told of when given up."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fakes.agent_parts import store_in, value
from outrider_agent.core.batching import BatchLimits
from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import StorageError
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store import recorder as module
from outrider_agent.store.recorder import Recorder, RecorderOptions
from outrider_agent.store.store import Store, StoreLimits
from outrider_proto import batches, limits, records
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry

QUICK = BatchLimits(max_delay=0.02, max_bytes=10_000)
DROPPED = "outrider_agent_dropped_records_total"


def record(text: str, size: int = 10) -> pb.EncodedRecord:
    return pb.EncodedRecord(data_type=1, timestamp=int(text), data=b"x" * size)


class Made:
    def __init__(self, store: Store, recorder: Recorder, registry: CollectorRegistry) -> None:
        self.store = store
        self.recorder = recorder
        self.registry = registry

    async def batches(self) -> list[list[pb.EncodedRecord]]:
        return [batches.decode(w.batch) for w in await self.store.batches_after(0, 10**9)]

    async def until_stored(self, count: int) -> list[list[pb.EncodedRecord]]:
        async with asyncio.timeout(10):
            while sum(map(len, found := await self.batches())) < count:
                await asyncio.sleep(0.01)
        return found


@contextlib.asynccontextmanager
async def made_in(
    directory: Path,
    batch_limits: BatchLimits = QUICK,
    queue: int = 50_000,
    outbox: int = 10**7,
) -> AsyncIterator[Made]:
    registry = CollectorRegistry()
    async with store_in(directory, StoreLimits(outbox, 60, 10), registry) as store:
        options = RecorderOptions(batch_limits, pb.CODEC_ZSTD, queue)
        recorder = Recorder(store, options, AgentMetrics(CollectorRegistry()))
        recorder._metrics = AgentMetrics(metrics := CollectorRegistry())
        task = asyncio.create_task(recorder.run())
        try:
            yield Made(store, recorder, metrics)
        finally:
            await recorder.finish()
            await task


async def test_records_of_one_class_share_a_batch_and_classes_do_not(tmp_path: Path) -> None:
    async with made_in(tmp_path) as made:
        for number in range(5):
            assert made.recorder.submit(record(str(number)), RecordClass.LOG)
        made.recorder.submit(record("9"), RecordClass.RESULT)
        found = await made.until_stored(6)
    # The worthier class is stored first.
    assert [[r.timestamp for r in batch] for batch in found] == [[9], [0, 1, 2, 3, 4]]


async def test_a_full_batch_does_not_wait(tmp_path: Path) -> None:
    async with made_in(tmp_path, BatchLimits(max_delay=3600, max_bytes=1000)) as made:
        made.recorder.submit(record("1", 500), RecordClass.LOG)
        made.recorder.submit(record("2", 500), RecordClass.LOG)
        assert len(await made.until_stored(2)) == 1


async def test_what_has_no_room_is_dropped_and_counted(tmp_path: Path) -> None:
    slow = BatchLimits(max_delay=3600, max_bytes=10**6)
    async with made_in(tmp_path, slow, queue=1000) as made:
        assert made.recorder.submit(record("1", 900), RecordClass.LOG)
        assert not made.recorder.submit(record("2", 900), RecordClass.LOG)
        # Another class has room of its own.
        assert made.recorder.submit(record("3", 900), RecordClass.RESULT)
    labels = {"class": "log", "reason": "queue_full"}
    assert value(made.registry, DROPPED, **labels) == 1
    assert value(made.registry, "outrider_agent_queue_bytes") == 0


async def test_a_record_beyond_the_wires_limit_is_dropped(tmp_path: Path) -> None:
    async with made_in(tmp_path) as made:
        big = record("1", limits.RECORD_BYTES + 1)
        assert not made.recorder.submit(big, RecordClass.LOG)
        await made.recorder.put(big, RecordClass.LOG)
    assert value(made.registry, DROPPED, **{"class": "log", "reason": "too_large"}) == 2


async def test_put_waits_for_room(tmp_path: Path) -> None:
    async with made_in(tmp_path, BatchLimits(0.05, 10**6), queue=1000) as made:
        for number in range(20):
            await made.recorder.put(record(str(number), 900), RecordClass.RESULT)
        found = await made.until_stored(20)
    assert [r.timestamp for batch in found for r in batch] == list(range(20))


async def test_the_end_stores_what_is_held_and_takes_no_more(tmp_path: Path) -> None:
    async with made_in(tmp_path, BatchLimits(max_delay=3600, max_bytes=10**6)) as made:
        for number in range(3):
            made.recorder.submit(record(str(number)), RecordClass.LOG)
        await made.recorder.finish()
        assert not made.recorder.submit(record("9"), RecordClass.LOG)
        assert len((await made.until_stored(3))[0]) == 3


async def test_a_disk_that_fails_for_a_while_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made_in(tmp_path) as made:
        made.recorder._queues[RecordClass.LOG].backoff._cap = 0.01
        good, tries = made.store.append_batches, 0

        async def fail(new: object) -> object:
            nonlocal tries
            tries += 1
            raise StorageError("disk full")

        monkeypatch.setattr(made.store, "append_batches", fail)
        made.recorder.submit(record("1"), RecordClass.LOG)
        async with asyncio.timeout(10):
            while tries < 3:
                await asyncio.sleep(0.01)
        made.recorder.submit(record("2"), RecordClass.LOG)
        monkeypatch.setattr(made.store, "append_batches", good)
        found = await made.until_stored(2)
    assert [r.timestamp for batch in found for r in batch] == [1, 2]


async def test_a_full_outbox_is_told_in_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOSS_REPORT_SECONDS", 0.0)
    async with made_in(tmp_path, BatchLimits(0.01, 1), outbox=2_000) as made:
        for number in range(8):
            made.recorder.submit(
                records.payload(1, number, {"n": f"{number}" * 30}), RecordClass.TELEMETRY
            )
            await asyncio.sleep(0.02)
        for number in range(60):
            made.recorder.submit(records.payload(1, number, {"n": "x" * 30}), RecordClass.TELEMETRY)
        events: list[dict[str, str]] = []
        async with asyncio.timeout(10):
            while not events:
                found = [r for b in await made.batches() for r in b]
                events = [records.fields_of(r) for r in found if r.data_type == records.AGENT_EVENT]
                await asyncio.sleep(0.01)
    assert events[0]["event"] == "OutboxFull"
    assert events[0]["class"] == "telemetry"
    assert int(events[0]["records"]) > 0
    assert events[0]["epoch"] == str(made.store.epoch)
