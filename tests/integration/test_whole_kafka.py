"""Records into a real Kafka that is killed and away: nothing acknowledged or accepted is lost."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing

import pytest
from cluster.controlplane import ControlPlane
from cluster.kafka import KafkaBroker
from cluster.programs import Programs, http
from cluster.records import read_topic
from cluster.supervised import wait_for
from outrider_proto import records

#: Several waits of up to a minute each, should the machine be busy.
pytestmark = pytest.mark.timeout(400)

NODES = ("alpha", "beta", "gamma")
WAIT = 90.0
#: Many small batches rather than few large ones: more to lose.
LOAD = {
    "collectors": {"host": {"intervalSeconds": 1}},
    "heartbeat": {"intervalSeconds": 1},
    "batch": {"maxDelayMillis": 20},
}
LINES = 1500
TASK = {
    "apiVersion": "outrider.dev/v1alpha1",
    "kind": "AgentTask",
    "metadata": {"name": "load"},
    "spec": {
        "run": {
            "script": {
                "source": f"""
            i=0
            while [ $i -lt {LINES} ]; do
                i=$((i + 1)); echo "$OUTRIDER_NODE line $i"; sleep 0.01
            done"""
            }
        },
        "timeoutSeconds": 300,
        "rollout": {"maxConcurrent": "100%", "maxFailures": 0, "waves": ["100%"]},
    },
}


@pytest.fixture
def broker(kafka_jars_folder, tmp_path) -> Iterator[KafkaBroker]:
    with KafkaBroker(tmp_path / "kafka") as running:
        yield running


@pytest.fixture
def fleet(control_plane_programs: None, broker: KafkaBroker, tmp_path) -> Iterator[Programs]:
    with ControlPlane(tmp_path / "plane") as plane:
        programs = Programs(plane, kafka=broker.bootstrap)
        programs.install()
        programs.server()
        for node in NODES:
            programs.agent(node, overrides=LOAD)
        yield programs


def start_agents(fleet: Programs) -> None:
    for agent in fleet.agents.values():
        fleet.start(agent, ready=False)
    for agent in fleet.agents.values():
        fleet.wait_ready(agent, WAIT)


def start_load(fleet: Programs) -> None:
    """A task that prints lines on all nodes, each of them once."""
    fleet.plane.kubectl("apply", "-f", "-", stdin=json.dumps(TASK))


def wait_load(fleet: Programs) -> None:
    def ended() -> bool:
        task = json.loads(fleet.plane.kubectl("get", "agenttask", "load", "-o", "json"))
        return bool(task.get("status", {}).get("phase") == "Succeeded")

    wait_for("the load has ended", ended, WAIT, 0.5)


def printed(found: list[records.Decoded]) -> list[str]:
    """The lines of all nodes' output, of each batch once."""
    output: dict[str, dict[int, str]] = defaultdict(dict)
    for batch in found:
        for record in batch.records:
            if record.data_type == records.TASK_OUTPUT:
                fields = records.fields_of(record)
                output[batch.node][int(fields["offset"])] = fields["output"]
    return [
        line
        for chunks in output.values()
        for line in "".join(text for _, text in sorted(chunks.items())).splitlines()
    ]


def in_kafka(bootstrap: str) -> list[records.Decoded]:
    messages = asyncio.run(read_topic(bootstrap))
    for message in messages:
        assert message.key.decode() == message.decoded.agent_id
    return [message.decoded for message in messages]


def ask(fleet: Programs, node: str, question: str) -> int:
    """Ask a node's file for one number."""
    file = fleet.folder / node / "state" / "agent.db"
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10)) as db:
        return int(db.execute(question).fetchone()[0])


def outbox(fleet: Programs, node: str) -> int:
    """Batches that wait in a node's outbox."""
    return ask(fleet, node, "SELECT count(*) FROM batches")


def test_broker_killed_under_load_then_the_server_too(fleet, broker) -> None:
    fleet.start(fleet.servers["server-0"])
    start_agents(fleet)
    server = fleet.servers["server-0"]
    start_load(fleet)
    wait_for("output is stored", lambda: len(printed(in_kafka(broker.bootstrap))) > 100, WAIT, 0.2)
    broker.kill()
    wait_for("the server says so", lambda: http(server, "/readyz")[0] == 503, WAIT, 0.2)
    assert "sink" in http(server, "/readyz")[1]
    wait_for(
        "agents keep their records",
        lambda: all(outbox(fleet, node) > 5 for node in NODES),
        WAIT,
        0.2,
    )
    assert fleet.plane.processes.running(server.name)
    # What it had acknowledged without having it in Kafka would go with its memory.
    fleet.plane.processes.kill(server.name)
    fleet.start(server, ready=False)
    broker.resume()
    wait_for("the server is ready again", lambda: http(server, "/readyz")[0] == 200, WAIT, 0.2)
    wait_load(fleet)
    check_nothing_is_lost(fleet, broker)


def check_nothing_is_lost(fleet: Programs, broker: KafkaBroker) -> None:
    """Stop making records, let the outboxes run empty, and compare."""
    for agent in fleet.agents.values():
        agent.settings.update(
            collectors={"host": {"enabled": False}}, heartbeat={"intervalSeconds": 3600}
        )
        fleet.plane.processes.stop(agent.name, 30)
        fleet.start(agent, ready=False)
    # What is accepted by now; agents go on, if slowly.
    last = {
        node: ask(fleet, node, "SELECT value FROM meta WHERE name = 'next_seq'") - 1
        for node in NODES
    }
    wait_for(
        "all of them are acknowledged",
        lambda: (
            not any(
                ask(fleet, node, f"SELECT count(*) FROM batches WHERE seq <= {last[node]}")
                for node in NODES
            )
        ),
        WAIT,
        0.5,
    )
    seqs: dict[tuple[str, int], list[int]] = defaultdict(list)
    found = in_kafka(broker.bootstrap)
    lines = printed(found)
    assert sorted(lines) == sorted(
        f"{node} line {i}" for node in NODES for i in range(1, LINES + 1)
    )
    for batch in found:
        seqs[batch.node, batch.epoch].append(batch.seq)
    assert {node for node, _ in seqs} == set(NODES)
    for (node, epoch), stored in seqs.items():
        assert epoch == ask(fleet, node, "SELECT value FROM meta WHERE name = 'epoch'") % 2**64
        lost = set(range(1, last[node] + 1)) - set(stored)
        assert not lost, (node, sorted(lost))
    total = sum(map(len, seqs.values()))
    unique = sum(len(set(stored)) for stored in seqs.values())
    print(f"batches accepted {unique}, lost 0, stored more than once {total - unique}")


def test_broker_away_when_everything_starts(fleet, broker) -> None:
    broker.kill()
    server = fleet.servers["server-0"]
    fleet.start(server, ready=False)
    start_agents(fleet)
    start_load(fleet)
    code, text = http(server, "/readyz")
    assert code == 503
    assert "[-]sink" in text
    wait_for(
        "agents keep their records",
        lambda: all(outbox(fleet, node) > 5 for node in NODES),
        WAIT,
        0.2,
    )
    broker.resume()
    wait_for("the server is ready", lambda: http(server, "/readyz")[0] == 200, WAIT, 0.2)
    wait_load(fleet)
    check_nothing_is_lost(fleet, broker)
