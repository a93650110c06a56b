"""The smoke test that `helm test` runs, and what AgentConfigs are told, with real programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from cluster.controlplane import ControlPlane
from cluster.programs import Programs
from cluster.supervised import wait_for

WAIT = 40.0


@pytest.fixture(scope="module")
def fleet(
    control_plane_programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        programs = Programs(plane)
        programs.install()
        programs.start(programs.server(overrides={"agents": {"removeAfterSeconds": 1}}))
        for node in ("alpha", "beta"):
            programs.start(programs.agent(node), ready=False)
        programs.wait_agents_ready(2)
        yield programs


def smoke(fleet: Programs, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "outrider_operator.smoke"),
            *("--kubeconfig", str(fleet.plane.kubeconfig), *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environ},
    )


def tasks(fleet: Programs) -> list[Any]:
    return list(json.loads(fleet.plane.kubectl("get", "agenttasks", "-A", "-o", "json"))["items"])


def test_smoke_succeeds_and_cleans_up(fleet) -> None:
    done = smoke(fleet, POD_NAMESPACE="outrider", OUTRIDER_SMOKE_TIMEOUT_SECONDS="30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "alpha: Succeeded" in done.stdout
    assert "Succeeded: 2 of 2 nodes answered" in done.stdout
    assert "AgentTask outrider/smoke-" in done.stdout
    wait_for("its task is gone", lambda: not tasks(fleet), WAIT, 0.1)


def test_smoke_fails_in_words(fleet) -> None:
    done = smoke(fleet, "--namespace", "no-such-namespace")
    assert done.returncode == 1
    assert "no-such-namespace" in done.stdout
    assert "Traceback" not in done.stderr


def test_smoke_fails_when_a_node_does_not_answer(fleet) -> None:
    agent = fleet.agents["beta"]
    fleet.plane.processes.kill(agent.name)
    try:
        done = smoke(fleet, "--timeout", "3")
    finally:
        fleet.start(agent)
    assert done.returncode == 1, done.stdout
    assert "beta: Skipped" in done.stdout
    assert "1 of 2 nodes answered" in done.stdout


def test_an_agent_goes_a_while_after_its_node(fleet) -> None:
    node = "gamma"
    agent = fleet.agent(node)
    fleet.start(agent)
    wait_for("its Agent is there", lambda: node in agents(fleet), WAIT, 0.1)
    fleet.plane.processes.kill(agent.name)
    fleet.plane.kubectl("delete", "node", node)
    wait_for("its Agent is gone", lambda: node not in agents(fleet), WAIT, 0.2)
    assert {"alpha", "beta"} <= agents(fleet)


def agents(fleet: Programs) -> set[str]:
    found = json.loads(fleet.plane.kubectl("get", "agents.outrider.dev", "-o", "json"))
    return {item["metadata"]["name"] for item in found["items"]}
