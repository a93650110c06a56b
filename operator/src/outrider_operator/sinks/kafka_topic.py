"""Sees that the topic is there and takes batches of the contract's size; makes it where allowed.

Changes no topic that exists.
"""

from collections.abc import Sequence
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, NoError, TopicAlreadyExistsError, for_code
from outrider_proto import limits
from outrider_runtime.logs import get_logger

from outrider_operator.settings import KafkaSinkSettings

#: Largest message a batch becomes, bytes: key and headers are small beside it.
MESSAGE_BYTES: Final = limits.BATCH_BYTES + 64 * limits.KIB

log = get_logger(__name__)


class TopicError(Exception):
    """The topic cannot be used; the text says why and what to do."""


def topic_configs(replicas: int) -> dict[str, str]:
    """The settings of a new topic with so many replicas."""
    return {
        "max.message.bytes": str(MESSAGE_BYTES),
        # By default acks=all is content with one replica when the others are behind, and what was
        # acknowledged goes with that broker. With two, one of three may still be away.
        "min.insync.replicas": "2" if replicas >= 3 else "1",
    }


async def ensure_topic(settings: KafkaSinkSettings) -> None:
    """See that the topic is there, making it where that is allowed.

    Raises:
        TopicError: it is not there, and cannot or must not be made.
        KafkaError: the brokers cannot be asked.
    """
    admin = AIOKafkaAdminClient(
        bootstrap_servers=list(settings.bootstrap_servers),
        client_id=settings.client_id,
        request_timeout_ms=int(settings.request_timeout_seconds * 1000),
    )
    try:
        await admin.start()
        if settings.topic not in await admin.list_topics():
            await _create(admin, settings)
        await _check_size(admin, settings.topic)
    finally:
        await admin.close()


async def _create(admin: AIOKafkaAdminClient, settings: KafkaSinkSettings) -> None:
    if not settings.create_topic:
        raise TopicError(
            f"the topic {settings.topic!r} is not there: make it, or set sink.kafka.createTopic"
        )
    brokers: Sequence[Any] = (await admin.describe_cluster())["brokers"]
    replicas = min(settings.replication_factor, max(1, len(brokers)))
    if replicas < settings.replication_factor:
        log.warning("topic made with fewer replicas, there are too few brokers", replicas=replicas)
    topic = NewTopic(
        settings.topic,
        settings.partitions,
        replicas,
        topic_configs=topic_configs(replicas),
    )
    answer = await admin.create_topics([topic])
    for item in answer.to_object()["topic_errors"]:
        error = for_code(item["error_code"])
        if error not in (NoError, TopicAlreadyExistsError):
            text = item.get("error_message") or error.__name__
            raise TopicError(f"the topic {settings.topic!r} cannot be made: {text}")
        log.info("topic made", topic=settings.topic, partitions=settings.partitions)


async def _check_size(admin: AIOKafkaAdminClient, topic: str) -> None:
    """Warn where the largest batches would be rejected; they stay with their agents then."""
    try:
        resource = ConfigResource(
            ConfigResourceType.TOPIC, topic, configs={"max.message.bytes": None}
        )
        answers = await admin.describe_configs([resource])
    except KafkaError as error:  # a broker may not let us see it
        log.info("topic's message size not known", topic=topic, error=str(error))
        return
    for found in answers[0].to_object()["resources"]:
        for entry in found["config_entries"]:
            limit = int(entry["config_value"] or 0)
            if 0 < limit < MESSAGE_BYTES:
                log.warning(
                    "topic takes smaller messages than batches can be: raise max.message.bytes",
                    topic=topic,
                    limit=limit,
                    needed=MESSAGE_BYTES,
                )
