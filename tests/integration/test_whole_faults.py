"""Faults that the whole must survive: each test causes the very fault on real processes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from cluster.controlplane import API_SERVER, ControlPlane
from cluster.programs import HOST, Program, Programs, http, rows, status
from cluster.supervised import wait_for
from prometheus_client.parser import text_string_to_metric_families

#: Several waits of up to a minute each, should the machine be busy.
pytestmark = pytest.mark.timeout(400)

NODES = ("alpha", "beta", "gamma")
WAIT = 60.0
TAKEOVER_SECONDS = 20.0
ALL_AT_ONCE = {"maxConcurrent": "100%", "maxFailures": "100%", "waves": ["100%"]}


@pytest.fixture(scope="module")
def fleet(
    control_plane_programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        programs = Programs(plane)
        programs.install()
        for name in ("server-0", "server-1"):
            programs.server(name)
        for server in programs.servers.values():
            programs.start(server)
        for node in NODES:
            programs.start(programs.agent(node), ready=False)
        programs.wait_agents_ready(len(NODES))
        yield programs


@pytest.fixture
def whole(fleet: Programs) -> Iterator[Programs]:
    """The fleet, and everything of it running again afterwards."""
    yield fleet
    processes = fleet.plane.processes
    if not processes.running(API_SERVER):
        fleet.plane.start_part(API_SERVER)
    for program in [*fleet.servers.values(), *fleet.agents.values()]:
        if not processes.running(program.name):
            fleet.start(program, ready=False)
    fleet.wait_agents_ready(len(NODES), WAIT)
    for server in fleet.servers.values():
        fleet.wait_ready(server)


def apply(fleet: Programs, source: str, env: dict[str, str], **spec: Any) -> str:
    name = f"task-{uuid.uuid4().hex[:8]}"
    task = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": name},
        "spec": {
            "run": {"script": {"interpreter": ["/bin/sh", "-eu"], "source": source}},
            "env": env,
            "timeoutSeconds": 300,
            "rollout": ALL_AT_ONCE,
            **spec,
        },
    }
    fleet.plane.kubectl("apply", "-f", "-", stdin=json.dumps(task))
    return name


def wait_phase(fleet: Programs, name: str, *phases: str, seconds: float = WAIT) -> None:
    wait_for(
        f"{name} is one of {phases}",
        lambda: status(fleet, name).get("phase") in phases,
        seconds,
        0.1,
    )


def wait_lines(file, count: int) -> None:
    wait_for(
        f"{file.name} has {count} lines",
        lambda: file.exists() and len(file.read_text().splitlines()) >= count,
        WAIT,
    )


def metric(program: Program, name: str) -> float:
    families = text_string_to_metric_families(http(program, "/metrics")[1])
    return sum(s.value for f in families for s in f.samples if s.name == name)


def leading(fleet: Programs) -> Program | None:
    """The server that holds the Lease; None while nobody does."""
    lease = json.loads(fleet.plane.kubectl("-n", "outrider", "get", "lease", "-o", "json"))
    holder = lease["items"][0]["spec"].get("holderIdentity") or ""
    holds = (server for name, server in fleet.servers.items() if holder.startswith(name))
    return next(holds, None)


def leader(fleet: Programs) -> Program:
    wait_for("somebody leads", lambda: leading(fleet) is not None, WAIT, 0.1)
    found = leading(fleet)
    assert found is not None
    return found


def test_agent_killed_in_the_middle_of_a_task(whole, tmp_path) -> None:
    log, pids = tmp_path / "log", tmp_path / "pids"
    name = apply(
        whole,
        'echo "$OUTRIDER_NODE" >> "$LOG"; echo $$ >> "$PIDS"; sleep 600',
        {"LOG": str(log), "PIDS": str(pids)},
        target={"nodeNames": ["beta"]},
    )
    wait_lines(pids, 1)
    wait_for(
        "it is reported to run",
        lambda: rows(whole, name).get("beta", {}).get("phase") == "Running",
        WAIT,
        0.1,
    )
    agent = whole.agents["beta"]
    whole.plane.processes.kill(agent.name)
    whole.start(agent, ready=False)
    wait_phase(whole, name, "Failed")
    row = rows(whole, name)["beta"]
    assert (row["phase"], row["attempt"], row["reason"]) == ("Interrupted", 1, "AgentRestarted")
    assert log.read_text() == "beta\n"
    pid = int(pids.read_text())
    wait_for("its process is gone", lambda: not _alive(pid), WAIT)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_api_server_away_in_the_middle_of_a_task(whole, tmp_path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    name = apply(
        whole,
        'echo "$OUTRIDER_NODE" >> "$LOG"; while ! [ -e "$GO" ]; do sleep 0.1; done;'
        ' echo "$OUTRIDER_NODE done" >> "$LOG"',
        {"LOG": str(log), "GO": str(go)},
    )
    wait_lines(log, 3)
    wait_for("all run", lambda: status(whole, name).get("counts", {}).get("running") == 3, WAIT)
    streams = {n: metric(a, "outrider_agent_connects_total") for n, a in whole.agents.items()}
    whole.plane.kill_part(API_SERVER)
    go.touch()
    wait_lines(log, 6)
    for agent in whole.agents.values():
        assert http(agent, "/readyz")[0] == 200, "the agents keep their streams"
    whole.plane.start_part(API_SERVER)
    wait_phase(whole, name, "Succeeded", seconds=90)
    assert {row["attempt"] for row in rows(whole, name).values()} == {1}
    assert sorted(log.read_text().splitlines()) == sorted(
        line for node in NODES for line in (node, f"{node} done")
    )
    assert streams == {
        n: metric(a, "outrider_agent_connects_total") for n, a in whole.agents.items()
    }


def test_leader_killed_in_the_middle_of_a_task(whole, tmp_path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    name = apply(
        whole,
        'echo "$OUTRIDER_NODE" >> "$LOG"; while ! [ -e "$GO" ]; do sleep 0.1; done',
        {"LOG": str(log), "GO": str(go)},
        rollout={"maxConcurrent": 2, "maxFailures": 0, "waves": ["100%"]},
    )
    wait_lines(log, 2)
    first = leader(whole)
    killed = time.monotonic()
    whole.plane.processes.kill(first.name)
    wait_for(
        "the other takes over", lambda: leading(whole) not in (None, first), TAKEOVER_SECONDS, 0.2
    )
    assert time.monotonic() - killed < TAKEOVER_SECONDS
    assert len(log.read_text().splitlines()) == 2, "never more than maxConcurrent"
    go.touch()
    wait_phase(whole, name, "Succeeded")
    assert sorted(log.read_text().splitlines()) == sorted(NODES), "nothing runs twice"
    assert {row["attempt"] for row in rows(whole, name).values()} == {1}


def test_gateway_killed_in_the_middle_of_a_task(whole, tmp_path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    name = apply(
        whole,
        'echo "$OUTRIDER_NODE" >> "$LOG"; while ! [ -e "$GO" ]; do sleep 0.1; done',
        {"LOG": str(log), "GO": str(go)},
    )
    wait_lines(log, 3)
    first = leader(whole)
    (other,) = [server for server in whole.servers.values() if server is not first]
    whole.plane.processes.kill(other.name)
    whole.wait_agents_ready(len(NODES), WAIT)
    go.touch()
    wait_phase(whole, name, "Succeeded")
    assert sorted(log.read_text().splitlines()) == sorted(NODES)


def test_sigterm_frees_the_ports_and_hands_over(whole, tmp_path) -> None:
    first = leader(whole)
    code = whole.plane.processes.stop(first.name, 40)
    assert code == 0, whole.plane.processes.log(first.name)[-3000:]
    for port in (first.grpc_port, first.ops_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    wait_for("the other leads", lambda: leading(whole) not in (None, first), TAKEOVER_SECONDS, 0.1)
    log = tmp_path / "log"
    name = apply(whole, 'echo "$OUTRIDER_NODE" >> "$LOG"', {"LOG": str(log)})
    wait_phase(whole, name, "Succeeded")
    assert sorted(log.read_text().splitlines()) == sorted(NODES)


def test_second_process_of_an_agent_is_refused_its_file(whole) -> None:
    agent = whole.agents["alpha"]
    done = subprocess.run(
        [sys.executable, "-m", agent.module, "--config", agent.config, "--ops.address=127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert "state.directory" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "flags", "says"),
    [
        ("outrider_operator.main", ["--gateway.address=nonsense"], "gateway.address"),
        ("outrider_operator.main", ["--gateway.addres=:1"], "--gateway.addres"),
        ("outrider_operator.main", ["--gateway.tls.cert-file=/no/such"], "gateway.tls.certFile"),
        ("outrider_operator.main", ["--sink.kind=tape"], "sink.kind"),
        ("outrider_operator.main", ["--gateway.address=127.0.0.1:TAKEN"], "gateway.address"),
        ("outrider_operator.main", ["--ops.address=127.0.0.1:TAKEN"], "ops.address"),
        ("outrider_agent.main", ["--server.target=nonsense"], "server.target"),
        ("outrider_agent.main", ["--server.ca-file=/no/such"], "server.caFile"),
        ("outrider_agent.main", ["--batch.codec=rar"], "batch.codec"),
        ("outrider_agent.main", ["--ops.address=127.0.0.1:TAKEN"], "ops.address"),
        ("outrider_agent.main", ["--state.directory=/proc/nothing"], "state.directory"),
    ],
)
def test_wrong_settings_end_the_program_with_one_line(whole, tmp_path, module, flags, says) -> None:
    server = "operator" in module
    program = whole.servers["server-0"] if server else whole.agents["alpha"]
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        free = ["--gateway.address=127.0.0.1:0"] if server else [f"--state.directory={tmp_path}"]
        began = time.monotonic()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                module,
                "--config",
                program.config,
                "--ops.address=127.0.0.1:0",
                *free,
                *(flag.replace("TAKEN", port) for flag in flags),
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        took = time.monotonic() - began
    assert done.returncode == 2, done.stderr
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    # 2 s are promised; the bound leaves room for a busy machine and the interpreter's own start.
    assert took < 10, took


def test_sigterm_of_an_agent_ends_in_order(whole) -> None:
    agent = whole.agents["gamma"]
    whole.plane.processes.signal(agent.name, signal.SIGTERM)
    assert whole.plane.processes.wait(agent.name, 30) == 0
    wait_for("its object says so", lambda: whole.ready_agents() == 2, WAIT, 0.2)
