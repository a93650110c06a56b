"""What a user sees after `helm install`: agents, the first task, `helm test`, safe Pods."""

from __future__ import annotations

import os
import uuid

import pytest
from cluster import addons, api, paths, release, tasks
from cluster.layout import STATE
from cluster.tasks import eventually

NODES = ("node1", "node2", "node3")
EXAMPLE = paths.ROOT / "examples" / "kernel-version.yaml"
pytestmark = pytest.mark.usefixtures("release")


def test_example_of_the_readme_runs_on_every_node() -> None:
    api.kubectl("delete", "-f", EXAMPLE, "--ignore-not-found")
    api.kubectl("apply", "-f", EXAMPLE)
    status = tasks.await_final("kernel-version")
    assert status["phase"] == "Succeeded", status
    assert status["counts"]["targeted"] == status["counts"]["succeeded"] == len(NODES)
    (outcome,) = status["outcomes"]
    assert (outcome["nodes"], outcome["exitCode"]) == (len(NODES), 0)
    assert outcome["preview"] == f"{os.uname().release}\n"
    rows = tasks.rows("kernel-version")
    assert sorted(rows) == [*NODES]
    for row in rows.values():
        assert (row["phase"], row["exitCode"], row["attempt"]) == ("Succeeded", 0, 1)
        assert row["preview"] == outcome["preview"]
        assert row["startTime"] <= row["finishTime"]


def test_task_runs_exactly_once_on_each_node() -> None:
    file = f"once-{uuid.uuid4().hex[:8]}"
    name = tasks.create_script(f"echo ran >> /var/lib/outrider/{file}")
    assert tasks.await_final(name)["phase"] == "Succeeded"
    for node in NODES:
        assert tasks.lines_on_node(STATE, node, file) == ["ran"]


def test_failing_task_says_where_and_why() -> None:
    name = tasks.create_script('echo "on $(cat /etc/hostname)"; exit 3')
    status = tasks.await_final(name)
    assert status["phase"] == "Failed"
    rows = tasks.rows(name)
    assert {row["exitCode"] for row in rows.values() if row["phase"] == "Failed"} == {3}
    assert any("on outrider-agent" in outcome.get("preview", "") for outcome in status["outcomes"])


def test_agents_are_listed_ready() -> None:
    lines = api.kubectl("get", "agents").splitlines()
    header, rows = lines[0].split(), [line.split() for line in lines[1:]]
    assert header[:2] == ["NAME", "READY"]
    assert [row[:2] for row in rows] == [[node, "True"] for node in NODES]
    for agent in api.kubectl_json("get", "agents.outrider.dev")["items"]:
        assert agent["status"]["version"]
        assert agent["status"]["server"].startswith("outrider-server-")
        assert agent["status"]["netMode"] == "sd"


def test_helm_test_passes() -> None:
    said = release.helm("test", release.RELEASE, "--namespace", release.NAMESPACE)
    assert "Phase:          Succeeded" in said


def test_agents_have_no_privileges() -> None:
    pods = api.kubectl_json(
        *("-n", release.NAMESPACE, "get", "pods", "-l", "app.kubernetes.io/component=agent")
    )["items"]
    assert len(pods) == len(NODES)
    for pod in pods:
        spec = pod["spec"]
        assert not spec.get("hostPID")
        assert not spec.get("hostNetwork")
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert not context.get("privileged")
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
    # Not only on paper: the root really cannot be written to.
    name = tasks.create_script("touch /written")
    assert tasks.await_final(name)["phase"] == "Failed"
    previews = {row.get("preview", "").strip() for row in tasks.rows(name).values()}
    assert any("Read-only file system" in preview for preview in previews)


def test_prometheus_scrapes_server_and_agents() -> None:
    def all_up() -> bool:
        found = addons.targets()
        components = sorted(target["component"] for target in found)
        healthy = all(target["health"] == "up" for target in found)
        return healthy and components == ["agent"] * 3 + ["server"] * 2

    eventually("five targets up", all_up)
    assert sorted(t["node"] for t in addons.targets() if t["component"] == "agent") == [*NODES]

    def loads() -> bool:
        found = addons.prometheus("/api/v1/query?query=node_load1")["result"]
        return sorted(series["metric"]["node"] for series in found) == [*NODES]

    eventually("the load of all nodes under node_exporter's name", loads)


def _restarts() -> dict[str, int]:
    """How often each container of the release's Pods was started again."""
    pods = api.kubectl_json("-n", release.NAMESPACE, "get", "pods")["items"]
    return {
        pod["metadata"]["name"]: status["restartCount"]
        for pod in pods
        for status in pod["status"].get("containerStatuses", [])
    }


@pytest.fixture(scope="module", autouse=True)
def restarts_before(_installed: None) -> dict[str, int]:
    return _restarts()


def test_nothing_restarted_meanwhile(restarts_before: dict[str, int]) -> None:
    # The last one here. Pods that came after the first test must never have restarted.
    after = _restarts()
    assert after
    assert {
        name: count for name, count in after.items() if count != restarts_before.get(name, 0)
    } == {}
