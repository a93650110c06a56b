"""Records into a real Kafka that is killed and away: nothing acknowledged or accepted is lost."""

from __future__ import annotations

import asyncio
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from cluster.controlplane import ControlPlane
from cluster.kafka import KafkaBroker
from cluster.programs import Programs, http
from cluster.supervised import wait_for
from outrider_proto import records

NODES = ("alpha", "beta", "gamma")
WAIT = 90.0
TOPIC = "outrider.records"
#: Many small batches rather than few large ones: more to lose.
LOAD = {
    "collectors": {"host": {"intervalSeconds": 0.05}},
    "heartbeat": {"intervalSeconds": 0.2},
    "batch": {"maxDelayMillis": 20},
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


async def _read_all(bootstrap: str) -> list[records.Decoded]:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False
    )
    await consumer.start()
    try:
        partitions = [
            TopicPartition(TOPIC, p) for p in consumer.partitions_for_topic(TOPIC) or set()
        ]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        found: list[records.Decoded] = []
        for partition in partitions:
            while await consumer.position(partition) < ends[partition]:
                got = await consumer.getmany(partition, timeout_ms=5000)
                for messages in got.values():
                    for message in messages:
                        decoded = records.decode_message(message.headers, message.value)
                        assert message.key.decode() == decoded.agent_id
                        found.append(decoded)
        return found
    finally:
        await consumer.stop()


def in_kafka(bootstrap: str) -> list[records.Decoded]:
    return asyncio.run(_read_all(bootstrap))


def ask(fleet: Programs, node: str, question: str) -> int:
    """Ask a node's file for one number."""
    file = fleet.folder / node / "state" / "agent.db"
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10)) as db:
        return int(db.execute(question).fetchone()[0])


def outbox(fleet: Programs, node: str) -> int:
    """Batches that wait in a node's outbox."""
    return ask(fleet, node, "SELECT count(*) FROM batches")


def test_broker_killed_under_load_and_back(fleet, broker) -> None:
    fleet.start(fleet.servers["server-0"])
    start_agents(fleet)
    server = fleet.servers["server-0"]
    wait_for("records are stored", lambda: len(in_kafka(broker.bootstrap)) > 50, WAIT, 1)
    broker.kill()
    wait_for("the server says so", lambda: http(server, "/readyz")[0] == 503, WAIT, 0.2)
    assert "sink" in http(server, "/readyz")[1]
    wait_for(
        "agents keep their records",
        lambda: all(outbox(fleet, node) > 20 for node in NODES),
        WAIT,
        0.2,
    )
    assert fleet.plane.processes.running(server.name)
    broker.resume()
    wait_for("the server is ready again", lambda: http(server, "/readyz")[0] == 200, WAIT, 0.2)
    check_nothing_is_lost(fleet, broker)


def check_nothing_is_lost(fleet: Programs, broker: KafkaBroker) -> None:
    """Stop making records, let the outboxes run empty, and compare."""
    for agent in fleet.agents.values():
        agent.settings.update(
            collectors={"host": {"enabled": False}}, heartbeat={"intervalSeconds": 3600}
        )
        fleet.plane.processes.stop(agent.name, 30)
        fleet.start(agent, ready=False)
    wait_for(
        "the outboxes are empty", lambda: all(outbox(fleet, node) == 0 for node in NODES), WAIT, 0.5
    )
    seqs: dict[tuple[str, int], list[int]] = defaultdict(list)
    for batch in in_kafka(broker.bootstrap):
        seqs[batch.node, batch.epoch].append(batch.seq)
    assert {node for node, _ in seqs} == set(NODES)
    for (node, epoch), found in seqs.items():
        assert epoch == ask(fleet, node, "SELECT value FROM meta WHERE name = 'epoch'") % 2**64
        last = ask(fleet, node, "SELECT value FROM meta WHERE name = 'next_seq'") - 1
        lost = set(range(1, last + 1)) - set(found)
        assert not lost, (node, sorted(lost))
    total = sum(map(len, seqs.values()))
    unique = sum(len(set(found)) for found in seqs.values())
    print(f"batches accepted {unique}, lost 0, stored more than once {total - unique}")


def test_broker_away_when_everything_starts(fleet, broker) -> None:
    broker.kill()
    server = fleet.servers["server-0"]
    fleet.start(server, ready=False)
    start_agents(fleet)
    code, text = http(server, "/readyz")
    assert code == 503
    assert "[-]sink" in text
    wait_for(
        "agents keep their records",
        lambda: all(outbox(fleet, node) > 10 for node in NODES),
        WAIT,
        0.2,
    )
    broker.resume()
    wait_for("the server is ready", lambda: http(server, "/readyz")[0] == 200, WAIT, 0.2)
    check_nothing_is_lost(fleet, broker)
