"""The whole of Outrider at work: `make demo-cluster`.

A three-node Kubernetes with Kafka and Prometheus, this project's images and chart, the example task
of the README, the example plug-in, what Kafka then holds and what Prometheus sees. Leaves
everything running to be looked at; `make demo-down` takes it away. Shows only what it has read from
the cluster.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml
from cluster import addons, api, configs, fetch, images, lifecycle, paths, plugins, release
from cluster.errors import run_main
from cluster.layout import KUBECONFIG
from cluster.processes import wait_for
from cluster.progress import Steps
from cluster.records import read_topic
from outrider_proto import records
from rich.console import Console
from rich.table import Table

EXAMPLE = "examples/kernel-version.yaml"
PLUGIN = "examples/plugins/filewatch"
FILE_STATE = 6001
"""Type of the example plug-in's records."""

NODES = 3
SERVERS = 2
TASK_SECONDS = 120.0
SOAK_SECONDS = 5
"""How long the demo watches the canary: the example's minute is for those who do not look on."""


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
    print()


def _start(steps: Steps) -> None:
    """Everything up to a release that is ready."""
    fetch.fetch_all(steps)
    built = images.build(steps)
    with steps.step(f"Kubernetes: control plane and {NODES} nodes"):
        lifecycle.up(NODES)
    with steps.step("Kafka"):
        addons.start_kafka()
    with steps.step("Prometheus"):
        addons.start_prometheus()
    with steps.step("an https server for plug-ins"):
        plugins.start_server()
    with steps.step("helm install outrider charts/outrider"):
        chosen = release.values(built, kafka=True)
        chosen["agent"]["plugins"] = {"caConfigMap": plugins.CA_CONFIG_MAP}
        release.install(chosen)


def _agents_ready() -> bool:
    agents = api.kubectl_json("get", "agents.outrider.dev")["items"]
    conditions = [c for agent in agents for c in agent.get("status", {}).get("conditions", [])]
    ready = [c for c in conditions if c["type"] == "Ready" and c["status"] == "True"]
    return len(ready) >= NODES


def _task() -> dict[str, Any]:
    status: dict[str, Any] = api.kubectl_json("get", "-f", paths.ROOT / EXAMPLE).get("status", {})
    return status


def _run_example() -> None:
    """Apply the example and show its counts whenever they change."""
    print(f"\n$ kubectl apply -f {EXAMPLE}")
    print(api.kubectl("apply", "-f", paths.ROOT / EXAMPLE), end="")
    shown: dict[str, int] = {}

    def finished() -> bool:
        nonlocal shown
        status = _task()
        counts = {name: n for name, n in status.get("counts", {}).items() if n}
        if counts != shown:
            shown = counts
            line = ", ".join(f"{name} {n}" for name, n in counts.items())
            print(f"  {status.get('phase', '')}: {line}")
        return status.get("phase") in ("Succeeded", "Failed", "Cancelled")

    wait_for("end of the example task", finished, TASK_SECONDS, 0.2)
    print()
    reports = api.kubectl_json("get", "agenttaskreports")["items"]
    rows = [
        (
            row["node"],
            row["phase"],
            str(row.get("exitCode", "")),
            row.get("preview", row.get("reason", "")).strip(),
        )
        for report in reports
        for row in report["nodes"]
    ]
    _table("Each node's result", ("NODE", "PHASE", "EXIT CODE", "OUTPUT"), sorted(rows))


def _run_plugin() -> None:
    """Apply the example of a plug-in and show how it reaches the nodes, then its records."""
    manifest = yaml.safe_load((paths.ROOT / PLUGIN / "agentconfig.yaml").read_text())
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    (plugin,) = spec["plugins"]
    package = plugins.pack(plugin["name"], paths.ROOT / PLUGIN / "filewatch")
    plugin |= plugins.publish(plugin["name"], plugin["version"], package)
    spec["rollout"]["canary"]["soakSeconds"] = SOAK_SECONDS
    changes = f"with the package's address and sha256, and soakSeconds: {SOAK_SECONDS}"
    print(f"$ kubectl apply -f {PLUGIN}/agentconfig.yaml   # {changes}")
    print(api.kubectl("apply", "-f", "-", stdin=json.dumps(manifest)), end="")
    shown = ""

    def settled() -> bool:
        nonlocal shown
        status = configs.status(name)
        rollout = status.get("rollout", {})
        counts = {key: n for key, n in status.get("counts", {}).items() if n}
        line = ", ".join(f"{key} {n}" for key, n in counts.items())
        line = f"{rollout['phase']}: {line}" if rollout.get("phase") else shown
        if line != shown:
            shown = line
            print(f"  {line}")
        return bool(status.get("observedGeneration") and rollout.get("phase") == "Settled")

    wait_for("the plug-in on all nodes", settled, TASK_SECONDS, 0.2)
    print()
    rows: list[tuple[str, str, str, str]] = []

    def arrived() -> bool:
        rows[:] = sorted(set(_plugin_records()))
        return len({node for node, *_ in rows}) >= NODES

    wait_for("records of the plug-in in Kafka", arrived, 90, 1.0)
    _table("Records of the plug-in in Kafka", ("NODE", "EVENT", "FILE", "SHA-256"), rows)


def _plugin_records() -> list[tuple[str, str, str, str]]:
    """Node, event, path and the hash's beginning of each record of the example plug-in."""
    found = []
    for message in asyncio.run(read_topic(addons.KAFKA_HERE)):
        for record in message.decoded.records:
            if record.data_type == FILE_STATE:
                fields = records.fields_of(record)
                short = fields.get("sha256", "")[:12]
                found.append((message.decoded.node, fields["event"], fields["path"], short))
    return found


def _show_records() -> None:
    """How many records of each type Kafka holds, and of how many nodes."""
    counts: Counter[int] = Counter()
    nodes: dict[int, set[str]] = {}
    for message in asyncio.run(read_topic(addons.KAFKA_HERE)):
        for record in message.decoded.records:
            counts[record.data_type] += 1
            nodes.setdefault(record.data_type, set()).add(message.decoded.node)
    names = {**records.NAMES, FILE_STATE: "the plug-in's"}
    rows = [
        (str(kind), names.get(kind, ""), str(number), str(len(nodes[kind])))
        for kind, number in sorted(counts.items())
    ]
    _table("Records in Kafka", ("TYPE", "WHAT", "RECORDS", "NODES"), rows)


def _show_targets() -> None:
    """What Prometheus scrapes, once each target was scraped."""

    def scraped() -> bool:
        seen = [target for target in addons.targets() if target["health"] != "unknown"]
        return len(seen) >= NODES + SERVERS

    wait_for("first scrape of every target", scraped, 60, 0.5)
    rows = [
        (target["component"], target["pod"], target["node"], target["health"])
        for target in addons.targets()
    ]
    _table("Prometheus' targets", ("COMPONENT", "POD", "NODE", "HEALTH"), sorted(rows))


def main() -> None:
    """Start it all, show it, and say what to do next.

    Raises:
        ClusterError: something did not work; what is there stays for a look.
    """
    began = time.monotonic()
    steps = Steps()
    _start(steps)
    with steps.step("agents connected"):
        wait_for("all agents Ready", _agents_ready, 90, 0.3)
    _run_example()
    _run_plugin()
    with steps.step("first records in Kafka"):
        wait_for("records", lambda: asyncio.run(read_topic(addons.KAFKA_HERE)), 90, 1.0)
    _show_records()
    _show_targets()
    kubectl = toolchain_path()
    print(f"""\
It took {time.monotonic() - began:.0f} s, and is yours to try:

  export KUBECONFIG={KUBECONFIG}
  export PATH="$PATH:{kubectl}"
  kubectl get agents
  kubectl get agenttasks,agenttaskreports,agentconfigs
  kubectl apply -f examples/plugins/filewatch/task.yaml   # asks the plug-in on every node
  kubectl apply -f examples/disk-usage.yaml
  kubectl -n outrider logs deployment/outrider-server
  curl 'http://127.0.0.1:{addons.PROMETHEUS_PORT}/api/v1/query?query=up'
  PYTHONPATH=tests .venv/bin/python -m cluster.records    # what is in Kafka, as JSON lines
  PYTHONPATH=tests .venv/bin/python -m cluster --help     # faults: node stop, partition, ...

`make demo-down` takes it all away.""")


def toolchain_path() -> str:
    """Folder of the cluster's own kubectl, for people who have none."""
    return os.fspath(KUBECONFIG.parent / "bin")


if __name__ == "__main__":
    run_main(main)
