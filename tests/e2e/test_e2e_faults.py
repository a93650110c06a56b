"""What happens to tasks when nodes, the leader or the certificate go in the middle of them."""

from __future__ import annotations

import base64
import socket
import ssl
import uuid
from typing import Any

import pytest
from cluster import api, command, release, tasks
from cluster.layout import STATE
from cluster.tasks import eventually

NODES = ("node1", "node2", "node3")
pytestmark = pytest.mark.usefixtures("release")


def _waiting_script(file: str) -> str:
    """A script that leaves a line behind at its start and one at its end, when it is let go on."""
    path = f"/var/lib/outrider/{file}"
    wait = f"until [ -e {path}.go ]; do sleep 0.2; done"
    return f"echo start >> {path}; {wait}; echo end >> {path}"


def _let_go_on(file: str) -> None:
    for node in NODES:
        tasks.make_on_node(STATE, node, f"{file}.go")


def _assert_ran_once(name: str, file: str) -> None:
    status = tasks.await_final(name)
    assert (status["phase"], status["counts"]["succeeded"]) == ("Succeeded", 3), status
    assert {row["attempt"] for row in tasks.rows(name).values()} == {1}
    for node in NODES:
        assert tasks.lines_on_node(STATE, node, file) == ["start", "end"]


def _pods(component: str) -> list[dict[str, Any]]:
    label = f"app.kubernetes.io/component={component}"
    found: list[dict[str, Any]] = api.kubectl_json(
        *("-n", release.NAMESPACE, "get", "pods", "-l", label)
    )["items"]
    return found


def _uids(component: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in _pods(component)}


def _leader() -> str:
    """The Pod that holds the Lease; empty where none does, or one that is gone."""
    leases = api.kubectl_json("-n", release.NAMESPACE, "get", "leases")["items"]
    servers: list[str] = [pod["metadata"]["name"] for pod in _pods("server")]
    holders = [lease["spec"].get("holderIdentity") or "" for lease in leases]
    return next((name for name in servers for holder in holders if holder.startswith(name)), "")


def test_task_waits_for_a_node_that_is_off() -> None:
    command.must("node", "stop", "node3")
    try:
        others = ["node1", "node2"]
        eventually("node3's agent not Ready", lambda: tasks.ready_agents() == others, 90)
        assert tasks.agents()["node3"]["reason"]
        # Several, as each has its nodes in an order of its own: the one that is off comes first
        # in some, and must not hold up the others.
        names = [tasks.create_script("true", at_once=False) for _ in range(4)]
        for name in names:
            tasks.await_rows(name, "Succeeded", others)
            row = tasks.rows(name)["node3"]
            assert (row["phase"], bool(row.get("reason"))) == ("Pending", True), row
            assert tasks.status(name)["phase"] == "Running"
            counts = tasks.status(name)["counts"]
            assert (counts["succeeded"], counts["pending"]) == (2, 1)
    finally:
        command.must("node", "start", "node3")
    for name in names:
        status = tasks.await_final(name, 120)
        assert (status["phase"], status["counts"]["succeeded"]) == ("Succeeded", 3)
    eventually("all agents Ready", lambda: tasks.ready_agents() == [*NODES], 90)


@pytest.mark.parametrize("force", [False, True], ids=["gracefully", "by-force"])
def test_task_ends_right_when_its_leader_goes(force: bool) -> None:
    file = f"leader-{uuid.uuid4().hex[:8]}"
    name = tasks.create_script(_waiting_script(file))
    tasks.await_rows(name, "Running", NODES)
    leader = eventually("a leader", _leader)
    how = ["--grace-period=0", "--force"] if force else ["--wait=false"]
    api.kubectl("-n", release.NAMESPACE, "delete", "pod", leader, *how)
    eventually("another leader", lambda: _leader() not in ("", leader))
    _let_go_on(file)
    _assert_ran_once(name, file)


def test_killed_agent_reports_the_attempt_interrupted() -> None:
    file = f"killed-{uuid.uuid4().hex[:8]}"
    name = tasks.create_script(_waiting_script(file))
    tasks.await_rows(name, "Running", NODES)
    (agent,) = [pod for pod in _pods("agent") if pod["spec"]["nodeName"] == "node2"]
    names = (agent["metadata"]["name"], "--grace-period=0", "--force")
    api.kubectl("-n", release.NAMESPACE, "delete", "pod", *names)
    tasks.await_rows(name, "Interrupted", ["node2"], 120)
    _let_go_on(file)
    status = tasks.await_final(name)
    rows = tasks.rows(name)
    assert rows["node2"]["phase"] == "Interrupted", rows["node2"]
    assert {rows[node]["phase"] for node in ("node1", "node3")} == {"Succeeded"}
    assert status["phase"] == "Failed"
    assert tasks.lines_on_node(STATE, "node2", file) == ["start"]


def test_task_goes_on_while_all_servers_are_replaced(_installed: Any) -> None:
    servers, agents = _uids("server"), _uids("agent")
    file = f"rolling-{uuid.uuid4().hex[:8]}"
    name = tasks.create_script(_waiting_script(file))
    tasks.await_rows(name, "Running", NODES)
    change = f"server.podAnnotations.test={file}"
    _installed.upgrade(change)
    # helm waits for the new Pods, not for the end of the old ones.
    eventually("an end of the old servers", lambda: not servers & _uids("server"), 90)
    assert _uids("agent") == agents
    assert {row["phase"] for row in tasks.rows(name).values()} == {"Running"}
    _let_go_on(file)
    _assert_ran_once(name, file)


def _nobody_leaves() -> bool:
    pods = [*_pods("server"), *_pods("agent")]
    return not any(pod["metadata"].get("deletionTimestamp") for pod in pods)


def _forward(pod: dict[str, Any]) -> int:
    """Make a server's port reachable from here; returns the port on 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    command.must("forward", str(port), "cp", f"{pod['status']['podIP']}:8443")
    return port


def _stored_certificate() -> str:
    secret = api.kubectl_json("-n", release.NAMESPACE, "get", "secret", "outrider-tls")
    return base64.b64decode(secret["data"]["tls.crt"]).decode()


def test_upgrade_with_a_new_certificate_disturbs_nothing(chart_values: dict[str, object]) -> None:
    eventually("an end of the Pods of the test before", _nobody_leaves, 90)
    before = _uids("server") | _uids("agent")
    old = _stored_certificate()
    file = f"upgrade-{uuid.uuid4().hex[:8]}"
    name = tasks.create_script(_waiting_script(file))
    tasks.await_rows(name, "Running", NODES)
    release.install(chart_values, ["tls.generated.renewAfterDays=0"])
    new = _stored_certificate()
    assert new != old
    _let_go_on(file)
    _assert_ran_once(name, file)
    assert _uids("server") | _uids("agent") == before
    # kubelet takes some 20 s to renew the mounted file; no restart in between.
    for pod in _pods("server"):
        port = _forward(pod)

        def served(port: int = port) -> bool:
            shown = ssl.get_server_certificate(("127.0.0.1", port), timeout=5)
            return shown.split() == new.split()

        eventually(f"the new certificate at {pod['metadata']['name']}", served, 180, 2.0)
    assert tasks.ready_agents() == [*NODES]
    name = tasks.create_script("true")
    assert tasks.await_final(name)["phase"] == "Succeeded"
