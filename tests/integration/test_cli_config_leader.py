"""kubectl outrider config with a real leader and real agents: what it says is what they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.controlplane import ControlPlane
from cluster.programs import NAMESPACE, Programs
from cluster.supervised import wait_for

PLUGIN = Path(sys.executable).parent / "kubectl-outrider"
NODES = ("alpha", "beta", "gamma")
WAIT = 90.0
#: Agent objects are some 10 to 30 seconds behind.
WRITTEN = 60.0
IN = ("--server-namespace", NAMESPACE)
QUICK = {"canary": {"nodes": 1, "soakSeconds": 1}, "maxUnavailable": 1}
#: No agent takes it: it is not an address of loopback.
REFUSED = {"listeners": {"framedTcp": {"address": "192.0.2.1:9876"}}}


@pytest.fixture(scope="module")
def fleet(
    control_plane_programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        programs = Programs(plane)
        programs.install()
        programs.start(programs.server())
        for node in NODES:
            programs.start(programs.agent(node), ready=False)
        programs.wait_agents_ready(len(NODES))
        yield programs


def outrider(fleet: Programs, *words: str, code: int = 0) -> Any:
    done = subprocess.run(
        [PLUGIN, "config", *words],
        env={**os.environ, "KUBECONFIG": str(fleet.plane.kubeconfig), "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def apply(fleet: Programs, name: str, **spec: Any) -> None:
    body = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentConfig",
        "metadata": {"name": name},
        "spec": {"rollout": QUICK, **spec},
    }
    fleet.plane.kubectl("apply", "-f", "-", stdin=json.dumps(body))


def interval(seconds: int, **more: Any) -> dict[str, Any]:
    return {"collectors": {"host": {"intervalSeconds": seconds}}, **more}


def follow(fleet: Programs, name: str, code: int = 0) -> Any:
    return outrider(fleet, "status", name, "--timeout", "80s", code=code)


def shown(fleet: Programs, node: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(outrider(fleet, node, *IN, "-o", "yaml").stdout)
    return found


def written(fleet: Programs, config: str, revision: str, *nodes: str) -> None:
    """Wait until the Agent objects say that these nodes run a revision."""
    part = {"name": config, "revision": revision}

    def there() -> bool:
        path = "/apis/outrider.dev/v1alpha1/agents/"
        found = [fleet.plane.request("GET", path + node)["status"] for node in nodes]
        stands = [status.get("config") or {} for status in found]
        return all(s.get("phase") == "Applied" and part in s["revisions"] for s in stands)

    wait_for(f"{', '.join(nodes)} run {config}@{revision}", there, WRITTEN, 0.2)


def settled(fleet: Programs, name: str) -> str:
    path = f"/apis/outrider.dev/v1alpha1/agentconfigs/{name}"
    return str(fleet.plane.request("GET", path)["status"]["settledRevision"])


def test_a_change_is_followed_and_shown_as_the_agents_run_it(fleet: Programs) -> None:
    apply(fleet, "base", **interval(30))
    done = follow(fleet, "base")
    assert 'agentconfig "base" successfully rolled out' in done.stdout
    assert "(3 of 3 nodes run it)" in done.stdout.splitlines()[-1]
    written(fleet, "base", settled(fleet, "base"), *NODES)
    # The hash of what the command merges is the one that the agent reports.
    found = shown(fleet, "alpha")
    assert found["config"]["collectors"]["host"] == {"intervalSeconds": 30}
    assert found["agent"]["runsIt"] is True
    assert found["agent"]["hash"] == found["hash"]
    assert "no difference" in outrider(fleet, "beta", "--diff", *IN).stderr


def test_a_rollback_goes_to_what_settled_before(fleet: Programs) -> None:
    apply(fleet, "back", **interval(31, priority=5))
    follow(fleet, "back")
    first = settled(fleet, "back")
    apply(fleet, "back", **interval(21))
    follow(fleet, "back")
    assert settled(fleet, "back") != first
    outrider(fleet, "rollback", "back", *IN)
    follow(fleet, "back")
    assert settled(fleet, "back") == first
    lines = outrider(fleet, "history", "back", *IN).stdout.splitlines()
    assert [line.split()[2:] for line in lines[1:]] == [["Applied"], ["Applied", "settled"]]
    assert lines[2].split()[0] == first
    kept = outrider(fleet, "history", "back", "--revision", first, *IN).stdout
    assert yaml.safe_load(kept)["priority"] == 5
    fleet.plane.kubectl("delete", "ac", "back")


def test_a_change_that_agents_refuse_goes_back_and_may_be_tried_again(fleet: Programs) -> None:
    apply(fleet, "ports", agent={"logLevel": "debug"})
    follow(fleet, "ports")
    apply(fleet, "ports", **REFUSED)
    failed = follow(fleet, "ports", code=1)
    assert "was rolled back: 1 node failed with it" in failed.stderr
    assert "loopback" in failed.stderr
    lines = outrider(fleet, "history", "ports", *IN).stdout.splitlines()
    assert [line.split()[2:] for line in lines[1:]] == [
        ["Applied", "settled"],
        ["RolledBack", "asked", "for"],
    ]
    before = fleet.plane.kubectl("get", "ac", "ports", "-o", "jsonpath={.status.rollout.started}")
    outrider(fleet, "retry", "ports")

    def anew() -> bool:
        path = "jsonpath={.status.rollout.started}"
        return bool(fleet.plane.kubectl("get", "ac", "ports", "-o", path) != before)

    wait_for("it is tried again", anew, WAIT, 0.2)
    assert "was rolled back" in follow(fleet, "ports", code=1).stderr
    outrider(fleet, "rollback", "ports", *IN)
    assert "successfully rolled out" in follow(fleet, "ports").stdout


def test_conflicts_are_named(fleet: Programs) -> None:
    apply(fleet, "one", **interval(11, priority=500))
    apply(fleet, "two", **interval(12, priority=500))
    follow(fleet, "one")
    follow(fleet, "two")
    written(fleet, "two", settled(fleet, "two"), "beta")
    said = outrider(fleet, "beta", *IN)
    assert "collectors.host.intervalSeconds: one is heard, not two" in said.stderr
    assert ["collectors.host.intervalSeconds", "11", "one"] in [
        line.split() for line in said.stdout.splitlines()
    ]
    for name in ("one", "two"):
        fleet.plane.kubectl("delete", "ac", name)


def test_an_agent_that_is_away_is_told_of(fleet: Programs) -> None:
    fleet.plane.processes.kill(fleet.agents["gamma"].name)
    try:

        def away() -> bool:
            return "its agent is not connected since" in outrider(fleet, "gamma", *IN).stderr

        wait_for("it is away", away, WAIT, 0.5)
        apply(fleet, "later", agent={"maxBytesPerSecond": "1Mi"})
        last = follow(fleet, "later").stdout.splitlines()[-1]
        assert "(2 of 3 nodes run it, 1 not connected)" in last
    finally:
        fleet.start(fleet.agents["gamma"], ready=False)
