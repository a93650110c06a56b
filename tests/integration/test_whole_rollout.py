"""Retries, late nodes, waves, suspension and lost nodes: real processes, tasks by kubectl."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.controlplane import ControlPlane
from cluster.programs import Programs, rows, status
from cluster.supervised import wait_for

NODES = ("alpha", "beta", "gamma")
WAIT = 60.0
ALL_AT_ONCE = {"maxConcurrent": "100%", "maxFailures": "100%", "waves": ["100%"]}
#: So that nobody waits long for what is to be seen.
SETTINGS = {
    "tasks": {"lostAfterSeconds": 3, "retryBackoffSeconds": 1},
    "gateway": {"keepalive": {"timeSeconds": 2, "timeoutSeconds": 2}},
}
SECOND_TIME = (
    'echo "$OUTRIDER_NODE" >> "$DIR/log"; '
    'if ! [ -e "$DIR/$OUTRIDER_NODE" ]; then : > "$DIR/$OUTRIDER_NODE"; exit 3; fi; echo better'
)
#: Says that it began, and ends when it may.
HELD = 'echo "$OUTRIDER_NODE" >> "$DIR/log"; while ! [ -e "$DIR/go" ]; do sleep 0.1; done'


@pytest.fixture(scope="module")
def fleet(
    control_plane_programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        programs = Programs(plane)
        programs.install()
        programs.start(programs.server(overrides=SETTINGS))
        for node in NODES:
            programs.start(programs.agent(node), ready=False)
        programs.wait_agents_ready(len(NODES))
        yield programs


def apply(fleet: Programs, folder: Path, source: str, **spec: Any) -> str:
    name = f"task-{uuid.uuid4().hex[:8]}"
    task = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": name},
        "spec": {
            "run": {"script": {"source": source}},
            "env": {"DIR": str(folder)},
            "timeoutSeconds": 120,
            "rollout": ALL_AT_ONCE,
            **spec,
        },
    }
    fleet.plane.kubectl("apply", "-f", "-", stdin=json.dumps(task))
    return name


def ended(fleet: Programs, name: str, phase: str) -> dict[str, Any]:
    final = ("Succeeded", "Failed", "Cancelled")
    wait_for(f"{name} has ended", lambda: status(fleet, name).get("phase") in final, WAIT, 0.1)
    found = status(fleet, name)
    assert found["phase"] == phase, (found, rows(fleet, name))
    return found


def change(fleet: Programs, name: str, **spec: Any) -> None:
    body = json.dumps({"spec": spec})
    fleet.plane.kubectl("patch", "agenttask", name, "--type=merge", "-p", body)


def lines(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def wait_lines(folder: Path, count: int) -> None:
    wait_for(f"{count} have begun", lambda: len(lines(folder)) >= count, WAIT)


def count(fleet: Programs, name: str, phase: str) -> int:
    return int(status(fleet, name).get("counts", {}).get(phase, 0))


def test_a_second_attempt_helps(fleet, tmp_path) -> None:
    name = apply(
        fleet,
        tmp_path,
        SECOND_TIME,
        retries=1,
        rollout={**ALL_AT_ONCE, "maxFailures": 0},
    )
    found = ended(fleet, name, "Succeeded")
    assert (found["counts"]["succeeded"], found["counts"]["failed"]) == (3, 0)
    assert sorted(lines(tmp_path)) == sorted(NODES * 2)
    for row in rows(fleet, name).values():
        assert (row["phase"], row["attempt"], row["exitCode"]) == ("Succeeded", 2, 0)
        assert (row["lastPhase"], row["lastReason"]) == ("Failed", "NonZeroExit")
        assert row["preview"] == "better\n", "of the last attempt only"


def test_an_attempt_its_agent_did_not_survive_is_followed_by_another(fleet, tmp_path) -> None:
    name = apply(fleet, tmp_path, HELD, retries=1, target={"nodeNames": ["beta"]})
    wait_lines(tmp_path, 1)
    agent = fleet.agents["beta"]
    fleet.plane.processes.kill(agent.name)
    fleet.start(agent, ready=False)
    wait_lines(tmp_path, 2)
    (tmp_path / "go").touch()
    ended(fleet, name, "Succeeded")
    row = rows(fleet, name)["beta"]
    assert (row["attempt"], row["lastPhase"]) == (2, "Interrupted")
    assert lines(tmp_path) == ["beta", "beta"]


def test_when_no_attempt_is_left_the_last_one_counts(fleet, tmp_path) -> None:
    name = apply(fleet, tmp_path, "exit 4", retries=1, target={"nodeNames": ["alpha"]})
    found = ended(fleet, name, "Failed")
    row = rows(fleet, name)["alpha"]
    assert (row["phase"], row["attempt"], row["exitCode"]) == ("Failed", 2, 4)
    assert found["counts"]["failed"] == 1


def test_a_node_that_joins_later_is_run_on(fleet, tmp_path) -> None:
    skip, run = tmp_path / "skip", tmp_path / "run"
    tasks = {}
    for folder, late in ((skip, "Skip"), (run, "Run")):
        folder.mkdir()
        tasks[late] = apply(fleet, folder, HELD, lateNodes=late)
        wait_lines(folder, 3)
    fleet.start(fleet.agent("late"), ready=False)
    try:
        wait_lines(run, 4)
        for folder in (skip, run):
            (folder / "go").touch()
        assert ended(fleet, tasks["Skip"], "Succeeded")["counts"]["targeted"] == 3
        assert ended(fleet, tasks["Run"], "Succeeded")["counts"]["targeted"] == 4
        assert set(rows(fleet, tasks["Run"])) == {*NODES, "late"}
    finally:
        fleet.plane.processes.stop(fleet.agents.pop("late").name)
        fleet.plane.kubectl("delete", "node", "late")
        fleet.plane.kubectl("delete", "agents.outrider.dev", "late")


def test_a_task_is_deleted_after_its_time_to_live(fleet, tmp_path) -> None:
    name = apply(fleet, tmp_path, "true", ttlSecondsAfterFinished=2)
    ended(fleet, name, "Succeeded")

    def there() -> bool:
        shown = fleet.plane.kubectl("get", "agenttask", name, "--ignore-not-found", "-o", "name")
        return bool(shown.strip())

    wait_for("it is gone", lambda: not there(), WAIT, 0.2)
    wait_for("its reports are gone", lambda: not rows(fleet, name), WAIT, 0.2)


def test_cordoned_and_unready_nodes_are_run_on_and_shown(fleet, tmp_path) -> None:
    def become(ready: str) -> None:
        state = {"conditions": [{"type": "Ready", "status": ready, "reason": "Test"}]}
        fleet.plane.request("PATCH", "/api/v1/nodes/gamma/status", {"status": state})

    fleet.plane.kubectl("cordon", "beta")
    try:
        name = apply(fleet, tmp_path, HELD)
        wait_lines(tmp_path, 3)
        wait_for(
            "it is shown",
            lambda: rows(fleet, name).get("beta", {}).get("nodeState") == "Cordoned",
            WAIT,
            0.1,
        )
        assert "nodeState" not in rows(fleet, name)["alpha"]
        become("Unknown")
        wait_for(
            "what changed is shown too",
            lambda: rows(fleet, name)["gamma"].get("nodeState") == "NotReady",
            WAIT,
            0.1,
        )
        (tmp_path / "go").touch()
        ended(fleet, name, "Succeeded")
        found = rows(fleet, name)
        states = {node: found[node].get("nodeState") for node in NODES}
        assert states == {"alpha": None, "beta": "Cordoned", "gamma": "NotReady"}
    finally:
        become("True")
        fleet.plane.kubectl("uncordon", "beta")


def test_waves_wait_for_one_another_and_the_interval(fleet, tmp_path) -> None:
    source = 'date +%s.%N >> "$DIR/log"; while ! [ -e "$DIR/go" ]; do sleep 0.1; done'
    rollout = {**ALL_AT_ONCE, "waves": [1, "100%"], "waveIntervalSeconds": 3}
    name = apply(fleet, tmp_path, source, rollout=rollout)
    wait_lines(tmp_path, 1)
    wait_for("it is reported", lambda: count(fleet, name, "running") == 1, WAIT, 0.1)
    waiting = [row for row in rows(fleet, name).values() if row["phase"] == "Pending"]
    assert [row["reason"] for row in waiting] == ["WaitingForWave"] * 2
    (tmp_path / "go").touch()
    ended(fleet, name, "Succeeded")
    first, *others = map(float, lines(tmp_path))
    assert len(others) == 2
    assert min(others) >= first + 3


def test_suspend_and_resume(fleet, tmp_path) -> None:
    rollout = {"maxConcurrent": 1, "waves": ["100%"]}
    name = apply(fleet, tmp_path, HELD, rollout=rollout)
    wait_lines(tmp_path, 1)
    change(fleet, name, suspend=True)
    wait_for("it is suspended", lambda: status(fleet, name).get("phase") == "Suspended", WAIT, 0.1)
    (tmp_path / "go").touch()
    wait_for("what ran ended", lambda: count(fleet, name, "succeeded") == 1, WAIT, 0.1)
    found = [row for row in rows(fleet, name).values() if row["phase"] == "Pending"]
    assert [row["reason"] for row in found] == ["Suspended"] * 2
    assert len(lines(tmp_path)) == 1
    change(fleet, name, suspend=False)
    ended(fleet, name, "Succeeded")
    assert sorted(lines(tmp_path)) == sorted(NODES)


@pytest.mark.parametrize("targets", [["gamma"], ["alpha", "gamma"]])
def test_a_late_result_of_a_lost_node_corrects_the_counts(fleet, tmp_path, targets) -> None:
    """Lost with nothing else left, the task has ended by then; else it goes on."""
    source = HELD.replace('/go"', '/go-$OUTRIDER_NODE"')
    name = apply(fleet, tmp_path, source, target={"nodeNames": targets})
    wait_lines(tmp_path, len(targets))
    wait_for("all run", lambda: count(fleet, name, "running") == len(targets), WAIT, 0.1)
    agent = fleet.agents["gamma"]
    fleet.plane.processes.signal(agent.name, signal.SIGSTOP)
    try:
        (tmp_path / "go-gamma").touch()
        wait_for("it is lost", lambda: count(fleet, name, "lost") == 1, WAIT, 0.1)
        row = rows(fleet, name)["gamma"]
        assert (row["phase"], row["reason"]) == ("Lost", "AgentNotConnected")
    finally:
        fleet.plane.processes.signal(agent.name, signal.SIGCONT)
    wait_for("its result has come", lambda: count(fleet, name, "lost") == 0, WAIT, 0.1)
    assert rows(fleet, name)["gamma"]["phase"] == "Succeeded"
    (tmp_path / "go-alpha").touch()
    only = len(targets) == 1
    found = ended(fleet, name, "Failed" if only else "Succeeded")
    assert found["counts"]["succeeded"] == len(targets)
    assert lines(tmp_path).count("gamma") == 1
