"""Whatever a plug-in does to its working directory, the agent goes on."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from fakes.plugin_bench import plugins_in
from outrider_agent.plugins import places, removing, usage, watching
from outrider_agent.plugins.packages import Packages
from outrider_agent.settings import PluginsSettings
from outrider_agent.tasks.program import Children
from outrider_proto import records

#: More than Python calls nest.
DEEP = 1_200


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A folder `work/gone` with folders nested deeper than a path is long."""
    folder = tmp_path / "work/gone"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"x" * 10_000)
    here = os.open(folder, os.O_RDONLY)
    for _ in range(DEEP):
        os.mkdir("nested", dir_fd=here)
        below = os.open("nested", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=here))
    os.close(here)
    yield folder
    if folder.exists():  # pytest itself cannot remove it
        removing.remove(folder)


def test_deep_folders_are_added_up_to_a_depth(deep: Path) -> None:
    assert usage.disk_use(deep) >= 10_000


def test_folders_that_vanish_meanwhile_count_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    scandir = os.scandir

    def vanishing(path: str) -> "os._ScandirIterator[str]":
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert usage.disk_use(tmp_path) >= 10_000
    assert usage.disk_use(tmp_path / "never") == 0


def test_only_the_first_files_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        (tmp_path / str(number)).write_bytes(b"x" * 4096)
    whole = usage.disk_use(tmp_path)
    monkeypatch.setattr(usage, "FILES", 5)
    assert 0 < usage.disk_use(tmp_path) < whole


def test_deep_folders_are_removed(deep: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (deep / "link").symlink_to(outside)
    (tmp_path / "work/link").symlink_to(outside)
    (tmp_path / "work/kept").mkdir()
    assert places.keep_only(tmp_path, {"kept"}) == []
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["kept"]
    assert (outside / "kept").exists()
    assert places.keep_only(tmp_path / "never", ()) == []


def test_very_many_files_are_removed_in_several_goes(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    for number in range(10):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "file").touch()
    for _ in range(2):
        with pytest.raises(BlockingIOError):
            removing.remove(folder, entries=12)
    removing.remove(folder)
    assert not folder.exists()


async def test_what_cannot_be_removed_fails_no_switch_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    folder = tmp_path / "work/gone"
    folder.mkdir(parents=True)
    async with plugins_in(tmp_path) as bench:
        monkeypatch.setattr("outrider_agent.plugins.manager.CALM_SECONDS", 0.05)
        with monkeypatch.context() as patch, structlog.testing.capture_logs() as lines:
            patch.setattr(places, "remove", refuse)
            await bench.apply(bench.plugin("emit 1"))
            await bench.until(lambda: bench.state().healthy)
            told = [line for line in lines if "folders of plug-ins" in line["event"]]
            assert len(told) == 1
            assert "Operation not permitted" in told[0]["problems"][0]
        await bench.apply(bench.plugin("emit 2"))
        await bench.until(lambda: not folder.exists())
        assert (tmp_path / "work/wire").exists()


async def test_a_fault_in_a_look_is_logged_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise RecursionError("too deep")

    monkeypatch.setattr("outrider_agent.plugins.manager.CALM_SECONDS", 0.05)
    with structlog.testing.capture_logs() as lines:
        async with plugins_in(tmp_path, heartbeat_seconds=1.0) as bench:
            with monkeypatch.context() as patch:
                patch.setattr(watching, "used_by", fail)
                await bench.apply(bench.plugin("emit 1"))
                await bench.until(lambda: bench.value("faults_total", kind="look") >= 2)
            before = bench.value("faults_total", kind="look")
            with monkeypatch.context() as patch:
                patch.setattr(usage, "disk_use", fail)
                await bench.until(lambda: bench.value("faults_total", kind="look") > before)
            await bench.until(lambda: bench.sink.fields(records.PLUGIN_HEARTBEAT))
    assert len([line for line in lines if "cannot be looked at" in line["event"]]) == 1


async def test_what_was_unpacked_is_removed_however_deep_it_is(deep: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "plugins" / "unpacked"
    unpacked.mkdir(parents=True)
    deep.rename(unpacked / "x")
    packages = Packages(tmp_path / "plugins", PluginsSettings(), Children())
    packages.clear()
    assert not unpacked.exists()
    packages.clear()  # nothing is there: nothing happens
