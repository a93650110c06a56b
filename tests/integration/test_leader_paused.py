"""A leader that is frozen past its Lease and thawed while another leads: nothing runs twice."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from cluster.controlplane import ControlPlane
from cluster.programs import Program, Programs, http
from cluster.supervised import wait_for
from prometheus_client.parser import text_string_to_metric_families

NODES = ("alpha", "beta", "gamma")
WAIT = 60.0


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


def holder(fleet: Programs) -> str:
    leases = fleet.plane.kubectl("-n", "outrider", "get", "lease", "-o", "json")
    return str(json.loads(leases)["items"][0]["spec"]["holderIdentity"]).partition("_")[0]


def leads(server: Program) -> float:
    families = text_string_to_metric_families(http(server, "/metrics")[1])
    return sum(s.value for f in families for s in f.samples if s.name == "outrider_server_leader")


def test_a_frozen_leader_does_nothing_more_when_it_thaws(fleet, tmp_path) -> None:
    log, go = tmp_path / "log", tmp_path / "go"
    task = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": "frozen"},
        "spec": {
            "run": {
                "script": {
                    "source": 'echo "$OUTRIDER_NODE" >> "$LOG"; '
                    'while ! [ -e "$GO" ]; do sleep 0.1; done'
                }
            },
            "env": {"LOG": str(log), "GO": str(go)},
            "timeoutSeconds": 300,
            "rollout": {"maxConcurrent": 1, "maxFailures": 0, "waves": ["100%"]},
        },
    }
    fleet.plane.kubectl("apply", "-f", "-", stdin=json.dumps(task))
    wait_for("the first runs", lambda: log.exists() and log.read_text() != "", WAIT, 0.05)
    first = holder(fleet)
    frozen = fleet.servers[first]
    fleet.plane.processes.freeze(frozen.name)
    try:
        wait_for("the other takes over", lambda: holder(fleet) != first, 25, 0.2)
        go.touch()
        # Streams of the frozen server's agents end at their own keepalive, and come back here.
        wait_for("a second one runs", lambda: len(log.read_text().split()) >= 2, WAIT, 0.1)
    finally:
        fleet.plane.processes.thaw(frozen.name)

    def phase() -> str:
        found = json.loads(fleet.plane.kubectl("get", "agenttask", "frozen", "-o", "json"))
        return str(found.get("status", {}).get("phase", ""))

    wait_for("the task has ended", lambda: phase() in ("Succeeded", "Failed"), WAIT, 0.1)
    assert phase() == "Succeeded"
    assert sorted(log.read_text().split()) == sorted(NODES), "each node ran it once"
    wait_for("the old leader knows", lambda: leads(frozen) == 0.0, WAIT, 0.1)
    assert holder(fleet) != first
    fleet.wait_ready(frozen)
