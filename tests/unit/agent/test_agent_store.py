"""The agent's file: journal, outbox, lock, migrations, and a full disk."""

import asyncio
import os
import resource
import shutil
import signal
import sqlite3
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.agent_parts import LIMITS, batch_of, run_state, store_in, value
from outrider_agent.core.eviction import Disk
from outrider_agent.core.records import RecordClass
from outrider_agent.core.runs import RunKey
from outrider_agent.core.storage import JournalFullError, OutboxFullError, Process, StorageError
from outrider_agent.store import journal, space
from outrider_agent.store.database import FILE_NAME
from outrider_agent.store.store import Store, StoreLimits
from outrider_proto import batches, records
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.settings import SettingsError
from prometheus_client import CollectorRegistry


async def test_a_run_is_accepted_once(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        assert await store.accept_run(run_state("a")) is None
        known = await store.accept_run(run_state("a"))
        assert known is not None
        assert known.phase == pb.RUN_PHASE_ACCEPTED
        assert await store.accept_run(run_state("a", attempt=2)) is None


async def test_of_many_at_once_one_is_new(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        found = await asyncio.gather(*(store.accept_run(run_state("a")) for _ in range(50)))
    assert sum(state is None for state in found) == 1


async def test_an_acknowledged_run_is_not_accepted_again(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        await store.accept_run(run_state("a"))
        await store.update_run(run_state("a", pb.RUN_PHASE_REJECTED))
        assert await store.ack_runs([RunKey("a", 1)]) == 1
        assert await store.run_states() == []
    async with store_in(tmp_path) as store:
        known = await store.accept_run(run_state("a"))
        assert known is not None
        assert known.phase == pb.RUN_PHASE_REJECTED


async def test_only_final_runs_are_forgotten_by_an_acknowledgement(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        await store.accept_run(run_state("a"))
        assert await store.ack_runs([RunKey("a", 1), RunKey("unknown", 1)]) == 0
        assert len(await store.run_states()) == 1


async def test_a_final_state_stays(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        await store.accept_run(run_state("a"))
        await store.update_run(run_state("a", pb.RUN_PHASE_CANCELLED))
        await store.update_run(run_state("a", pb.RUN_PHASE_RUNNING))
        (state,) = await store.run_states()
        assert state.phase == pb.RUN_PHASE_CANCELLED
        assert await store.unfinished_runs() == []


async def test_unfinished_runs_keep_their_process(tmp_path: Path) -> None:
    process = Process(123, 456, "boot")
    async with store_in(tmp_path) as store:
        await store.accept_run(run_state("a"))
        await store.update_run(run_state("a", pb.RUN_PHASE_RUNNING), process)
        await store.accept_run(run_state("b"))
    async with store_in(tmp_path) as store:
        left = {u.state.id.task_uid: u.process for u in await store.unfinished_runs()}
    assert left == {"a": process, "b": None}


async def test_tombstones_expire_and_are_bounded(tmp_path: Path) -> None:
    short = StoreLimits(LIMITS.max_outbox_bytes, tombstone_seconds=-10, max_tombstones=100)
    few = StoreLimits(LIMITS.max_outbox_bytes, tombstone_seconds=3600, max_tombstones=3)

    async def end(store: Store, uid: str) -> None:
        assert await store.accept_run(run_state(uid)) is None
        await store.update_run(run_state(uid, pb.RUN_PHASE_REJECTED))
        await store.ack_runs([RunKey(uid, 1)])

    async with store_in(tmp_path, short) as store:
        await end(store, "a")
        await end(store, "b")
        assert await store.find_run(RunKey("a", 1)) is None
    async with store_in(tmp_path, few) as store:
        for number in range(6):
            await end(store, f"r{number}")
        kept = [n for n in range(6) if await store.find_run(RunKey(f"r{n}", 1))]
    assert len(kept) == 3
    assert 5 in kept


async def test_the_journal_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_RUNS", 3)
    async with store_in(tmp_path) as store:
        for number in range(3):
            await store.accept_run(run_state(f"r{number}"))
        with pytest.raises(JournalFullError):
            await store.accept_run(run_state("more"))
        assert await store.accept_run(run_state("r1")) is not None


async def test_batches_are_numbered_and_read_back_in_order(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        for text in "abc":
            await store.append_batch(batch_of(text))
        found = await store.batches_after(0, 10_000)
        assert [w.seq for w in found] == [1, 2, 3]
        assert all(w.batch.epoch == store.epoch for w in found)
        texts = [records.fields_of(batches.decode(w.batch)[0])["text"] for w in found]
        assert texts == ["a", "b", "c"]
        assert [w.seq for w in await store.batches_after(2, 10_000)] == [3]


async def test_reading_keeps_to_its_limit_but_for_a_single_batch(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        for _ in range(3):
            await store.append_batch(batch_of("x" * 1000))
        size = (await store.batches_after(0, 10**6))[0].size
        assert len(await store.batches_after(0, size * 2)) == 2
        assert await store.batches_after(0, 10) == []
        assert len(await store.batches_after(0, 10, at_least_one=True)) == 1


async def test_numbers_and_epoch_outlive_the_batches(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        epoch = store.epoch
        await store.append_batch(batch_of("a"))
        assert await store.ack_batches(epoch, 1, 1) == 1
    async with store_in(tmp_path) as store:
        assert store.epoch == epoch > 0
        assert (await store.append_batch(batch_of("b"))).seq == 2


async def test_acknowledgements_of_another_epoch_delete_nothing(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        await store.append_batch(batch_of("a"))
        assert await store.ack_batches(store.epoch + 1, 1, 1) == 0
        assert store.backlog.batches == 1


async def test_a_full_outbox_gives_up_the_oldest_of_the_least_class(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    limits = StoreLimits(max_outbox_bytes=5_000, tombstone_seconds=1, max_tombstones=1)
    async with store_in(tmp_path, limits, registry) as store:
        await store.append_batch(batch_of("r" * 1000, RecordClass.RESULT))
        await store.append_batch(batch_of("t" * 1000, RecordClass.TELEMETRY))
        await store.append_batch(batch_of("t" * 1000, RecordClass.TELEMETRY))
        await store.append_batch(batch_of("l" * 1000, RecordClass.LOG))
        done = await store.append_batch(batch_of("l" * 1000, RecordClass.LOG))
        loss = done.losses.by_class[RecordClass.TELEMETRY]
        assert (loss.batches, loss.first_seq, loss.last_seq) == (1, 2, 2)
        for _ in range(4):
            await store.append_batch(batch_of("l" * 1000, RecordClass.LOG))
        left = [w.seq for w in await store.batches_after(0, 10**6)]
        assert left == [1, 7, 8, 9]
        assert store.backlog.bytes <= 5_000
    name = "outrider_agent_dropped_records_total"
    assert value(registry, name, **{"class": "telemetry", "reason": "outbox_full"}) == 2
    assert value(registry, name, **{"class": "log", "reason": "outbox_full"}) == 3


@pytest.mark.parametrize("statement", ["SELECT 1", "INSERT INTO meta VALUES ('epoch', 1)"])
async def test_a_failing_operation_takes_no_other_with_it(tmp_path: Path, statement: str) -> None:
    """Whether it fails by itself, or its second statement does."""
    async with store_in(tmp_path) as store:

        def fail(db: sqlite3.Connection) -> None:
            db.execute("INSERT INTO meta VALUES ('half', 1)")
            db.execute(statement)
            raise RuntimeError("mine")

        good, bad, also = await asyncio.gather(
            store.accept_run(run_state("a")),
            store._do(fail),
            store.accept_run(run_state("b")),
            return_exceptions=True,
        )
        assert (good, also) == (None, None)
        assert isinstance(bad, RuntimeError if statement == "SELECT 1" else StorageError)
        half = await store._do(
            lambda db: db.execute("SELECT count(*) FROM meta WHERE name = 'half'").fetchone()[0]
        )
        assert half == 0
        assert len(await store.run_states()) == 2


async def test_waiting_operations_share_a_commit(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    async with store_in(tmp_path, registry=registry) as store:
        before = value(registry, "outrider_agent_store_commit_seconds_count")
        await asyncio.gather(*(store.accept_run(run_state(f"r{n}")) for n in range(200)))
        commits = value(registry, "outrider_agent_store_commit_seconds_count") - before
    assert commits < 50


async def test_two_agents_cannot_share_a_directory(tmp_path: Path) -> None:
    async with store_in(tmp_path):
        with pytest.raises(SettingsError, match=r'"state\.directory".*pid'):
            async with store_in(tmp_path):
                raise AssertionError("opened twice")
    async with store_in(tmp_path):
        pass


async def test_a_directory_that_cannot_be_made_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r'"state\.directory"'):
        async with store_in(tmp_path / "file" / "state"):
            raise AssertionError("opened")


async def test_a_file_of_a_newer_agent_is_left_alone(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        await store._do(lambda db: db.execute("INSERT INTO migrations VALUES (99, 0)").rowcount)
    with pytest.raises(SettingsError, match="schema version 99"):
        async with store_in(tmp_path):
            raise AssertionError("opened")
    assert list(tmp_path.glob("*.damaged-*")) == []


async def test_the_file_is_for_its_user_only(tmp_path: Path) -> None:
    async with store_in(tmp_path / "state"):
        for path in (tmp_path / "state").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


async def test_a_full_disk_is_an_error_that_passes(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: both make SQLite's writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    async with store_in(tmp_path) as store:
        await store.accept_run(run_state("a"))
        wal = os.stat(tmp_path / f"{FILE_NAME}-wal").st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (wal, before[1]))
        try:
            with pytest.raises(StorageError):
                await store.append_batch(batch_of("x" * 500_000))
            with pytest.raises(StorageError):
                await store.accept_run(run_state("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        assert await store.accept_run(run_state("b")) is None
        assert (await store.append_batch(batch_of("x"))).seq == 1


def small(**more: Any) -> StoreLimits:
    return StoreLimits(max_outbox_bytes=5_000, tombstone_seconds=1, max_tombstones=1, **more)


async def test_results_stay_and_others_are_refused_while_results_fill_the_outbox(
    tmp_path: Path,
) -> None:
    made_room = 0

    def room() -> None:
        nonlocal made_room
        made_room += 1

    async with store_in(tmp_path, small(result_reserve_bytes=2_500)) as store:
        store.on_room = room
        await store.append_batch(batch_of("l" * 1000, RecordClass.LOG))
        for _ in range(6):
            await store.append_batch(batch_of("r" * 1000, RecordClass.RESULT))
        assert store.crowded == {RecordClass.LOG, RecordClass.TELEMETRY}
        assert [w.seq for w in await store.batches_after(0, 10**6)] == [2, 3, 4, 5, 6, 7]
        with pytest.raises(OutboxFullError, match="results wait"):
            for _ in range(3):
                await store.append_batch(batch_of("r" * 1000, RecordClass.RESULT))
        assert store.backlog.bytes <= 7_500
        before = made_room
        await store.ack_batches(store.epoch, 1, 5)
        assert made_room > before
        assert store.crowded == frozenset()
        await store.append_batch(batch_of("r" * 1000, RecordClass.RESULT))


async def test_one_result_too_many_takes_no_other_batch_with_it(tmp_path: Path) -> None:
    async with store_in(tmp_path, small()) as store:
        full, kept = await store.append_batches(
            [batch_of("r" * 6000, RecordClass.RESULT), batch_of("l", RecordClass.LOG)]
        )
        assert isinstance(full, OutboxFullError)
        assert not isinstance(kept, Exception)
        assert kept.seq == 1


async def test_lanes(tmp_path: Path) -> None:
    """What the uplink asks for: results first, then what is new, then what is old."""
    async with store_in(tmp_path) as store:
        for record_class in (RecordClass.LOG, RecordClass.RESULT, RecordClass.TELEMETRY) * 2:
            await store.append_batch(batch_of("x", record_class))
        assert store.last_seq == 6

        async def seqs(**more: Any) -> list[int]:
            return [w.seq for w in await store.batches_after(0, 10**6, **more)]

        assert await seqs(classes=[RecordClass.RESULT]) == [2, 5]
        assert await seqs(upto=3) == [1, 2, 3]
        assert await seqs(classes={RecordClass.LOG, RecordClass.TELEMETRY}, upto=4) == [1, 3, 4]
        assert await seqs(classes=[]) == []
        found = await store.batches_after(4, 10**6)
        assert [w.record_class for w in found] == [RecordClass.RESULT, RecordClass.TELEMETRY]
    async with store_in(tmp_path) as store:
        assert store.last_seq == 6


@pytest.mark.parametrize(("relaxed", "syncs"), [(False, 5), (True, 1)])
async def test_which_commits_wait_for_the_disk(tmp_path: Path, relaxed: bool, syncs: int) -> None:
    """Appends do, or one for all within a second; acknowledgements and reads never; runs always."""
    registry = CollectorRegistry()
    async with store_in(tmp_path, replace(LIMITS, relaxed=relaxed), registry) as store:

        def synced() -> float:
            return value(registry, "outrider_agent_store_syncs_total")

        before = synced()
        for _ in range(5):
            await store.append_batch(batch_of("x"))
        # In the relaxed mode the one that reserves numbers, and perhaps the one that is due.
        assert syncs <= synced() - before <= (4 if relaxed else 5)
        if relaxed:
            async with asyncio.timeout(10):
                while store._worker._unsynced_since is not None:
                    await asyncio.sleep(0.01)
            assert synced() - before >= 2
        before = synced()
        await store.ack_batches(store.epoch, 1, 3)
        await store.batches_after(0, 10**6)
        await store.totals()
        assert synced() == before
        await store.accept_run(run_state("a"))
        assert synced() == before + 1


async def test_numbers_that_were_reserved_are_skipped_after_a_kill_only(tmp_path: Path) -> None:
    relaxed = replace(LIMITS, relaxed=True)
    async with store_in(tmp_path / "a", relaxed) as store:
        assert (await store.append_batch(batch_of("x"))).seq == 1
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    async with store_in(tmp_path / "a", relaxed) as store:
        assert (await store.append_batch(batch_of("x"))).seq == 2
    # Whatever the durability is then.
    async with store_in(tmp_path / "b") as store:
        assert (await store.append_batch(batch_of("x"))).seq > 1000


async def test_a_disk_with_little_room_makes_the_outbox_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    free = 10**9
    monkeypatch.setattr(space, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(space, "disk_of", lambda _: Disk(size=10**10, free=free))
    limits = replace(LIMITS, max_outbox_bytes=10**6, min_free_bytes=10**6)
    name = "outrider_agent_dropped_records_total"
    async with store_in(tmp_path, limits, registry) as store:
        for _ in range(8):
            await store.append_batch(batch_of("x" * 100_000, RecordClass.LOG))
        await store.append_batch(batch_of("x" * 100_000, RecordClass.RESULT))
        assert value(registry, "outrider_agent_outbox_limit_bytes") == 10**6
        await checkpoint(store)
        before = (tmp_path / FILE_NAME).stat().st_size
        free = 10**6 - 300_000
        async with asyncio.timeout(10):
            while store.backlog.bytes > 650_000:
                await store.totals()
        labels = {"class": "log", "reason": "disk_low"}
        assert value(registry, name, **labels) >= 3
        assert value(registry, "outrider_agent_outbox_limit_bytes") < 700_000
        assert "disk_low" in store.losses
        # The file gets smaller by it: somebody else may have the space.
        async with asyncio.timeout(10):
            while (tmp_path / FILE_NAME).stat().st_size > before - 250_000:
                await store.totals()
        free = 0
        async with asyncio.timeout(10):
            while store.crowded != {RecordClass.LOG, RecordClass.TELEMETRY}:
                await store.totals()
        (left,) = await store.batches_after(0, 10**7)
        assert left.record_class is RecordClass.RESULT
        free = 10**9
        async with asyncio.timeout(10):
            while store.crowded:
                await store.totals()


async def test_a_disk_with_room_again_is_noticed_by_an_agent_that_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All records are refused while there is none, so nothing else asks the store for anything."""
    free = 0
    monkeypatch.setattr(space, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(space, "disk_of", lambda _: Disk(size=10**10, free=free))
    limits = replace(LIMITS, max_outbox_bytes=10**6, min_free_bytes=10**6)
    async with store_in(tmp_path, limits) as store:
        async with asyncio.timeout(10):
            while store.crowded != {RecordClass.LOG, RecordClass.TELEMETRY}:
                await asyncio.sleep(0.01)
        free = 10**9
        async with asyncio.timeout(10):
            while store.crowded:
                await asyncio.sleep(0.01)


async def test_small_results_do_not_go_before_one_that_has_no_room(tmp_path: Path) -> None:
    limits = replace(LIMITS, max_outbox_bytes=100_000, result_reserve_bytes=0)
    large, small = (batch_of("x" * size, RecordClass.RESULT) for size in (60_000, 100))
    async with store_in(tmp_path, limits) as store:
        await store.append_batch(large)
        found = await store.append_batches([batch_of("x", RecordClass.LOG), large, small])
        assert [isinstance(one, OutboxFullError) for one in found] == [False, True, True]
        await store.ack_batches(store.epoch, 1, 1)
        found = await store.append_batches([large, small])
        assert not any(isinstance(one, Exception) for one in found)


async def checkpoint(store: Store) -> None:
    """Move all of the log into the file: its size tells what is in it then."""
    await store._do(lambda _: None)
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


async def test_closing_finishes_what_waits(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        pending = [asyncio.ensure_future(store.accept_run(run_state(f"r{n}"))) for n in range(20)]
        await asyncio.sleep(0)
        await store.close()
        assert [await p for p in pending] == [None] * 20
        with pytest.raises(StorageError):
            await store.run_states()
        assert store.check() is not None
    async with store_in(tmp_path) as store:
        assert len(await store.run_states()) == 20
        assert store.check() is None
