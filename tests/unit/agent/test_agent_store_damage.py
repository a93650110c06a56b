"""A damaged file: set aside, what can be read of the journal kept, and the agent goes on."""

import asyncio
import random
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

import pytest
from fakes.agent_parts import batch_of, run_state, store_in, value
from outrider_agent.core.runs import RunKey
from outrider_agent.store import database
from outrider_agent.store.database import FILE_NAME, StoreDamagedError
from outrider_proto import batches
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry


async def fill(directory: Path) -> None:
    """A file with 30 ended runs, 10 that run, and 20 batches."""
    async with store_in(directory) as store:
        for number in range(40):
            await store.accept_run(run_state(f"task-{number}"))
        for number in range(30):
            state = run_state(f"task-{number}", pb.RUN_PHASE_FAILED)
            state.preview = bytes([number]) * 500
            await store.update_run(state)
        for number in range(20):
            await store.append_batch(batch_of(f"{number}" * 200))


@pytest.fixture(scope="module")
def good() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(fill(Path(folder)))
        db = sqlite3.connect(Path(folder) / FILE_NAME)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
        return (Path(folder) / FILE_NAME).read_bytes()


async def check_goes_on(directory: Path, *, torn: bool) -> None:
    """Whatever happened to the file: nothing false comes out of it, and it can be used.

    At the latest by the agent that is started after one that damage ended.
    """
    try:
        await use(directory, torn=torn)
    except StoreDamagedError:
        await use(directory, torn=True)


async def use(directory: Path, *, torn: bool) -> None:
    async with store_in(directory) as store:
        for state in await store.run_states():
            number = int(state.id.task_uid.removeprefix("task-"))
            if state.phase == pb.RUN_PHASE_FAILED:
                assert state.preview == bytes([number]) * 500
            else:
                assert state.phase == pb.RUN_PHASE_ACCEPTED
        for waiting in await store.batches_after(0, 10**7):
            assert batches.check(waiting.batch) is None
            batches.decode(waiting.batch)
        assert await store.accept_run(run_state("new")) is None
        await store.append_batch(batch_of("new"))
        assert store.check() is None
        if torn:
            assert store.damaged is not None


@pytest.mark.parametrize("seed", range(40))
async def test_any_flipped_bit(tmp_path: Path, good: bytes, seed: int) -> None:
    rng = random.Random(seed)
    # The first pages hold the schema and the journal: half of the bits are flipped there.
    offset = rng.randrange(len(good) if seed % 2 else 10 * 4096)
    content = bytearray(good)
    content[offset] ^= 1 << rng.randrange(8)
    (tmp_path / FILE_NAME).write_bytes(content)
    await check_goes_on(tmp_path, torn=False)


@pytest.mark.parametrize("seed", range(20))
async def test_any_torn_tail(tmp_path: Path, good: bytes, seed: int) -> None:
    size = random.Random(seed).randrange(1, len(good))
    (tmp_path / FILE_NAME).write_bytes(good[:size])
    await check_goes_on(tmp_path, torn=True)


async def test_a_file_that_is_none_is_kept_aside_and_counted(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database" * 1000)
    registry = CollectorRegistry()
    async with store_in(tmp_path, registry=registry) as store:
        assert store.damaged is not None
        assert store.damaged.read_bytes().startswith(b"not a database")
        assert store.damaged.name.startswith(f"{FILE_NAME}.damaged-")
    assert value(registry, "outrider_agent_store_damaged_total") == 1


async def test_a_damaged_result_does_not_make_its_run_new(tmp_path: Path, good: bytes) -> None:
    """The row's key can be read, its state cannot: it must not be run again."""
    content = good.replace(bytes([7]) * 500, bytes([7]) * 250 + b"!" + bytes([7]) * 249)
    assert content != good
    (tmp_path / FILE_NAME).write_bytes(content)
    async with store_in(tmp_path) as store:
        assert store.damaged is not None
        assert len(await store.run_states()) == 40
        left = {u.state.id.task_uid for u in await store.unfinished_runs()}
        assert "task-7" in left
        assert "task-8" not in left
        known = await store.accept_run(run_state("task-7"))
        assert known is not None


class Killed(BaseException):
    """The agent is no more."""


@pytest.mark.parametrize("point", ["_carry_over", "_set_aside", "_forget_old", "_take_place"])
async def test_a_kill_while_the_file_is_replaced_makes_no_run_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    await fill(tmp_path)
    (tmp_path / database.SUSPECT_NAME).touch()

    def kill(*_arguments: object, **_options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(database, point, kill)
        with pytest.raises(Killed):
            database.open_database(tmp_path)
    async with store_in(tmp_path) as store:
        for number in range(40):
            assert await store.accept_run(run_state(f"task-{number}")) is not None
    assert not (tmp_path / database.NEW_NAME).exists()


async def test_a_new_file_has_a_new_epoch(tmp_path: Path) -> None:
    await fill(tmp_path)
    async with store_in(tmp_path) as store:
        before = store.epoch
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:10_000])
    async with store_in(tmp_path) as store:
        assert store.epoch != before
        assert (await store.append_batch(batch_of("x"))).seq == 1


async def test_damaged_batches_are_dropped_and_counted(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    async with store_in(tmp_path, registry=registry) as store:
        for text in "abc":
            await store.append_batch(batch_of(text))
        await store._do(
            lambda db: db.execute("UPDATE batches SET batch = zeroblob(9) WHERE seq = 2").rowcount
        )
        assert [w.seq for w in await store.batches_after(0, 10**6)] == [1, 3]
        assert (await store.totals()).batches == 2
    name = "outrider_agent_dropped_records_total"
    assert value(registry, name, **{"class": "log", "reason": "damaged"}) == 1


async def test_damage_that_shows_while_in_use_ends_the_agent(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:

        def malformed(db: sqlite3.Connection) -> None:
            db.execute("PRAGMA writable_schema = ON")
            db.execute("UPDATE sqlite_schema SET rootpage = 9999 WHERE name = 'runs'")
            db.execute("PRAGMA writable_schema = RESET")
            db.execute("SELECT * FROM runs").fetchall()

        watching = asyncio.ensure_future(store.watch())
        with pytest.raises(StoreDamagedError):
            await store._do(malformed)
        with pytest.raises(StoreDamagedError):
            await watching
    # The next agent does not trust it, whatever a check says.
    async with store_in(tmp_path) as store:
        assert store.damaged is not None
    async with store_in(tmp_path) as store:
        assert store.damaged is None


async def test_damaged_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.time()
    for number in range(5):
        (tmp_path / FILE_NAME).write_bytes(b"rubbish" * 100)
        opened = database.open_database(tmp_path, now=lambda: clock + number)  # noqa: B023 - used at once
        opened.connection.close()
        assert opened.damaged is not None
        assert opened.damaged.exists()
        for path in tmp_path.glob(f"{FILE_NAME}-*"):
            path.unlink()
    kept = list(tmp_path.glob(f"{FILE_NAME}.damaged-*"))
    assert len(kept) == database.KEPT_DAMAGED


async def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    """What a killed process leaves is the files as they are: take them away under its hands."""
    async with store_in(tmp_path / "a") as store:
        await store.accept_run(run_state("x"))
        await store.append_batch(batch_of("y"))
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    async with store_in(tmp_path / "b") as store:
        assert store.damaged is None
        assert await store.find_run(RunKey("x", 1)) is not None
        assert len(await store.batches_after(0, 10**6)) == 1
