"""What the agents' records in Kafka are, read by a consumer that knows only the published form."""

from __future__ import annotations

import asyncio

import pytest
from cluster import addons, api
from cluster.records import Message, read_topic
from cluster.tasks import eventually
from outrider_proto import records

NODES = {"node1", "node2", "node3"}
pytestmark = pytest.mark.usefixtures("release")


def _messages() -> list[Message]:
    return asyncio.run(read_topic(addons.KAFKA_HERE))


def _with_type(messages: list[Message], kind: int) -> list[Message]:
    return [m for m in messages if any(r.data_type == kind for r in m.decoded.records)]


def test_heartbeats_of_all_agents_arrive() -> None:
    def beating() -> list[Message]:
        found = _with_type(_messages(), records.AGENT_HEARTBEAT)
        return found if {m.decoded.node for m in found} == NODES else []

    found = eventually("heart-beats of all three agents in Kafka", beating, 120, 1.0)
    for message in found:
        for record in message.decoded.records:
            if record.data_type == records.AGENT_HEARTBEAT:
                fields = records.fields_of(record)
                assert int(fields["pid"]) > 0
                assert fields["platform"]
                assert float(fields["total_mem"]) > 0


def test_messages_are_keyed_and_labelled() -> None:
    found = eventually("records", _messages, 120, 1.0)
    nodes = api.kubectl_json("get", "nodes")["items"]
    uids = {node["metadata"]["name"]: node["metadata"]["uid"] for node in nodes}
    for message in found:
        headers = {name: value.decode() for name, value in message.headers.items()}
        node = headers[records.HEADER_NODE]
        assert message.key.decode() == headers[records.HEADER_AGENT] == uids[node]
        assert headers[records.HEADER_CODEC] == "zstd"
        assert headers[records.HEADER_CONTENT_TYPE] == records.CONTENT_TYPE
        assert int(headers[records.HEADER_COUNT]) == len(message.decoded.records)
        types = {record.data_type for record in message.decoded.records}
        assert types == set(map(int, headers[records.HEADER_TYPES].split(",")))


def test_batches_of_an_agent_have_no_gaps() -> None:
    eventually("records", _messages, 120, 1.0)
    numbers: dict[tuple[str, int], set[int]] = {}
    for message in _messages():
        batch = message.decoded
        numbers.setdefault((batch.agent_id, batch.epoch), set()).add(batch.seq)
    for seen in numbers.values():
        assert seen == set(range(1, max(seen) + 1))
