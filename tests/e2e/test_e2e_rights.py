"""What agents take only where the chart lets them: the host, other users, Restart and Shutdown.

Last of the files here by its name: the release is upgraded for it, and only where another test
follows is it made what it was before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import api, release, tasks
from cluster.layout import STATE
from cluster.processes import read_pid
from cluster.tasks import eventually

NODES = ("node1", "node2", "node3")
KINDS = ("command", "script", "builtin/Ping", "builtin/Restart", "builtin/Shutdown")
ALLOWED = (
    "agent.allowedUsers={nobody}",
    f"agent.settings.tasks.allowedKinds={{{','.join(KINDS)}}}",
    "agent.updateStrategy.rollingUpdate.maxUnavailable=100%",  # all at once, to save time
)
SPACES = ("mnt", "uts", "ipc", "net", "pid")
AT_ONCE = {"maxConcurrent": "100%", "waves": ["100%"], "maxFailures": "100%"}
NOBODY = "65534"


@pytest.fixture
def allowed(upgrade: Callable[..., None]) -> None:
    """Agents without privileges that take a user, and builtins that end them."""
    upgrade(*ALLOWED)


@pytest.fixture
def full_access(upgrade: Callable[..., None]) -> None:
    """Agents that take tasks for the host."""
    upgrade(*ALLOWED, "agent.hostAccess=full")


def _rows(name: str, phase: str) -> dict[str, dict[str, Any]]:
    """The rows of a task that ended the same way everywhere."""
    tasks.await_final(name)
    rows = tasks.rows(name)
    assert {row["phase"] for row in rows.values()} == {phase}, rows
    return rows


def _agent_on(node: str) -> dict[str, Any]:
    label = "app.kubernetes.io/component=agent"
    pods = api.kubectl_json("-n", release.NAMESPACE, "get", "pods", "-l", label)["items"]
    (pod,) = [pod for pod in pods if pod["spec"].get("nodeName") == node]
    found: dict[str, Any] = pod
    return found


def _life_of(pod: dict[str, Any]) -> tuple[str, int]:
    """What changes when kubelet has a hand in it: the Pod's UID, and restarts of its container."""
    return pod["metadata"]["uid"], pod["status"]["containerStatuses"][0]["restartCount"]


def _log(pod: dict[str, Any]) -> str:
    return api.kubectl("-n", release.NAMESPACE, "logs", pod["metadata"]["name"])


def _processes(argument: str) -> list[int]:
    """Living processes of this machine, and so of all nodes, with an argument of just this text."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if argument.encode() in arguments:
            found.append(int(entry.name))
    return found


@pytest.mark.usefixtures("release")
def test_nothing_of_it_is_taken_by_default() -> None:
    refused = {
        "tasks.allowHost": tasks.create_script("true", where="Host", rollout=AT_ONCE),
        "tasks.allowedUsers": tasks.create_script("true", user="nobody", rollout=AT_ONCE),
        "tasks.allowedKinds": tasks.create({"builtin": "Shutdown"}, rollout=AT_ONCE),
    }
    for setting, name in refused.items():
        for row in _rows(name, "Rejected").values():
            assert row["reason"] == "NotAllowed"
            assert setting in row["message"]
            assert "startTime" not in row


@pytest.mark.usefixtures("allowed")
def test_a_run_has_its_user_and_no_capability() -> None:
    name = tasks.create_script("id -u; id -g; grep CapEff /proc/self/status", user="nobody")
    for row in _rows(name, "Succeeded").values():
        assert row["preview"].split() == [NOBODY, NOBODY, "CapEff:", "0" * 16]
    refused = tasks.create_script("true", user="daemon", rollout=AT_ONCE)
    for row in _rows(refused, "Rejected").values():
        assert row["reason"] == "NotAllowed"
        assert "tasks.allowedUsers" in row["message"]
        assert "daemon" in row["message"]


@pytest.mark.usefixtures("allowed")
def test_all_that_a_user_started_is_ended() -> None:
    # Needs the capabilities KILL, and SYS_PTRACE to find what left the session.
    seconds = "86399.5"
    script = f"setsid sleep {seconds} & sleep {seconds}"
    name = tasks.create_script(script, user="nobody", timeoutSeconds=3)
    eventually("processes of the run", lambda: len(_processes(seconds)) >= 2 * len(NODES))
    _rows(name, "TimedOut")
    eventually("an end of them", lambda: not _processes(seconds))


@pytest.mark.usefixtures("allowed")
def test_a_restart_is_reported_by_the_agent_that_came_back() -> None:
    before = _agent_on("node2")
    name = tasks.create({"builtin": "Restart"}, target={"nodeNames": ["node2"]}, rollout=AT_ONCE)
    (row,) = _rows(name, "Succeeded").values()
    assert (row["node"], row["attempt"], row["message"]) == ("node2", 1, "restarted")
    after = _agent_on("node2")
    assert _life_of(after) == _life_of(before)
    assert _log(after).count("beginning anew") == 1
    # Nothing of the other agents, and this one takes tasks again.
    assert "beginning anew" not in _log(_agent_on("node1"))
    _rows(tasks.create_script("true"), "Succeeded")


@pytest.mark.usefixtures("allowed")
def test_a_shutdown_lasts_until_the_pod_is_another() -> None:
    before = _agent_on("node3")
    name = tasks.create({"builtin": "Shutdown"}, target={"nodeNames": ["node3"]}, rollout=AT_ONCE)
    (row,) = _rows(name, "Succeeded").values()
    assert row["node"] == "node3"
    eventually("node3's agent away", lambda: tasks.ready_agents() == ["node1", "node2"])

    def unready() -> bool:
        return not _agent_on("node3")["status"]["containerStatuses"][0]["ready"]

    eventually("its Pod not ready", unready)
    # Its turn does not come, and kubelet leaves the process alone.
    waiting = tasks.create_script("true")
    tasks.await_rows(waiting, "Succeeded", ["node1", "node2"])
    assert tasks.rows(waiting)["node3"]["reason"] == "AgentNotConnected"
    assert _life_of(_agent_on("node3")) == _life_of(before)
    api.kubectl("-n", release.NAMESPACE, "delete", "pod", before["metadata"]["name"])
    _rows(waiting, "Succeeded")
    assert tasks.ready_agents() == [*NODES]


def _namespaces(text: str) -> dict[str, str]:
    """The lines "mnt:[…]" of a run, by kind."""
    return {line.partition(":")[0]: line for line in text.split()}


@pytest.mark.usefixtures("full_access")
def test_a_run_on_the_host_is_in_the_namespaces_of_the_host() -> None:
    script = f"cd /proc/self/ns; readlink {' '.join(SPACES)}"
    on_host = tasks.create_script(script, where="Host")
    inside = tasks.create_script(script)
    hosts, containers = _rows(on_host, "Succeeded"), _rows(inside, "Succeeded")
    for node in NODES:
        spaces = Path(f"/proc/{read_pid(f'{node}.init')}/ns")
        own = {kind: str((spaces / kind).readlink()) for kind in SPACES}
        assert _namespaces(hosts[node]["preview"]) == own, "the host's are those of process 1"
        seen = _namespaces(containers[node]["preview"])
        assert {kind for kind in SPACES if seen[kind] == own[kind]} == {"pid"}, "only hostPID"


@pytest.mark.usefixtures("full_access")
def test_names_files_and_users_are_those_of_the_host() -> None:
    mark = Path("/var/lib/outrider-host-mark")  # outside of the agents' own folder
    name = tasks.create_script(f"hostname; id -u > {mark}", where="Host")
    rows = _rows(name, "Succeeded")
    for node in NODES:
        assert rows[node]["preview"].strip() == node
        assert (STATE / node / "var-lib" / mark.name).read_text() == "0\n"
    name = tasks.create_script(f"id -u; cat {mark}", where="Host", user="nobody")
    for row in _rows(name, "Succeeded").values():
        assert row["preview"].split() == [NOBODY, "0"]
