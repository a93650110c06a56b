"""The main job: real API server, the server and three agents as processes, tasks by kubectl."""

from __future__ import annotations

import json
import os
import platform
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster.controlplane import ControlPlane
from cluster.paths import ROOT
from cluster.programs import Programs, http, rows, status
from cluster.supervised import wait_for
from outrider_proto import records
from prometheus_client.parser import text_string_to_metric_families

#: Several waits of up to a minute each, should the machine be busy.
pytestmark = pytest.mark.timeout(400)

NODES = ("alpha", "beta", "gamma")
WAIT = 60.0
RUN_KINDS = [
    "command",
    "script",
    "plugin",
    "builtin/Ping",
    "builtin/Facts",
    "builtin/Restart",
]


@pytest.fixture(scope="module")
def fleet(
    control_plane_programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        programs = Programs(plane)
        programs.install()
        programs.start(programs.server())
        for node in NODES:
            labels = {"tier": "odd" if node == "beta" else "even"}
            # One that allows more than the others.
            more = {"tasks": {"allowedKinds": RUN_KINDS, "allowedUsers": ["nobody"]}}
            agent = programs.agent(node, labels, more if node == "beta" else None)
            programs.start(agent, ready=False)
        programs.wait_agents_ready(len(NODES))
        yield programs


def apply(fleet: Programs, spec: dict[str, Any], name: str = "") -> str:
    name = name or f"task-{uuid.uuid4().hex[:8]}"
    task = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": name},
        "spec": spec,
    }
    fleet.plane.kubectl("apply", "-f", "-", stdin=json.dumps(task))
    return name


def ended(fleet: Programs, name: str, phase: str = "") -> dict[str, Any]:
    final = ("Succeeded", "Failed", "Cancelled")
    wait_for(f"{name} has ended", lambda: status(fleet, name).get("phase") in final, WAIT, 0.1)
    found = status(fleet, name)
    assert not phase or found["phase"] == phase, (found, rows(fleet, name))
    return found


def condition(found: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((c for c in found.get("conditions", []) if c["type"] == kind), {})


def test_the_example(fleet) -> None:
    fleet.plane.kubectl("apply", "-f", ROOT / "examples" / "kernel-version.yaml")
    found = ended(fleet, "kernel-version", "Succeeded")
    assert found["counts"]["targeted"] == found["counts"]["succeeded"] == 3
    kernel = platform.release()
    (outcome,) = found["outcomes"]
    assert (outcome["nodes"], outcome["phase"], outcome["exitCode"]) == (3, "Succeeded", 0)
    assert outcome["preview"].strip() == kernel
    got = rows(fleet, "kernel-version")
    assert set(got) == set(NODES)
    for row in got.values():
        assert (row["phase"], row["attempt"], row["exitCode"]) == ("Succeeded", 1, 0)
        assert row["preview"] == kernel + "\n"
        assert row["startTime"] <= row["finishTime"]
    assert condition(found, "Complete")["status"] == "True"
    table = fleet.plane.kubectl("get", "agenttask", "kernel-version")
    assert "Succeeded" in table


def test_each_node_runs_it_once_and_as_many_at_a_time_as_allowed(fleet, tmp_path) -> None:
    log = tmp_path / "log"
    source = 'echo "start $OUTRIDER_NODE" >> "$LOG"; sleep 0.3; echo "end $OUTRIDER_NODE" >> "$LOG"'
    name = apply(
        fleet,
        {
            "run": {"script": {"interpreter": ["/bin/sh", "-eu"], "source": source}},
            "env": {"LOG": str(log)},
            "rollout": {"maxConcurrent": 1, "waves": ["100%"]},
        },
    )
    ended(fleet, name, "Succeeded")
    lines = log.read_text().split("\n")[:-1]
    assert Counter(lines) == Counter(
        f"{word} {node}" for word in ("start", "end") for node in NODES
    )
    for start, end in zip(lines[::2], lines[1::2], strict=True):
        assert start.replace("start", "end") == end, lines


def test_results_of_failures_say_why(fleet) -> None:
    name = apply(
        fleet,
        {
            "run": {"script": {"source": 'echo "out of $OUTRIDER_NODE"; echo err >&2; exit 7'}},
            "rollout": {"maxFailures": "100%", "waves": ["100%"]},
        },
    )
    found = ended(fleet, name)
    assert found["counts"]["failed"] == 3
    for node, row in rows(fleet, name).items():
        assert (row["phase"], row["exitCode"], row["reason"]) == ("Failed", 7, "NonZeroExit")
        assert f"out of {node}\n" in row["preview"]
        assert "err\n" in row["preview"]


def test_past_the_error_budget_nothing_begins(fleet) -> None:
    name = apply(
        fleet,
        {
            "run": {"command": ["false"]},
            "rollout": {"maxConcurrent": 1, "maxFailures": 0, "waves": ["100%"]},
        },
    )
    found = ended(fleet, name, "Failed")
    counts = found["counts"]
    assert (counts["failed"], counts["skipped"]) == (1, 2)
    assert condition(found, "Failed")["status"] == "True"
    assert "TooManyFailures" in json.dumps(found)


def test_timeout_ends_the_whole_group(fleet, tmp_path) -> None:
    pids = tmp_path / "pids"
    name = apply(
        fleet,
        {
            "run": {
                "script": {
                    "interpreter": ["/bin/sh"],
                    "source": 'sleep 600 & echo $! >> "$PIDS"; wait',
                }
            },
            "env": {"PIDS": str(pids)},
            "timeoutSeconds": 1,
            "rollout": {"maxConcurrent": "100%", "maxFailures": "100%", "waves": ["100%"]},
        },
    )
    found = ended(fleet, name)
    assert found["counts"]["timedOut"] == 3
    alive = [
        pid
        for pid in pids.read_text().split()
        if Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    ]
    assert alive == []


def test_cancel_ends_what_runs(fleet, tmp_path) -> None:
    name = apply(
        fleet,
        {
            "run": {"command": ["sleep", "600"]},
            "timeoutSeconds": 900,
            "rollout": {"maxConcurrent": "100%", "waves": ["100%"]},
        },
    )
    wait_for("it runs", lambda: status(fleet, name).get("counts", {}).get("running") == 3, WAIT)
    fleet.plane.kubectl(
        "patch", "agenttask", name, "--type=merge", "-p", '{"spec": {"cancel": true}}'
    )
    found = ended(fleet, name, "Cancelled")
    assert found["counts"]["cancelled"] == 3


def test_selector_names_and_nobody(fleet) -> None:
    one = apply(
        fleet,
        {"run": {"builtin": "Ping"}, "target": {"nodeSelector": {"matchLabels": {"tier": "odd"}}}},
    )
    two = apply(fleet, {"run": {"builtin": "Facts"}, "target": {"nodeNames": ["alpha", "gamma"]}})
    none = apply(
        fleet,
        {"run": {"builtin": "Ping"}, "target": {"nodeSelector": {"matchLabels": {"tier": "none"}}}},
    )
    ended(fleet, one, "Succeeded")
    assert set(rows(fleet, one)) == {"beta"}
    ended(fleet, two, "Succeeded")
    facts = rows(fleet, two)
    assert set(facts) == {"alpha", "gamma"}
    assert json.loads(facts["alpha"]["preview"])
    found = ended(fleet, none, "Failed")
    assert "NoMatchingNodes" in json.dumps(found)


def test_what_this_version_cannot_do_is_refused_in_words(fleet) -> None:
    name = apply(fleet, {"run": {"plugin": {"name": "fim", "dataType": 6001}}, "user": "nobody"})
    found = ended(fleet, name, "Failed")
    assert condition(found, "Failed")["reason"] == "NotSupported"
    assert "plugin" in condition(found, "Failed")["message"]


def test_a_task_for_a_plugin_that_no_node_has_fails_at_once(fleet) -> None:
    name = apply(fleet, all_at_once({"run": {"plugin": {"name": "fim", "dataType": 6001}}}))
    ended(fleet, name, "Failed")
    for row in rows(fleet, name).values():
        assert (row["phase"], row["reason"]) == ("Failed", "UnknownPlugin")
        assert "no such plug-in (it has: none)" in row["message"]


def all_at_once(spec: dict[str, Any]) -> dict[str, Any]:
    rollout = {"maxConcurrent": "100%", "maxFailures": "100%", "waves": ["100%"]}
    return {**spec, "rollout": rollout}


def test_an_agent_that_is_told_to_restart_says_so_when_it_is_back(fleet) -> None:
    name = apply(fleet, all_at_once({"run": {"builtin": "Restart"}}))
    ended(fleet, name)
    got = rows(fleet, name)
    assert (got["beta"]["phase"], got["beta"]["message"]) == ("Succeeded", "restarted")
    assert got["beta"]["attempt"] == 1
    for node in ("alpha", "gamma"):
        assert (got[node]["phase"], got[node]["reason"]) == ("Rejected", "NotAllowed")
        assert "tasks.allowedKinds" in got[node]["message"]
    again = apply(fleet, {"run": {"command": ["true"]}, "target": {"nodeNames": ["beta"]}})
    ended(fleet, again, "Succeeded")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_task_is_of_the_user_it_names_where_the_node_allows_it(fleet) -> None:
    name = apply(fleet, all_at_once({"run": {"command": ["id", "-un"]}, "user": "nobody"}))
    ended(fleet, name)
    got = rows(fleet, name)
    assert (got["beta"]["phase"], got["beta"]["preview"]) == ("Succeeded", "nobody\n")
    assert (got["alpha"]["phase"], got["alpha"]["reason"]) == ("Rejected", "NotAllowed")
    assert "tasks.allowedUsers" in got["alpha"]["message"]


def test_a_task_for_the_host_is_refused_where_the_node_does_not_allow_it(fleet) -> None:
    name = apply(fleet, all_at_once({"run": {"command": ["true"]}, "where": "Host"}))
    ended(fleet, name, "Failed")
    for row in rows(fleet, name).values():
        assert (row["phase"], row["reason"]) == ("Rejected", "NotAllowed")
        assert "tasks.allowHost" in row["message"]


def test_deleting_a_running_task_ends_it(fleet, tmp_path) -> None:
    pids = tmp_path / "pids"
    name = apply(
        fleet,
        {
            "run": {
                "script": {
                    "interpreter": ["/bin/sh"],
                    "source": 'echo $$ >> "$PIDS"; exec sleep 600',
                }
            },
            "env": {"PIDS": str(pids)},
            "timeoutSeconds": 900,
            "rollout": {"maxConcurrent": "100%", "waves": ["100%"]},
        },
    )
    wait_for("it runs", lambda: pids.exists() and len(pids.read_text().split()) == 3, WAIT)
    fleet.plane.kubectl("delete", "agenttask", name, "--timeout=30s")
    wait_for(
        "its processes are gone",
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split()),
        WAIT,
    )


def test_the_registry(fleet) -> None:
    agents = json.loads(fleet.plane.kubectl("get", "agents.outrider.dev", "-o", "json"))["items"]
    assert {agent["metadata"]["name"] for agent in agents} == set(NODES)
    for agent in agents:
        assert agent["status"]["server"] == "server-0"
        assert agent["status"]["version"]
        assert condition(agent["status"], "Ready")["status"] == "True"


def stored(fleet: Programs) -> list[records.Decoded]:
    folder = fleet.folder / "server-0" / "records"
    found = []
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as opened:
            found += [records.decode_stored(s) for s in records.read_stored(opened)]
    return found


def test_records_are_stored_and_acknowledged(fleet) -> None:
    def heartbeats() -> set[str]:
        return {
            batch.node
            for batch in stored(fleet)
            for record in batch.records
            if record.data_type == records.AGENT_HEARTBEAT
        }

    wait_for("heart-beats of all nodes are stored", lambda: heartbeats() == set(NODES), WAIT, 0.2)
    for batch in stored(fleet):
        node = json.loads(fleet.plane.kubectl("get", "node", batch.node, "-o", "json"))
        assert batch.agent_id == node["metadata"]["uid"]
    fields = next(
        records.fields_of(r)
        for b in stored(fleet)
        for r in b.records
        if r.data_type == records.AGENT_HEARTBEAT
    )
    wanted = """
        kernel_version arch platform platform_family platform_version state state_detail idc region
        net_mode rx_speed tx_speed cpu rss read_speed write_speed pid nfd start_time tx_tps rx_tps
        du nproc total_mem load_1 load_5 load_15 running_procs total_procs host_serial host_id
        host_model host_vendor dns gateway cpu_name boot_time cpu_usage mem_usage
    """
    assert [name for name in wanted.split() if name not in fields] == []
    assert fields["kernel_version"] == platform.release()


def test_output_travels_as_records(fleet) -> None:
    name = apply(fleet, {"run": {"command": ["echo", "hello records"]}})
    ended(fleet, name, "Succeeded")
    task = json.loads(fleet.plane.kubectl("get", "agenttask", name, "-o", "json"))
    uid = task["metadata"]["uid"]

    def nodes() -> set[str]:
        return {
            b.node
            for b in stored(fleet)
            for r in b.records
            if r.data_type == records.TASK_OUTPUT and records.fields_of(r).get("task_uid") == uid
        }

    wait_for("the output of all nodes is stored", lambda: nodes() == set(NODES), WAIT, 0.2)


def test_metrics_parse_and_labels_are_bounded(fleet) -> None:
    for program in [*fleet.servers.values(), *fleet.agents.values()]:
        code, text = http(program, "/metrics")
        assert code == 200
        families = list(text_string_to_metric_families(text))
        own = [f for f in families if f.name.startswith("outrider_")]
        assert len(own) > 5
        assert any(f.name == "outrider_event_loop_lag_seconds" for f in own)
        if program.grpc_port:
            values = {v for f in own for s in f.samples for v in s.labels.values()}
            assert not values & set(NODES)
        assert http(program, "/healthz")[0] == 200


def test_deleted_task_takes_its_reports_along(fleet) -> None:
    name = apply(fleet, {"run": {"command": ["true"]}})
    ended(fleet, name, "Succeeded")
    assert rows(fleet, name)
    fleet.plane.kubectl("delete", "agenttask", name, "--timeout=30s")
    wait_for("its reports are gone", lambda: not rows(fleet, name), WAIT, 0.2)
