"""The resource definitions at a real API server: what is refused, with which words, and defaults.

A refusal is good when its sentence says what to change, so each case names the field and a part of
the sentence.
"""

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from cluster.controlplane import ControlPlane, RequestError
from cluster.paths import ROOT

GROUP = "/apis/outrider.dev/v1alpha1"
TASKS = f"{GROUP}/namespaces/default/agenttasks"
REPORTS = f"{GROUP}/namespaces/default/agenttaskreports"
UNAME: dict[str, Any] = {"command": ["uname", "-r"]}
IMMUTABLE = "cannot be changed after the task was made (only suspend and cancel can)"
PERCENT = "must be a number of nodes from 1 to 100000 or a percentage from 1% to 100%"
UP = "must go up: numbers of nodes first, then percentages, each larger than the one before"
STRICT = "?dryRun=All&fieldValidation=Strict"


def unique(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(4)}"


def task(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": name},
        "spec": spec,
    }


def refusal(error: RequestError) -> str:
    message: str = json.loads(error.message)["message"]
    return message


@pytest.fixture
def made(control_plane: ControlPlane) -> Iterator[str]:
    """The path of a task that stands in the API server."""
    name = unique("made")
    control_plane.request("POST", TASKS, task(name, run=UNAME))
    yield f"{TASKS}/{name}"
    control_plane.request("DELETE", f"{TASKS}/{name}", absent_ok=True)


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("no run", {}, "spec.run", "Required value"),
    ("nothing to run", {"run": {}}, "spec.run", "give one of command, script, plugin and builtin"),
    (
        "two kinds of run",
        {"run": {**UNAME, "builtin": "Ping"}},
        "spec.run",
        "keep one of command, script, plugin and builtin",
    ),
    ("empty command", {"run": {"command": []}}, "spec.run.command", "names no program: give one"),
    ("nameless", {"run": {"command": [""]}}, "spec.run.command", "names no program: give one"),
    ("NUL", {"run": {"command": ["a\0b"]}}, "spec.run.command[0]", "should match"),
    ("long", {"run": {"command": ["x" * 1000] * 200}}, "spec.run.command", "use script for long"),
    ("many", {"run": {"command": ["x"] * 1025}}, "spec.run.command", "at most 1024 items"),
    (
        "no interpreter",
        {"run": {"script": {"source": "true", "interpreter": []}}},
        "spec.run.script.interpreter",
        "names no interpreter: give one",
    ),
    ("no source", {"run": {"script": {"source": ""}}}, "spec.run.script.source", "at least 1"),
    (
        "a large script",
        {"run": {"script": {"source": "x" * (256 * 1024 + 1)}}},
        "spec.run.script.source",
        "may not be more than 262144 bytes",
    ),
    (
        "an unknown builtin",
        {"run": {"builtin": "Explode"}},
        "spec.run.builtin",
        'supported values: "Ping", "Facts", "Restart", "Shutdown"',
    ),
    ("where", {"run": UNAME, "where": "Moon"}, "spec.where", 'supported values: "Container"'),
    ("a user", {"run": UNAME, "user": "a b"}, "spec.user", "should match"),
    ("a negative user", {"run": UNAME, "user": "-1"}, "spec.user", "should match"),
    ("a long user", {"run": UNAME, "user": "u" * 65}, "spec.user", "may not be more than 64"),
    (
        "a builtin on the host",
        {"run": {"builtin": "Restart"}, "where": "Host"},
        "spec",
        "a builtin is done by the agent itself",
    ),
    (
        "a builtin as a user",
        {"run": {"builtin": "Ping"}, "user": "nobody"},
        "spec",
        "leave out user",
    ),
    ("no time", {"run": UNAME, "timeoutSeconds": 0}, "spec.timeoutSeconds", "greater than or eq"),
    ("ages", {"run": UNAME, "timeoutSeconds": 10**12}, "spec.timeoutSeconds", "less than or equal"),
    ("retries", {"run": UNAME, "retries": 11}, "spec.retries", "less than or equal to 10"),
    (
        "more than all",
        {"run": UNAME, "rollout": {"maxConcurrent": "101%"}},
        "spec.rollout.maxConcurrent",
        PERCENT,
    ),
    (
        "none at a time",
        {"run": UNAME, "rollout": {"maxConcurrent": 0}},
        "spec.rollout.maxConcurrent",
        PERCENT,
    ),
    (
        "more failures than all",
        {"run": UNAME, "rollout": {"maxFailures": "200%"}},
        "spec.rollout.maxFailures",
        "must be a number of nodes from 0 to 100000 or a percentage from 0% to 100%",
    ),
    (
        "no sign",
        {"run": UNAME, "rollout": {"maxFailures": "10"}},
        "spec.rollout.maxFailures",
        "or a percentage from 0% to 100%",
    ),
    ("sample", {"run": UNAME, "target": {"sample": "0%"}}, "spec.target.sample", PERCENT),
    ("down", {"run": UNAME, "rollout": {"waves": [5, 1]}}, "spec.rollout.waves", UP),
    ("% down", {"run": UNAME, "rollout": {"waves": ["50%", "20%"]}}, "spec.rollout.waves", UP),
    ("mixed", {"run": UNAME, "rollout": {"waves": ["20%", 5]}}, "spec.rollout.waves", UP),
    (
        "the same wave twice",
        {"run": UNAME, "rollout": {"waves": [1, 1]}},
        "spec.rollout.waves",
        "names a wave twice",
    ),
    (
        "no wave",
        {"run": UNAME, "rollout": {"waves": []}},
        "spec.rollout.waves",
        "give at least one wave",
    ),
    (
        "a wave that is none",
        {"run": UNAME, "rollout": {"waves": [1, "some"]}},
        "spec.rollout.waves[1]",
        PERCENT,
    ),
    (
        "a node twice",
        {"run": UNAME, "target": {"nodeNames": ["a", "b", "a"]}},
        "spec.target.nodeNames[2]",
        'Duplicate value: "a"',
    ),
    (
        "In without values",
        {
            "run": UNAME,
            "target": {"nodeSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}},
        },
        "spec.target.nodeSelector.matchExpressions[0]",
        "the operators In and NotIn need values",
    ),
    ("A-B", {"run": UNAME, "env": {"A-B": "x"}}, "spec.env", "letters, digits and underscores"),
    ("1A", {"run": UNAME, "env": {"1A": "x"}}, "spec.env", "begin with no digit"),
    ("empty name", {"run": UNAME, "env": {"": "x"}}, "spec.env", "names of environment variables"),
    (
        "a preview larger than all",
        {"run": UNAME, "output": {"previewBytes": 100, "maxBytes": 10}},
        "spec.output",
        "previewBytes must not be larger than maxBytes",
    ),
    (
        "a large preview",
        {"run": UNAME, "output": {"previewBytes": 8193}},
        "spec.output.previewBytes",
        "less than or equal to 8192",
    ),
    ("a field that is none", {"run": UNAME, "timeout": 3}, "spec.timeout", "unknown field"),
]


@pytest.mark.parametrize(
    ("spec", "field", "words"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED]
)
def test_a_task_that_makes_no_sense_is_refused(
    control_plane: ControlPlane, spec: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        control_plane.request("POST", TASKS + STRICT, task(unique("bad"), **spec))
    said = refusal(caught.value)
    assert field in said
    assert words in said


def test_a_long_name_is_refused(control_plane: ControlPlane) -> None:
    with pytest.raises(RequestError) as caught:
        control_plane.request("POST", TASKS + STRICT, task("n" * 64, run=UNAME))
    assert "metadata.name must have at most 63 characters" in refusal(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        {"run": UNAME, "rollout": {"waves": [1, 5, "20%", "100%"]}},
        {"run": UNAME, "rollout": {"waves": ["100%"], "maxConcurrent": 100000}},
        {"run": UNAME, "rollout": {"maxFailures": 0}},
        {"run": UNAME, "rollout": {"maxFailures": "0%"}},
        {"run": UNAME, "target": {"sample": "1%"}},
        {"run": UNAME, "env": {"_A1": "", "b": "ü"}},
        {"run": {"script": {"source": "ü" * (256 * 1024)}}},
        {"run": {"command": ["/bin/echo", ""]}},
        {"run": {"plugin": {"name": "fim", "dataType": 6001, "data": "{}"}}, "where": "Host"},
        {"run": UNAME, "where": "Host", "user": "nobody"},
        {"run": UNAME, "user": "1000"},
        {"run": {"builtin": "Shutdown"}, "where": "Container", "user": ""},
        {"run": UNAME, "output": {"previewBytes": 0, "maxBytes": 0}},
        {"run": UNAME, "ttlSecondsAfterFinished": 0},
    ],
)
def test_what_makes_sense_is_taken(control_plane: ControlPlane, spec: dict[str, Any]) -> None:
    control_plane.request("POST", TASKS + STRICT, task(unique("good"), **spec))


def test_a_task_of_a_whole_large_fleet_is_taken_and_can_be_suspended(
    control_plane: ControlPlane,
) -> None:
    names = [f"node-{i:04}.some.longer.domain.example.org" for i in range(5000)]
    name = unique("large")
    control_plane.request("POST", TASKS, task(name, run=UNAME, target={"nodeNames": names}))
    path = f"{TASKS}/{name}"
    control_plane.request("PATCH", path, {"spec": {"suspend": True}})
    with pytest.raises(RequestError):
        control_plane.request("PATCH", path, {"spec": {"target": {"nodeNames": names[1:]}}})
    control_plane.request("DELETE", path)


def test_defaults_are_filled_in(control_plane: ControlPlane, made: str) -> None:
    spec = control_plane.request("GET", made)["spec"]
    assert spec == {
        "target": {"nodeSelector": {}, "nodeNames": []},
        "run": UNAME,
        "where": "Container",
        "user": "",
        "env": {},
        "timeoutSeconds": 30,
        "retries": 0,
        "rollout": {
            "maxConcurrent": "25%",
            "maxFailures": "10%",
            "waves": [1, 5, "20%", "100%"],
            "waveIntervalSeconds": 0,
        },
        "lateNodes": "Skip",
        "activeDeadlineSeconds": 3600,
        "suspend": False,
        "cancel": False,
        "output": {"previewBytes": 2048, "maxBytes": 1048576},
        "ttlSecondsAfterFinished": 86400,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target", {"sample": 3}),
        ("target", {"nodeNames": ["a"]}),
        ("run", {"command": ["uname"]}),
        ("run", {"command": None, "builtin": "Ping"}),
        ("where", "Host"),
        ("user", "nobody"),
        ("env", {"A": "b"}),
        ("timeoutSeconds", 31),
        ("retries", 1),
        ("rollout", {"maxConcurrent": 1}),
        ("rollout", {"waves": None, "maxFailures": 1}),
        ("lateNodes", "Run"),
        ("activeDeadlineSeconds", 1),
        ("output", {"maxBytes": 4096}),
        ("ttlSecondsAfterFinished", 1),
    ],
)
def test_a_spec_cannot_be_changed(
    control_plane: ControlPlane, made: str, field: str, value: Any
) -> None:
    with pytest.raises(RequestError) as caught:
        control_plane.request("PATCH", made, {"spec": {field: value}})
    said = refusal(caught.value)
    assert f"spec.{field}: " in said
    assert IMMUTABLE in said


def test_a_task_can_be_suspended_and_taken_up_but_not_uncancelled(
    control_plane: ControlPlane, made: str
) -> None:
    for suspend in (True, False):
        changed = control_plane.request("PATCH", made, {"spec": {"suspend": suspend}})
        assert changed["spec"]["suspend"] is suspend
    control_plane.request("PATCH", made, {"spec": {"cancel": True}})
    with pytest.raises(RequestError) as caught:
        control_plane.request("PATCH", made, {"spec": {"cancel": False}})
    assert "spec.cancel: " in refusal(caught.value)
    assert "cannot go back to false: make a new AgentTask" in refusal(caught.value)
    # Labels, annotations and finalizers are free all the same.
    control_plane.request("PATCH", made, {"metadata": {"labels": {"a": "b"}}})


def test_the_status_is_apart_from_the_spec(control_plane: ControlPlane, made: str) -> None:
    before = control_plane.request("GET", made)["metadata"]["generation"]
    status = {"phase": "Running", "counts": {"targeted": 3, "succeeded": 1}, "foreign": 1}
    answer = control_plane.request("PATCH", f"{made}/status", {"status": status, "spec": {}})
    assert answer["status"] == {"phase": "Running", "counts": {"targeted": 3, "succeeded": 1}}
    assert answer["metadata"]["generation"] == before
    ignored = control_plane.request("PATCH", made, {"status": {"phase": "Failed"}})
    assert ignored["status"]["phase"] == "Running"
    with pytest.raises(RequestError) as caught:
        control_plane.request("PATCH", f"{made}/status", {"status": {"phase": "Odd"}})
    assert "status.phase" in refusal(caught.value)


def test_a_glance_tells_how_a_task_is_going(control_plane: ControlPlane, made: str) -> None:
    name = made.rpartition("/")[2]
    counts = {"targeted": 9, "succeeded": 5, "failed": 1, "running": 3, "pending": 0, "lost": 0}
    status = {"phase": "Running", "reason": "InProgress", "counts": counts}
    control_plane.request("PATCH", f"{made}/status", {"status": status})
    header, row = control_plane.kubectl("get", "at", name).splitlines()
    assert header.split() == ["NAME", "PHASE", "TARGETED", "SUCCEEDED", "FAILED", "RUNNING", "AGE"]
    assert row.split()[:6] == [name, "Running", "9", "5", "1", "3"]
    wide = control_plane.kubectl("get", "at", name, "-o", "wide")
    assert "InProgress" in wide
    chosen = control_plane.kubectl("get", "at", "--field-selector=status.phase=Running", "-o=name")
    assert f"agenttask.outrider.dev/{name}" in chosen


def test_an_agent_tells_whether_it_is_there(control_plane: ControlPlane) -> None:
    name, path = unique("node"), f"{GROUP}/agents"
    body = {"apiVersion": "outrider.dev/v1alpha1", "kind": "Agent", "metadata": {"name": name}}
    control_plane.request("POST", path, body)
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Connected",
        "message": "connected to server-0",
        "lastTransitionTime": "2024-01-01T00:00:00Z",
    }
    status = {
        "version": "0.1.0",
        "server": "server-0",
        "address": "10.0.0.1:40000",
        "netMode": "sd",
        "connectedSince": "2024-01-01T00:00:00.123456Z",
        "lastSeen": "2024-01-01T00:00:00Z",
        "observedGeneration": 1,
        "conditions": [ready],
    }
    written = control_plane.request("PATCH", f"{path}/{name}/status", {"status": status})
    assert written["status"] == status, "a field of the status is not in the definition"
    header, row = control_plane.kubectl("get", "ag", name).splitlines()
    assert header.split() == ["NAME", "READY", "REASON", "VERSION", "SERVER", "SINCE", "AGE"]
    assert row.split()[:5] == [name, "True", "Connected", "0.1.0", "server-0"]
    control_plane.request("DELETE", f"{path}/{name}")


def test_reports_of_the_servers_making_are_taken_whole(
    control_plane: ControlPlane, made: str
) -> None:
    from outrider_operator.core.model import NodeRun, Phase, Task, parse_spec
    from outrider_operator.core.slices import cut, from_objects, to_object

    previews = 8192
    spec = parse_spec({"run": UNAME, "output": {"previewBytes": previews}})
    rows = [
        NodeRun(
            node=f"node-{i}.{'x' * 200}",
            phase=Phase.FAILED,
            reason="NonZeroExit",
            message="m" * 1024,
            attempt=1,
            exit_code=-1,
            signal=9,
            started_nanos=1_700_000_000_123_456_000,
            finished_nanos=1_700_000_001_000_000_000,
            preview="\x00" * previews,
            output_bytes=2**40,
            output_truncated=True,
        )
        for i in range(len(cut([f"n{i}" for i in range(5000)], previews)[0]))
    ]
    uid = control_plane.request("GET", made)["metadata"]["uid"]
    name = made.rpartition("/")[2]
    owner = Task(uid=uid, namespace="default", name=name, generation=1, spec=spec)
    written = control_plane.request("POST", REPORTS, to_object(owner, 0, rows))
    found = from_objects([written], owner.uid)[0]
    assert [row.node for row in found.values()] == [row.node for row in rows]
    assert to_object(owner, 0, found.values())["nodes"] == written["nodes"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": [{"node": "a", "phase": "Odd"}]}, "nodes[0].phase"),
        ({"nodes": [{"node": f"n{i}", "phase": "Lost"} for i in range(201)]}, "at most 200 items"),
        ({"slice": -1}, "slice"),
        ({"task": None}, "task: Required value"),
        ({"nodes": [{"node": "a", "phase": "Lost", "startTime": "noon"}]}, "nodes[0].startTime"),
    ],
)
def test_a_report_that_makes_no_sense_is_refused(
    control_plane: ControlPlane, change: dict[str, Any], words: str
) -> None:
    report: dict[str, Any] = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTaskReport",
        "metadata": {"name": unique("report")},
        "task": {"name": "t", "uid": "u"},
        "slice": 0,
        "nodes": [{"node": "a", "phase": "Pending"}],
    }
    control_plane.request("POST", REPORTS + STRICT, report)
    with pytest.raises(RequestError) as caught:
        control_plane.request("POST", REPORTS + STRICT, {**report, **change})
    assert words in refusal(caught.value)


PLUGIN: dict[str, Any] = {
    "name": "fim",
    "version": "1.2.0",
    "source": {"urls": ["https://example.org/fim"], "sha256": "0" * 64},
    "args": ["-v"],
    "env": {"A": "b"},
    "detail": "{}",
    "resources": {"cpu": "100m", "memory": "64Mi"},
}


def config(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentConfig",
        "metadata": {"name": unique("config")},
        "spec": spec,
    }


def test_a_config_is_taken_and_only_what_is_not_merged_is_filled_in(
    control_plane: ControlPlane,
) -> None:
    full = {
        "plugins": [PLUGIN],
        "collectors": {"host": {"enabled": True}},
        "listeners": {"framedTcp": {"address": "127.0.0.1:9876"}},
        "datasets": [{"name": "blocklist"}],
        "agent": {"logLevel": "info"},
    }
    answer = control_plane.request("POST", f"{GROUP}/agentconfigs{STRICT}", config(full))
    filled = {
        "selector": {},
        "priority": 100,
        "rollout": {
            "maxUnavailable": "10%",
            "canary": {"nodes": 1, "soakSeconds": 60},
            "progressDeadlineSeconds": 120,
            "onFailure": "Rollback",
        },
    }
    assert answer["spec"] == {**full, **filled}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"plugins": [PLUGIN, PLUGIN]}, "Duplicate value"),
        (
            {"plugins": [{**PLUGIN, "source": {"urls": ["http://x/y"], "sha256": "0" * 64}}]},
            "must be an https:// address with a path",
        ),
        (
            {"plugins": [{**PLUGIN, "source": {"urls": ["https://x/y"], "sha256": "0" * 63}}]},
            "must be 64 hex digits",
        ),
        ({"plugins": [{**PLUGIN, "env": {"A-B": ""}}]}, "letters, digits and underscores"),
        ({"plugins": [{**PLUGIN, "resources": {"cpu": "much"}}]}, "must be a quantity from 1m"),
        ({"plugins": [{**PLUGIN, "resources": {"memory": "0"}}]}, "must be a quantity from 1Mi"),
        (
            {"listeners": {"framedTcp": {"address": "127.0.0.1:70000"}}},
            "must be an IP address and a port from 1 to 65535",
        ),
        ({"listeners": {"framedTcp": {"address": "localhost"}}}, "must be an IP address"),
        ({"collectors": {"host": {"intervalSeconds": 0}}}, "spec.collectors.host.intervalSeconds"),
        ({"rollout": {"maxUnavailable": 0}}, PERCENT),
        ({"rollout": {"onFailure": "Pray"}}, 'supported values: "Rollback", "Pause"'),
        ({"agent": {"logLevel": "loud"}}, "spec.agent.logLevel"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    control_plane: ControlPlane, spec: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        control_plane.request("POST", f"{GROUP}/agentconfigs{STRICT}", config(spec))
    assert words in refusal(caught.value)


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=str)
def test_examples_are_taken(control_plane: ControlPlane, example: Any) -> None:
    for body in yaml.safe_load_all(example.read_text()):
        path = {
            "AgentTask": TASKS,
            "AgentTaskSchedule": f"{GROUP}/namespaces/default/agenttaskschedules",
            "AgentConfig": f"{GROUP}/agentconfigs",
        }[body["kind"]]
        control_plane.request("POST", path + STRICT, body)


def test_kubectl_explain_reads_well(control_plane: ControlPlane) -> None:
    told = control_plane.kubectl("explain", "agenttask.spec.rollout.maxFailures").split()
    assert "0 stops at the first failure, 100% never. Default 10%." in " ".join(told)
    kinds = control_plane.kubectl("api-resources", "--categories=outrider", "-o=name").split()
    assert sorted(kinds) == [
        f"{plural}.outrider.dev"
        for plural in (
            "agentconfigs",
            "agents",
            "agenttaskreports",
            "agenttasks",
            "agenttaskschedules",
        )
    ]
