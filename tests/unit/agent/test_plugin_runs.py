"""Runs that are tasks for plug-ins, and output that is on disk before its run has ended."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes.agent_parts import ListSink, store_in, value
from fakes.plugin_bench import plugins_in
from outrider_agent.core import batching
from outrider_agent.core.outcome import Cause
from outrider_agent.core.plugins import PluginError, PluginTasks
from outrider_agent.core.policy import RUN_KINDS, Load, Policy, refuse
from outrider_agent.core.records import RecordClass
from outrider_agent.core.runs import is_final
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store.recorder import Recorder, RecorderOptions
from outrider_agent.store.store import Store
from outrider_agent.tasks import execution
from outrider_agent.tasks.execution import Host, execute
from outrider_agent.tasks.leaving import Exit, Marker
from outrider_agent.tasks.placing import Place
from outrider_agent.tasks.supervisor import RunLimits, Supervisor
from outrider_proto import records
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry


def run_of(uid: str = "a", **change: Any) -> pb.RunCommand:
    fields: dict[str, Any] = {
        "id": pb.RunId(task_uid=uid, attempt=1),
        "namespace": "default",
        "name": "task",
        "timeout_seconds": 20,
        "preview_bytes": 1000,
        "max_output_bytes": 1_000_000,
    }
    return pb.RunCommand(**{**fields, **change})


def task(name: str = "wire", data_type: int = 5100, data: str = "") -> pb.PluginTask:
    return pb.PluginTask(name=name, data_type=data_type, data=data)


class _Carry:
    """Carries out runs on a host with plug-ins; no journal."""

    def __init__(self, plugins: PluginTasks | None, directory: Path, sink: ListSink) -> None:
        place = Place("node-a", directory / "work", 0.3, Policy(RUN_KINDS))
        self.threads = ThreadPoolExecutor(2)
        self.host = Host(
            place=place, builtins={}, records=sink, threads=self.threads, plugins=plugins
        )
        self.stop: asyncio.Future[Cause] = asyncio.get_running_loop().create_future()

    async def __call__(self, command: pb.RunCommand) -> execution.Result:
        async def on_start(_: object) -> None:
            pass

        return await execute(command, self.host, stop=self.stop, on_start=on_start)


async def test_the_answer_is_the_output(tmp_path: Path) -> None:
    async with plugins_in(tmp_path) as bench:
        carry = _Carry(bench.plugins, tmp_path, bench.sink)
        await bench.apply(bench.plugin("emit 0"))
        await bench.until(lambda: bench.state().phase == pb.PLUGIN_PHASE_RUNNING)
        result = await carry(run_of(plugin=task(data="scan é")))
        assert result.outcome.phase == pb.RUN_PHASE_SUCCEEDED
        assert json.loads(result.output.preview) == {"data": "scan é"}
        (output,) = bench.sink.fields(records.TASK_OUTPUT)[-1:]
        assert json.loads(output["output"]) == {"data": "scan é"}
        late = await carry(run_of(plugin=task(data_type=14), timeout_seconds=1))
        assert (late.outcome.phase, late.outcome.reason) == (
            pb.RUN_PHASE_TIMED_OUT,
            "DeadlineExceeded",
        )
        unknown = await carry(run_of(plugin=task("other")))
        assert (unknown.outcome.phase, unknown.outcome.reason) == (
            pb.RUN_PHASE_FAILED,
            "UnknownPlugin",
        )
        ended = await carry(run_of(plugin=task(data_type=13)))
        assert ended.outcome.reason == "PluginEnded"
        await bench.until(
            lambda: bench.state().restarts and bench.plugins._runners["wire"].instance
        )
        waiting = asyncio.create_task(carry(run_of(plugin=task(data_type=14))))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        carry.stop.set_result(Cause.CANCEL)
        assert (await waiting).outcome.phase == pb.RUN_PHASE_CANCELLED
        carry.threads.shutdown()


async def test_reasons_of_the_plugin_are_those_of_the_run(tmp_path: Path) -> None:
    class Full:
        async def ask(
            self, name: str, data_type: int, data: str, timeout: float
        ) -> Mapping[str, str]:
            raise PluginError(name, "PluginFull", "64 tasks wait")

    carry = _Carry(Full(), tmp_path, ListSink())
    result = await carry(run_of(plugin=task("fim")))
    assert (result.outcome.reason, result.outcome.message) == (
        "PluginFull",
        "plug-in fim: 64 tasks wait",
    )
    assert (await _Carry(None, tmp_path, ListSink())(run_of(plugin=task()))).outcome.reason == (
        "UnknownPlugin"
    )
    carry.threads.shutdown()


@pytest.mark.parametrize(
    "change",
    [
        {"user": "root"},
        {"host": True},
        {"env": {"A": "b"}},
        {"plugin": task("")},
        {"plugin": task(data_type=0)},
        {"plugin": task(data="x" * 300_000)},
    ],
)
def test_what_makes_no_sense_for_a_plugin_is_refused(change: dict[str, Any]) -> None:
    command = run_of(**{"plugin": task(), **change})
    policy = Policy(RUN_KINDS, users=["*"], host=True)
    refusal = refuse(command, now_nanos=1, policy=policy, load=Load(0, 1))
    assert refusal is not None
    assert refusal.reason == "InvalidRun"


@contextlib.asynccontextmanager
async def supervised(
    directory: Path, states: list[pb.RunState], look: Any
) -> AsyncIterator[tuple[Supervisor, Store]]:
    """A supervisor whose records go to its store, as in the agent; `look` at each report."""
    registry = CollectorRegistry()
    metrics = AgentMetrics(registry)
    stored = CollectorRegistry()
    async with store_in(directory / "state", registry=stored) as store:
        # Batches that wait for a minute: only who asks has them stored before.
        options = RecorderOptions(batching.BatchLimits(60.0, 512 * 1024), pb.CODEC_NONE)
        recorder = Recorder(store, options, metrics)
        with ThreadPoolExecutor(4) as threads:
            place = Place("node-a", directory / "work", 0.3, Policy(RUN_KINDS, own={"root", "0"}))
            host = Host(place=place, builtins={}, records=recorder, threads=threads)

            def notify(state: pb.RunState) -> None:
                states.append(state)
                look(stored, state)

            way_out = Exit(Marker(directory / "state"), "pod-1", lambda _: None)
            supervisor = Supervisor(store, host, RunLimits(4, 4), metrics, notify, way_out)
            await supervisor.recover()
            tasks = [asyncio.create_task(part) for part in (supervisor.run(), recorder.run())]
            await asyncio.sleep(0)
            try:
                yield supervisor, store
            finally:
                for one in tasks:
                    one.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


async def test_output_is_on_disk_before_its_run_has_ended(tmp_path: Path) -> None:
    states: list[pb.RunState] = []
    batches: list[float] = []

    def look(registry: CollectorRegistry, state: pb.RunState) -> None:
        if is_final(state):  # a kill -9 of the agent now leaves what is in the file
            batches.append(value(registry, "outrider_agent_outbox_batches"))

    async with supervised(tmp_path, states, look) as (supervisor, _):
        echo = pb.Exec(argv=["sh", "-c", "echo the end of the output"])
        await supervisor.submit([run_of("a", command=echo)])
        async with asyncio.timeout(10):
            while not batches:
                await asyncio.sleep(0.01)
    assert states[-1].phase == pb.RUN_PHASE_SUCCEEDED
    assert batches == [1]


async def test_a_disk_that_takes_nothing_holds_a_result_up_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stuck(ListSink):
        async def flush(self, record_class: RecordClass) -> None:
            await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(execution, "DURABLE_SECONDS", 0.1)
    carry = _Carry(None, tmp_path, Stuck())
    result = await carry(run_of(command=pb.Exec(argv=["echo", "x"])))
    assert result.outcome.phase == pb.RUN_PHASE_SUCCEEDED
    carry.threads.shutdown()
