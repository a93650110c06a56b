"""The quick look: a real API server, Outrider's server and three agents, and a task that runs.

Why it exists: who hears of Outrider sees it do its job with one command, without a cluster
or an image. Everything is a plain process on loopback and stays there until `down`. It must show
nothing that the real thing would not.

    python -m cluster.demo up|down
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from typing import Any

from cluster import controlplane, paths
from cluster.controlplane import ControlPlane
from cluster.errors import run_main
from cluster.programs import Programs
from cluster.progress import Steps
from cluster.supervised import wait_for
from rich.console import Console
from rich.table import Table

FOLDER = paths.state("demo")
NODES = ("node-1", "node-2", "node-3")
EXAMPLE = paths.ROOT / "examples" / "kernel-version.yaml"
TASK_SECONDS = 60.0


def up() -> int:
    """Start everything anew, run the example, and say what came of it and what to do next."""
    began = time.monotonic()
    steps, console = Steps(), Console(highlight=False, soft_wrap=True)
    controlplane.require(steps)
    down(quiet=True)
    with steps.step("control plane: etcd, kube-apiserver, kube-controller-manager"):
        plane = ControlPlane(FOLDER, detached=True).start()
    try:
        _outrider(plane, steps)
        succeeded = _example(plane, console)
    except BaseException:
        _keep_logs()
        plane.stop()
        raise
    _next(plane, console, time.monotonic() - began)
    plane.processes.let_go()
    return 0 if succeeded else 1


def down(*, quiet: bool = False) -> int:
    """Take everything away: processes and files."""
    plane = ControlPlane.attach(FOLDER)
    if plane is not None:
        plane.stop()
    if not quiet:
        print("the demo is gone" if plane else "no demo is running")
    return 0


def _outrider(plane: ControlPlane, steps: Steps) -> None:
    programs = Programs(plane)
    with steps.step("resource definitions, accounts, certificate"):
        programs.install()
    with steps.step("outrider-server"):
        programs.start(programs.server())
    with steps.step(f"outrider-agent on {', '.join(NODES)}"):
        for node in NODES:
            programs.start(programs.agent(node), ready=False)
        programs.wait_agents_ready(len(NODES))


def _example(plane: ControlPlane, console: Console) -> bool:
    """Apply the example and show it going; True if it succeeded on all nodes."""
    console.print(f"\n$ kubectl apply -f {EXAMPLE.relative_to(paths.ROOT)}")
    console.print(plane.kubectl("apply", "-f", EXAMPLE).strip())
    shown = ""

    def finished() -> bool:
        nonlocal shown
        status = _task(plane).get("status", {})
        counts = status.get("counts", {})
        line = f"{status.get('phase', 'Pending'):10} " + "  ".join(
            f"{name} {counts[name]}"
            for name in ("targeted", "running", "succeeded", "failed")
            if name in counts
        )
        if line != shown:
            console.print(line.rstrip())
            shown = line
        return status.get("phase") in ("Succeeded", "Failed", "Cancelled")

    wait_for("the example has ended", finished, TASK_SECONDS, 0.05)
    console.print(_table(plane))
    return bool(_task(plane)["status"]["phase"] == "Succeeded")


def _task(plane: ControlPlane) -> dict[str, Any]:
    task: dict[str, Any] = json.loads(plane.kubectl("get", "-f", EXAMPLE, "-o", "json"))
    return task


def _table(plane: ControlPlane) -> Table:
    """Node, exit code and output, from the task's reports."""
    reports = json.loads(plane.kubectl("get", "agenttaskreports", "-o", "json"))
    table = Table("NODE", "PHASE", "EXIT CODE", "OUTPUT", box=None, pad_edge=False, padding=(0, 3))
    rows = [row for report in reports["items"] for row in report["nodes"]]
    for row in sorted(rows, key=lambda row: str(row["node"])):
        output = row.get("preview", "").strip() or row.get("message", "")
        table.add_row(row["node"], row["phase"], str(row.get("exitCode", "")), output)
    return table


def _next(plane: ControlPlane, console: Console, seconds: float) -> None:
    records = f"{FOLDER}/outrider/server-0/records/*"
    config = shlex.quote(str(plane.kubeconfig))
    kubectl = "kubectl" if shutil.which("kubectl") else str(plane.program("kubectl"))
    console.print(f"""
That took {seconds:.0f} s. It is all still running. Next you can type

  export KUBECONFIG={config}
  {kubectl} get agents                          # who is there
  {kubectl} apply -f examples/disk-usage.yaml   # another task
  {kubectl} get agenttasks,agenttaskreports     # how it goes
  {kubectl} explain agenttask.spec              # what a task can say
  .venv/bin/kubectl-outrider run -- uptime      # run something now

and see what the agents sent:

  .venv/bin/python -m outrider_proto.records {records}

make demo-down takes it all away.""")


def _keep_logs() -> None:
    """Save the logs of a demo that failed: its folder goes."""
    logs, kept = FOLDER / "log", paths.cache() / "demo-failed-logs"
    if logs.exists():
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept)
        print(f"the logs are in {kept}", file=sys.stderr)


def main() -> int:
    """Run the command that was asked for; 2 for any other word."""
    commands = {"up": up, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print("usage: python -m cluster.demo up|down", file=sys.stderr)
        return 2
    return commands[sys.argv[1]]()


if __name__ == "__main__":
    run_main(main)
