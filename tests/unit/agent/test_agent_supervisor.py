"""Runs from command to acknowledged result: once each, journalled, within limits."""

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fakes.agent_parts import ListSink, run_state, store_in, value
from outrider_agent.core.policy import RUN_KINDS, Policy
from outrider_agent.core.runs import RunKey, is_final
from outrider_agent.core.storage import JournalFullError, Process, StorageError
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store import journal
from outrider_agent.store.store import Store
from outrider_agent.tasks import processes
from outrider_agent.tasks.execution import Host
from outrider_agent.tasks.leaving import Exit, Leave, Marker
from outrider_agent.tasks.placing import Place
from outrider_agent.tasks.supervisor import RunLimits, Supervisor
from outrider_proto import records
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry

ALLOWED = Policy(kinds=RUN_KINDS, own={"root", "0"})
LIMITS = RunLimits(max_concurrent=4, max_queued=10)


@dataclass
class Bench:
    """A supervisor on a real store, and what it said."""

    supervisor: Supervisor
    store: Store
    sink: ListSink
    registry: CollectorRegistry
    states: list[pb.RunState] = field(default_factory=list)
    left: list[Leave] = field(default_factory=list)

    async def submit(self, *commands: pb.RunCommand) -> None:
        await self.supervisor.submit(commands)

    async def until(self, condition: Callable[[], object], seconds: float = 20) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s; states: {self.states}") from None

    async def final(self, uid: str) -> pb.RunState:
        def found() -> list[pb.RunState]:
            return [s for s in self.states if s.id.task_uid == uid and is_final(s)]

        await self.until(found)
        return found()[0]

    def phases(self, uid: str) -> list[str]:
        return [pb.RunPhase.Name(s.phase)[10:] for s in self.states if s.id.task_uid == uid]


@contextlib.asynccontextmanager
async def bench_in(
    directory: Path,
    limits: RunLimits = LIMITS,
    wrap: Callable[[Store], Any] = lambda s: s,
    *,
    allowed: Policy = ALLOWED,
    host_pid: int = 1,
) -> AsyncIterator[Bench]:
    registry = CollectorRegistry()
    sink = ListSink()

    async def ping() -> bytes:
        return b"pong\n"

    async def broken() -> bytes:
        raise RuntimeError("a fault of ours")

    with ThreadPoolExecutor(4) as threads:
        async with store_in(directory / "state") as store:
            place = Place("node-a", directory / "work", 0.3, allowed, host_pid)
            host = Host(
                place=place,
                builtins={pb.BUILTIN_PING: ping, pb.BUILTIN_FACTS: broken},
                records=sink,
                threads=threads,
            )
            states: list[pb.RunState] = []
            left: list[Leave] = []
            way_out = Exit(Marker(directory / "state"), "pod-1", left.append)
            supervisor = Supervisor(
                wrap(store), host, limits, AgentMetrics(registry), states.append, way_out
            )
            await supervisor.recover()
            task = asyncio.create_task(supervisor.run())
            await asyncio.sleep(0)
            try:
                yield Bench(supervisor, store, sink, registry, states, left)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path) as made:
        yield made


def run_of(uid: str, shell: str = "true", attempt: int = 1, **change: Any) -> pb.RunCommand:
    fields: dict[str, Any] = {
        "id": pb.RunId(task_uid=uid, attempt=attempt),
        "namespace": "default",
        "name": "task",
        "timeout_seconds": 20,
        "preview_bytes": 100,
        "max_output_bytes": 10_000,
    }
    if not change.keys() & {"script", "builtin", "command", "plugin"}:
        fields["command"] = pb.Exec(argv=["sh", "-c", shell])
    return pb.RunCommand(**{**fields, **change})


async def test_a_run_is_accepted_runs_and_succeeds(bench: Bench) -> None:
    await bench.submit(run_of("a", "echo hello"))
    state = await bench.final("a")
    assert bench.phases("a") == ["ACCEPTED", "RUNNING", "SUCCEEDED"]
    assert (state.exit_code, state.preview, state.output_bytes) == (0, b"hello\n", 6)
    assert state.HasField("exit_code")
    assert 0 < state.started_unix_nanos <= state.finished_unix_nanos
    assert [s.phase for s in await bench.store.run_states()] == [pb.RUN_PHASE_SUCCEEDED]
    (output,) = bench.sink.fields(records.TASK_OUTPUT)
    assert output == {
        "task_uid": "a",
        "namespace": "default",
        "task": "task",
        "attempt": "1",
        "offset": "0",
        "encoding": "utf-8",
        "output": "hello\n",
    }
    assert value(bench.registry, "outrider_agent_runs_total", phase="Succeeded") == 1


async def test_what_is_reported_as_accepted_is_in_the_journal(tmp_path: Path) -> None:
    """Read at the moment of the report, by another connection."""
    async with bench_in(tmp_path) as bench:
        seen: list[object] = []

        def look(state: pb.RunState) -> None:
            import sqlite3

            with contextlib.closing(sqlite3.connect(tmp_path / "state/agent.db")) as db:
                row = db.execute("SELECT final FROM runs WHERE task_uid = 'a'").fetchone()
                seen.append((state.phase, row))

        bench.supervisor._notify = look
        await bench.submit(run_of("a"))
        await bench.until(lambda: len(seen) == 3)
    assert seen == [
        (pb.RUN_PHASE_ACCEPTED, (0,)),
        (pb.RUN_PHASE_RUNNING, (0,)),
        (pb.RUN_PHASE_SUCCEEDED, (1,)),
    ]


async def test_a_repeated_command_runs_once(bench: Bench, tmp_path: Path) -> None:
    run = run_of("a", f"echo x >> {tmp_path}/marks; sleep 0.3")
    await bench.submit(run, run, run)
    await bench.submit(run)
    await bench.final("a")
    await bench.submit(run)
    await bench.supervisor.acknowledge([RunKey("a", 1)])
    await bench.submit(run)
    await bench.until(lambda: len(bench.phases("a")) >= 8)
    assert (tmp_path / "marks").read_text() == "x\n"
    assert bench.phases("a")[-2:] == ["SUCCEEDED", "SUCCEEDED"]
    assert value(bench.registry, "outrider_agent_runs_repeated_total") == 5


async def test_another_attempt_is_another_run(bench: Bench, tmp_path: Path) -> None:
    script = f"echo $OUTRIDER_ATTEMPT >> {tmp_path}/marks"
    await bench.submit(run_of("a", script), run_of("a", script, attempt=2))
    await bench.until(lambda: bench.phases("a").count("SUCCEEDED") == 2)
    assert sorted((tmp_path / "marks").read_text().split()) == ["1", "2"]


async def test_the_environment_is_small_and_the_agents_names_cannot_be_taken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_AGENT", "x")
    env = {"MINE": "yes", "OUTRIDER_RUN": "forged", "LANG": "de_DE"}
    await bench.submit(run_of("a", "env", env=env, preview_bytes=4000))
    state = await bench.final("a")
    found = dict(line.split("=", 1) for line in state.preview.decode().splitlines())
    assert found["OUTRIDER_RUN"] == "a/1@node-a"
    assert found["OUTRIDER_NODE"] == "node-a"
    assert found["OUTRIDER_TASK"] == "default/task"
    assert (found["MINE"], found["LANG"]) == ("yes", "de_DE")
    assert "SECRET_OF_THE_AGENT" not in found
    assert set(found) - {"PWD", "SHLVL", "_", "OLDPWD"} == {
        *("OUTRIDER_RUN", "OUTRIDER_NODE", "OUTRIDER_TASK", "OUTRIDER_ATTEMPT"),
        *("PATH", "HOME", "LANG", "MINE"),
    }


async def test_a_script_has_a_private_file_that_is_removed(bench: Bench, tmp_path: Path) -> None:
    source = '#!/bin/sh\nstat -c \'%a\' "$0" "$(dirname "$0")"; echo $0\n'
    script = pb.Script(interpreter=["/bin/sh", "-eu"], source=source)
    await bench.submit(run_of("a", script=script))
    state = await bench.final("a")
    modes = state.preview.decode().split()
    assert modes[:2] == ["700", "700"]
    assert modes[2].startswith(str(tmp_path / "work"))
    assert list((tmp_path / "work").iterdir()) == []


async def test_builtins(bench: Bench) -> None:
    await bench.submit(run_of("a", builtin=pb.BUILTIN_PING))
    state = await bench.final("a")
    assert (state.phase, state.preview) == (pb.RUN_PHASE_SUCCEEDED, b"pong\n")


async def test_a_fault_of_ours_fails_the_run_and_not_the_agent(bench: Bench) -> None:
    await bench.submit(run_of("a", builtin=pb.BUILTIN_FACTS))
    assert (await bench.final("a")).reason == "InternalError"
    await bench.submit(run_of("b"))
    assert (await bench.final("b")).phase == pb.RUN_PHASE_SUCCEEDED


async def test_what_cannot_be_started_fails_with_its_reason(bench: Bench) -> None:
    await bench.submit(run_of("a", command=pb.Exec(argv=["no-such-program"])))
    state = await bench.final("a")
    assert (state.phase, state.reason) == (pb.RUN_PHASE_FAILED, "CommandNotFound")
    assert bench.phases("a") == ["ACCEPTED", "FAILED"]
    assert not state.HasField("exit_code")
    assert state.started_unix_nanos == state.finished_unix_nanos == 0


async def test_timeouts_and_cancels(bench: Bench) -> None:
    await bench.submit(run_of("a", "sleep 60", timeout_seconds=1), run_of("b", "sleep 60"))
    await bench.until(lambda: "RUNNING" in bench.phases("b"))
    await bench.supervisor.cancel([RunKey("b", 1), RunKey("unknown", 1)])
    assert (await bench.final("b")).phase == pb.RUN_PHASE_CANCELLED
    state = await bench.final("a")
    assert (state.phase, state.signal) == (pb.RUN_PHASE_TIMED_OUT, 15)
    # Of one that has ended, its state is told again.
    await bench.supervisor.cancel([RunKey("b", 1)])
    assert bench.phases("b")[-2:] == ["CANCELLED", "CANCELLED"]


async def test_no_more_than_allowed_run_at_once(tmp_path: Path) -> None:
    limits = RunLimits(max_concurrent=2, max_queued=20)
    script = "echo +; sleep 0.1; echo -"
    async with bench_in(tmp_path, limits) as bench:
        peak = 0

        def look(state: pb.RunState) -> None:
            nonlocal peak
            bench.states.append(state)
            peak = max(peak, int(value(bench.registry, "outrider_agent_runs_active")))

        bench.supervisor._notify = look
        await bench.submit(*(run_of(f"r{n}", script) for n in range(8)))
        for number in range(8):
            assert (await bench.final(f"r{number}")).phase == pb.RUN_PHASE_SUCCEEDED
        assert peak == 2
        await bench.until(lambda: value(bench.registry, "outrider_agent_runs_active") == 0)
        assert value(bench.registry, "outrider_agent_runs_queued") == 0


async def test_too_many_are_rejected_and_the_place_is_given_back(tmp_path: Path) -> None:
    limits = RunLimits(max_concurrent=1, max_queued=1)
    async with bench_in(tmp_path, limits) as bench:
        await bench.submit(*(run_of(f"r{n}", "sleep 0.2") for n in range(6)))
        rejected = await bench.final("r2")
        assert (rejected.phase, rejected.reason) == (pb.RUN_PHASE_REJECTED, "TooManyRuns")
        await bench.final("r0")
        await bench.final("r1")
        await bench.until(lambda: not bench.supervisor._runs)
        await bench.submit(run_of("again"))
        assert (await bench.final("again")).phase == pb.RUN_PHASE_SUCCEEDED
        # A rejected attempt is not run later either.
        await bench.submit(run_of("r2", f"touch {tmp_path}/ran"))
        await bench.until(lambda: len(bench.phases("r2")) == 2)
        assert bench.phases("r2") == ["REJECTED", "REJECTED"]


async def test_a_queued_run_can_be_cancelled_and_can_expire(tmp_path: Path) -> None:
    limits = RunLimits(max_concurrent=1, max_queued=5)
    soon = time.time_ns() + int(0.2e9)
    async with bench_in(tmp_path, limits) as bench:
        await bench.submit(
            run_of("first", "sleep 0.6"),
            run_of("cancelled", f"touch {tmp_path}/ran"),
            run_of("late", f"touch {tmp_path}/ran", not_after_unix_nanos=soon),
        )
        await bench.supervisor.cancel([RunKey("cancelled", 1)])
        assert (await bench.final("cancelled")).phase == pb.RUN_PHASE_CANCELLED
        assert "first" not in {s.id.task_uid for s in bench.states if is_final(s)}
        late = await bench.final("late")
        assert (late.phase, late.reason) == (pb.RUN_PHASE_REJECTED, "Expired")
        assert not (tmp_path / "ran").exists()


async def test_a_run_without_a_name_is_not_taken(bench: Bench) -> None:
    await bench.submit(run_of("", "true"), run_of("a", attempt=0))
    assert bench.states == []
    assert await bench.store.run_states() == []


async def test_the_report_holds_what_was_not_acknowledged(bench: Bench) -> None:
    await bench.submit(run_of("a"), run_of("b", "sleep 60"))
    await bench.final("a")
    await bench.until(lambda: "RUNNING" in bench.phases("b"))
    report = {s.id.task_uid: s.phase for s in await bench.supervisor.report()}
    assert report == {"a": pb.RUN_PHASE_SUCCEEDED, "b": pb.RUN_PHASE_RUNNING}
    await bench.supervisor.acknowledge([RunKey("a", 1), RunKey("b", 1)])
    assert [s.id.task_uid for s in await bench.supervisor.report()] == ["b"]


async def test_draining_lets_short_runs_end_and_interrupts_long_ones(tmp_path: Path) -> None:
    limits = RunLimits(max_concurrent=2, max_queued=5)
    async with bench_in(tmp_path, limits) as bench:
        await bench.submit(
            run_of("short", "sleep 0.3"), run_of("long", "sleep 60"), run_of("queued", "sleep 60")
        )
        await bench.until(lambda: "RUNNING" in bench.phases("long"))
        await bench.supervisor.drain(0.8)
        assert (await bench.final("short")).phase == pb.RUN_PHASE_SUCCEEDED
        for uid in ("long", "queued"):
            state = await bench.final(uid)
            assert (state.phase, state.reason) == (pb.RUN_PHASE_INTERRUPTED, "AgentStopped")
        count = len(bench.states)
        await bench.submit(run_of("late"))
        assert len(bench.states) == count
        assert await bench.store.find_run(RunKey("late", 1)) is None


async def test_what_an_earlier_agent_left_is_ended_and_told(tmp_path: Path) -> None:
    """One in its group, one that left it, and one whose number belongs to another by now."""
    mark = f"{tmp_path.name}-{time.time_ns()}"
    env = {"OUTRIDER_RUN": f"{mark}/1@node-a", "PATH": "/usr/bin:/bin"}
    leader = subprocess.Popen(
        ["sh", "-c", "env -i sleep 60 & setsid sleep 60 & sleep 60"],
        env=env,
        start_new_session=True,
    )
    # The same task on another node, whose agent runs on this system too.
    env = {"OUTRIDER_RUN": f"{mark}/1@node-b", "PATH": "/usr/bin:/bin"}
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True, env=env)
    try:
        info, other = processes.inspect(leader.pid), processes.inspect(bystander.pid)
        assert info
        assert other
        async with store_in(tmp_path / "state") as store:
            await store.accept_run(run_state(mark))
            process = Process(info.pid, info.start, processes.boot_id())
            await store.update_run(run_state(mark, pb.RUN_PHASE_RUNNING), process)
            await store.accept_run(run_state("reused"))
            stale = Process(other.pid, other.start - 1, processes.boot_id())
            await store.update_run(run_state("reused", pb.RUN_PHASE_RUNNING), stale)
            await store.accept_run(run_state("ended"))
            await store.update_run(run_state("ended", pb.RUN_PHASE_REJECTED))
        (tmp_path / "work/outrider-run-left").mkdir(parents=True)
        (tmp_path / "work/run-of-others").mkdir()
        async with bench_in(tmp_path) as bench:
            for uid in (mark, "reused"):
                state = await bench.final(uid)
                assert (state.phase, state.reason) == (pb.RUN_PHASE_INTERRUPTED, "AgentRestarted")
            assert bench.phases("ended") == []
            assert processes.members(f"{mark}/1@node-a", None, below=None) == []
            in_group = [p for p in processes.scan() if p.group == leader.pid and not p.zombie]
            assert in_group == []
            assert bystander.poll() is None
            assert not (tmp_path / "work/outrider-run-left").exists()
            assert (tmp_path / "work/run-of-others").exists()
            await bench.submit(run_of(mark, f"touch {tmp_path}/ran"))
            await bench.until(lambda: len(bench.phases(mark)) == 2)
            assert bench.phases(mark) == ["INTERRUPTED", "INTERRUPTED"]
    finally:
        for child in (leader, bystander):
            child.kill()
            child.wait()


class FailingJournal:
    """A store whose methods of the given names fail while `failing`."""

    def __init__(self, store: Store, names: set[str], error: Exception) -> None:
        self._store = store
        self._names = names
        self._error = error
        self.failing = True

    def __getattr__(self, name: str) -> Any:
        if self.failing and name in self._names:

            async def fail(*_: object) -> None:
                raise self._error

            return fail
        return getattr(self._store, name)


async def test_without_the_journal_nothing_is_run(tmp_path: Path) -> None:
    names = {"accept_run", "bury_run"}

    def wrap(store: Store) -> FailingJournal:
        return FailingJournal(store, names, StorageError("disk full"))

    async with bench_in(tmp_path, wrap=wrap) as bench:
        await bench.submit(run_of("a", f"touch {tmp_path}/ran"))
        state = await bench.final("a")
        assert (state.phase, state.reason) == (pb.RUN_PHASE_REJECTED, "JournalUnavailable")
        assert not (tmp_path / "ran").exists()


async def test_a_full_journal_rejects_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MAX_RUNS", 1)
    async with bench_in(tmp_path) as bench:
        await bench.submit(run_of("a"))
        await bench.final("a")
        await bench.submit(run_of("b", f"touch {tmp_path}/ran"))
        assert (await bench.final("b")).reason == "TooManyRuns"
        await bench.supervisor.acknowledge([RunKey("a", 1)])
        await bench.submit(run_of("b", f"touch {tmp_path}/ran"))
        await bench.until(lambda: len(bench.phases("b")) == 2)
        assert bench.phases("b") == ["REJECTED", "REJECTED"]
    assert JournalFullError.__mro__[1] is StorageError


async def test_a_result_that_cannot_be_stored_is_reported_and_stored_later(tmp_path: Path) -> None:
    made: list[FailingJournal] = []

    def wrap(store: Store) -> FailingJournal:
        made.append(FailingJournal(store, {"update_run"}, StorageError("disk full")))
        return made[0]

    async with bench_in(tmp_path, wrap=wrap) as bench:
        await bench.submit(run_of("a"))
        assert (await bench.final("a")).phase == pb.RUN_PHASE_SUCCEEDED
        report = {s.id.task_uid: s.phase for s in await bench.supervisor.report()}
        assert report == {"a": pb.RUN_PHASE_SUCCEEDED}
        made[0].failing = False
        await bench.until(lambda: not bench.supervisor._runs)
        (stored,) = await bench.store.run_states()
        assert stored.phase == pb.RUN_PHASE_SUCCEEDED


class SlowJournal:
    """A store on a slow disk: what is entered into the journal takes until `go`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.entered = asyncio.Event()
        self.go = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def accept_run(self, state: pb.RunState) -> pb.RunState | None:
        known = await self._store.accept_run(state)
        self.entered.set()
        await self.go.wait()
        return known


async def test_a_run_in_the_journal_begins_though_its_stream_breaks(tmp_path: Path) -> None:
    made: list[SlowJournal] = []

    def wrap(store: Store) -> SlowJournal:
        made.append(SlowJournal(store))
        return made[0]

    async with bench_in(tmp_path, wrap=wrap) as bench:
        stream = asyncio.create_task(bench.submit(run_of("a")))
        await made[0].entered.wait()
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
        made[0].go.set()
        assert (await bench.final("a")).phase == pb.RUN_PHASE_SUCCEEDED


async def test_facts_are_json() -> None:
    from outrider_agent.collectors.facts import facts
    from outrider_agent.collectors.hostinfo import HostPaths

    found = json.loads(facts(HostPaths(), node="node-a", version="1", config="abc"))
    assert found["node"] == "node-a"
    assert int(found["nproc"]) > 0
    assert found["kernel_version"]


# Restart and Shutdown; as a process of its own in tests/integration/test_agent_leaving.py.


class ReadOnlyJournal:
    """A store that accepts runs and then takes no more changes."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def update_run(self, state: pb.RunState, process: Process | None = None) -> None:
        if state.phase == pb.RUN_PHASE_RUNNING:
            raise StorageError("the disk is full")
        await self._store.update_run(state, process)


@pytest.mark.parametrize("which", [pb.BUILTIN_RESTART, pb.BUILTIN_SHUTDOWN])
async def test_an_agent_that_cannot_note_that_it_goes_stays(
    tmp_path: Path, which: pb.Builtin.ValueType
) -> None:
    async with bench_in(tmp_path, wrap=ReadOnlyJournal) as bench:
        await bench.submit(run_of("a", builtin=which))
        state = await bench.final("a")
        assert (state.phase, state.reason) == (pb.RUN_PHASE_FAILED, "StateUnavailable")
        assert bench.left == []
        await bench.submit(run_of("b", builtin=pb.BUILTIN_PING))
        assert (await bench.final("b")).phase == pb.RUN_PHASE_SUCCEEDED


async def test_a_shutdown_whose_marker_cannot_be_written_leaves_the_agent_there(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "state/shutdown.new").mkdir()
    await bench.submit(run_of("a", builtin=pb.BUILTIN_SHUTDOWN))
    assert (await bench.final("a")).reason == "StateUnavailable"
    assert bench.left == []
    await bench.supervisor.foreign(pb.Task(data_type=1060, object_name="outrider-agent"))
    assert bench.left == []


async def test_an_agent_that_goes_takes_no_more_runs(bench: Bench) -> None:
    await bench.submit(run_of("a", builtin=pb.BUILTIN_RESTART))
    await bench.until(lambda: bench.left)
    assert bench.left == [Leave.RESTART]
    await bench.submit(run_of("b"))
    assert bench.phases("b") == []
    await bench.until(lambda: not bench.supervisor._runs)
    # Its end is not for this process to report.
    assert bench.phases("a") == ["ACCEPTED", "RUNNING"]
    (stored,) = await bench.store.run_states()
    assert (stored.phase, stored.reason) == (pb.RUN_PHASE_RUNNING, "Restarting")


async def test_a_shutdown_waits_for_its_result_to_be_taken(bench: Bench) -> None:
    await bench.submit(run_of("a", builtin=pb.BUILTIN_SHUTDOWN))
    await bench.final("a")
    await asyncio.sleep(0)
    assert bench.left == []
    await bench.supervisor.acknowledge([RunKey("other", 1)])
    assert bench.left == []
    await bench.supervisor.acknowledge([RunKey("a", 1)])
    await bench.until(lambda: bench.left == [Leave.SHUTDOWN], seconds=5)
