"""Records from agents through one gateway to Kafka: how many, how fast, at what cost.

Why it exists: the figures of "Records" in docs/performance.md come from here. Load, broker, API
server and gateway all run on this machine, as processes of their own, so that the gateway has what
the others leave it: figures by CPU-second hold for any machine, those by second for this one. It
must count only what a server has acknowledged, and the server acknowledges what Kafka has.

    python -m records.ingest --look
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import controlplane, kafka_jars, paths
from cluster.controlplane import ControlPlane
from cluster.errors import run_main
from cluster.programs import Program
from cluster.progress import Steps
from records import agent_program, look
from records.stage import Load, Stage
from swarm import measure
from swarm.profiler import Profiler

OUTPUT = paths.ROOT / "dist" / "bench-ingest.jsonl"
PARTS = ("throughput", "latency", "memory", "agent", "record", "file")
#: The bounds of docs/performance.md.
LEAST_RECORDS_PER_CPU_SECOND = 1_300_000
MOST_P50_MILLIS, MOST_P99_MILLIS = 250.0, 600.0
#: Records a second of an agent where latencies are measured.
RATE = 10.0
#: Kafka takes so much while memory is watched, bytes a second.
SLOW_BYTES = 2 * look.MIB
#: What the gateway may take, by docs/sizing.md: its setting gateway.maxInflightBytes with what its
#: heap needs around it, and a part for each stream.
INFLIGHT_BYTES = 128 * look.MIB * 5 // 4
STREAM_BYTES = 128 * 1024
MOST_GROWTH_MIB = 2.0
#: The window of a stream with which a gateway's budget is reached by a hundred agents.
MEMORY_AGENTS = 200


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        agents: how many, one measurement after the other.
        warm: seconds of load before anything is counted.
        seconds: of each count.
        repeat: counts.
        latency_agents, latency_seconds: as their names say.
        memory_agents, memory_seconds: how many while memory is watched, and how long.
        pool: different batches in each process of load.
        processes: of load.
        idle_seconds, load_seconds: of the agent.
    """

    agents: list[int]
    warm: float
    seconds: float
    repeat: int
    latency_agents: list[int]
    latency_seconds: float
    memory_agents: list[int]
    memory_seconds: float
    pool: int
    processes: int
    idle_seconds: float
    load_seconds: float


@dataclass
class Bench:
    """What runs, what is wanted, and where figures go."""

    stage: Stage
    plan: Plan
    report: measure.Report
    steps: Steps
    profiler: Profiler | None


def main() -> int:
    """Run the parts asked for; 1 if a figure is over its bound."""
    options = _options()
    plan = _plan(options)
    parts = options.parts.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise SystemExit(f"error: --parts: expected some of {', '.join(PARTS)}, got {unknown}")
    steps = Steps()
    controlplane.require(steps)
    kafka_jars.ensure(steps)
    profiler = Profiler.ensure(steps) if options.profile else None
    report = measure.Report(options.output, {"look": options.look})
    with (
        tempfile.TemporaryDirectory(prefix="outrider-bench-") as scratch,
        ControlPlane(Path(scratch) / "plane") as plane,
    ):
        stage = Stage(plane, Path(scratch))
        try:
            most = max([*plan.agents, *plan.latency_agents, *plan.memory_agents])
            with steps.step(f"broker; Nodes, Pods and tokens of {most} agents") as step:
                stage.start(most, lambda done: step.update(f"{done}/{most}"))
            bench = Bench(stage, plan, report, steps, profiler)
            for part in parts:
                RUN[part](bench)
        finally:
            _keep_logs(Path(scratch) / "plane")
            stage.close()
    return 0 if report.table() else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="records.ingest", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--look", action="store_true", help="a short look: fewer and shorter")
    parser.add_argument("--agents", help="how many, separated by commas; 10,100,1000 if not given")
    parser.add_argument("--minutes", type=float, help="how long memory is watched; 2 if not given")
    parser.add_argument("--profile", action="store_true", help="also say where the time goes")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file for the JSON lines")
    return parser.parse_args()


def _plan(options: argparse.Namespace) -> Plan:
    look_only: bool = options.look
    agents = [10, 100] if look_only else [10, 100, 1000]
    if options.agents:
        agents = [int(word) for word in options.agents.split(",")]
    minutes = options.minutes or (0.5 if look_only else 2.0)
    return Plan(
        agents=agents,
        warm=3.0 if look_only else 8.0,
        seconds=5.0 if look_only else 15.0,
        repeat=1 if look_only else 3,
        latency_agents=[count for count in agents if count >= 100] or agents,
        latency_seconds=10.0 if look_only else 30.0,
        memory_agents=agents if options.agents else [MEMORY_AGENTS],
        memory_seconds=60 * minutes,
        pool=150 if look_only else 600,
        processes=2,
        idle_seconds=15.0 if look_only else 60.0,
        load_seconds=10.0 if look_only else 30.0,
    )


# ---------------------------------------------------------------- how many


def _throughput(bench: Bench) -> None:
    _rates(bench, "kafka", {}, LEAST_RECORDS_PER_CPU_SECOND)


def _record_form(bench: Bench) -> None:
    _rates(bench, "kafka, format record", {"sink": {"kafka": {"format": "record"}}}, None)


def _file_sink(bench: Bench) -> None:
    _rates(bench, "file", {"sink": {"kind": "file"}}, None)


def _rates(bench: Bench, sink: str, settings: Mapping[str, Any], least: float | None) -> None:
    """Records acknowledged by second and by CPU-second, with more and more agents."""
    for agents in bench.plan.agents:
        with bench.steps.step(f"{sink}: full windows of {agents} agents"):
            server = bench.stage.serve("server-0", settings)
            try:
                found = _full_windows(bench, sink, server, agents)
            finally:
                bench.stage.end(server)
        middle = statistics.median(w.records_per_cpu_second for w in found)
        name = f"{sink}, {agents} agents"
        bench.report.bound(f"{name}: records per CPU-second", middle, "", least=least)
        speed = statistics.median(w.records for w in found)
        bench.report.bound(f"{name}: records per second", speed, "")


def _full_windows(bench: Bench, sink: str, server: Program, agents: int) -> list[look.Window]:
    stage, plan = bench.stage, bench.plan
    pid = stage.pid(server.name)
    base = measure.rss(pid)
    kafka = sink.startswith("kafka")
    before = sum(look.topic_ends(stage.broker.bootstrap).values()) if kafka else 0
    with stage.load(agents, plan.processes, plan.pool) as load:
        time.sleep(plan.warm)
        threads = look.threads(pid)
        found = [look.window(stage, load, pid, plan.seconds) for _ in range(plan.repeat)]
        used = {name: s - threads.get(name, 0.0) for name, s in look.threads(pid).items()}
        for one in found:
            bench.report.line("throughput", sink=sink, agents=agents, **one.figures())
        if bench.profiler is not None:
            _profile(bench, bench.profiler, sink, agents, pid)
        total = load.status()
    stored = sum(look.topic_ends(stage.broker.bootstrap).values()) - before if kafka else 0
    rates = [one.records_per_cpu_second for one in found]
    bench.report.line(
        "throughput, all counts",
        sink=sink,
        agents=agents,
        median=round(statistics.median(rates)),
        lowest=round(min(rates)),
        highest=round(max(rates)),
        acked_batches=total["acked_batches"],
        acked_records=total["acked_records"],
        messages_in_topic=stored,
        base_rss_mib=round(base / look.MIB, 1),
        cpu_seconds_by_thread={name: round(s, 2) for name, s in used.items() if s >= 0.05},
    )
    _check_stored(sink, total["acked_batches"], total["acked_records"], stored)
    return found


def _check_stored(sink: str, batches: int, records: int, stored: int) -> None:
    """What was acknowledged is in the topic.

    Raises:
        RuntimeError: it is not.
    """
    acked = {"kafka": batches, "kafka, format record": records}.get(sink, 0)
    if stored < acked:
        raise RuntimeError(f"{acked} were acknowledged, and the topic got {stored} messages")
    if not batches:
        raise RuntimeError("nothing was acknowledged at all")


def _profile(bench: Bench, profiler: Profiler, sink: str, agents: int, pid: int) -> None:
    with profiler.sampling({"gateway": pid}) as profiles:
        time.sleep(bench.plan.seconds)
    for part, profile in profiles.items():
        if profile.samples:
            print(profile.text(), file=sys.stderr)
            bench.report.line("profile", part=part, sink=sink, agents=agents, **profile.figures())


# ---------------------------------------------------------------- how fast


def _latency(bench: Bench) -> None:
    """From the making of a record to Kafka's own time stamp, at a steady rate."""
    stage, plan = bench.stage, bench.plan
    for agents in plan.latency_agents:
        with bench.steps.step(f"latency at {RATE:g} records a second of {agents} agents"):
            server = stage.serve("server-0", {})
            try:
                pid = stage.pid(server.name)
                with stage.load(agents, plan.processes, 1, RATE) as load:
                    time.sleep(plan.warm)
                    begin = look.topic_ends(stage.broker.bootstrap)
                    seen = look.window(stage, load, pid, plan.latency_seconds)
            finally:
                stage.end(server)
            found = look.latencies(stage.broker.bootstrap, begin)
        p50, p99 = found.percentile(0.5), found.percentile(0.99)
        bench.report.line(
            "latency",
            agents=agents,
            records=len(found.values),
            p50_millis=round(p50, 1),
            p90_millis=round(found.percentile(0.9), 1),
            p99_millis=round(p99, 1),
            most_millis=round(max(found.values), 1),
            **seen.figures(),
        )
        bench.report.bound(f"latency, {agents} agents: p50", p50, "ms", MOST_P50_MILLIS)
        bench.report.bound(f"latency, {agents} agents: p99", p99, "ms", MOST_P99_MILLIS)


# ---------------------------------------------------------------- memory


def _memory(bench: Bench) -> None:
    """The gateway between full windows and a Kafka that takes little."""
    for agents in bench.plan.memory_agents:
        _memory_of(bench, agents)


def _memory_of(bench: Bench, agents: int) -> None:
    stage, plan = bench.stage, bench.plan
    server = stage.serve("server-0", {}, throttled=True)
    try:
        pid = stage.pid(server.name)
        stage.throttle.slow(stage.broker.front, up=SLOW_BYTES)
        with (
            bench.steps.step(f"memory of {agents} agents, {plan.memory_seconds:.0f} s") as step,
            _connected(stage, plan, agents) as load,
        ):
            found = look.memory(
                pid,
                load.base_rss,
                plan.memory_seconds,
                lambda rss: step.update(f"{rss // look.MIB} MiB"),
            )
            total = load.load.status()
    finally:
        stage.throttle.slow(stage.broker.front)
        stage.end(server)
    above = (found.most - found.base) / look.MIB
    growth = found.growth / look.MIB
    bench.report.line(
        "memory",
        agents=agents,
        seconds=plan.memory_seconds,
        base_mib=round(found.base / look.MIB, 1),
        most_mib=round(found.most / look.MIB, 1),
        growth_mib_per_minute=round(growth, 2),
        acked_records=total["acked_records"],
        kafka_takes_mib_per_second=SLOW_BYTES / look.MIB,
    )
    budget = (INFLIGHT_BYTES + agents * STREAM_BYTES) / look.MIB
    name = f"memory with a slow Kafka, {agents} agents"
    bench.report.bound(f"{name}: above idle", above, "MiB", budget)
    bench.report.bound(f"{name}: growth in the second half", growth, "MiB/min", MOST_GROWTH_MIB)


@dataclass
class _Loaded:
    """Load, and the gateway's memory with all agents connected and nothing sent."""

    load: Load
    base_rss: int


class _connected:  # noqa: N801 - used as a function
    """Load whose agents are connected, with a look at the gateway before it begins."""

    def __init__(self, stage: Stage, plan: Plan, agents: int) -> None:
        self._stage = stage
        self._load = stage.load(agents, plan.processes, plan.pool)

    def __enter__(self) -> _Loaded:
        load = self._load.__enter__()
        server = next(iter(self._stage.programs.servers.values()))
        return _Loaded(load, measure.rss(self._stage.pid(server.name)))

    def __exit__(self, *_: object) -> None:
        self._load.__exit__()


# ---------------------------------------------------------------- the agent


def _agent(bench: Bench) -> None:
    """The real agent program: idle, and with a load."""
    server = bench.stage.serve("server-0", {})
    try:
        agent_program.measure_agent(
            bench.stage, bench.report, bench.steps, bench.plan.idle_seconds, bench.plan.load_seconds
        )
    finally:
        bench.stage.end(server)


RUN = {
    "throughput": _throughput,
    "latency": _latency,
    "memory": _memory,
    "agent": _agent,
    "record": _record_form,
    "file": _file_sink,
}


def _keep_logs(folder: Path) -> None:
    """Save the logs: the folder goes."""
    kept = OUTPUT.parent / "bench-ingest-logs"
    kept.mkdir(parents=True, exist_ok=True)
    for pattern in ("outrider-*.log", "load-*.log"):
        for log in (folder / "log").glob(pattern):
            (kept / log.name).write_bytes(log.read_bytes())


if __name__ == "__main__":
    run_main(main)
