"""AgentConfigs from kubectl to real agents: trial, soak, the rest and back; leaders are killed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cluster.controlplane import ControlPlane
from cluster.programs import NAMESPACE, Program, Programs, http
from cluster.supervised import free_port, wait_for
from prometheus_client.parser import text_string_to_metric_families

NODES = ("alpha", "beta", "gamma")
WAIT = 60.0
#: So that agents that are gone are noticed soon.
SETTINGS = {"gateway": {"keepalive": {"timeSeconds": 2, "timeoutSeconds": 2}}}
ALL_AT_ONCE = {"maxUnavailable": "100%", "canary": {"nodes": 0}}


@pytest.fixture(scope="module")
def fleet(
    control_plane_programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        programs = Programs(plane)
        programs.install()
        servers = [programs.server(f"server-{number}", SETTINGS) for number in range(2)]
        for server in servers:
            programs.start(server)
        for node in NODES:
            programs.start(programs.agent(node), ready=False)
        programs.wait_agents_ready(len(NODES))
        yield programs


@pytest.fixture(autouse=True)
def clean(fleet: Programs) -> Iterator[None]:
    yield
    fleet.plane.kubectl("delete", "agentconfigs", "--all")
    wait_for("nobody asks for anything", lambda: set(running(fleet).values()) <= {NOTHING}, WAIT)


#: Hash of a configuration that asks for nothing.
NOTHING = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def canary(soak: int, **more: Any) -> dict[str, Any]:
    return {"maxUnavailable": 1, "canary": {"nodes": 1, "soakSeconds": soak}, **more}


def interval(seconds: int) -> dict[str, Any]:
    return {"collectors": {"host": {"intervalSeconds": seconds}}}


def listener(port: int) -> dict[str, Any]:
    return {"listeners": {"framedTcp": {"address": f"127.0.0.1:{port}"}}}


def apply(fleet: Programs, name: str, content: dict[str, Any], **more: Any) -> None:
    body = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentConfig",
        "metadata": {"name": name},
        "spec": {"rollout": ALL_AT_ONCE, **content, **more},
    }
    fleet.plane.kubectl("apply", "-f", "-", stdin=json.dumps(body))


def status(fleet: Programs, name: str) -> dict[str, Any]:
    """The status, if it is about the spec as it is."""
    body = json.loads(fleet.plane.kubectl("get", "ac", name, "-o", "json"))
    found = dict(body.get("status") or {})
    return found if found.get("observedGeneration") == body["metadata"]["generation"] else {}


def phase(fleet: Programs, name: str) -> str:
    return str(status(fleet, name).get("rollout", {}).get("phase", ""))


def wait_phase(fleet: Programs, name: str, wanted: str) -> dict[str, Any]:
    wait_for(f"{name} is {wanted}", lambda: phase(fleet, name) == wanted, WAIT, 0.1)
    return status(fleet, name)


def settled(fleet: Programs, name: str) -> dict[str, Any]:
    def done() -> bool:
        found = status(fleet, name)
        same = found.get("settledRevision") == found.get("revision")
        return bool(found) and found["rollout"]["phase"] == "Settled" and same

    wait_for(f"{name} has settled", done, WAIT, 0.1)
    return status(fleet, name)


def condition(found: dict[str, Any], kind: str) -> dict[str, Any]:
    return dict({item["type"]: item for item in found["conditions"]}[kind])


def reasons(fleet: Programs, name: str) -> list[str]:
    field = f"--field-selector=involvedObject.name={name}"
    found = json.loads(fleet.plane.kubectl("get", "events", "-A", field, "-o", "json"))
    return [item["reason"] for item in found["items"]]


def running(fleet: Programs) -> dict[str, str]:
    """Hash of the configuration in force, by node; of the agents that answer."""
    found = {node: in_force(agent) for node, agent in fleet.agents.items()}
    return {node: digest for node, digest in found.items() if digest is not None}


def in_force(agent: Program) -> str | None:
    code, text = http(agent, "/metrics")
    if code != 200:
        return None
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "outrider_agent_config_info":
                return sample.labels["hash"]
    return None


def leader(fleet: Programs) -> str:
    lease = json.loads(fleet.plane.kubectl("-n", NAMESPACE, "get", "lease", "-o", "json"))
    return str(lease["items"][0]["spec"].get("holderIdentity") or "").partition("_")[0]


def test_a_change_goes_from_canary_to_all(fleet: Programs) -> None:
    apply(fleet, "whole", interval(20))
    first = settled(fleet, "whole")
    assert first["counts"]["applied"] == len(NODES)
    assert condition(first, "Ready")["status"] == "True"
    before = running(fleet)
    assert len(set(before.values())) == 1
    apply(fleet, "whole", interval(30), rollout=canary(3))
    wait_phase(fleet, "whole", "Soaking")
    changed = [node for node, digest in running(fleet).items() if digest != before[node]]
    assert len(changed) == 1
    after = settled(fleet, "whole")
    assert [entry["result"] for entry in after["history"]] == ["Applied", "Applied"]
    assert len(set(running(fleet).values())) == 1
    told = reasons(fleet, "whole")
    assert {"RolloutStarted", "CanaryWell", "Settled"} <= set(told)
    revisions = fleet.plane.kubectl("-n", NAMESPACE, "get", "controllerrevisions", "-o", "name")
    assert f"controllerrevision.apps/whole-{after['revision']}" in revisions
    glance = fleet.plane.kubectl("get", "ac", "whole").splitlines()
    assert glance[0].split()[:3] == ["NAME", "PHASE", "READY"]
    assert glance[1].split()[:3] == ["whole", "Settled", "True"]


def test_a_bad_change_goes_back_by_itself_and_says_why(fleet: Programs) -> None:
    apply(fleet, "bad", interval(20))
    settled(fleet, "bad")
    before = running(fleet)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        apply(fleet, "bad", listener(taken.getsockname()[1]), rollout=canary(1))
        found = wait_phase(fleet, "bad", "RolledBack")
    assert "1 node failed with it" in found["rollout"]["message"]
    assert any(node in found["rollout"]["message"] for node in NODES)
    assert condition(found, "Ready")["status"] == "False"
    assert found["history"][0]["result"] == "RolledBack"
    assert running(fleet) == before
    assert "RolledBack" in reasons(fleet, "bad")


def test_a_pause_waits_and_is_tried_again(fleet: Programs) -> None:
    chosen = {"selector": {"matchLabels": {"kubernetes.io/hostname": "alpha"}}}
    apply(fleet, "held", interval(20), **chosen)
    settled(fleet, "held")
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        pausing = canary(0, onFailure="Pause")
        apply(fleet, "held", listener(port), rollout=pausing, **chosen)
        wait_phase(fleet, "held", "Paused")
    fleet.plane.kubectl("annotate", "ac", "held", "outrider.dev/retry=1")
    found = settled(fleet, "held")
    assert [entry["result"] for entry in found["history"]] == ["Applied", "Failed", "Applied"]


def test_a_change_in_the_middle_and_a_new_node(fleet: Programs) -> None:
    apply(fleet, "twice", interval(20))
    settled(fleet, "twice")
    (old,) = set(running(fleet).values())
    apply(fleet, "twice", interval(30), rollout=canary(600))
    wait_phase(fleet, "twice", "Soaking")
    # A Node's time of creation has whole seconds: it must be another second than the change's.
    time.sleep(1.1)
    fleet.start(fleet.agent("late"), ready=False)
    wait_for("the new node has the old one", lambda: running(fleet).get("late") == old, WAIT, 0.2)
    assert phase(fleet, "twice") == "Soaking"
    apply(fleet, "twice", interval(40), rollout=canary(1))
    found = settled(fleet, "twice")
    results = [entry["result"] for entry in found["history"]]
    assert results == ["Applied", "Superseded", "Applied"]
    (new,) = set(running(fleet).values())
    assert new != old


def test_an_agent_that_is_away_gets_it_when_it_is_back(fleet: Programs) -> None:
    apply(fleet, "away", interval(20))
    settled(fleet, "away")
    gone = fleet.agents["gamma"]
    fleet.plane.processes.kill(gone.name)
    present = len(fleet.agents) - 1

    def noticed() -> bool:
        return fleet.ready_agents() == present

    wait_for("its absence is noticed", noticed, WAIT, 0.2)
    apply(fleet, "away", interval(30))
    found = settled(fleet, "away")
    assert (found["counts"]["applied"], found["counts"]["absent"]) == (present, 1)
    fleet.start(gone, ready=False)

    def all_same() -> bool:
        return len(running(fleet)) == present + 1 and len(set(running(fleet).values())) == 1

    wait_for("it has it too", all_same, WAIT, 0.2)
    counted = {"applied": present + 1, "absent": 0}
    wait_for(
        "the numbers say so",
        lambda: counted.items() <= status(fleet, "away").get("counts", {}).items(),
        WAIT,
        0.2,
    )


def wait_conflict(fleet: Programs, name: str) -> None:
    def told() -> bool:
        found = status(fleet, name)
        return bool(found) and condition(found, "Conflicting")["status"] == "True"

    wait_for(f"the conflict of {name} is told", told, WAIT, 0.2)


def test_two_configs_with_a_conflict(fleet: Programs) -> None:
    apply(fleet, "one", {**interval(20), "agent": {"logLevel": "debug"}})
    apply(fleet, "two", interval(30))
    settled(fleet, "one")
    settled(fleet, "two")
    for name in ("one", "two"):
        wait_conflict(fleet, name)
        told = condition(status(fleet, name), "Conflicting")["message"]
        assert "collectors.host.intervalSeconds: one" in told
    assert "Conflict" in reasons(fleet, "two")


def test_another_leader_goes_on_in_the_middle(fleet: Programs) -> None:
    apply(fleet, "killed", interval(20))
    settled(fleet, "killed")
    apply(fleet, "killed", interval(30), rollout=canary(8))
    before = wait_phase(fleet, "killed", "Soaking")["rollout"]
    name = leader(fleet)
    fleet.plane.processes.kill(fleet.servers[name].name)
    wait_for("another one leads", lambda: leader(fleet) not in ("", name), WAIT, 0.2)
    found = settled(fleet, "killed")
    fleet.start(fleet.servers[name])
    assert found["revision"] == before["revision"]
    assert [entry["result"] for entry in found["history"]] == ["Applied", "Applied"]
    assert reasons(fleet, "killed").count("RolloutStarted") == 2


def test_agents_say_what_they_run(fleet: Programs) -> None:
    apply(fleet, "told", interval(20))
    revision = settled(fleet, "told")["revision"]

    def told() -> bool:
        found = json.loads(fleet.plane.kubectl("get", "ag", "alpha", "-o", "json"))
        config = found.get("status", {}).get("config", {})
        named = config.get("revisions") == [{"name": "told", "revision": revision}]
        same: bool = config.get("hash") == running(fleet)["alpha"]
        return named and config["phase"] == "Applied" and same

    wait_for("the Agent says so", told, WAIT, 0.5)
