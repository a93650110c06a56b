"""Records on their way into the outbox: bounded, batched, and told of when given up."""

import asyncio
import contextlib
import os
import random
import resource
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes.agent_parts import store_in, value
from outrider_agent.core.batching import BatchLimits
from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import OutboxFullError, StorageError
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store import recorder as module
from outrider_agent.store.database import FILE_NAME
from outrider_agent.store.outbox import NewBatch
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
    def __init__(
        self,
        store: Store,
        recorder: Recorder,
        registry: CollectorRegistry,
        store_registry: CollectorRegistry,
    ) -> None:
        self.store = store
        self.recorder = recorder
        self.registry = registry
        self.store_registry = store_registry

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
    reserve: int = 0,
    codec: pb.Codec.ValueType = pb.CODEC_ZSTD,
) -> AsyncIterator[Made]:
    registry, metrics = CollectorRegistry(), CollectorRegistry()
    async with store_in(directory, StoreLimits(outbox, 60, 10, reserve), registry) as store:
        options = RecorderOptions(batch_limits, codec, queue)
        recorder = Recorder(store, options, AgentMetrics(metrics))
        task = asyncio.create_task(recorder.run())
        try:
            yield Made(store, recorder, metrics, registry)
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


SLOW = BatchLimits(max_delay=3600, max_bytes=10**6)


def typed(data_type: int, number: int, size: int = 10) -> pb.EncodedRecord:
    return pb.EncodedRecord(data_type=data_type, timestamp=number, data=random.randbytes(size))


async def test_batches_hold_types_of_one_group_only(tmp_path: Path) -> None:
    async with made_in(tmp_path) as made:
        made.recorder.set_groups([{1, 2}, {3}])
        for number in range(60):
            made.recorder.submit(typed(number % 6, number), RecordClass.LOG)
        found = await made.until_stored(60)
        kinds = [{r.data_type for r in batch} for batch in found]
        assert all(k <= {1, 2} or k <= {3} or k <= {0, 4, 5} for k in kinds)
        # What is held when the groups change is not mixed with what comes.
        made.recorder.submit(typed(1, 60), RecordClass.LOG)
        made.recorder.set_groups([])
        made.recorder.submit(typed(4, 61), RecordClass.LOG)
        made.recorder.submit(typed(1, 62), RecordClass.LOG)
        found = await made.until_stored(63)
    assert [[r.timestamp for r in batch] for batch in found[-2:]] == [[60], [61, 62]]


async def test_types_of_all_groups_share_a_commit(tmp_path: Path) -> None:
    async with made_in(tmp_path, SLOW) as made:
        made.recorder.set_groups([{n} for n in range(10)])
        for number in range(20):
            made.recorder.submit(typed(number % 10, number), RecordClass.LOG)
        name = "outrider_agent_store_syncs_total"
        before = value(made.store_registry, name)
        await made.recorder.flush(RecordClass.LOG)
        assert value(made.store_registry, name) == before + 1
        assert len(await made.batches()) == 10


@pytest.mark.parametrize("codec", [pb.CODEC_NONE, pb.CODEC_ZSTD, pb.CODEC_LZ4])
async def test_batches_are_no_larger_than_a_server_takes(
    tmp_path: Path, codec: pb.Codec.ValueType
) -> None:
    async with made_in(tmp_path, SLOW, queue=10**7, codec=codec) as made:
        for number in range(10):
            made.recorder.submit(typed(1, number, 900), RecordClass.LOG)
        made.recorder.set_max_batch_bytes(2_000)
        for number in range(10, 30):
            made.recorder.submit(typed(1, number, 900), RecordClass.LOG)
        made.recorder.submit(typed(1, 30, 5_000), RecordClass.LOG)  # cannot be made smaller
        await made.recorder.flush(RecordClass.LOG)
        waiting = await made.store.batches_after(0, 10**9)
        sizes = [len(w.batch.records) for w in waiting]
        assert all(size <= 2_000 for size in sizes[:-1])
        assert waiting[-1].batch.count == 1
        found = [r.timestamp for w in waiting for r in batches.decode(w.batch)]
        assert found == list(range(31))
        made.recorder.set_max_batch_bytes(0)
        for number in range(20):
            made.recorder.submit(typed(1, number, 900), RecordClass.LOG)
        await made.recorder.flush(RecordClass.LOG)
        assert (await made.store.batches_after(0, 10**9))[-1].batch.count == 20


async def test_flush_waits_for_the_disk_and_not_for_the_delay(tmp_path: Path) -> None:
    async with made_in(tmp_path, SLOW) as made:
        await made.recorder.flush(RecordClass.RESULT)  # nothing is there
        for number in range(3):
            made.recorder.submit(record(str(number)), RecordClass.RESULT)
        made.recorder.submit(record("9"), RecordClass.LOG)
        await made.recorder.flush(RecordClass.RESULT)
        assert [[r.timestamp for r in batch] for batch in await made.batches()] == [[0, 1, 2]]


async def test_flush_waits_for_what_it_was_called_for_whatever_is_stored_before_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with made_in(tmp_path) as made:
        made.recorder.set_groups([{2}])
        refused = asyncio.Event()
        append = made.store.append_batches

        async def refusing(news: Sequence[NewBatch]) -> list[Any]:
            """Never those of group 2, for the outbox is full."""
            taken = [new for new in news if new.held.data_types != {2}]
            results = iter(await append(taken))
            refused.set()
            full = OutboxFullError("full")
            return [full if new.held.data_types == {2} else next(results) for new in news]

        monkeypatch.setattr(made.store, "append_batches", refusing)
        made.recorder.submit(typed(2, 1), RecordClass.RESULT)
        flushing = asyncio.create_task(made.recorder.flush(RecordClass.RESULT))
        await asyncio.wait_for(refused.wait(), 10)
        for number in range(2, 5):
            made.recorder.submit(typed(1, number), RecordClass.RESULT)
        await made.until_stored(3)
        assert not flushing.done()
        monkeypatch.setattr(made.store, "append_batches", append)
        await asyncio.wait_for(flushing, 15)
        assert len(await made.batches()) >= 2


async def test_while_results_fill_the_outbox_others_are_refused_and_put_waits(
    tmp_path: Path,
) -> None:
    async with made_in(tmp_path, outbox=2_000, reserve=3_000) as made:
        made.recorder.submit(typed(1, 1, 2_500), RecordClass.RESULT)
        await made.recorder.flush(RecordClass.RESULT)
        assert not made.recorder.submit(typed(1, 2), RecordClass.TELEMETRY)
        putting = asyncio.create_task(made.recorder.put(typed(1, 3), RecordClass.LOG))
        # Results go on into their reserve, and then wait in memory.
        made.recorder.submit(typed(1, 4, 2_000), RecordClass.RESULT)
        await made.recorder.flush(RecordClass.RESULT)
        made.recorder.submit(typed(1, 5, 2_000), RecordClass.RESULT)
        flushing = asyncio.create_task(made.recorder.flush(RecordClass.RESULT))
        done, _ = await asyncio.wait({putting, flushing}, timeout=0.2)
        assert not done
        assert len(await made.batches()) == 2
        await made.store.ack_batches(made.store.epoch, 1, 2)
        async with asyncio.timeout(10):
            await flushing
            await putting
            await made.store.ack_batches(made.store.epoch, 3, 3)
        found = await made.until_stored(1)
    assert 3 in [r.timestamp for batch in found for r in batch]
    labels = {"class": "telemetry", "reason": "refused"}
    assert value(made.registry, DROPPED, **labels) == 1


async def test_what_was_lost_is_told_once_there_is_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOSS_REPORT_SECONDS", 0.05)
    async with made_in(tmp_path, outbox=4_000, reserve=3_000) as made:
        made.recorder.submit(typed(1, 1, 1_000), RecordClass.TELEMETRY)
        await made.recorder.flush(RecordClass.TELEMETRY)
        made.recorder.submit(typed(1, 2, 4_500), RecordClass.RESULT)
        await made.recorder.flush(RecordClass.RESULT)
        labels = {"class": "log", "reason": "refused"}
        async with asyncio.timeout(10):
            while not value(made.registry, DROPPED, **labels):  # what was to tell of it
                await asyncio.sleep(0.01)
        assert [[r.timestamp for r in batch] for batch in await made.batches()] == [[2]]
        await made.store.ack_batches(made.store.epoch, 1, 2)
        (batch,) = await made.until_stored(1)
        told = records.fields_of(batch[0])
    assert told["event"] == "OutboxFull"
    assert (told["class"], told["reason"], told["records"]) == ("telemetry", "outbox_full", "1")
    assert made.store.losses == {}


async def test_a_disk_that_is_full_for_a_while_loses_nothing(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: both make SQLite's writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    failures = "outrider_agent_store_failures_total"
    async with made_in(tmp_path, BatchLimits(0.01, 20_000), queue=10**6) as made:
        made.recorder._queues[RecordClass.LOG].backoff._cap = 0.01
        for number in range(10):
            made.recorder.submit(typed(1, number, 3_000), RecordClass.LOG)
        await made.until_stored(10)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        wal = os.stat(tmp_path / f"{FILE_NAME}-wal").st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (wal, before[1]))
        try:
            for number in range(10, 60):
                made.recorder.submit(typed(1, number, 3_000), RecordClass.LOG)
            async with asyncio.timeout(10):
                while value(made.store_registry, failures) < 3:
                    await asyncio.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        found = await made.until_stored(60)
        assert [r.timestamp for batch in found for r in batch] == list(range(60))
