"""Sees that the topics are there and takes their limits; makes them where that is allowed.

Changes no topic that exists.
"""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType
from outrider_proto import limits
from outrider_runtime.logs import get_logger

from outrider_operator.settings_kafka import KafkaSinkSettings
from outrider_operator.sinks.kafka_producer import LIBRARY_LOG, tell

#: Room for key and headers in a message, bytes: a node's name, 64 data types and a reason.
OVERHEAD_BYTES: Final = 4 * limits.KIB
#: Largest message a batch becomes, bytes: key and headers are small beside it.
MESSAGE_BYTES: Final = limits.BATCH_BYTES + 64 * limits.KIB
#: What a broker takes that was not told otherwise, bytes: where it does not let us see it.
USUAL_MESSAGE_BYTES: Final = 1_048_588
#: A topic that takes less is not fit for batches, bytes.
LEAST_MESSAGE_BYTES: Final = 2 * OVERHEAD_BYTES

T = TypeVar("T")
log = get_logger(__name__)


class TopicError(Exception):
    """A topic cannot be used; the text says why and what to do."""


@dataclass(frozen=True)
class TopicLimits:
    """What a topic takes.

    Attributes:
        message_bytes: largest message, and largest group of messages.
        in_sync: replicas that must have a message before it is acknowledged.
    """

    message_bytes: int = USUAL_MESSAGE_BYTES
    in_sync: int = 1


def topic_configs(replicas: int, retention_hours: float = 0.0) -> dict[str, str]:
    """The settings of a new topic with so many replicas; 0 hours: kept as long as brokers say."""
    found = {
        "max.message.bytes": str(MESSAGE_BYTES),
        # By default acks=all is content with one replica when the others are behind, and what was
        # acknowledged goes with that broker. With two, one of three may still be away.
        "min.insync.replicas": "2" if replicas >= 3 else "1",
        # Otherwise brokers refuse what comes from a server whose clock is an hour ahead of theirs.
        # When the server took a batch is in its headers.
        "message.timestamp.type": "LogAppendTime",
    }
    if retention_hours:
        found["retention.ms"] = str(int(retention_hours * 3_600_000))
    return found


def trouble_of(topic: str, partitions: Sequence[Any], in_sync: int) -> str:
    """What keeps partitions, as brokers describe them, from taking messages; empty: nothing."""
    for partition in partitions:
        if partition.leader is None or partition.leader.id < 0:
            return (
                f"partition {partition.id} of {topic!r} has no leader: look at the brokers that "
                "hold it, their disks may be full"
            )
        # Brokers content themselves with all replicas, where fewer were made than are asked for.
        needed = min(in_sync, len(partition.replicas))
        if len(partition.isr) < needed:
            return (
                f"partition {partition.id} of {topic!r} has {len(partition.isr)} replicas in sync "
                f"and needs {needed} (min.insync.replicas): bring its brokers back"
            )
    return ""


class Topics:
    """The topics of a sink, by an admin client of its own.

    Args:
        connection: brokers and security, in librdkafka's words.
        settings: how topics are made.
        names: the topics.
        problem: told what the library says is wrong, in words.

    Raises:
        KafkaException: a certificate or other setting cannot be used.
    """

    def __init__(
        self,
        connection: dict[str, Any],
        settings: KafkaSinkSettings,
        names: Sequence[str],
        problem: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._names = list(names)
        self._timeout = settings.request_timeout_seconds
        config: dict[str, Any] = {
            **connection,
            "socket.timeout.ms": int(self._timeout * 1000),
            "error_cb": lambda error: tell(error, problem),
        }
        self._admin: AdminClient | None = AdminClient(config, logger=LIBRARY_LOG)

    def poll(self) -> None:
        """Fetch errors and lines for the log."""
        if self._admin is not None:
            self._admin.poll(0)

    async def ensure(self) -> dict[str, TopicLimits]:
        """See that all topics are there, making them where that is allowed; returns their limits.

        Raises:
            TopicError: one is not there, or cannot be used.
            KafkaException, TimeoutError: the brokers cannot be asked.
        """
        found = await self._describe()
        missing = [name for name, topic in found.items() if topic is None]
        if missing:
            await self._create(missing)
        return await self.limits()

    async def limits(self) -> dict[str, TopicLimits]:
        """What the topics take now.

        Raises:
            TopicError: a topic takes too little.
            KafkaException, TimeoutError: the brokers cannot be asked.
        """
        resources = [ConfigResource(ResourceType.TOPIC, name) for name in self._names]
        answers = self._client.describe_configs(resources, request_timeout=self._timeout)
        found: dict[str, TopicLimits] = {}
        for resource, answer in answers.items():
            name = resource.name
            try:
                entries = await self._answer(answer)
            except KafkaException as error:
                if _code(error) not in _DENIED:
                    raise
                log.info("topic's message size not known", topic=name, error=str(error))
                found[name] = TopicLimits()
                continue
            size = int(entries["max.message.bytes"].value)
            if size < LEAST_MESSAGE_BYTES:
                raise TopicError(
                    f"the topic {name!r} takes messages of {size} bytes only: raise its "
                    f"max.message.bytes, at best to {MESSAGE_BYTES}"
                )
            found[name] = TopicLimits(size, int(entries["min.insync.replicas"].value))
        return found

    async def trouble(self, known: dict[str, TopicLimits]) -> str:
        """Why topics take nothing though brokers answer; empty where that does not show.

        Raises:
            KafkaException, TimeoutError: the brokers cannot be asked.
        """
        for name, topic in (await self._describe()).items():
            if topic is None:
                return f"the topic {name!r} is gone: it is made again where createTopic allows it"
            found = trouble_of(name, topic.partitions, known.get(name, TopicLimits()).in_sync)
            if found:
                return found
        return ""

    async def answers(self) -> bool:
        """Whether a broker answers at all."""
        try:
            request = self._client.describe_cluster(request_timeout=self._timeout)
            await self._answer(request)
        except (KafkaException, TimeoutError):
            return False
        return True

    async def close(self) -> None:
        """Close the connections."""
        last = [self._admin]
        self._admin = None
        # Its threads are waited for when the last one lets go of it.
        await asyncio.to_thread(last.clear)

    @property
    def _client(self) -> AdminClient:
        assert self._admin is not None
        return self._admin

    async def _describe(self) -> dict[str, Any]:
        request = self._client.describe_topics(
            TopicCollection(self._names), request_timeout=self._timeout
        )
        found: dict[str, Any] = {}
        for name, answer in request.items():
            try:
                found[name] = await self._answer(answer)
            except KafkaException as error:
                if _code(error) in _DENIED:
                    raise TopicError(_denied(name)) from None
                if _code(error) != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise
                found[name] = None
        return found

    async def _create(self, names: Sequence[str]) -> None:
        settings = self._settings
        if not settings.create_topic:
            raise TopicError(
                f"the topic {names[0]!r} is not there: make it, or set sink.kafka.createTopic"
            )
        cluster = self._client.describe_cluster(request_timeout=self._timeout)
        brokers = len((await self._answer(cluster)).nodes)
        replicas = min(settings.replication_factor, max(1, brokers))
        if replicas < settings.replication_factor:
            log.warning(
                "topics made with fewer replicas, there are too few brokers", replicas=replicas
            )
        config = topic_configs(replicas, settings.retention_hours)
        request = self._client.create_topics(
            [NewTopic(name, settings.partitions, replicas, config=config) for name in names],
            request_timeout=self._timeout,
        )
        for name, answer in request.items():
            try:
                await self._answer(answer)
            except KafkaException as error:
                if _code(error) == KafkaError.TOPIC_ALREADY_EXISTS:
                    continue
                if _code(error) < 0:  # not the broker's own word
                    raise
                raise TopicError(
                    f"the topic {name!r} cannot be made: {error.args[0].str()}: make it by hand, "
                    "or let this user make it"
                ) from None
            log.info("topic made", topic=name, partitions=settings.partitions)
        await self._until_there()

    async def _until_there(self) -> None:
        """Brokers know a new topic a moment after they made it."""
        async with asyncio.timeout(self._timeout):
            while None in (await self._describe()).values():  # noqa: ASYNC110 - brokers tell nobody
                await asyncio.sleep(0.05)

    async def _answer(self, request: "concurrent.futures.Future[T]") -> T:
        """The result of a request; who waits may be cancelled without the library noticing."""
        loop = asyncio.get_running_loop()
        mine: asyncio.Future[T] = loop.create_future()

        def take(done: "concurrent.futures.Future[T]") -> None:
            if mine.done():
                return
            error = done.exception()
            mine.set_exception(error) if error is not None else mine.set_result(done.result())

        def called(done: "concurrent.futures.Future[T]") -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(take, done)

        request.add_done_callback(called)
        async with asyncio.timeout(2 * self._timeout):
            return await mine


_DENIED: Final = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)


def _code(error: KafkaException) -> int:
    found = error.args[0] if error.args else None
    return int(found.code()) if isinstance(found, KafkaError) else -1


def _denied(topic: str) -> str:
    return (
        f"the brokers do not let this user see the topic {topic!r}: allow it to Describe, Write "
        "and, where it is to be made, Create"
    )
