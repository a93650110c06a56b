"""Configurations go into force whole or not at all, and the last good one survives."""

import asyncio
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import structlog
from fakes.agent_parts import value
from fakes.config_parts import FakePart, applying, config_of
from outrider_agent.config import applier as applier_module
from outrider_agent.config.lastgood import DamagedError, LastGood
from outrider_proto import effective
from outrider_proto.effective import Dataset, Effective
from outrider_proto.v1 import agent_pb2 as pb


@pytest.fixture(autouse=True)
def lines() -> Iterator[None]:
    """Not rendered: tracebacks in colours, as structlog makes them by default, take seconds."""
    with structlog.testing.capture_logs():
        yield


INFO, DEBUG, ERROR = map(config_of, ("info", "debug", "error"))


async def test_all_is_prepared_then_switched_then_what_was_before_is_let_go(tmp_path: Path) -> None:
    async with applying(tmp_path) as bench:
        await bench.until(lambda: bench.journal[-1:] == ["three.finish None"])
        bench.journal.clear()
        bench.applier.ask(INFO)
        report = await bench.stands(INFO, "APPLIED")
        names = [part.name for part in bench.parts]
        assert bench.journal == [
            f"{name}.{step} info" for step in ("prepare", "switch", "finish") for name in names
        ]
        assert bench.values == ["info"] * 3
        assert (report.hash, report.message, list(report.drift)) == (INFO.hash, "", [])
        phases = [r.phase for r in bench.reports if r.tried_hash == INFO.hash]
        assert phases[0] == pb.CONFIG_PHASE_APPLYING
        assert LastGood(bench.file).read() == INFO
        assert bench.file.stat().st_mode & 0o777 == 0o600
        name = "outrider_agent_config"
        assert value(bench.registry, f"{name}_info", hash=INFO.hash) == 1
        assert value(bench.registry, f"{name}_info", hash="") == 0
        assert value(bench.registry, f"{name}_phase", phase="applied") == 1
        assert value(bench.registry, f"{name}_phase", phase="applying") == 0
        assert value(bench.registry, f"{name}_applies_total", result="applied") == 1


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("step", ["prepare", "switch"])
@pytest.mark.parametrize("error", [None, ValueError("a fault")])
async def test_a_failure_anywhere_leaves_what_was(
    tmp_path: Path, part: int, step: str, error: Exception | None
) -> None:
    async with applying(tmp_path) as bench:
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")
        bench.parts[part].fail(step, level="debug", error=error)
        bench.journal.clear()
        bench.applier.ask(DEBUG)
        report = await bench.stands(DEBUG, "FAILED")
        assert bench.values == ["info"] * 3
        assert report.hash == INFO.hash
        assert report.message.startswith(f"{bench.parts[part].name}: ")
        assert ("told to fail" if error is None else "ValueError: a fault") in report.message
        assert LastGood(bench.file).read() == INFO
        assert [p.name for p in tmp_path.iterdir()] == ["last-good"]
        touched = [line for line in bench.journal if ".switch" in line]
        assert len(touched) == (0 if step == "prepare" else part + 1)
        # None is left prepared and neither switched nor dropped.
        ended = [line for line in bench.journal if ".undo" in line or ".drop" in line]
        assert len(ended) == (part if step == "prepare" else 3)
        # By itself it is not tried again; when asked, it is.
        bench.journal.clear()
        bench.parts[part].before.clear()
        bench.applier.answered()
        await asyncio.sleep(0.05)
        assert bench.journal == []
        bench.applier.ask(DEBUG)
        await bench.stands(DEBUG, "APPLIED")
        assert bench.values == ["debug"] * 3


async def test_what_cannot_go_back_is_told(tmp_path: Path) -> None:
    async with applying(tmp_path) as bench:
        bench.parts[1].fail("switch", "undo", level="debug")
        bench.applier.ask(DEBUG)
        report = await bench.stands(DEBUG, "FAILED")
        assert "two: told to fail; and it cannot go back: two: told to fail" in report.message
        assert bench.parts[0].value is None  # the others went back all the same


async def test_what_could_not_go_back_is_in_force_again_only_when_it_is(tmp_path: Path) -> None:
    async with applying(tmp_path, check_seconds=0.05) as bench:
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")
        bench.parts[1].fail("switch", "undo", level="debug")
        bench.parts[1].fail("prepare", level="info")
        bench.applier.ask(DEBUG)
        report = await bench.stands(DEBUG, "FAILED")
        assert (report.hash, bench.applier.in_force) == ("", "")
        await bench.until(lambda: bench.applier.report().drift)
        assert "neither the old nor the new" in bench.applier.report().drift[0]
        assert bench.values == ["info", "debug", "info"]
        bench.parts[1].before.clear()
        await bench.until(lambda: bench.applier.in_force == INFO.hash)
        assert bench.values == ["info"] * 3
        await bench.until(lambda: not bench.reports[-1].drift)
        assert (bench.reports[-1].hash, bench.reports[-1].tried_hash) == (INFO.hash, DEBUG.hash)
        # And where a server asks for the old one meanwhile, all of it is put into force.
        bench.parts[1].fail("switch", "undo", level="debug")
        bench.applier.ask(DEBUG)
        await bench.stands(DEBUG, "FAILED")
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")
        assert bench.values == ["info"] * 3


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (pb.EffectiveConfig(hash="0" * 64, content=b"{}"), "hash does not match"),
        (
            pb.EffectiveConfig(
                hash=effective.digest(b'{"agent":{"colour":"red"}}'),
                content=b'{"agent":{"colour":"red"}}',
            ),
            "colour",
        ),
        (pb.EffectiveConfig(hash=effective.digest(b"{"), content=b"{"), "refused"),
    ],
)
async def test_what_is_none_is_refused_before_anything_is_touched(
    tmp_path: Path, config: pb.EffectiveConfig, said: str
) -> None:
    async with applying(tmp_path) as bench:
        await bench.until(lambda: bench.journal[-1:] == ["three.finish None"])
        bench.journal.clear()
        bench.applier.ask(config)
        report = await bench.stands(config, "FAILED")
        assert said in report.message
        assert bench.journal == []


async def test_a_full_disk_fails_it_whole_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with applying(tmp_path) as bench:
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")
        for step in ("prepare", "commit"):
            with monkeypatch.context() as patch:
                patch.setattr(LastGood, step, full)
                bench.applier.ask(DEBUG)
                report = await bench.stands(DEBUG, "FAILED")
            assert "No space left" in report.message
            assert "state.directory" in report.message
            assert bench.values == ["info"] * 3
            assert LastGood(bench.file).read() == INFO
    # And it is no reason not to begin with what is on the disk.
    monkeypatch.setattr(LastGood, "prepare", full)
    async with applying(tmp_path) as bench:
        await bench.stands(INFO, "APPLIED")
        assert bench.values == ["info"] * 3


async def test_a_newer_one_does_not_wait_for_one_that_is_still_prepared(tmp_path: Path) -> None:
    async with applying(tmp_path) as bench:
        await bench.until(lambda: bench.journal[-1:] == ["three.finish None"])
        bench.journal.clear()
        bench.parts[1].go_on.clear()  # as with a server of packages that hangs
        bench.applier.ask(DEBUG)
        await bench.until(lambda: "two.prepare debug" in bench.journal)
        bench.applier.ask(DEBUG)
        bench.applier.ask(ERROR)
        bench.applier.ask(INFO)
        await bench.until(lambda: "one.drop debug" in bench.journal)
        bench.parts[1].go_on.set()
        await bench.stands(INFO, "APPLIED")
        assert not [line for line in bench.journal if "error" in line or "switch debug" in line]
        name = "outrider_agent_config_applies_total"
        assert value(bench.registry, name, result="superseded") == 1


async def test_one_asked_for_again_while_it_is_given_up_is_begun_again(tmp_path: Path) -> None:
    async with applying(tmp_path) as bench:
        await bench.until(lambda: bench.journal[-1:] == ["three.finish None"])
        bench.parts[1].go_on.clear()
        bench.applier.ask(DEBUG)
        await bench.until(lambda: "two.prepare debug" in bench.journal)
        bench.applier.ask(INFO)
        bench.applier.ask(DEBUG)
        bench.parts[1].go_on.set()
        await bench.stands(DEBUG, "APPLIED")
        assert bench.values == ["debug"] * 3
        assert not [line for line in bench.journal if "info" in line]


async def test_one_that_hangs_fails_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applier_module, "PREPARE_SECONDS", 0.1)
    async with applying(tmp_path) as bench:
        await bench.until(lambda: bench.journal[-1:] == ["three.finish None"])
        bench.parts[2].go_on.clear()
        bench.applier.ask(DEBUG)
        report = await bench.stands(DEBUG, "FAILED")
        assert "three: not done within" in report.message


async def test_it_begins_with_the_last_good_one(tmp_path: Path) -> None:
    async with applying(tmp_path) as bench:
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")
    async with applying(tmp_path) as bench:
        report = await bench.stands(INFO, "APPLIED")
        assert report.hash == INFO.hash
        assert bench.values == ["info"] * 3
        assert "one.prepare None" not in bench.journal  # not by way of its own settings


async def test_where_that_fails_the_own_settings_hold_and_a_server_has_it_tried_again(
    tmp_path: Path,
) -> None:
    async with applying(tmp_path) as bench:
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")

    def spoil(parts: Sequence[FakePart]) -> None:
        parts[2].fail("prepare", level="info")

    async with applying(tmp_path, setup=spoil) as bench:
        report = await bench.stands(INFO, "FAILED")
        assert (report.hash, bench.values) == ("", [None] * 3)
        await bench.until(lambda: "three.finish None" in bench.journal)
        assert LastGood(bench.file).read() == INFO  # kept
        bench.parts[2].before.clear()
        bench.applier.answered()
        await bench.stands(INFO, "APPLIED")


@pytest.mark.parametrize("place", [0, 5, 20, 60, 84, 90, -1])
async def test_a_damaged_file_is_set_aside_and_told(tmp_path: Path, place: int) -> None:
    async with applying(tmp_path) as bench:
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")
    raw = bytearray(bench.file.read_bytes())
    raw[place] ^= 1
    bench.file.write_bytes(raw)
    async with applying(tmp_path, check_seconds=0.05) as bench:
        await bench.until(lambda: any(r.drift for r in bench.reports))
        report = next(r for r in bench.reports if r.drift)
        assert report.phase == pb.CONFIG_PHASE_NONE
        assert "was damaged" in report.drift[0]
        assert (tmp_path / "last-good.damaged").read_bytes() == raw
        assert not bench.file.exists()
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")


@pytest.mark.parametrize("length", [0, 1, 17, 40, 83, 84])
def test_a_file_that_was_cut_is_damaged(tmp_path: Path, length: int) -> None:
    last_good = LastGood(tmp_path / "file")
    last_good.prepare(INFO)
    last_good.commit()
    last_good.path.write_bytes(last_good.path.read_bytes()[:length])
    with pytest.raises(DamagedError):
        last_good.read()


def test_a_crash_before_the_rename_leaves_the_old_one(tmp_path: Path) -> None:
    last_good = LastGood(tmp_path / "file")
    assert last_good.read() is None
    last_good.prepare(INFO)
    assert last_good.read() is None
    last_good.commit()
    last_good.prepare(DEBUG)
    again = LastGood(tmp_path / "file")
    assert again.read() == INFO
    again.prepare(ERROR)  # what was left is in nobody's way
    again.commit()
    assert again.read() == ERROR


@pytest.mark.parametrize("how", ["changed", "gone", "other"])
async def test_a_file_changed_by_hand_is_put_right_and_told(tmp_path: Path, how: str) -> None:
    async with applying(tmp_path, check_seconds=0.05) as bench:
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")
        if how == "gone":
            bench.file.unlink()
        elif how == "changed":
            bench.file.write_bytes(bench.file.read_bytes().replace(b"info", b"warn"))
        else:
            other = LastGood(bench.file)
            other.prepare(DEBUG)
            other.commit()
        await bench.until(lambda: any("was put right" in d for r in bench.reports for d in r.drift))
        assert LastGood(bench.file).read() == INFO
        await bench.until(lambda: not bench.applier.report().drift)
        assert bench.values == ["info"] * 3


async def test_drift_of_parts_and_states_of_plugins_are_told_once(tmp_path: Path) -> None:
    async with applying(tmp_path, check_seconds=0.02) as bench:
        await bench.until(lambda: bench.journal[-1:] == ["three.finish None"])
        count = len(bench.reports)
        bench.parts[1].drift = ["nobody listens"]
        await bench.until(lambda: list(bench.applier.report().drift) == ["nobody listens"])
        assert value(bench.registry, "outrider_agent_config_drift") == 1
        state = pb.PluginState(name="fim", phase=pb.PLUGIN_PHASE_BACKING_OFF)
        bench.applier.plugins_changed([state])
        told = [r for r in bench.reports[count:] if r.drift]
        bench.applier.plugins_changed([state])
        assert told[-1].plugins[0] == state
        assert len([r for r in bench.reports if r.plugins]) == 1


async def test_servers_hear_of_changes_and_answers_alone(tmp_path: Path) -> None:
    async with applying(tmp_path, check_seconds=0.01) as bench:
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")
        await asyncio.sleep(0.05)
        count = len(bench.reports)
        bench.applier.answered()
        await asyncio.sleep(0.1)
        assert len(bench.reports) == count
        bench.journal.clear()
        bench.applier.ask(INFO)
        await bench.until(lambda: len(bench.reports) == count + 1)
        await asyncio.sleep(0.05)
        assert (len(bench.reports), bench.journal) == (count + 1, [])


async def test_one_from_the_disk_that_this_version_does_not_know_is_told_and_kept(
    tmp_path: Path,
) -> None:
    content = b'{"agent":{"colour":"red"}}'
    newer = pb.EffectiveConfig(hash=effective.digest(content), content=content)
    last_good = LastGood(tmp_path / "last-good")
    last_good.prepare(newer)
    last_good.commit()
    async with applying(tmp_path) as bench:
        report = await bench.stands(newer, "FAILED")
        assert "colour" in report.message
        await bench.until(lambda: "three.finish None" in bench.journal)
        assert last_good.read() == newer
        bench.applier.ask(INFO)
        await bench.stands(INFO, "APPLIED")
        assert last_good.read() == INFO


async def test_what_the_agent_does_not_do_yet_is_told(tmp_path: Path) -> None:
    config = effective.pack(Effective(datasets=(Dataset(name="blocklist"),)))
    async with applying(tmp_path) as bench:
        bench.applier.ask(config)
        await bench.stands(config, "APPLIED")
        await bench.until(lambda: bench.applier.report().drift)
        assert "blocklist" in bench.applier.report().drift[0]
