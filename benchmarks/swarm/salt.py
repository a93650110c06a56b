"""The same job by Salt and by Outrider, side by side: N real minions against N real agents.

Why it exists: a figure says little without one of a peer from the same machine and the same run.
Both run a command on all nodes, all as bare processes on loopback: a Salt master and its minions;
an API server, one Outrider server and its agents. The API server is counted apart: with Outrider
it is there anyway. It must give neither a setting that helps it against the other.

    python -m swarm.salt --nodes 50
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from cluster import controlplane, paths
from cluster.controlplane import ControlPlane
from cluster.errors import ClusterError, run_main
from cluster.programs import Programs
from cluster.progress import Steps
from cluster.supervised import Supervised, free_port, wait_for
from swarm import measure
from swarm.profiler import make_environment

VERSION = "3008.3"
OUTPUT = paths.ROOT / "dist" / "bench-salt.jsonl"
COMMAND = ["uname", "-r"]
START_SECONDS = 600.0
JOB_SECONDS = 300
#: An agent or minion with all its children, bytes of PSS; more does not fit into half the memory.
NODE_BYTES = 110 * 2**20


@dataclass(frozen=True)
class Contender:
    """One of the two, running.

    Attributes:
        name: for the figures.
        job: runs the command on all nodes and returns once every result is known.
        nodes: process ids of minions or agents.
        server: process ids of the master or the server.
    """

    name: str
    job: Callable[[], None]
    nodes: list[int]
    server: list[int]


def main() -> int:
    """Measure both, one after the other, and print the table."""
    options = _options()
    count = min(options.nodes, int(psutil.virtual_memory().available / 2 / NODE_BYTES))
    steps = Steps()
    controlplane.require(steps)
    folder = paths.cache() / "bench" / f"salt-{VERSION}"
    with steps.step(f"salt {VERSION}"):
        make_environment(folder, f"salt=={VERSION}")
    report = measure.Report(options.output, {"nodes": count, "command": " ".join(COMMAND)})
    with _outrider(count, steps) as contender:
        ours = _measure(contender, report, steps, options.repeat)
    with _salt(folder / "bin", count, steps) as contender:
        theirs = _measure(contender, report, steps, options.repeat)
    for name, unit in (("median_seconds", "s"), ("node_mib", "MiB"), ("server_mib", "MiB")):
        report.bound(f"salt: {name}", theirs[name], unit, None)
        report.bound(f"outrider: {name}", ours[name], unit, None)
    report.table()
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="swarm.salt", description=__doc__)
    parser.add_argument("--nodes", type=int, default=50, help="fewer where memory does not allow")
    parser.add_argument("--repeat", type=int, default=5, help="jobs of each")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file for the JSON lines")
    return parser.parse_args()


def _measure(
    contender: Contender, report: measure.Report, steps: Steps, repeat: int
) -> dict[str, float]:
    with steps.step(f"{contender.name}: a first job"):
        contender.job()
    nodes, server = _with_children(contender.nodes), _with_children(contender.server)
    seconds = []
    for number in range(repeat):
        with steps.step(f"{contender.name}: job {number + 1} of {repeat}"):
            spent = measure.Spent({"nodes": nodes, "server": server})
            contender.job()
            figures = spent.figures()
        seconds.append(figures["wall_seconds"])
        report.line("job", contender=contender.name, **figures)
    mib = 2**20
    found = {
        "median_seconds": statistics.median(seconds),
        "node_mib": round(sum(map(measure.pss, nodes)) / mib / len(contender.nodes), 1),
        "server_mib": round(sum(map(measure.pss, server)) / mib, 1),
    }
    report.line("summary", contender=contender.name, **found)
    return found


def _with_children(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        process = psutil.Process(pid)
        found += [pid, *(child.pid for child in process.children(recursive=True))]
    return found


# ---------------------------------------------------------------- Outrider


@contextmanager
def _outrider(count: int, steps: Steps) -> Iterator[Contender]:
    with ControlPlane() as plane:
        programs = Programs(plane)
        with steps.step("outrider: control plane and server"):
            programs.install()
            server = programs.server()
            programs.start(server)
        with steps.step(f"outrider: {count} agents"):
            for number in range(count):
                programs.start(programs.agent(f"node-{number:03}"), ready=False)
            programs.wait_agents_ready(count, START_SECONDS)
        status = plane.processes.status()
        yield Contender(
            "outrider",
            lambda: _outrider_job(plane, count),
            [status[agent.name].pid for agent in programs.agents.values()],
            [status[server.name].pid],
        )


def _outrider_job(plane: ControlPlane, count: int) -> None:
    task = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": "bench"},
        "spec": {
            "run": {"command": COMMAND},
            "rollout": {"maxConcurrent": "100%", "waves": ["100%"]},
        },
    }
    plane.kubectl("delete", "agenttask", "bench", "--ignore-not-found")
    plane.kubectl("apply", "-f", "-", stdin=json.dumps(task))
    path = "/apis/outrider.dev/v1alpha1/namespaces/default/agenttasks/bench"

    def done() -> bool:
        counts = plane.request("GET", path).get("status", {}).get("counts", {})
        return bool(counts.get("succeeded") == count)

    wait_for("all agents have succeeded", done, JOB_SECONDS, 0.05)


# ---------------------------------------------------------------- Salt


@contextmanager
def _salt(programs: Path, count: int, steps: Steps) -> Iterator[Contender]:
    with tempfile.TemporaryDirectory(prefix="outrider-salt-") as scratch:
        folder = Path(scratch)
        ports = {"publish_port": free_port(), "ret_port": free_port()}
        master = _write_master(folder, ports)
        # Salt takes its other files from where it was installed unless told otherwise.
        environment = {**os.environ, "PYTHONPATH": "", "HOME": scratch}
        with Supervised.start(folder / "run") as processes:
            with steps.step("salt: master"):
                words: list[str | Path] = [programs / "salt-master", "-c", master]
                processes.run("salt-master", words, environment)
                wait_for("it listens", lambda: _listen(ports.values()), START_SECONDS, 0.2)
            with steps.step(f"salt: {count} minions") as step:
                for number in range(count):
                    config = _write_minion(folder, number, ports)
                    words = [programs / "salt-minion", "-c", config]
                    processes.run(f"salt-minion-{number:03}", words, environment)
                keys = folder / "master" / "pki" / "minions"

                def accepted() -> bool:
                    found = len(list(keys.glob("*"))) if keys.exists() else 0
                    step.update(f"{found}/{count}")
                    return found == count

                wait_for("the master has all minions' keys", accepted, START_SECONDS, 0.5)
                _wait_pong(programs, master, environment, count)
            status = processes.status()
            yield Contender(
                "salt",
                lambda: _salt_job(programs, master, environment, count, "cmd.run", *_joined()),
                [one.pid for name, one in status.items() if "minion" in name],
                [status["salt-master"].pid],
            )


def _joined() -> tuple[str]:
    return (" ".join(COMMAND),)


def _listen(ports: Iterable[int]) -> bool:
    found = psutil.net_connections("tcp")
    taken = {one.laddr.port for one in found if one.laddr and one.status == psutil.CONN_LISTEN}
    return taken.issuperset(ports)


def _wait_pong(programs: Path, master: Path, environment: dict[str, str], count: int) -> None:
    """The keys are there before the minions listen: try until all answer."""

    def all_answer() -> bool:
        try:
            _salt_job(programs, master, environment, count, "test.ping")
        except ClusterError:
            return False
        return True

    wait_for("all minions answer", all_answer, START_SECONDS, 1.0)


def _salt_job(
    programs: Path, master: Path, environment: dict[str, str], count: int, *words: str
) -> None:
    """Run a function on all minions. Raises ClusterError if one does not answer."""
    began = time.monotonic()
    done = subprocess.run(
        [
            *(programs / "salt", "-c", master, "--out=json", "--static"),
            *(f"--timeout={JOB_SECONDS}", "*", *words),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * JOB_SECONDS,
        check=False,
    )
    try:
        answers = json.loads(done.stdout or "{}")
    except ValueError:
        answers = {}
    good = sum(bool(answer) for answer in answers.values())
    if done.returncode or good != count:
        said = (done.stderr or done.stdout).strip()[-300:]
        took = time.monotonic() - began
        raise ClusterError(f"salt: {good} of {count} minions answered in {took:.0f} s: {said}")


def _write_master(folder: Path, ports: dict[str, int]) -> Path:
    config = folder / "master"
    config.mkdir()
    settings = {
        **ports,
        "interface": "127.0.0.1",
        "user": "root",
        "auto_accept": True,
        "root_dir": str(config),
        "pki_dir": str(config / "pki"),
        "cachedir": str(config / "cache"),
        "sock_dir": str(config / "sock"),
        "log_file": str(config / "log"),
        "log_level": "error",
    }
    (config / "master").write_text(yaml.safe_dump(settings))
    return config


def _write_minion(folder: Path, number: int, ports: dict[str, int]) -> Path:
    name = f"node-{number:03}"
    config = folder / name
    config.mkdir()
    settings = {
        "master": "127.0.0.1",
        "master_port": ports["ret_port"],
        "publish_port": ports["publish_port"],
        "id": name,
        "user": "root",
        "root_dir": str(config),
        "pki_dir": str(config / "pki"),
        "cachedir": str(config / "cache"),
        "sock_dir": str(config / "sock"),
        "conf_file": str(config / "minion"),
        "log_file": str(config / "log"),
        "log_level": "error",
    }
    (config / "minion").write_text(yaml.safe_dump(settings))
    return config


if __name__ == "__main__":
    run_main(main)
