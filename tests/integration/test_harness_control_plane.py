"""The control plane of plain processes does what tests rely on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cluster.controlplane import API_SERVER, CONTROLLERS, ETCD, ControlPlane, RequestError
from cluster.supervised import wait_for

TESTS = Path(__file__).parents[1]
SECONDS = 15.0
REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"

OWNER = """
import sys, time
from pathlib import Path
from cluster.controlplane import ControlPlane
plane = ControlPlane(Path(sys.argv[1])).start()
print(*[status.pid for status in plane.processes.status().values()], flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_stop_leaves_no_process_and_no_file(control_plane_programs: None, tmp_path: Path) -> None:
    folder = tmp_path / "plane"
    with ControlPlane(folder) as plane:
        pids = [status.pid for status in plane.processes.status().values()]
        assert len(pids) == 3
        assert not any(gone(pid) for pid in pids)
    assert all(gone(pid) for pid in pids)
    assert not folder.exists()


def test_a_killed_owner_leaves_nothing(control_plane_programs: None, tmp_path: Path) -> None:
    folder = tmp_path / "plane"
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 3
        owner.kill()
    wait_for("all processes are gone", lambda: all(gone(pid) for pid in pids), SECONDS)
    wait_for("the folder is gone", lambda: not folder.exists(), SECONDS)


def test_a_bound_token_names_its_node_and_is_no_credential(
    control_plane: ControlPlane, namespace: str
) -> None:
    node_uid = control_plane.make_node(f"{namespace}-node")
    pod = control_plane.make_agent_pod(f"{namespace}-node", namespace, "agent")
    token = control_plane.token(namespace, "agent", bound_pod=pod)

    review = {"spec": {"token": token, "audiences": ["outrider"]}}
    status = control_plane.request("POST", REVIEWS, review)["status"]
    assert status["authenticated"] is True
    assert status["audiences"] == ["outrider"]
    user = status["user"]
    assert user["username"] == f"system:serviceaccount:{namespace}:agent"
    kind = "authentication.kubernetes.io"
    assert user["extra"][f"{kind}/node-name"] == [f"{namespace}-node"]
    assert user["extra"][f"{kind}/node-uid"] == [node_uid]
    assert user["extra"][f"{kind}/pod-uid"] == [pod.uid]

    with pytest.raises(RequestError) as refused:
        control_plane.request("GET", "/api/v1/nodes", token=token)
    assert refused.value.code == 401


def test_a_token_of_another_audience_is_refused(
    control_plane: ControlPlane, namespace: str
) -> None:
    control_plane.make_service_account(namespace, "agent")
    token = control_plane.token(namespace, "agent", audience="other")
    review = {"spec": {"token": token, "audiences": ["outrider"]}}
    assert not control_plane.request("POST", REVIEWS, review)["status"].get("authenticated")


def test_a_service_account_may_do_what_its_roles_say(
    control_plane: ControlPlane, namespace: str
) -> None:
    control_plane.make_service_account(namespace, "reader")
    token = control_plane.token(namespace, "reader", audience="")
    file = control_plane.kubeconfig_for(f"{namespace}-reader", token)
    with pytest.raises(RequestError) as refused:
        control_plane.request("GET", "/api/v1/nodes", token=token)
    assert refused.value.code == 403
    assert control_plane.kubectl("auth", "whoami", f"--kubeconfig={file}").count(namespace) > 0


def test_objects_of_a_deleted_namespace_go(control_plane: ControlPlane) -> None:
    control_plane.make_node("doomed-node")
    control_plane.make_agent_pod("doomed-node", "doomed", "agent")
    control_plane.request("DELETE", "/api/v1/namespaces/doomed")
    namespaces = "/api/v1/namespaces"

    def names() -> set[str]:
        items = control_plane.request("GET", namespaces)["items"]
        return {item["metadata"]["name"] for item in items}

    wait_for("the namespace is gone", lambda: "doomed" not in names(), 60)


def test_each_part_can_be_killed_and_started_again(
    control_plane_programs: None, tmp_path: Path
) -> None:
    with ControlPlane(tmp_path / "plane") as plane:
        uid = plane.make_node("kept")
        for part in (ETCD, API_SERVER, CONTROLLERS):
            plane.kill_part(part)
            assert not plane.processes.running(part)
            plane.start_part(part)
        plane.wait_ready()
        assert plane.request("GET", "/api/v1/nodes/kept")["metadata"]["uid"] == uid
        plane.kill_part(CONTROLLERS)
        plane.restart_part(API_SERVER)
        assert not plane.processes.running(CONTROLLERS), "who stopped it may want that"
        plane.start_part(CONTROLLERS)

        plane.processes.freeze(API_SERVER)
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(
                [plane.program("kubectl"), f"--kubeconfig={plane.kubeconfig}", "version"],
                capture_output=True,
                timeout=1,
                check=False,
            )
        plane.processes.thaw(API_SERVER)
        plane.wait_ready()
        plane.stop_part(API_SERVER)
        with pytest.raises(OSError, match="refused"):
            plane.request("GET", "/readyz")


def test_a_detached_one_is_found_again(control_plane_programs: None, tmp_path: Path) -> None:
    folder = tmp_path / "plane"
    first = ControlPlane(folder, detached=True).start()
    uid = first.make_node("kept")
    first.processes.let_go()
    second = ControlPlane.attach(folder)
    assert second is not None
    assert second.request("GET", "/api/v1/nodes/kept")["metadata"]["uid"] == uid
    assert "kept" in second.kubectl("get", "nodes")
    second.stop()
    assert not folder.exists()
    assert ControlPlane.attach(folder) is None
