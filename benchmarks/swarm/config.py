"""One change of an AgentConfig for thousands of agents: its time, its writes, its processor time.

Why it exists: the figures in docs/performance.md come from here. API server, servers and agents all
run on this machine, so the figures hold for its cores. It must measure what a user sees: from
`kubectl apply` until the status says that every agent runs it. Merging is measured by itself: many
AgentConfigs for all nodes, in this process.

    python -m swarm.config --agents 5000
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster import controlplane, paths
from cluster.controlplane import ControlPlane
from cluster.errors import run_main
from cluster.progress import Steps
from cluster.supervised import wait_for
from outrider_operator.core.config_count import count_settled
from outrider_operator.core.config_objects import content_of, revision_of
from outrider_operator.core.config_plan import (
    Config,
    Merger,
    NodeState,
    conflicts,
    picture,
)
from outrider_operator.core.config_rollout import Plan, Rollout
from swarm import fanout, measure
from swarm.fanout import Bench
from swarm.profiler import Profiler

OUTPUT = paths.ROOT / "dist" / "bench-config.jsonl"
CONFIGS = "/apis/outrider.dev/v1alpha1/agentconfigs"
NAME = "bench"
CHANGE_SECONDS = 180.0
#: Bytes of a plug-in's settings: what makes a configuration a few kilobytes.
DETAIL_BYTES = 2048
#: Resources whose writes are counted as a change's; those of Agent objects follow later.
CHANGE_RESOURCES = ("agentconfigs", "controllerrevisions", "events")
#: The bounds of docs/performance.md: seconds, and processor seconds of merging.
MOST_SECONDS = 15.0
MOST_MERGE_SECONDS = 2.0
MERGED_CONFIGS = 200
MERGED_NODES = 5000


def main() -> int:
    """Run all measurements; 1 if a figure is over its bound."""
    options = _options()
    steps = Steps()
    report = measure.Report(options.output, {"agents": options.agents, "servers": options.servers})
    with steps.step(f"merge {MERGED_CONFIGS} AgentConfigs for {MERGED_NODES} nodes"):
        merging(report)
    if options.agents:
        controlplane.require(steps)
        profiler = Profiler.ensure(steps) if options.profile else None
        folder = Path(tempfile.mkdtemp(prefix="outrider-bench-"))
        with ControlPlane(folder) as plane:
            try:
                bench = fanout.begin(plane, options, report, steps, profiler)
                _changes(bench, options, steps)
            finally:
                fanout.keep_logs(folder, "bench-config-logs")
    return 0 if report.table() else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="swarm.config", description=__doc__)
    parser.add_argument("--agents", type=int, default=5000, help="0: merging only")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--per-process", type=int, default=500, help="agents in one process")
    parser.add_argument("--repeat", type=int, default=3, help="changes")
    parser.add_argument("--profile", action="store_true", help="also say where the time goes")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file for the JSON lines")
    return parser.parse_args()


# ---------------------------------------------------------------- changes


def _changes(bench: Bench, options: argparse.Namespace, steps: Steps) -> None:
    with steps.step("the first AgentConfig"):
        _change(bench, 1)
    results = []
    for number in range(options.repeat):
        with steps.step(f"change {number + 1} for all"):
            results.append(_change(bench, number + 2))
    if results:
        middle = sorted(results)[len(results) // 2]
        name = "every agent Applied and the status final (median)"
        bench.report.bound(name, middle, "s", MOST_SECONDS)
    if bench.profiler is not None:
        with steps.step("change under the profiler"):
            _profile(bench, bench.profiler, options.repeat + 2)


def _apply(bench: Bench, number: int) -> None:
    plugin = {
        "name": "bench",
        "version": str(number),
        "source": {"urls": ["https://example.org/bench"], "sha256": "0" * 64},
        "detail": "x" * DETAIL_BYTES,
    }
    config = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentConfig",
        "metadata": {"name": NAME},
        "spec": {
            "collectors": {"host": {"intervalSeconds": 10 + number}},
            "plugins": [plugin],
            "rollout": {"maxUnavailable": "100%", "canary": {"nodes": 0}},
        },
    }
    bench.plane.kubectl("apply", "-f", "-", stdin=json.dumps(config))


def _until_final(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def final() -> bool:
        found.update(bench.plane.request("GET", f"{CONFIGS}/{NAME}"))
        status = found.get("status", {})
        return bool(
            status.get("observedGeneration") == found["metadata"]["generation"]
            and status["rollout"]["phase"] == "Settled"
            and status["settledRevision"] == status["revision"]
            and status["counts"]["applied"] == bench.herd.size
        )

    wait_for("every agent runs it", final, CHANGE_SECONDS, 0.05)
    return found


def _change(bench: Bench, number: int) -> float:
    bench.rest()
    tally = bench.herd.status()
    writes = measure.api_writes(bench.plane, CHANGE_RESOURCES)
    agents = measure.api_writes(bench.plane, ("agents",)).total()
    spent = bench.spent()
    began = time.monotonic()
    _apply(bench, number)
    applied = time.monotonic() - began
    found = _until_final(bench)
    seconds = time.monotonic() - began
    figures = spent.figures()
    made = measure.api_writes(bench.plane, CHANGE_RESOURCES) - writes
    meanwhile = measure.api_writes(bench.plane, ("agents",)).total() - agents
    after = bench.herd.status()
    bench.report.line(
        "change",
        number=number,
        seconds=round(seconds, 2),
        kubectl_seconds=round(applied, 2),
        writes=made.total(),
        writes_by_kind=dict(made),
        agent_writes_meanwhile=meanwhile,
        sent=after["configs"] - tally["configs"],
        applied=after["applied"] - tally["applied"],
        counts=found["status"]["counts"],
        **figures,
    )
    return seconds


def _profile(bench: Bench, profiler: Profiler, number: int) -> None:
    """The same change with a sampling profiler on the leader."""
    bench.rest()
    leader = bench.leader()
    status = bench.plane.processes.status()
    with profiler.sampling({"leader": status[leader.name].pid}) as profiles:
        _apply(bench, number)
        _until_final(bench)
    for part, profile in profiles.items():
        print(profile.text(), file=sys.stderr)
        bench.report.line("profile", part=part, **profile.figures())


# ---------------------------------------------------------------- merging


def merging(report: measure.Report) -> None:
    """Many AgentConfigs for all nodes: as fleets have them, and with a set for each node."""
    for what, distinct in (("pools, zones and single nodes", False), ("every node its own", True)):
        configs, nodes = _population(distinct)
        merger = Merger()
        spent = []
        for _ in range(2):
            began = time.process_time()
            now = picture(configs, nodes, merger)
            conflicts(now)
            count_settled(configs.values(), nodes, now)
            spent.append(time.process_time() - began)
        sets = len({id(desired) for desired in now.desired.values()})
        report.line(
            "merge",
            selectors=what,
            configs=len(configs),
            nodes=len(nodes),
            different=sets,
            cpu_seconds=round(spent[0], 3),
            cpu_seconds_again=round(spent[1], 3),
        )
        report.bound(f"merge, {what}: processor time", spent[0], "s", MOST_MERGE_SECONDS)


def _population(distinct: bool) -> tuple[dict[str, Config], dict[str, NodeState]]:
    chance = random.Random(1)
    nodes = {}
    for number in range(MERGED_NODES):
        labels = {
            "kubernetes.io/hostname": f"node-{number}",
            "zone": f"zone-{number % 3}",
            "pool": f"pool-{number % 20}",
        }
        if distinct:
            labels.update({f"c{i}": "y" for i in range(MERGED_CONFIGS) if chance.random() < 0.1})
        nodes[f"node-{number:05}"] = NodeState(labels, connected=1.0)
    configs = {}
    for number in range(MERGED_CONFIGS):
        choices = [
            {},
            {"zone": f"zone-{number % 3}"},
            {"pool": f"pool-{number % 20}"},
            {"kubernetes.io/hostname": f"node-{number * 20}"},
        ]
        labels = {f"c{number}": "y"} if distinct else chance.choice(choices)
        configs[f"config-{number}"] = _config(f"config-{number}", number, labels)
    return configs, nodes


def _config(name: str, number: int, labels: dict[str, str]) -> Config:
    spec = {
        "selector": {"matchLabels": labels},
        "priority": number % 7,
        "collectors": {"host": {"intervalSeconds": number + 1}},
        "agent": {"logLevel": "info"},
        "plugins": [
            {
                "name": f"plugin-{number % 40}",
                "version": str(number),
                "source": {"urls": ["https://example.org/x"], "sha256": "0" * 64},
            }
        ],
    }
    made = revision_of(name, content_of(spec))
    rollout = Rollout(settled=made.name)
    return Config(name, f"uid-{name}", Plan(), made.name, "", rollout, {made.name: made})


if __name__ == "__main__":
    run_main(main)
