"""The file sink: rotation, retention, a full disk, a crash in the middle of a batch."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zstandard
from fakes.files_sink import read, read_file, running
from fakes.gateway import eventually
from fakes.sink_suite import SinkCase, SinkSuite, batch, names, origin
from outrider_operator.core.sink import SinkUnavailableError
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import FileSinkSettings
from outrider_operator.sinks import files, files_writer
from outrider_operator.sinks.files import FileSink
from outrider_proto import stored
from outrider_proto.v1.agent_pb2 import CODEC_NONE
from outrider_runtime.health import Health
from outrider_runtime.settings import SettingsError
from prometheus_client import CollectorRegistry

MIB = 1024 * 1024


@pytest.fixture
async def sink_case(tmp_path: Path) -> AsyncIterator[SinkCase]:
    async with running(tmp_path / "records") as case:
        yield case


class TestFileSink(SinkSuite):
    pass


both_forms = pytest.mark.parametrize("form", ["zstd", "none"])


async def test_rotates_by_size(tmp_path: Path) -> None:
    async with running(tmp_path, max_file_bytes=MIB) as case:
        for seq in range(1, 6):
            await case.sink.store(origin(), batch(seq, os.urandom(600_000), records=1))
    sizes = [path.stat().st_size for path in stored.files_in(tmp_path)]
    assert len(sizes) == 3
    assert names(read(tmp_path)) == {("uid-1", 3, seq) for seq in range(1, 6)}


async def test_rotates_by_age(tmp_path: Path) -> None:
    async with running(tmp_path, max_file_seconds=0.05) as case:
        await case.sink.store(origin(), batch(1))
        await eventually(lambda: not case.sink._files.is_open)  # type: ignore[attr-defined]
        await case.sink.store(origin(), batch(2))
    assert len(stored.files_in(tmp_path)) == 2


async def test_keeps_within_its_bound_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    async with running(tmp_path, max_file_bytes=MIB, max_total_bytes=3 * MIB) as case:
        for seq in range(1, 13):
            await case.sink.store(origin(), batch(seq, os.urandom(600_000), records=1))
    total = sum(path.stat().st_size for path in stored.files_in(tmp_path))
    assert total <= 3 * MIB + 600_000
    kept = {seq for _, _, seq in names(read(tmp_path))}
    assert kept == set(range(min(kept), 13))
    assert len(kept) >= 2
    assert (tmp_path / "notes.txt").exists()


@both_forms
async def test_torn_tail_of_a_crash_is_left_behind(tmp_path: Path, form: str) -> None:
    async with running(tmp_path, compression=form) as case:
        await case.sink.store(origin(), batch(1))
        await case.sink.store(origin(), batch(2))
    (path,) = stored.files_in(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    async with running(tmp_path, compression=form) as case:
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
        (path,) = stored.files_in(tmp_path)
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

    def no_probe(self: files_writer.RotatedFiles) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    async with running(tmp_path) as case:
        full = False
        monkeypatch.setattr(os, "write", limited)
        monkeypatch.setattr(files_writer.RotatedFiles, "probe", no_probe)
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
    assert len(stored.files_in(tmp_path)) == 2


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


async def test_old_files_are_deleted_and_the_open_one_kept(tmp_path: Path) -> None:
    for name in ("00000000000000000001.records", "00000000000000000002.records.zst"):
        (tmp_path / name).write_bytes(b"old")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "00000000000000000003.records").write_bytes(b"new")
    async with running(tmp_path, max_age_seconds=3600, max_file_seconds=0.2) as case:
        kept = [path.name[19] for path in stored.files_in(tmp_path)]
        assert kept == ["3"]
        await case.sink.store(origin(), batch(1))
        os.utime(stored.files_in(tmp_path)[0], (1, 1))
        await eventually(lambda: len(stored.files_in(tmp_path)) == 1)
    assert names(read(tmp_path)) == {("uid-1", 3, 1)}


async def test_files_stay_in_order_when_the_clock_was_put_back(tmp_path: Path) -> None:
    future = f"{10**19 - 1:020d}.records"
    (tmp_path / future).write_bytes(b"")
    async with running(tmp_path) as case:
        await case.sink.store(origin(), batch(1))
    last = stored.files_in(tmp_path)[-1]
    assert last.name > future
    assert names(read_file(last)) == {("uid-1", 3, 1)}


async def test_files_of_both_forms_are_read_together(tmp_path: Path) -> None:
    for seq, form in enumerate(["none", "zstd", "none"], start=1):
        async with running(tmp_path, compression=form) as case:
            await case.sink.store(origin(), batch(seq))
    assert [item.seq for item in read(tmp_path)] == [1, 2, 3]
    assert [path.suffix for path in stored.files_in(tmp_path)] == [".records", ".zst", ".records"]


async def test_batches_that_come_uncompressed_are_compressed(tmp_path: Path) -> None:
    plain = batch(1, b"a line of a log\n" * 1000)
    plain.codec, plain.records = CODEC_NONE, zstandard.decompress(plain.records)
    async with running(tmp_path) as case:
        await case.sink.store(origin(), plain)
    (path,) = stored.files_in(tmp_path)
    assert path.stat().st_size * 10 < len(plain.records)
    assert [len(item.records) for item in read(tmp_path)] == [2]


@pytest.mark.parametrize(
    ("policy", "at_once", "later"), [("always", 1, 1), ("interval", 0, 1), ("never", 0, 0)]
)
async def test_when_it_flushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, at_once: int, later: int
) -> None:
    flushes = 0
    fsync = os.fsync

    def counting(descriptor: int) -> None:
        nonlocal flushes
        flushes += 1
        fsync(descriptor)

    async with running(tmp_path, fsync=policy, fsync_interval_seconds=0.3) as case:
        await case.sink.store(origin(), batch(1))  # opens the file
        await asyncio.sleep(0.5)
        monkeypatch.setattr(os, "fsync", counting)
        await case.sink.store(origin(), batch(2))
        assert flushes == at_once or policy == "interval"
        await asyncio.sleep(0.7)
        assert flushes == later
        assert names(read(tmp_path)) == {("uid-1", 3, 1), ("uid-1", 3, 2)}


async def test_what_can_never_be_stored_is_set_aside_with_the_reason(tmp_path: Path) -> None:
    async with running(tmp_path, max_file_bytes=MIB) as case:
        for seq in range(1, 8):
            poison = batch(seq, os.urandom(600_000), records=1)
            await case.sink.set_aside(origin(), poison, "says so")
        await case.sink.store(origin(), batch(9))
    assert names(read(tmp_path)) == {("uid-1", 3, 9)}
    aside = sorted(tmp_path.glob("*.dead-letter"))
    assert len(aside) == 2
    found = [item for path in aside for item in read_file(path)]
    assert [item.seq for item in found] == [5, 6, 7]
    assert {item.reason for item in found} == {"says so"}
