"""The agent's file: journal, outbox, lock, migrations, and a full disk."""

import asyncio
import os
import resource
import signal
import sqlite3
import stat
from pathlib import Path

import pytest
from fakes.agent_parts import LIMITS, batch_of, run_state, store_in, value
from outrider_agent.core.records import RecordClass
from outrider_agent.core.runs import RunKey
from outrider_agent.core.storage import JournalFullError, Process, StorageError
from outrider_agent.store import journal
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
