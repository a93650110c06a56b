"""The chart's rights are enough: the real server works with its ServiceAccount's token alone.

Which rights it must not have is tested with the chart. Here a server, an agent and the Ping of
`helm test` run as processes, each with the account that the chart gives it.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import toolchain
from cluster.controlplane import ControlPlane
from cluster.paths import ROOT
from cluster.programs import AGENT_ACCOUNT, NAMESPACE, SERVER_ACCOUNT, Programs
from cluster.supervised import wait_for

CHART = ROOT / "charts" / "outrider"
TEST_ACCOUNT = "outrider-test"
NODE = "chart-node"
WAIT = 60.0


@pytest.fixture(scope="module")
def helm() -> Path:
    return toolchain.ensure(["helm"])["helm"]


@pytest.fixture(scope="module")
def programs(
    control_plane_programs: None, helm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        started = Programs(plane)
        started.install()
        install(plane, helm)
        kubeconfig = kubeconfig_of(plane, SERVER_ACCOUNT)
        server = started.server(overrides={"kube": {"kubeconfig": str(kubeconfig)}})
        started.start(server)
        started.start(started.agent(NODE), ready=False)
        started.wait_agents_ready(1)
        yield started


def run(*command: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=90, check=False)


def install(plane: ControlPlane, helm: Path) -> None:
    command = [helm, "--kubeconfig", plane.kubeconfig, "--namespace", NAMESPACE]
    # The accounts and definitions are there already: the programs were prepared with them.
    values = ["--take-ownership", "--set", "crds.install=false"]
    done = run(*command, "install", "outrider", CHART, *values)
    assert done.returncode == 0, done.stderr
    # The account of the test is only there while helm runs it.
    hooks = run(*command, "get", "hooks", "outrider")
    assert hooks.returncode == 0, hooks.stderr
    for item in yaml.safe_load_all(hooks.stdout):
        if item and item["kind"] != "Pod":
            plane.kubectl("apply", "-f", "-", stdin=json.dumps(item))


def kubeconfig_of(plane: ControlPlane, account: str) -> Path:
    return plane.kubeconfig_for(account, plane.token(NAMESPACE, account, audience=""))


def task(programs: Programs, name: str) -> dict[str, Any]:
    text = programs.plane.kubectl("get", "at", name, "-o", "json", "--ignore-not-found")
    return dict(json.loads(text)) if text else {}


def apply(programs: Programs, name: str, **spec: Any) -> None:
    body = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": name},
        "spec": spec,
    }
    programs.plane.kubectl("apply", "-f", "-", stdin=json.dumps(body))


def test_helm_test_passes_with_its_own_account(programs: Programs) -> None:
    kubeconfig = kubeconfig_of(programs.plane, TEST_ACCOUNT)
    arguments = ["--kubeconfig", str(kubeconfig), "--namespace", NAMESPACE, "--timeout", "60"]
    done = run(sys.executable, "-m", "outrider_operator.smoke", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Succeeded: 1 of 1 nodes answered" in done.stdout
    left = programs.plane.kubectl("-n", NAMESPACE, "get", "at", "-o", "name")
    assert left.strip() == "", "the test leaves its task behind"


def test_the_server_does_all_its_work_with_the_charts_rights(programs: Programs) -> None:
    plane = programs.plane
    # Made, carried out, reported, told in an event, and deleted when its time is over.
    apply(programs, "short", run={"command": ["true"]}, ttlSecondsAfterFinished=0)
    wait_for("the task is deleted", lambda: not task(programs, "short"), WAIT, 0.1)
    # Ended by its deletion: a finalizer is put on and taken off.
    apply(programs, "long", run={"command": ["sleep", "600"]}, timeoutSeconds=600)
    wait_for("it runs", lambda: running(programs, "long"), WAIT, 0.1)
    plane.kubectl("delete", "at", "long", "--wait=false")
    wait_for("the task is gone", lambda: not task(programs, "long"), WAIT, 0.1)
    # Refused in a condition, which goes into the status.
    apply(programs, "later", run={"plugin": {"name": "fim", "dataType": 1}})
    wait_for("it is refused", lambda: phase(programs, "later") == "Failed", WAIT, 0.1)
    # A schedule's task is made, and deleted when it is not to be kept.
    keep_a_schedule(programs)
    # An AgentConfig gets a status too.
    plane.kubectl("apply", "-f", ROOT / "examples" / "agentconfig-host-metrics.yaml")
    lease = plane.kubectl("-n", NAMESPACE, "get", "lease", "outrider-leader", "-o", "json")
    assert json.loads(lease)["spec"]["holderIdentity"]
    wait_for("the config has a status", lambda: config_status(programs), WAIT, 0.1)
    refused = [line for line in server_log(programs).splitlines() if "forbidden" in line.lower()]
    assert refused == []


def keep_a_schedule(programs: Programs) -> None:
    template = {"spec": {"run": {"command": ["true"]}}}
    body = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTaskSchedule",
        "metadata": {"name": "kept"},
        "spec": {
            "schedule": "0 0 1 1 *",
            "successfulTasksHistoryLimit": 0,
            "suspend": True,
            "taskTemplate": template,
        },
    }
    plane = programs.plane
    plane.kubectl("apply", "-f", "-", stdin=json.dumps(body))
    # As after an outage: the last task was made long ago.
    was = '{"status": {"lastScheduleTime": "2020-01-01T00:00:00Z"}}'
    plane.kubectl("patch", "ats", "kept", "--subresource=status", "--type=merge", "-p", was)
    plane.kubectl("patch", "ats", "kept", "--type=merge", "-p", '{"spec": {"suspend": false}}')

    def reasons() -> set[str]:
        field = "--field-selector=involvedObject.name=kept"
        found = json.loads(plane.kubectl("get", "events", field, "-o", "json"))
        return {item["reason"] for item in found["items"]}

    wanted = {"SuccessfulCreate", "SawCompletedTask", "SuccessfulDelete"}
    wait_for("its task came and went", lambda: wanted <= reasons(), WAIT, 0.2)


def running(programs: Programs, name: str) -> bool:
    counts = task(programs, name).get("status", {}).get("counts", {})
    return bool(counts.get("running") == 1)


def phase(programs: Programs, name: str) -> str:
    return str(task(programs, name).get("status", {}).get("phase", ""))


def config_status(programs: Programs) -> bool:
    text = programs.plane.kubectl("get", "ac", "host-metrics", "-o", "json")
    return bool(json.loads(text).get("status"))


def test_an_agents_token_opens_no_door_of_the_api_server(programs: Programs) -> None:
    kubeconfig = kubeconfig_of(programs.plane, AGENT_ACCOUNT)
    kubectl = [programs.plane.program("kubectl"), "--kubeconfig", kubeconfig]
    for verb, kind in (("list", "pods"), ("create", "agenttasks"), ("get", "secrets")):
        done = run(*kubectl, "auth", "can-i", verb, kind, "-n", NAMESPACE)
        assert done.stdout.strip() == "no", (verb, kind, done.stderr)


def server_log(programs: Programs) -> str:
    return programs.plane.processes.log("outrider-server-0")
