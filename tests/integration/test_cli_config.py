"""kubectl outrider config against the real API server, with the rights that the chart gives.

What the operator writes is written by hand here, in the form that the definitions have: a field
they do not know would be dropped, and the commands would not find it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import toolchain
from cluster.controlplane import ControlPlane
from cluster.paths import ROOT
from outrider_cli.core import config_effective

PLUGIN = Path(sys.executable).parent / "kubectl-outrider"
NAMESPACE = "cli-config"
GROUP = "/apis/outrider.dev/v1alpha1"
RELEASE = "outrider"
ROLLOUT = {"maxUnavailable": 2, "canary": {"nodes": 1, "soakSeconds": 5}}


@pytest.fixture(scope="module")
def helm() -> Path:
    return toolchain.ensure(["helm"])["helm"]


@pytest.fixture(scope="module")
def users(control_plane: ControlPlane, helm: Path) -> dict[str, str]:
    """A kubeconfig for somebody with each of the chart's roles for AgentConfigs."""
    rendered = subprocess.run(
        [
            *map(str, (helm, "template", RELEASE, ROOT / "charts" / "outrider")),
            *("--namespace", NAMESPACE, "--show-only", "templates/user-roles.yaml"),
            *("--kube-version", toolchain.version("kubernetes")),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    control_plane.make_service_account(NAMESPACE, "nobody")
    control_plane.kubectl("apply", "-f", "-", stdin=rendered.stdout)
    made = {}
    for role in ("editor", "viewer"):
        account = f"config-{role}"
        control_plane.make_service_account(NAMESPACE, account)
        subject = ["--serviceaccount", f"{NAMESPACE}:{account}"]
        control_plane.kubectl(
            *("create", "clusterrolebinding", account),
            *("--clusterrole", f"{RELEASE}-{account}", *subject),
        )
        control_plane.kubectl(
            *("create", "rolebinding", account, "-n", NAMESPACE),
            *("--role", f"{RELEASE}-config-revisions", *subject),
        )
        token = control_plane.token(NAMESPACE, account, audience="")
        made[role] = str(control_plane.kubeconfig_for(account, token))
    return made


class World:
    """Three nodes' worth of objects, as the operator would have written them."""

    def __init__(self, plane: ControlPlane, users: dict[str, str]) -> None:
        self.plane = plane
        self.users = users
        self.name = f"web-{uuid.uuid4().hex[:8]}"
        self.node = f"node-{uuid.uuid4().hex[:8]}"
        self.made: list[str] = []
        self.uid = ""

    def config(self, seconds: int) -> None:
        """As `kubectl apply` of an AgentConfig."""
        body = {
            "apiVersion": "outrider.dev/v1alpha1",
            "kind": "AgentConfig",
            "metadata": {"name": self.name},
            "spec": {**asked(seconds), "rollout": ROLLOUT},
        }
        self.plane.kubectl("apply", "-f", "-", stdin=json.dumps(body))
        self.uid = str(self.read()["metadata"]["uid"])

    def read(self) -> dict[str, Any]:
        return self.plane.request("GET", f"{GROUP}/agentconfigs/{self.name}")

    def keep(self, revision: str, seconds: int) -> None:
        owner = {
            "apiVersion": "outrider.dev/v1alpha1",
            "kind": "AgentConfig",
            "name": self.name,
            "uid": self.uid,
        }
        body = {
            "metadata": {
                "name": f"{self.name}-{revision}",
                "labels": {"outrider.dev/agentconfig": self.name},
                "ownerReferences": [owner],
            },
            "revision": seconds,
            "data": asked(seconds),
        }
        path = f"/apis/apps/v1/namespaces/{NAMESPACE}/controllerrevisions"
        self.plane.request("POST", path, body)

    def stands(self, target: str, settled: str, phase: str, message: str = "") -> None:
        status = {
            "observedGeneration": self.read()["metadata"]["generation"],
            "revision": target,
            "settledRevision": settled,
            "history": [
                {"revision": "ccc3", "result": "RolledBack", "time": "2026-01-03T00:00:00Z"},
                {"revision": "bbb2", "result": "Applied", "time": "2026-01-02T00:00:00Z"},
                {"revision": "aaa1", "result": "Applied", "time": "2026-01-01T00:00:00Z"},
            ],
            "rollout": {
                "phase": phase,
                "settled": settled,
                "revision": target,
                "message": message,
            },
            "counts": {"targeted": 3, "updated": 1, "applied": 2, "failed": 1, "absent": 0},
        }
        path = f"{GROUP}/agentconfigs/{self.name}/status"
        self.plane.request("PATCH", path, {"status": status})

    def agent(self, revision: str, phase: str, digest: str, message: str = "") -> None:
        body = {
            "apiVersion": "outrider.dev/v1alpha1",
            "kind": "Agent",
            "metadata": {"name": self.node},
        }
        self.plane.request("POST", f"{GROUP}/agents", body, absent_ok=True)
        condition = {
            "type": "Ready",
            "status": "True",
            "reason": "Connected",
            "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        config = {
            "hash": digest,
            "phase": phase,
            "message": message,
            "revisions": [{"name": self.name, "revision": revision}],
            "plugins": [{"name": "fim", "version": "1", "phase": "Running", "healthy": True}],
            "drift": ["somebody changed a file"],
        }
        status = {"conditions": [condition], "config": config}
        self.plane.request("PATCH", f"{GROUP}/agents/{self.node}/status", {"status": status})

    def outrider(self, *words: str, role: str = "editor", code: int = 0) -> Any:
        done = subprocess.run(
            [PLUGIN, "config", *words, "--kubeconfig", self.users[role]],
            env={**os.environ, "LANG": "C.UTF-8"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    def close(self) -> None:
        for path in (f"agentconfigs/{self.name}", f"agents/{self.node}"):
            self.plane.request("DELETE", f"{GROUP}/{path}", absent_ok=True)


def asked(seconds: int) -> dict[str, Any]:
    """A spec without its rollout, as the API server completes it."""
    return {
        "selector": {},
        "priority": 100,
        "collectors": {"host": {"intervalSeconds": seconds}},
    }


def hash_of(seconds: int) -> str:
    return config_effective.wanted([("x", "1")], {("x", "1"): asked(seconds)}).hash


IN = ("--server-namespace", NAMESPACE)


@pytest.fixture
def world(control_plane: ControlPlane, users: dict[str, str]) -> Iterator[World]:
    """An AgentConfig with 15 s, of which a rollback returned to 10 s; 5 s settled before."""
    made = World(control_plane, users)
    made.config(15)
    for revision, seconds in (("aaa1", 5), ("bbb2", 10), ("ccc3", 15)):
        made.keep(revision, seconds)
    made.stands("ccc3", "bbb2", "RolledBack", "1 node failed with it: n1 (bad)")
    yield made
    made.close()


def test_a_nodes_config_is_what_its_revisions_make(world: World) -> None:
    world.agent("bbb2", "Applied", hash_of(10))
    done = world.outrider(world.node, *IN, "-o", "wide", role="viewer")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1] == ["collectors.host.intervalSeconds", "10", world.name, "bbb2", "100"]
    assert lines[-1] == ["fim", "1", "Running", "True", "0"]
    assert "its agent runs it (hash " in done.stderr
    assert "drift: somebody changed a file" in done.stderr
    found = yaml.safe_load(world.outrider(world.node, *IN, "-o", "yaml", role="viewer").stdout)
    assert found["hash"] == hash_of(10)
    assert found["agent"]["runsIt"] is True
    assert found["origins"]["collectors.host.intervalSeconds"]["revision"] == "bbb2"
    assert "no difference" in world.outrider(world.node, "--diff", *IN, role="viewer").stderr


def test_a_difference_is_shown_with_both_sides(world: World) -> None:
    world.agent("ccc3", "Failed", hash_of(10), "collectors: no such field")
    done = world.outrider(world.node, "--diff", *IN, role="viewer", code=1)
    assert f"({world.name}@bbb2)" in done.stdout.splitlines()[0]
    assert "-    intervalSeconds: 10\n+    intervalSeconds: 15\n" in done.stdout
    assert "refused the configuration" in done.stderr
    assert "collectors: no such field" in done.stderr


def test_history_and_rollback_work_with_the_objects_that_are_kept(world: World) -> None:
    lines = world.outrider("history", world.name, *IN, role="viewer").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["REVISION", "aaa1", "bbb2", "ccc3"]
    assert lines[2].split()[2:] == ["Applied", "settled"]
    shown = world.outrider("history", world.name, "--revision", "aaa1", *IN).stdout
    assert yaml.safe_load(shown) == asked(5)
    before = world.read()["spec"]
    done = world.outrider("rollback", world.name, "--dry-run=server", *IN)
    assert done.stdout.endswith(
        f"agentconfig.outrider.dev/{world.name} rolled back (server dry run)\n"
    )
    assert world.read()["spec"] == before
    world.outrider("rollback", world.name, *IN)
    after = world.read()
    assert after["spec"]["collectors"]["host"]["intervalSeconds"] == 10
    assert after["spec"]["rollout"] == before["rollout"]
    assert after["metadata"]["generation"] == 2
    world.outrider("rollback", world.name, "--to", "aaa1", *IN)
    assert world.read()["spec"]["collectors"]["host"]["intervalSeconds"] == 5


def test_retry_annotates_and_status_answers(world: World) -> None:
    world.outrider("retry", world.name)
    assert world.read()["metadata"]["annotations"]["outrider.dev/retry"]
    failed = world.outrider("status", world.name, role="viewer", code=1)
    assert "was rolled back: 1 node failed with it: n1 (bad)" in failed.stderr
    world.stands("ccc3", "bbb2", "Rolling", "given to 2 of 3 nodes")
    world.agent("ccc3", "Applying", "")
    late = world.outrider("status", world.name, "--timeout", "7s", role="viewer", code=4)
    assert "Rolling: given to 2 of 3 nodes (2 of 3 nodes run it, 1 failed)..." in late.stdout
    assert f"waiting: 1 node: Applying: {world.node}" in late.stderr
    world.stands("ccc3", "ccc3", "Settled")
    assert "successfully rolled out: revision ccc3" in world.outrider("status", world.name).stdout


def test_who_may_only_look_changes_nothing(world: World) -> None:
    before = world.read()
    for words in (("rollback", world.name, *IN), ("retry", world.name)):
        (line,) = world.outrider(*words, role="viewer", code=3).stderr.splitlines()
        assert "forbidden" in line
    assert world.read() == before


def test_revisions_elsewhere_are_nobodys_business(world: World) -> None:
    elsewhere = ("--server-namespace", "kube-system")
    (line,) = world.outrider("history", world.name, *elsewhere, code=3).stderr.splitlines()
    assert "forbidden" in line
