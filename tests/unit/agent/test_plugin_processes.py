"""Plug-ins as processes, in C and made for the wire alone: they work, and harm only themselves."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes.agent_parts import ListSink
from fakes.plugin_bench import NUMBERED, PluginBench, numbered, plugins_in
from outrider_agent.core.records import RecordClass
from outrider_agent.plugins import cgroups, manager
from outrider_agent.plugins.manager import PluginError
from outrider_proto import limits, records
from outrider_proto.v1 import agent_pb2 as pb


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[PluginBench]:
    async with plugins_in(tmp_path) as found:
        yield found


def phase(bench: PluginBench, name: str = "wire") -> str:
    return pb.PluginPhase.Name(bench.state(name).phase).removeprefix("PLUGIN_PHASE_")


async def test_a_plugin_for_the_wire_runs_unchanged(bench: PluginBench) -> None:
    told: list[str] = []
    bench.plugins.on_change = lambda: told.append(
        ",".join(pb.PluginPhase.Name(s.phase) for s in bench.plugins.states())
    )
    await bench.apply(bench.plugin("emit 1000"))
    await bench.until(lambda: len(bench.numbers()) == 1000)
    assert bench.numbers() == list(range(1000))
    record, record_class = bench.sink.records[0]
    assert record_class is RecordClass.LOG
    assert abs(record.timestamp - time.time()) < 60
    await bench.until(lambda: bench.state().healthy)
    answer = await bench.plugins.ask("wire", 5100, "how are you?", 10)
    assert answer == {"data": "how are you?"}
    large = "x" * 200_000
    assert (await bench.plugins.ask("wire", 5100, large, 10))["data"] == large
    assert bench.value("records_total") == 1002
    assert bench.value("up") == bench.value("healthy") == 1
    await bench.apply()
    assert bench.plugins.states() == []
    assert bench.processes() == []
    assert bench.registry.get_sample_value("outrider_agent_plugin_up", {"plugin": "wire"}) is None
    assert told[0] == "PLUGIN_PHASE_FETCHING"
    assert "PLUGIN_PHASE_RUNNING" in told
    assert not (bench.directory / "work/wire").exists()


async def test_what_is_not_text_is_replaced_and_passed_on(bench: PluginBench) -> None:
    await bench.apply(bench.plugin("notext"))
    await bench.until(bench.numbers)
    assert bench.sink.fields(NUMBERED) == [{"n": "1", "name": "caf\ufffd"}]


async def test_its_environment_and_directory_are_its_own(bench: PluginBench) -> None:
    script = b"#!/bin/sh\necho env=$(env | sort | tr '\\n' ' ')\npwd > pwd\nls -l > ls\nsleep 100\n"
    await bench.apply(bench.plugin("settings", content=script, env={"DETAIL": "x", "A": "b"}))
    work = bench.directory / "work/wire"
    await bench.until(lambda: (work / "ls").exists() and (work / "ls").read_text())
    assert (work / "pwd").read_text().strip() == str(work)
    assert work.stat().st_mode & 0o777 == 0o700
    assert "wire -> " in (work / "ls").read_text()  # its package's files are at hand
    pid = bench.pid()
    environment = dict(
        line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if line
    )
    assert environment["DETAIL"] == "settings"
    assert environment["A"] == "b"
    assert environment["HOME"] == str(work)
    assert not {"PYTHONPATH", "VIRTUAL_ENV", "OUTRIDER_SERVER_TOKEN_FILE"} & set(environment)
    assert os.getpgid(pid) == pid != os.getpgid(0)
    assert sorted(int(fd) for fd in os.listdir(f"/proc/{pid}/fd"))[:5] == [0, 1, 2, 3, 4]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
async def test_it_is_of_its_user(bench: PluginBench) -> None:
    await bench.apply()
    for folder in [bench.directory, *bench.directory.parents]:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    wanted = bench.plugin("emit 1", user="12345")
    with pytest.raises(PluginError, match=r"plugins\.allowedUsers .* lacks 12345"):
        await bench.plugins.prepare([wanted])
    async with plugins_in(bench.directory / "other", allowed_users=("12345",)) as other:
        before = os.getgroups()
        os.setgroups([4242])  # none of the agent's groups is to be its
        try:
            await other.apply(other.plugin("emit 1", user="12345"))
            await other.until(other.numbers)
        finally:
            os.setgroups(before)
        status = Path(f"/proc/{other.processes()[0]}/status").read_text()
        assert "Uid:\t12345\t12345\t12345" in status
        assert "Groups:\t \n" in status
        other.directory.chmod(0o700)
        with pytest.raises(PluginError, match=r"12345 may not enter .*plugins\.directory"):
            await other.plugins.prepare([other.plugin("emit 2", user="12345")])


@pytest.mark.parametrize(
    ("detail", "reason", "text"),
    [
        ("rubbish", "BadRecords", "4294967295 bytes"),
        ("norecord", "BadRecords", "no Record"),
        ("reserved", "ReservedType", "type 1000"),
        (f"huge {limits.RECORD_BYTES + 1}", "BadRecords", "bytes; they must have"),
        ("torn", "Ended", "exit code 0"),
        ("exit 7", "Ended", "exit code 7"),
    ],
)
async def test_what_it_does_wrong_is_told_and_it_is_started_again(
    bench: PluginBench, detail: str, reason: str, text: str
) -> None:
    seen: list[pb.PluginState] = []
    bench.plugins.on_change = lambda: seen.extend(bench.plugins.states())
    good = bench.plugin("emit 50", name="good")
    await bench.apply(bench.plugin(detail), good)
    await bench.until(lambda: bench.state().restarts)
    backing_off = [s for s in seen if s.phase == pb.PLUGIN_PHASE_BACKING_OFF and s.message]
    assert backing_off[0].reason == reason
    assert text in backing_off[0].message
    assert not backing_off[0].healthy
    await bench.until(lambda: bench.state("good").healthy)
    assert bench.state("good").restarts == 0
    if detail in ("rubbish", "torn"):  # what came before counts
        assert 1 in bench.numbers()
    if detail == "torn":
        assert bench.value("faults_total", kind="torn") >= 1


async def test_one_that_dies_in_a_loop_fails_until_its_config_changes(bench: PluginBench) -> None:
    await bench.apply(bench.plugin("exit 3"))
    await bench.until(lambda: phase(bench) == "FAILED")
    state = bench.state()
    assert state.reason == "CrashLoop"
    assert "exit code 3" in state.message
    assert state.restarts == 3
    with pytest.raises(PluginError, match="does not run now") as caught:
        await bench.plugins.ask("wire", 1, "", 5)
    assert caught.value.reason == "PluginNotRunning"
    await bench.apply(bench.plugin("exit 3"))  # the same: it stays failed
    assert phase(bench) == "FAILED"
    await bench.apply(bench.plugin("emit 1"))
    await bench.until(lambda: bench.state().healthy)


async def test_a_failed_one_is_tried_again_after_a_rest(tmp_path: Path) -> None:
    from outrider_agent.core.plugin_restarts import RestartLimits

    quick = RestartLimits(base=0.01, cap=0.01, ends=2, window=60, rest=0.3)
    async with plugins_in(tmp_path, restarts=quick) as bench:
        await bench.apply(bench.plugin("exit 3"))
        await bench.until(lambda: bench.state().restarts > 4)


async def test_one_that_cannot_start_says_so(bench: PluginBench) -> None:
    await bench.apply(bench.plugin("x", content=b"#!/no/such/interpreter\n"))
    await bench.until(lambda: bench.state().message)
    assert "not found (or its interpreter is missing)" in bench.state().message


async def test_one_that_hangs_and_ignores_term_is_ended(bench: PluginBench) -> None:
    await bench.apply(bench.plugin("stubborn"), bench.plugin("hang", name="hangs"))
    await bench.until(lambda: bench.numbers() and bench.processes("hangs"))
    began = time.monotonic()
    await bench.apply()
    assert time.monotonic() - began < 5
    assert bench.processes() == bench.processes("hangs") == []


async def test_children_that_leave_it_are_ended_with_it(bench: PluginBench) -> None:
    await bench.apply(bench.plugin("fork 4"))
    await bench.until(lambda: len(bench.processes()) == 9)
    old = set(bench.processes())
    os.kill(bench.pid(), signal.SIGKILL)
    await bench.until(lambda: bench.state().restarts == 1)
    assert not old & set(bench.processes())
    await bench.until(lambda: len(bench.processes()) == 9)
    await bench.apply()
    assert bench.processes() == []


async def test_a_flood_harms_only_itself(tmp_path: Path) -> None:
    async with plugins_in(tmp_path, max_records_per_second=1000) as bench:
        await bench.apply(bench.plugin("stream"), bench.plugin("emit 0", name="good"))
        await bench.until(lambda: len(bench.numbers()) >= 2500)
        began, before = time.monotonic(), len(bench.numbers())
        for _ in range(20):
            await bench.plugins.ask("good", 5100, "x", 5)
        assert time.monotonic() - began < 2
        await bench.until(lambda: time.monotonic() - began > 2)
        rate = (len(bench.numbers()) - before) / (time.monotonic() - began)
        # A pipe's content goes at once, so it may be more over so short a time.
        assert rate < 4000, rate
        assert bench.value("throttled_seconds_total") > 0
        found = bench.numbers()
        assert found == list(range(len(found)))


async def test_one_that_never_reads_its_tasks_fails_them(bench: PluginBench) -> None:
    await bench.apply(bench.plugin("hang"), bench.plugin("emit 0", name="good"))
    await bench.until(lambda: phase(bench) == phase(bench, "good") == "RUNNING")
    asked = [
        asyncio.create_task(bench.plugins.ask("wire", 1, "x" * 60_000, 0.5)) for _ in range(80)
    ]
    assert (await bench.plugins.ask("good", 5100, "x", 5)) == {"data": "x"}
    results = await asyncio.gather(*asked, return_exceptions=True)
    reasons = [getattr(result, "reason", result) for result in results]
    assert set(reasons) == {"NoAnswer", "PluginFull"}
    assert reasons.count("NoAnswer") <= 70
    assert any("it did not read the task" in str(result) for result in results)
    assert bench.value("tasks_total", result="full") > 0


async def test_tasks_fail_when_the_plugin_ends_or_is_unknown(bench: PluginBench) -> None:
    await bench.apply(bench.plugin("emit 0"))
    await bench.until(lambda: phase(bench) == "RUNNING")
    waiting = asyncio.create_task(bench.plugins.ask("wire", 14, "", 30))  # takes it, says nothing
    await asyncio.sleep(0)
    with pytest.raises(PluginError) as caught:
        await bench.plugins.ask("wire", 13, "", 30)  # ends
    assert caught.value.reason == "PluginEnded"
    with pytest.raises(PluginError, match="it ended before it answered"):
        await waiting
    with pytest.raises(PluginError, match=r"no such plug-in \(it has: wire\)") as caught:
        await bench.plugins.ask("other", 1, "", 5)
    assert caught.value.reason == "UnknownPlugin"


@pytest.mark.parametrize("rate", [0, 2000])  # 2000: its pipe is full when it is to end
async def test_an_upgrade_under_load_loses_no_record(tmp_path: Path, rate: int) -> None:
    settings: dict[str, Any] = {"max_bytes_per_second": 0, "termination_grace_seconds": 20.0}
    async with plugins_in(tmp_path, max_records_per_second=rate, **settings) as bench:
        for version in range(3):
            enough = version * 10_000_000 + 2000
            wanted = bench.plugin(f"stream {version * 10_000_000}", version=f"1.{version}")
            await bench.apply(wanted)
            await bench.until(partial(reached, bench.sink, enough))
            assert len(bench.processes()) == 1
        await bench.apply(bench.plugin("emit 0", version="2"))
        found = bench.numbers()
        written = {
            int(path.suffix[1:]): int(path.read_text())
            for path in (tmp_path / "work/wire").glob("written.*")
        }
    assert len(written) == 3
    expected = [first + n for first in sorted(written) for n in range(written[first])]
    # All that was written, and all of one version's before the next one's.
    assert found == expected


def reached(sink: ListSink, number: int) -> bool:
    return numbered([record for record, _ in sink.records[-1:]]) > [number]


async def test_a_full_recorder_makes_it_wait_and_loses_nothing(tmp_path: Path) -> None:
    sink = _Slow()
    async with plugins_in(tmp_path, sink=sink) as bench:
        await bench.apply(bench.plugin("emit 5000"))
        await bench.until(lambda: len(sink.records) == 100)
        await asyncio.sleep(0.2)
        assert len(sink.records) == 100
        sink.room.set()
        await bench.until(lambda: len(sink.records) == 5000)
        assert bench.numbers() == list(range(5000))


async def test_what_cannot_be_stored_at_its_end_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outrider_agent.plugins import runner

    monkeypatch.setattr(runner, "DRAIN_SECONDS", 0.2)
    sink = _Slow()
    async with plugins_in(tmp_path, sink=sink) as bench:
        await bench.apply(bench.plugin("emit 1000"))
        await bench.until(lambda: len(sink.records) == 100)
        await bench.apply(bench.plugin("emit 0", version="2"))
        await bench.until(lambda: bench.state().healthy)
        sink.room.set()
        await bench.until(lambda: len(sink.records) == 1000)


class _Slow(ListSink):
    """Has room for 100 records, until `room` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.room = asyncio.Event()

    async def put(self, record: pb.EncodedRecord, record_class: RecordClass) -> None:
        if len(self.records) >= 100:
            await self.room.wait()
        await super().put(record, record_class)


async def test_what_it_prints_is_logged_at_a_rate(bench: PluginBench) -> None:
    await bench.apply(bench.plugin("print 5000"))
    await bench.until(
        lambda: (
            bench.value("log_lines_total", result="logged")
            + bench.value("log_lines_total", result="suppressed")
            == 5000
        )
    )
    assert 1 <= bench.value("log_lines_total", result="logged") <= 100


async def test_memory_beyond_its_limit_ends_it_without_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(manager, "CALM_SECONDS", 0.05)
    seen: list[pb.PluginState] = []
    async with plugins_in(tmp_path, cgroup_root=tmp_path / "none") as bench:
        bench.plugins.on_change = lambda: seen.extend(bench.plugins.states())
        await bench.apply(bench.plugin("hog 100", resources={"memory_bytes": 32 * 1024 * 1024}))
        await bench.until(lambda: bench.state().restarts)
        messages = [s.message for s in seen]
        assert "memory limited by looks at its processes, and by its address space" in messages
        assert any("it may use 33554432" in message for message in messages)
        assert "MemoryLimit" in {s.reason for s in seen}


async def test_memory_and_processor_time_are_limited_by_groups(bench: PluginBench) -> None:
    resources = {"memory_bytes": 32 * 1024 * 1024, "cpu_millis": 200}
    seen: list[pb.PluginState] = []
    bench.plugins.on_change = lambda: seen.extend(bench.plugins.states())
    await bench.apply(bench.plugin("hog 100", resources=resources))
    group = bench.plugins._runners["wire"].group
    await bench.until(lambda: bench.plugins._runners["wire"].group)
    group = bench.plugins._runners["wire"].group
    assert group is not None
    if group.memory is None:
        pytest.fail(f"this machine lets us make no group: {group}")
    await bench.until(lambda: bench.state().restarts)
    assert "OutOfMemory" in {s.reason for s in seen}
    await bench.apply()
    assert not group.memory.exists()


async def test_heartbeats_have_the_known_fields(tmp_path: Path) -> None:
    async with plugins_in(tmp_path, heartbeat_seconds=1.0) as bench:
        await bench.apply(bench.plugin("emit 10"))
        bench.plugins._watch.judge([], {})
        await bench.until(lambda: bench.sink.fields(records.PLUGIN_HEARTBEAT))
        fields = bench.sink.fields(records.PLUGIN_HEARTBEAT)[0]
    known = "name pversion cpu rss read_speed write_speed pid nfd start_time du "
    known += "rx_tps tx_tps rx_speed tx_speed"
    assert set(fields) == set(known.split())
    assert fields["name"] == "wire"
    assert fields["pversion"] == "1.0"
    assert int(fields["rss"]) > 0


async def test_a_file_changed_by_hand_is_seen_and_put_back(bench: PluginBench) -> None:
    await bench.apply(bench.plugin("emit 0"))
    await bench.until(lambda: phase(bench) == "RUNNING")
    assert bench.plugins.drift() == []
    executable = bench.plugins._runners["wire"].package.executable
    executable.unlink()
    executable.write_bytes(b"#!/bin/sh\nexit 1\n")
    executable.chmod(0o755)
    assert "changed or removed by hand" in bench.plugins.drift()[0]
    os.kill(bench.pid(), signal.SIGKILL)
    await bench.until(lambda: bench.state().restarts == 1 and bench.state().healthy)
    assert bench.plugins.drift() == []
    assert (await bench.plugins.ask("wire", 5100, "x", 5)) == {"data": "x"}


async def test_what_a_killed_agent_left_is_ended(tmp_path: Path) -> None:
    async with plugins_in(tmp_path) as first:
        await first.apply(first.plugin("stubborn"))
        await first.until(first.numbers)
        left = first.processes()
        manager.end_left(tmp_path, "node-b")  # another node on the same system
        manager.end_left(tmp_path / "other", "node-a")
        assert first.processes() == left
        async with plugins_in(tmp_path) as second:
            await second.apply()
            assert not set(left) & set(first.processes())


async def test_what_was_prepared_in_vain_does_not_pile_up(bench: PluginBench) -> None:
    await bench.apply(bench.plugin("emit 0"))
    (bench.directory / "work/earlier").mkdir(parents=True)
    for number in range(3):
        await bench.plugins.prepare([bench.plugin("x", name=f"other{number}")])
    unpacked = bench.directory / "unpacked"
    assert sorted(path.name.split(".")[0] for path in unpacked.iterdir()) == ["other2", "wire"]
    await bench.apply(bench.plugin("emit 1"))
    assert [path.name.split(".")[0] for path in unpacked.iterdir()] == ["wire"]
    assert [path.name for path in (bench.directory / "work").iterdir()] == ["wire"]


def test_groups_of_version_2_where_the_agent_may_make_them(tmp_path: Path) -> None:
    assert cgroups.make("fim", 250, 64 << 20, tmp_path).folders == []
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    made = cgroups.make("fim", 250, 64 << 20, tmp_path)
    folder = tmp_path / "outrider-plugin-fim"
    assert (made.version, made.memory, made.cpu) == ("v2", folder, folder)
    assert made.procs == [str(folder / "cgroup.procs")]
    assert (folder / "memory.max").read_text() == str(64 << 20)
    assert (folder / "cpu.max").read_text() == "25000 100000"
    (folder / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert made.out_of_memory() == 1
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    (tmp_path / "cgroup.subtree_control").chmod(0o444)
    (tmp_path / "cgroup.procs").write_text("1 999999\n")  # not ours alone: left as they are
    some = cgroups.make("other", 250, 64 << 20, tmp_path)
    if os.geteuid() != 0:  # root writes whatever the mode says
        assert (some.memory, some.cpu) == (None, tmp_path / "outrider-plugin-other")
