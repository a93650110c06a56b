"""The file sink: rotation, retention, a full disk, a crash in the middle of a batch."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes.gateway import eventually
from fakes.sink_suite import SinkCase, SinkSuite, batch, names, origin
from outrider_operator.core.sink import SinkUnavailableError
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import FileSinkSettings
from outrider_operator.sinks import files
from outrider_operator.sinks.files import FileSink
from outrider_proto.records import Decoded, decode_stored, read_stored
from outrider_runtime.health import Health
from outrider_runtime.settings import SettingsError
from prometheus_client import CollectorRegistry

MIB = 1024 * 1024


def read(folder: Path) -> list[Decoded]:
    found: list[Decoded] = []
    for path in sorted(folder.glob("*.records")):
        with path.open("rb") as file:
            found.extend(decode_stored(item) for item in read_stored(file))
    return found


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[SinkCase]:
    health, stop = Health(), asyncio.Event()
    sink = FileSink(
        FileSinkSettings(directory=str(folder), **settings),
        ServerMetrics(CollectorRegistry()),
        health,
    )

    async def read_all() -> list[Decoded]:
        return read(folder)

    task = asyncio.create_task(sink.run(stop))
    await eventually(lambda: health.ready or task.done())
    try:
        yield SinkCase(sink, health, read_all, stop, task)
    finally:
        stop.set()
        await task


@pytest.fixture
async def sink_case(tmp_path: Path) -> AsyncIterator[SinkCase]:
    async with running(tmp_path / "records") as case:
        yield case


class TestFileSink(SinkSuite):
    pass


async def test_rotates_by_size(tmp_path: Path) -> None:
    async with running(tmp_path, max_file_bytes=MIB) as case:
        for seq in range(1, 6):
            await case.sink.store(origin(), batch(seq, os.urandom(600_000), records=1))
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.records"))]
    assert len(sizes) == 3
    assert names(read(tmp_path)) == {("uid-1", 3, seq) for seq in range(1, 6)}


async def test_rotates_by_age(tmp_path: Path) -> None:
    async with running(tmp_path, max_file_seconds=0.05) as case:
        await case.sink.store(origin(), batch(1))
        await eventually(lambda: case.sink._files._file is None)  # type: ignore[attr-defined]
        await case.sink.store(origin(), batch(2))
    assert len(list(tmp_path.glob("*.records"))) == 2


async def test_keeps_within_its_bound_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    async with running(tmp_path, max_file_bytes=MIB, max_total_bytes=3 * MIB) as case:
        for seq in range(1, 13):
            await case.sink.store(origin(), batch(seq, os.urandom(600_000), records=1))
    total = sum(path.stat().st_size for path in tmp_path.glob("*.records"))
    assert total <= 3 * MIB + 600_000
    kept = {seq for _, _, seq in names(read(tmp_path))}
    assert kept == set(range(min(kept), 13))
    assert len(kept) >= 2
    assert (tmp_path / "notes.txt").exists()


async def test_torn_tail_of_a_crash_is_left_behind(tmp_path: Path) -> None:
    async with running(tmp_path) as case:
        await case.sink.store(origin(), batch(1))
        await case.sink.store(origin(), batch(2))
    (path,) = tmp_path.glob("*.records")
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    async with running(tmp_path) as case:
        await case.sink.store(origin(), batch(3))
    assert {seq for _, _, seq in names(read(tmp_path))} == {1, 3}


async def test_flushed_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", noting)
    async with running(tmp_path) as case:
        flushed.clear()
        await case.sink.store(origin(), batch(1))
        (path,) = tmp_path.glob("*.records")
        assert flushed[-1] == path.stat().st_size > 0


async def test_batches_that_come_together_share_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = 0
    fsync = os.fsync

    def counting(descriptor: int) -> None:
        nonlocal flushes
        flushes += 1
        fsync(descriptor)

    async with running(tmp_path) as case:
        monkeypatch.setattr(os, "fsync", counting)
        await asyncio.gather(*(case.sink.store(origin(), batch(seq)) for seq in range(1, 101)))
    assert flushes <= 5


async def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PROBE_SECONDS", 0.05)
    write, full = os.write, True

    def limited(descriptor: int, data: bytes) -> int:
        if full:
            write(descriptor, bytes(data)[:3])  # what fits: the file is torn there
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    def no_probe(self: files.RotatedFiles) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    async with running(tmp_path) as case:
        full = False
        monkeypatch.setattr(os, "write", limited)
        monkeypatch.setattr(files.RotatedFiles, "probe", no_probe)
        await case.sink.store(origin(), batch(1))
        full = True
        for seq in (2, 3):
            with pytest.raises(SinkUnavailableError, match="No space left"):
                await case.sink.store(origin(), batch(seq))
        (condition,) = case.health.readiness()
        assert not condition.ok
        assert "free some space" in condition.reason
        full = False
        await eventually(lambda: case.health.ready)
        await case.sink.store(origin(), batch(4))
    assert {seq for _, _, seq in names(read(tmp_path))} == {1, 4}
    assert len(list(tmp_path.glob("*.records"))) == 2


@pytest.mark.parametrize("kind", ["file in the way", "parent is a file"])
async def test_directory_that_can_never_be_used_names_the_setting(
    tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if kind == "file in the way" else tmp_path / "file" / "below"
    with pytest.raises(SettingsError, match=r"sink\.file\.directory"):
        async with running(folder):
            pass


def test_bounds_that_contradict_each_other() -> None:
    with pytest.raises(SettingsError, match=r"sink\.file\.maxTotalBytes"):
        FileSink(
            FileSinkSettings(max_file_bytes=2 * MIB, max_total_bytes=3 * MIB),
            ServerMetrics(CollectorRegistry()),
            Health(),
        )
