"""What happens to tasks when nodes, the leader or the certificate go in the middle of them."""

from __future__ import annotations

import base64
import ssl
import uuid
from typing import Any

import pytest
from cluster import api, faults, network, release, tasks
from cluster.layout import PORT, STATE
from cluster.processes import kill
from cluster.tasks import eventually

NODES = ("node1", "node2", "node3")
TLS_PORT = PORT + 10
pytestmark = pytest.mark.usefixtures("release")


def _slow_script(file: str, seconds: int) -> str:
    """A script that leaves a line behind at its start and one at its end."""
    path = f"/var/lib/outrider/{file}"
    return f"echo start >> {path}; sleep {seconds}; echo end >> {path}"


def _assert_ran_once(file: str) -> None:
    for node in NODES:
        assert tasks.lines_on_node(STATE, node, file) == ["start", "end"]


def _pods(component: str) -> list[dict[str, Any]]:
    label = f"app.kubernetes.io/component={component}"
    found: list[dict[str, Any]] = api.kubectl_json(
        *("-n", release.NAMESPACE, "get", "pods", "-l", label)
    )["items"]
    return found


def _leader() -> str:
    """The Pod that holds the Lease."""
    leases = api.kubectl_json("-n", release.NAMESPACE, "get", "leases")["items"]
    servers: list[str] = [pod["metadata"]["name"] for pod in _pods("server")]
    holders = [lease["spec"].get("holderIdentity") or "" for lease in leases]
    (leader,) = [name for name in servers if any(holder.startswith(name) for holder in holders)]
    return leader


def test_task_waits_for_a_node_that_is_off() -> None:
    faults.power_off("node3")
    try:
        others = ["node1", "node2"]
        eventually("node3's agent not Ready", lambda: tasks.ready_agents() == others, 90)
        assert tasks.agents()["node3"]["reason"]
        name = tasks.create_script("true")
        tasks.await_rows(name, "Succeeded", others)
        row = tasks.rows(name)["node3"]
        assert (row["phase"], bool(row.get("reason"))) == ("Pending", True), row
        assert tasks.status(name)["phase"] == "Running"
        counts = tasks.status(name)["counts"]
        assert (counts["succeeded"], counts["pending"]) == (2, 1)
    finally:
        faults.power_on("node3")
    status = tasks.await_final(name, 120)
    assert (status["phase"], status["counts"]["succeeded"]) == ("Succeeded", 3)
    eventually("all agents Ready", lambda: tasks.ready_agents() == [*NODES], 90)


@pytest.mark.parametrize("force", [False, True], ids=["gracefully", "by-force"])
def test_task_ends_right_when_its_leader_goes(force: bool) -> None:
    file = f"leader-{uuid.uuid4().hex[:8]}"
    name = tasks.create_script(_slow_script(file, 10))
    tasks.await_rows(name, "Running", NODES)
    leader = _leader()
    how = ["--grace-period=0", "--force"] if force else ["--wait=false"]
    api.kubectl("-n", release.NAMESPACE, "delete", "pod", leader, *how)
    status = tasks.await_final(name, 120)
    assert (status["phase"], status["counts"]["succeeded"]) == ("Succeeded", 3), status
    _assert_ran_once(file)
    assert {row["attempt"] for row in tasks.rows(name).values()} == {1}
    eventually("another leader", lambda: _leader() != leader)


def test_killed_agent_reports_the_attempt_interrupted() -> None:
    file = f"killed-{uuid.uuid4().hex[:8]}"
    name = tasks.create_script(_slow_script(file, 20))
    tasks.await_rows(name, "Running", NODES)
    (agent,) = [pod for pod in _pods("agent") if pod["spec"]["nodeName"] == "node2"]
    names = (agent["metadata"]["name"], "--grace-period=0", "--force")
    api.kubectl("-n", release.NAMESPACE, "delete", "pod", *names)
    status = tasks.await_final(name, 120)
    rows = tasks.rows(name)
    assert rows["node2"]["phase"] == "Interrupted", rows["node2"]
    assert {rows[node]["phase"] for node in ("node1", "node3")} == {"Succeeded"}
    assert status["phase"] == "Failed"
    assert tasks.lines_on_node(STATE, "node2", file) == ["start"]


def _served_certificate(pod: dict[str, Any], port: int) -> str:
    """The certificate that a server shows at a new connection, as PEM."""
    name = f"tls-{port}"
    network.forward(port, "cp", f"{pod['status']['podIP']}:8443", name)
    try:
        return ssl.get_server_certificate(("127.0.0.1", port), timeout=5)
    except OSError as error:
        raise AssertionError(f"no handshake with {pod['metadata']['name']}: {error}") from error
    finally:
        kill(name)


def _stored_certificate() -> str:
    secret = api.kubectl_json("-n", release.NAMESPACE, "get", "secret", "outrider-tls")
    return base64.b64decode(secret["data"]["tls.crt"]).decode()


def test_upgrade_with_a_new_certificate_disturbs_nothing(chart_values: dict[str, object]) -> None:
    before = {pod["metadata"]["uid"] for pod in _pods("server") + _pods("agent")}
    old = _stored_certificate()
    file = f"upgrade-{uuid.uuid4().hex[:8]}"
    name = tasks.create_script(_slow_script(file, 20))
    tasks.await_rows(name, "Running", NODES)
    release.install(chart_values, ["tls.generated.renewAfterDays=0"])
    new = _stored_certificate()
    assert new != old
    status = tasks.await_final(name)
    assert (status["phase"], status["counts"]["succeeded"]) == ("Succeeded", 3)
    _assert_ran_once(file)
    assert {pod["metadata"]["uid"] for pod in _pods("server") + _pods("agent")} == before
    # kubelet takes up to some 90 s to renew the mounted file; no restart in between.
    for number, pod in enumerate(_pods("server")):
        port = TLS_PORT + number

        def served(pod: dict[str, Any] = pod, port: int = port) -> bool:
            return _served_certificate(pod, port).split() == new.split()

        eventually(f"the new certificate at {pod['metadata']['name']}", served, 180, 2.0)
    assert tasks.ready_agents() == [*NODES]
    name = tasks.create_script("true")
    assert tasks.await_final(name)["phase"] == "Succeeded"
