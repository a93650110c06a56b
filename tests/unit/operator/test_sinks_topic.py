"""Topics of the Kafka sink: the settings of one that is made, what keeps one from taking more."""

from types import SimpleNamespace

import pytest
from outrider_operator.sinks.kafka_topic import MESSAGE_BYTES, topic_configs, trouble_of


@pytest.mark.parametrize(("replicas", "in_sync"), [(1, "1"), (2, "1"), (3, "2"), (5, "2")])
def test_of_three_replicas_one_may_be_away_and_one_does_not_do(replicas: int, in_sync: str) -> None:
    """With one or two replicas, two in sync would mean that nothing is stored with one away."""
    found = topic_configs(replicas)
    assert found == {
        "max.message.bytes": str(MESSAGE_BYTES),
        "min.insync.replicas": in_sync,
        "message.timestamp.type": "LogAppendTime",
    }


def test_topics_keep_records_as_long_as_was_said() -> None:
    assert topic_configs(3, 1.5)["retention.ms"] == "5400000"
    assert "retention.ms" not in topic_configs(3)


@pytest.mark.parametrize(
    ("leader", "in_sync", "replicas", "needed", "words"),
    [
        (1, 3, 3, 2, ""),
        (1, 2, 3, 2, ""),
        (1, 1, 3, 2, "partition 7 of 't' has 1 replicas in sync and needs 2"),
        (1, 1, 1, 2, ""),
        (-1, 0, 3, 2, "partition 7 of 't' has no leader"),
        (None, 0, 3, 2, "partition 7 of 't' has no leader"),
    ],
)
def test_what_keeps_a_partition_from_taking_more(leader, in_sync, replicas, needed, words) -> None:
    well = SimpleNamespace(id=6, leader=SimpleNamespace(id=1), isr=[1] * 3, replicas=[1] * 3)
    partition = SimpleNamespace(
        id=7,
        leader=None if leader is None else SimpleNamespace(id=leader),
        isr=[1] * in_sync,
        replicas=[1] * replicas,
    )
    found = trouble_of("t", [well, partition], needed)
    assert found.startswith(words)
    assert bool(found) == bool(words)
