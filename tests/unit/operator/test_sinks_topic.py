"""The settings of a topic that the Kafka sink makes."""

import pytest
from outrider_operator.sinks.kafka_topic import MESSAGE_BYTES, topic_configs


@pytest.mark.parametrize(("replicas", "in_sync"), [(1, "1"), (2, "1"), (3, "2"), (5, "2")])
def test_of_three_replicas_one_may_be_away_and_one_does_not_do(replicas: int, in_sync: str) -> None:
    """With one or two replicas, two in sync would mean that nothing is stored with one away."""
    found = topic_configs(replicas)
    assert found == {"max.message.bytes": str(MESSAGE_BYTES), "min.insync.replicas": in_sync}
