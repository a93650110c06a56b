"""One task for thousands of agents: its time, its writes, the memory, and the way back.

Why it exists: the figures in docs/performance.md come from here. API server, servers and agents all
run on this machine, so the figures hold for its cores. It must measure what a user sees: from
`kubectl apply` until every result stands in the reports and the status is final.

    python -m swarm.fanout --agents 5000
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import controlplane, paths
from cluster.controlplane import ControlPlane
from cluster.errors import run_main
from cluster.programs import Program, Programs
from cluster.progress import Steps
from cluster.supervised import wait_for
from swarm import measure, population
from swarm.herd import Herd
from swarm.measure import metric
from swarm.profiler import Profiler

OUTPUT = paths.ROOT / "dist" / "bench-fanout.jsonl"
FINAL = ("Succeeded", "Failed", "Cancelled")
TASK_SECONDS = 90.0
CONNECT_SECONDS = 600.0
#: The servers are at rest when they take less of a core than this for two seconds.
REST_CORES = 0.25
#: Resources whose writes are counted as a task's.
TASK_RESOURCES = ("agenttasks", "agenttaskreports", "events")
#: The bounds of docs/performance.md: seconds by concurrency, writes, memory, seconds.
MOST_SECONDS = {"100%": 10.0, "25%": 20.0}
MOST_WRITES_PER_100 = 6.0
MOST_KIB_PER_AGENT = 90.0
MOST_RETURN_SECONDS = 60.0


@dataclass
class Bench:
    """What runs, and where figures go."""

    plane: ControlPlane
    programs: Programs
    herd: Herd
    report: measure.Report
    profiler: Profiler | None

    def server_pids(self) -> list[int]:
        """Of the servers that run."""
        status = self.plane.processes.status()
        found = [status[server.name] for server in self.programs.servers.values()]
        return [one.pid for one in found if one.code is None]

    def spent(self) -> measure.Spent:
        """A clock over all parts, begun now."""
        status = self.plane.processes.status()
        return measure.Spent(
            {
                "servers": self.server_pids(),
                "swarm": self.herd.pids(),
                "apiserver": [status[controlplane.API_SERVER].pid],
                "etcd": [status[controlplane.ETCD].pid],
            }
        )

    def rest(self, seconds: float = 180.0) -> None:
        """Wait until the servers have nothing more to do."""
        end = time.monotonic() + seconds
        quiet = 0
        while quiet < 2 and time.monotonic() < end:
            pids = self.server_pids()
            before, began = measure.cpu(pids), time.monotonic()
            time.sleep(1.0)
            used = (measure.cpu(pids) - before) / (time.monotonic() - began)
            quiet = quiet + 1 if used < REST_CORES else 0

    def leader(self) -> Program:
        """The server that leads."""
        servers = self.programs.servers.values()
        wait_for("a server leads", lambda: any(map(_leads, servers)), CONNECT_SECONDS, 0.5)
        return next(filter(_leads, servers))


def _leads(server: Program) -> bool:
    return metric(server, "outrider_server_leader") == 1


def main() -> int:
    """Run all measurements; 1 if a figure is over its bound."""
    options = _options()
    steps = Steps()
    controlplane.require(steps)
    report = measure.Report(options.output, {"agents": options.agents, "servers": options.servers})
    profiler = Profiler.ensure(steps) if options.profile else None
    folder = Path(tempfile.mkdtemp(prefix="outrider-bench-"))
    with ControlPlane(folder) as plane:
        try:
            bench = begin(plane, options, report, steps, profiler)
            _measure(bench, options, steps)
        finally:
            keep_logs(folder, "bench-fanout-logs")
    return 0 if report.table() else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="swarm.fanout", description=__doc__)
    parser.add_argument("--agents", type=int, default=5000)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--per-process", type=int, default=500, help="agents in one process")
    parser.add_argument("--repeat", type=int, default=3, help="tasks of each kind")
    parser.add_argument("--profile", action="store_true", help="also say where the time goes")
    parser.add_argument("--no-kill", action="store_true", help="leave out the kill of a server")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file for the JSON lines")
    return parser.parse_args()


def begin(
    plane: ControlPlane,
    options: argparse.Namespace,
    report: measure.Report,
    steps: Steps,
    profiler: Profiler | None,
) -> Bench:
    """Start everything, connect all agents, and measure that."""
    programs = Programs(plane)
    with steps.step("resource definitions, accounts, certificate"):
        programs.install()
    nodes = population.names(options.agents)
    with steps.step(f"{options.agents} Nodes, Pods and tokens") as step:
        files = population.make(
            plane,
            nodes,
            programs.folder / "tokens",
            lambda done: step.update(f"{done}/{options.agents}"),
        )
    with steps.step(f"{options.servers} servers"):
        for number in range(options.servers):
            programs.server(f"server-{number}", {"log": {"level": "warning"}})
        for server in programs.servers.values():
            programs.start(server)
    bench = Bench(plane, programs, Herd(programs, files, options.per_process), report, profiler)
    bench.rest()
    base = _memory(bench)
    _connect(bench, steps)
    _report_memory(bench, base)
    return bench


def _measure(bench: Bench, options: argparse.Namespace, steps: Steps) -> None:
    for concurrent in ("100%", "25%"):
        results = []
        for number in range(options.repeat):
            with steps.step(f"task with maxConcurrent {concurrent}, {number + 1}"):
                results.append(_task(bench, concurrent))
        if results:
            _report_tasks(bench, concurrent, results)
    if bench.profiler is not None:
        with steps.step("task under the profiler"):
            _profile(bench, bench.profiler)
    if not options.no_kill and options.servers > 1:
        with steps.step("kill -9 of one server"):
            _kill(bench)


def _memory(bench: Bench) -> dict[str, dict[str, int]]:
    status = bench.plane.processes.status()
    found = {}
    for name, server in bench.programs.servers.items():
        pid = status[server.name].pid
        found[name] = {"pss": measure.pss(pid), "rss": measure.rss(pid)}
    return found


def _connect(bench: Bench, steps: Steps) -> None:
    herd = bench.herd
    with steps.step(f"{herd.size} agents connect") as step:
        began = time.monotonic()
        herd.start()
        spent = bench.spent()

        def connected() -> bool:
            count = herd.status()["connected"]
            step.update(f"{count}/{herd.size}")
            return count == herd.size

        wait_for(f"{herd.size} agents are connected", connected, CONNECT_SECONDS, 0.25)
        seconds = time.monotonic() - began
    with steps.step("the servers come to rest"):
        wait_for("every Agent is written", lambda: _agents_written(bench), CONNECT_SECONDS, 1.0)
        bench.rest()
    problems = dict(herd.problems().most_common(5))
    bench.report.line(
        "connect", seconds=round(seconds, 2), problems=problems, **_rename(spent.figures())
    )


def _agents_written(bench: Bench) -> bool:
    servers = bench.programs.servers.values()
    return sum(metric(s, "outrider_server_agent_writes_total") for s in servers) >= bench.herd.size


def _rename(figures: dict[str, float]) -> dict[str, float]:
    """The wall time of a clock that ran until the servers were at rest."""
    return {("until_rest_seconds" if k == "wall_seconds" else k): v for k, v in figures.items()}


def _report_memory(bench: Bench, base: dict[str, dict[str, int]]) -> None:
    now = _memory(bench)
    total = 0
    servers = {}
    for name, server in bench.programs.servers.items():
        streams = metric(server, "outrider_server_streams")
        grown = now[name]["rss"] - base[name]["rss"]
        total += grown
        servers[name] = {
            "base_rss_mib": round(base[name]["rss"] / 2**20, 1),
            "rss_mib": round(now[name]["rss"] / 2**20, 1),
            "base_pss_mib": round(base[name]["pss"] / 2**20, 1),
            "pss_mib": round(now[name]["pss"] / 2**20, 1),
            "streams": int(streams),
            "kib_per_agent": round(grown / measure.KIB / max(1.0, streams), 1),
            "leads": _leads(server),
        }
    per_agent = total / measure.KIB / bench.herd.size
    bench.report.line("memory", kib_per_agent=round(per_agent, 1), by_server=servers)
    bench.report.bound("server memory per connected agent", per_agent, "KiB", MOST_KIB_PER_AGENT)


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class TaskResult:
    """What one task took."""

    seconds: float
    writes: int


def _apply(bench: Bench, concurrent: str) -> str:
    name = f"bench-{uuid.uuid4().hex[:8]}"
    task = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": name},
        "spec": {
            "run": {"command": ["uname", "-r"]},
            "timeoutSeconds": 60,
            "rollout": {"maxConcurrent": concurrent, "waves": ["100%"]},
        },
    }
    bench.plane.kubectl("apply", "-f", "-", stdin=json.dumps(task))
    return name


def _body(bench: Bench, name: str) -> dict[str, Any]:
    path = f"/apis/outrider.dev/v1alpha1/namespaces/default/agenttasks/{name}"
    return bench.plane.request("GET", path)


def _until_final(bench: Bench, name: str) -> dict[str, Any]:
    status: dict[str, Any] = {}

    def final() -> bool:
        status.update(_body(bench, name).get("status", {}))
        return status.get("phase") in FINAL

    wait_for(f"{name} has ended", final, TASK_SECONDS, 0.05)
    return status


def _task(bench: Bench, concurrent: str) -> TaskResult:
    bench.rest()
    tally = bench.herd.status()
    writes = measure.api_writes(bench.plane, TASK_RESOURCES)
    spent = bench.spent()
    began = time.monotonic()
    name = _apply(bench, concurrent)
    applied = time.monotonic() - began
    status = _until_final(bench, name)
    seconds = time.monotonic() - began
    figures = spent.figures()
    _check(bench, name, status)
    bench.rest()
    made = measure.api_writes(bench.plane, TASK_RESOURCES) - writes
    wait_for(
        "every result is acknowledged",
        lambda: _since(bench, tally)["acknowledged"] >= bench.herd.size,
        30.0,
        0.25,
    )
    after = _since(bench, tally)
    bench.report.line(
        "task",
        max_concurrent=concurrent,
        seconds=round(seconds, 2),
        kubectl_seconds=round(applied, 2),
        writes=made.total(),
        writes_by_kind=dict(made),
        writes_per_100=round(100 * made.total() / bench.herd.size, 2),
        executed=after["executed"],
        sent_again=after["repeated"],
        **figures,
    )
    if after["executed"] != bench.herd.size:
        raise RuntimeError(f"{after['executed']} runs of {bench.herd.size} agents were begun")
    bench.plane.kubectl("delete", "agenttask", name)
    return TaskResult(seconds, made.total())


def _since(bench: Bench, before: dict[str, int]) -> dict[str, int]:
    return {name: value - before.get(name, 0) for name, value in bench.herd.status().items()}


def _check(bench: Bench, name: str, status: dict[str, Any]) -> None:
    """Every node stands in the reports as succeeded, once.

    Raises:
        RuntimeError: It does not.
    """
    path = "/apis/outrider.dev/v1alpha1/namespaces/default/agenttaskreports"
    found = bench.plane.request("GET", f"{path}?labelSelector=outrider.dev%2Ftask%3D{name}")
    rows = [row for report in found["items"] for row in report["nodes"]]
    good = {row["node"] for row in rows if row["phase"] == "Succeeded" and row.get("preview")}
    size = bench.herd.size
    if len(rows) != size or len(good) != size or status["counts"]["succeeded"] != size:
        raise RuntimeError(f"{name}: {len(rows)} rows, {len(good)} good ones, {status['counts']}")


def _report_tasks(bench: Bench, concurrent: str, results: list[TaskResult]) -> None:
    middle = sorted(results, key=lambda result: result.seconds)[len(results) // 2]
    writes = 100 * max(result.writes for result in results) / bench.herd.size
    name = f"task, maxConcurrent {concurrent}"
    bench.report.bound(f"{name} (median)", middle.seconds, "s", MOST_SECONDS[concurrent])
    bench.report.bound(f"{name}: writes per 100 nodes", writes, "", MOST_WRITES_PER_100)


def _profile(bench: Bench, profiler: Profiler) -> None:
    """The same task with a sampling profiler on the leader and on one swarm process."""
    bench.rest()
    status = bench.plane.processes.status()
    leader = bench.leader()
    with profiler.sampling({"leader": status[leader.name].pid}) as profiles:
        name = _apply(bench, "100%")
        _until_final(bench, name)
    for part, profile in profiles.items():
        print(profile.text(), file=sys.stderr)
        bench.report.line("profile", part=part, **profile.figures())
    bench.plane.kubectl("delete", "agenttask", name)


def _kill(bench: Bench) -> None:
    """Kill the gateway that does not lead, and wait until all agents are back."""
    bench.rest()
    leader = bench.leader()
    victim = next(s for s in bench.programs.servers.values() if s is not leader)
    before, streams = bench.herd.status()["connects"], metric(victim, "outrider_server_streams")
    problems = bench.herd.problems()
    bench.plane.processes.kill(victim.name)
    spent = bench.spent()
    began = time.monotonic()
    wait_for(
        "the other server has all agents",
        lambda: (
            bench.herd.status()["connects"] >= before + streams
            and bench.herd.status()["connected"] == bench.herd.size
        ),
        CONNECT_SECONDS,
        0.25,
    )
    seconds = time.monotonic() - began
    bench.report.line(
        "return after kill -9",
        seconds=round(seconds, 2),
        moved=int(streams),
        streams=int(metric(leader, "outrider_server_streams")),
        problems=dict((bench.herd.problems() - problems).most_common(5)),
        **spent.figures(),
    )
    bench.report.bound("all agents back after kill -9", seconds, "s", MOST_RETURN_SECONDS)


def keep_logs(folder: Path, name: str) -> None:
    """Save the logs: the folder goes."""
    kept = OUTPUT.parent / name
    kept.mkdir(parents=True, exist_ok=True)
    for log in (folder / "log").glob("outrider-*.log"):
        (kept / log.name).write_bytes(log.read_bytes())


if __name__ == "__main__":
    run_main(main)
