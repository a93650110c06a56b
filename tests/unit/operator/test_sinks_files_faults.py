"""The file sink's faults: a disk really full, kill -9 under load, cancelled in mid-write."""

import asyncio
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fakes.files_sink import read, running
from fakes.gateway import eventually
from fakes.sink_suite import batch, names, origin
from outrider_operator.core.sink import SinkUnavailableError
from outrider_operator.sinks import files, files_writer
from outrider_proto import stored

MIB = 1024 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("form", ["zstd", "none"])
async def test_a_disk_that_is_full_and_has_room_again(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(files, "PROBE_SECONDS", 0.05)
    # Room for two writes of the largest size: the third fails in its middle.
    async with running(small_disk, compression=form, min_free_bytes=0) as case:
        kept, seq = set(), 0
        with pytest.raises(SinkUnavailableError, match=r"No space left|are free"):
            while seq < 100:
                seq += 1
                await case.sink.store(origin(), batch(seq, os.urandom(700_000), records=1))
                kept.add(seq)
        assert 2 <= len(kept) <= 5
        ballast = small_disk / "ballast"
        with suppress(OSError):
            ballast.write_bytes(bytes(8 * MIB))
        await eventually(lambda: not case.health.ready)
        (condition,) = case.health.readiness()
        assert "free some space" in condition.reason
        with pytest.raises(SinkUnavailableError):
            await case.sink.store(origin(), batch(101))
        ballast.unlink()
        stored.files_in(small_disk)[0].unlink()
        await eventually(lambda: case.health.ready)
        await case.sink.store(origin(), batch(102))
        assert {found for _, _, found in names(read(small_disk))} >= {102}


async def test_a_file_deleted_beneath_it_takes_nothing_more(tmp_path: Path) -> None:
    async with running(tmp_path) as case:
        await case.sink.store(origin(), batch(1))
        stored.files_in(tmp_path)[0].unlink()
        await case.sink.store(origin(), batch(2))
    assert {seq for _, _, seq in names(read(tmp_path))} == {2}


async def test_room_is_kept_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PROBE_SECONDS", 0.05)
    found = os.statvfs
    free = 10 * MIB

    def limited(path: Any) -> Any:
        real = found(path)
        return os.statvfs_result((1, 1, *real[2:4], free, *real[5:]))

    monkeypatch.setattr(os, "statvfs", limited)
    async with running(tmp_path, min_free_bytes=5 * MIB) as case:
        await case.sink.store(origin(), batch(1))
        free = 5 * MIB
        with pytest.raises(SinkUnavailableError, match=r"minFreeBytes is 5242880.*free some space"):
            await case.sink.store(origin(), batch(2))
        free = 10 * MIB
        await eventually(lambda: case.health.ready)
        await case.sink.store(origin(), batch(3))
    assert {seq for _, _, seq in names(read(tmp_path))} == {1, 3}
    # Nothing was written when it was refused: the file goes on.
    assert len(stored.files_in(tmp_path)) == 1


WRITER = """
import asyncio, itertools, os, sys
from fakes.files_sink import running
from fakes.sink_suite import batch, origin
from pathlib import Path

async def main():
    policy, form, epoch = sys.argv[2:]
    async with running(Path(sys.argv[1]), fsync=policy, compression=form) as case:
        async def agent(name):
            for seq in itertools.count(1):
                made = batch(seq, os.urandom(3000), epoch=int(epoch))
                await case.sink.store(origin(name), made)
                # One write: what is printed was acknowledged before.
                os.write(1, f"{name} {seq}\\n".encode())
        await asyncio.gather(*(agent(f"uid-{n}") for n in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize(("policy", "form"), [("always", "zstd"), ("never", "none")])
def test_all_that_was_acknowledged_is_there_after_a_kill(
    tmp_path: Path, policy: str, form: str
) -> None:
    acknowledged: set[tuple[str, int, int]] = set()
    tests = str(Path(__file__).parents[2])
    for epoch in (1, 2, 3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), policy, form, str(epoch)],
            env={**os.environ, "PYTHONPATH": tests},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(200)]
            writer.kill()
            lines += writer.stdout.read().splitlines()
        whole = [line.split() for line in lines if len(line.split()) == 2]
        acknowledged |= {(agent, epoch, int(seq)) for agent, seq in whole}
    assert len(acknowledged) >= 500
    assert acknowledged <= names(read(tmp_path))


async def test_cancelled_in_the_middle_of_a_write_it_closes_after_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []
    append, close = files_writer.RotatedFiles.append, files_writer.RotatedFiles.close

    def slow(self: Any, batches: Any) -> int:
        begun.set()
        assert go_on.wait(10)
        size = append(self, batches)
        done.append("written")
        return size

    def noted(self: Any) -> None:
        done.append("closed")
        close(self)

    async with running(tmp_path) as case:
        monkeypatch.setattr(files_writer.RotatedFiles, "append", slow)
        monkeypatch.setattr(files_writer.RotatedFiles, "close", noted)
        storing = asyncio.ensure_future(case.sink.store(origin(), batch(1)))
        await asyncio.to_thread(begun.wait, 10)
        case.task.cancel()
        with pytest.raises(SinkUnavailableError, match="stops"):
            await storing
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await case.task
    assert done == ["written", "closed"]
    assert {seq for _, _, seq in names(read(tmp_path))} == {1}


async def test_a_disk_that_hangs_is_told_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SLOW_SECONDS", 0.1)
    go_on = threading.Event()
    append = files_writer.RotatedFiles.append

    def hanging(self: Any, batches: Any) -> int:
        assert go_on.wait(10)
        return append(self, batches)

    async with running(tmp_path) as case:
        monkeypatch.setattr(files_writer.RotatedFiles, "append", hanging)
        storing = asyncio.ensure_future(case.sink.store(origin(), batch(1)))
        await eventually(lambda: not case.health.ready)
        (condition,) = case.health.readiness()
        assert "has not answered" in condition.reason
        with pytest.raises(SinkUnavailableError):
            await case.sink.store(origin(), batch(2))
        go_on.set()
        await storing
        await eventually(lambda: case.health.ready)


async def test_files_that_are_too_old_make_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without disk space nothing is written, nothing else deletes them."""
    monkeypatch.setattr(files, "PROBE_SECONDS", 0.05)
    async with running(tmp_path, max_file_seconds=1, max_age_seconds=2) as case:
        await case.sink.store(origin(), batch(1))
        room = files_writer.RotatedFiles._check_room

        def full(self: Any, size: int) -> None:
            if any(stored.files_in(tmp_path)):
                raise OSError(errno.ENOSPC, "no room")
            room(self, size)

        monkeypatch.setattr(files_writer.RotatedFiles, "_check_room", full)
        with pytest.raises(SinkUnavailableError):
            await case.sink.store(origin(), batch(2))
        assert not case.health.ready
        await eventually(lambda: case.health.ready, 10)
        assert not stored.files_in(tmp_path)


async def test_a_disk_that_hangs_in_a_flush_is_told_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SLOW_SECONDS", 0.1)
    go_on = threading.Event()

    def hanging(_: int) -> None:
        assert go_on.wait(10)

    async with running(tmp_path, fsync="interval", fsync_interval_seconds=0.3) as case:
        await case.sink.store(origin(), batch(1))
        monkeypatch.setattr(os, "fsync", hanging)
        try:
            await eventually(lambda: not case.health.ready, 5)
        finally:
            go_on.set()
        await eventually(lambda: case.health.ready)


def test_a_batch_costs_little(tmp_path: Path) -> None:
    """Group commit: thousands of batches of 20 kB a second, and few flushes."""

    async def load() -> float:
        made = [batch(seq, os.urandom(10_000)) for seq in range(1, 301)]
        where = origin()
        async with running(tmp_path) as case:
            before = time.process_time()
            await asyncio.gather(*(case.sink.store(where, item) for item in made))
            return (time.process_time() - before) / len(made)

    seconds = asyncio.run(load())
    assert seconds < 0.001, f"{seconds * 1e6:.0f} us a batch"
