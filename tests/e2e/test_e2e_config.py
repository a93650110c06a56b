"""AgentConfigs on three nodes: a new pace, a plug-in and its bad version, no server, an upgrade."""

from __future__ import annotations

import asyncio
import math
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from cluster import addons, api, configs, paths, plugins, release, tasks
from cluster.layout import STATE
from cluster.records import Message, read_topic
from cluster.tasks import eventually
from outrider_proto import records

NODES = ("node1", "node2", "node3")
PLUGINS = paths.ROOT / "tests" / "fakes" / "plugins"
NUMBERS, NUMBERED = "numbers", 6001
#: Kafka may hold what an earlier session's plug-in sent.
SESSION = uuid.uuid4().hex
SOAK_SECONDS = 4
#: One node at first, then one after the other.
ROLLOUT = {"canary": {"nodes": 1, "soakSeconds": SOAK_SECONDS}, "maxUnavailable": 1}
AT_ONCE = {"canary": {"nodes": 0}, "maxUnavailable": "100%"}
pytestmark = pytest.mark.usefixtures("release")


# ---------------------------------------------------------------- what is seen of it
def _messages() -> list[Message]:
    return asyncio.run(read_topic(addons.KAFKA_HERE))


def _fields(kind: int) -> dict[str, list[tuple[int, Mapping[str, str]]]]:
    """Time and fields of all records of a type in Kafka, by node, in order.

    A batch that was not acknowledged before its agent ended comes again, and counts once.
    """
    found: dict[str, list[tuple[int, Mapping[str, str]]]] = {node: [] for node in NODES}
    for batch in records.first_seen(message.decoded for message in _messages()):
        for record in batch.records:
            if record.data_type == kind:
                found[batch.node].append((record.timestamp, records.fields_of(record)))
    return found


def _numbers() -> dict[str, list[int]]:
    """The numbers of the plug-in's records in Kafka, by node."""
    return {
        node: [int(fields["number"]) for _, fields in rows if fields["session"] == SESSION]
        for node, rows in _fields(NUMBERED).items()
    }


def _sent(node: str) -> int:
    """The number that the plug-in on a node sent last."""
    file = plugins.folder_on(node, NUMBERS) / "last"
    return int(file.read_text()) if file.exists() else 0


def _starts(node: str) -> list[str]:
    """The versions of the plug-in that were started on a node, in order."""
    file = plugins.folder_on(node, NUMBERS) / "starts"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.split()[0] for line in lines]


def _first_seen(hash_: str) -> dict[str, float]:
    """When Prometheus first saw a configuration in force, by node, seconds since the epoch."""
    query = f'outrider_agent_config_info{{hash="{hash_}"}}'
    now = time.time()
    path = f"/api/v1/query_range?query={query}&start={now - 120}&end={now}&step=1"
    found: dict[str, float] = {}
    for series in addons.prometheus(path.replace('"', "%22"))["result"]:
        node, first = series["metric"]["node"], float(series["values"][0][0])
        found[node] = min(first, found.get(node, math.inf))
    return found


def _runs_on() -> None:
    """Wait until the plug-in sends on every node."""
    before = {node: _sent(node) for node in NODES}
    eventually("numbers on all nodes", lambda: all(_sent(n) > before[n] for n in NODES), 60)


def _assert_all_arrived() -> None:
    """Every number up to the last one that was sent by now has arrived, from each node."""
    sent = {node: _sent(node) for node in NODES}
    eventually(
        "the newest numbers in Kafka",
        lambda: all(max(_numbers()[n], default=0) >= sent[n] for n in NODES),
        60,
        0.5,
    )
    for node, numbers in _numbers().items():
        missing = set(range(1, max(numbers) + 1)) - set(numbers)
        assert not missing, f"{node} lost {sorted(missing)[:10]} of {max(numbers)}"
        # One may have been sent and not noted when its plug-in was ended.
        assert len(numbers) - len(set(numbers)) <= len(_starts(node)), node


# ---------------------------------------------------------------- an interval
def test_a_new_pace_is_tried_on_one_node_and_then_reaches_all() -> None:
    name = f"pace-{uuid.uuid4().hex[:6]}"
    host = {"enabled": True, "intervalSeconds": 2}
    try:
        configs.apply(name, {"collectors": {"host": host}, "rollout": ROLLOUT})
        seen = configs.await_phase(name, "Settled")
        settled = seen[-1]
        assert [s["rollout"]["phase"] for s in seen if "rollout" in s]
        for early in seen:
            if early.get("rollout", {}).get("phase") in ("Canary", "Soaking"):
                assert early["counts"].get("updated", 0) <= 1, early
        assert settled["revision"] == settled["settledRevision"]
        counts = {key: value for key, value in settled["counts"].items() if value}
        assert counts == {"targeted": 3, "updated": 3, "applied": 3}
        header, row = (line.split() for line in api.kubectl("get", "ac", name).splitlines())
        assert header[:-1] == ["NAME", "PHASE", "READY", "TARGETED", "APPLIED", "FAILED"]
        assert row[:-1] == [name, "Settled", "True", "3", "3", "0"]
        assert {"RolloutStarted", "CanaryWell", "Settled"} <= set(configs.events(name))

        def fast() -> bool:
            times = {n: sorted({t for t, _ in rows}) for n, rows in _fields(20000).items()}
            return all(len(t) >= 4 and t[-1] - t[-4] <= 10 for t in times.values())

        assert records.HOST_METRICS == 20000
        eventually("host metrics every two seconds from all nodes", fast, 60, 1.0)
        eventually("Agent objects", lambda: all(_says_applied(n, name) for n in NODES), 60)
        (hash_,) = {configs.of_agent(node)["hash"] for node in NODES}
        # By the agents' own word, not by the leader's: two nodes waited for the first.
        first, *others = sorted(_first_seen(hash_).values())
        assert len(others) == 2
        assert min(others) - first >= SOAK_SECONDS - 2.5  # scraped every 2 s
    finally:
        configs.delete(name)


def _says_applied(node: str, name: str) -> bool:
    found = configs.of_agent(node)
    asked = {revision["name"] for revision in found.get("revisions", ())}
    return name in asked and found.get("phase") == "Applied"


# ---------------------------------------------------------------- a plug-in
def _numbers_spec(version: str = "1.0", source: str = "numbers.py", **more: object) -> Any:
    package = plugins.pack(NUMBERS, PLUGINS / source)
    plugin = plugins.publish(NUMBERS, version, package, detail=f"0.05 {SESSION}")
    return {"plugins": [plugin], **more}


@pytest.fixture(scope="module")
def numbers(_installed: object) -> Iterator[str]:
    """The AgentConfig of a plug-in that runs on all nodes."""
    name = f"numbers-{uuid.uuid4().hex[:6]}"
    try:
        configs.apply(name, _numbers_spec(rollout=AT_ONCE))
        configs.await_phase(name, "Settled", 90)
        yield name
    finally:
        configs.delete(name)
        folders = [plugins.folder_on(node, NUMBERS) for node in NODES]
        eventually("no plug-in left", lambda: not any(f.exists() for f in folders), 90)


def test_records_of_a_plugin_arrive_from_all_nodes(numbers: str) -> None:
    _runs_on()
    _assert_all_arrived()
    assert {node: _starts(node) for node in NODES} == {node: ["1.0"] for node in NODES}


def test_a_version_that_cannot_start_goes_back_by_itself(numbers: str) -> None:
    before = configs.status(numbers)["settledRevision"]
    configs.apply(numbers, _numbers_spec("2.0", "broken.py", rollout=ROLLOUT))
    try:
        seen = configs.await_phase(numbers, "RolledBack", 120)
        status = seen[-1]
        touched = [node for node in NODES if "2.0" in _starts(node)]
        assert len(touched) == 1, touched  # only the canary ever had it
        assert all(early["counts"].get("updated", 0) <= 1 for early in seen if "counts" in early)
        assert status["settledRevision"] == before != status["revision"]
        assert status["history"][0]["result"] == "RolledBack", status["history"]
        (ready,) = (c for c in status["conditions"] if c["type"] == "Ready")
        assert (ready["status"], ready["reason"]) == ("False", "RolledBack")
        for text in (status["rollout"]["message"], *configs.events(numbers)["RolledBack"]):
            assert touched[0] in text
            assert f"plug-in {NUMBERS}" in text
        assert {node: _starts(node)[-1] for node in NODES} == dict.fromkeys(NODES, "1.0")
        _runs_on()
        _assert_all_arrived()
    finally:  # what a person does then: ask for what runs
        configs.apply(numbers, _numbers_spec(rollout=AT_ONCE))
        configs.await_phase(numbers, "Settled")


# ---------------------------------------------------------------- without a server
def _pods(component: str) -> list[dict[str, Any]]:
    label = f"app.kubernetes.io/component={component}"
    found: list[dict[str, Any]] = api.kubectl_json(
        *("-n", release.NAMESPACE, "get", "pods", "-l", label)
    )["items"]
    return found


def _scale_servers(count: int) -> None:
    deployment = ("deployment/outrider-server", f"--replicas={count}")
    api.kubectl("-n", release.NAMESPACE, "scale", *deployment)


def test_agents_that_start_without_a_server_run_their_last_configuration(numbers: str) -> None:
    starts = {node: len(_starts(node)) for node in NODES}
    replicas = len(_pods("server"))
    _scale_servers(0)
    try:
        eventually("no server", lambda: not _pods("server"), 90)
        names = [pod["metadata"]["name"] for pod in _pods("agent")]
        api.kubectl("-n", release.NAMESPACE, "delete", "pod", "--wait=false", *names)
        eventually(
            "plug-ins of new agents",
            lambda: all(len(_starts(node)) > starts[node] for node in NODES),
            90,
        )
        _runs_on()
        assert not _pods("server")
    finally:
        _scale_servers(replicas)
    release.await_rollout()
    eventually("three agents Ready", lambda: tasks.ready_agents() == [*NODES], 90)
    _assert_all_arrived()
    assert configs.await_phase(numbers, "Settled")[-1]["counts"]["applied"] == 3


# ---------------------------------------------------------------- an upgrade of the agents
def _epochs() -> dict[str, set[int]]:
    """The lives of outboxes that Kafka holds batches of, by node."""
    found: dict[str, set[int]] = {}
    for message in _messages():
        found.setdefault(message.decoded.node, set()).add(message.decoded.epoch)
    return found


def _let_go_of_runs(file: str, old: set[str], upgrade: threading.Thread) -> None:
    """Let the runs on a node end only once its agent was told to, by a file there."""
    while upgrade.is_alive():
        for pod in _pods("agent"):
            metadata = pod["metadata"]
            if metadata["uid"] in old and "deletionTimestamp" in metadata:
                tasks.make_on_node(STATE, pod["spec"]["nodeName"], f"{file}.go")
        upgrade.join(0.2)


def test_an_upgrade_of_the_agents_loses_and_interrupts_nothing(
    numbers: str, _installed: Any
) -> None:
    old = {pod["metadata"]["uid"] for pod in _pods("agent")}
    starts, epochs = {node: len(_starts(node)) for node in NODES}, _epochs()
    file = f"upgraded-{uuid.uuid4().hex[:8]}"
    path = f"/var/lib/outrider/{file}"
    wait = f"until [ -e {path}.go ]; do sleep 0.1; done; sleep 2"
    name = tasks.create_script(f"cat /etc/hostname >> {path}; {wait}; cat /etc/hostname >> {path}")
    tasks.await_rows(name, "Running", NODES)
    failed: list[BaseException] = []

    def upgrade() -> None:
        try:
            _installed.renew_agents()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=upgrade)
    thread.start()
    _let_go_of_runs(file, old, thread)
    assert not failed, failed
    assert not old & {pod["metadata"]["uid"] for pod in _pods("agent")}
    status = tasks.await_final(name)
    assert (status["phase"], status["counts"]["succeeded"]) == ("Succeeded", 3), status
    assert {row["attempt"] for row in tasks.rows(name).values()} == {1}
    for node in NODES:
        # Once, and from beginning to end in the Pod of one agent: the old one.
        begin, end = tasks.lines_on_node(STATE, node, file)
        assert begin == end
        assert len(_starts(node)) == starts[node] + 1
    _runs_on()
    _assert_all_arrived()
    assert _epochs() == epochs  # the same outboxes, taken over
