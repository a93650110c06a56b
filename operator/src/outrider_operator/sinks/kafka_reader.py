"""Reads the output of a run back from the topic of the Kafka sink.

Joins no group and commits nothing: servers and other readers notice nothing of it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from outrider_proto import limits
from outrider_proto.output import Piece, Wanted, may_hold_output, pieces_of
from outrider_proto.records import HEADER_NODE, HEADER_TYPES, decode_message

from outrider_operator.core.sink import SinkUnavailableError
from outrider_operator.settings_kafka import KafkaSinkSettings
from outrider_operator.sinks.kafka_security import SecurityError, for_aiokafka

#: A broker that sends nothing for so long is given up, seconds.
SILENCE_SECONDS: Final = 20.0
#: Asked of the brokers at a time, bytes: this runs beside a server, in the memory of its Pod.
FETCH_BYTES: Final = 8 * limits.MIB
#: Time between two looks at the partitions, seconds.
POLL_SECONDS: Final = 0.05
#: Damaged messages that are named.
MAX_PROBLEMS: Final = 10


async def pieces(
    settings: KafkaSinkSettings, wanted: Wanted, problems: list[str]
) -> AsyncIterator[Piece]:
    """The pieces of an output in the topic, as far as it is written now; repeats and all.

    Args:
        settings: Brokers and topic.
        wanted: Which output.
        problems: What could not be read is added here, MAX_PROBLEMS at most; the rest is read on.

    Raises:
        SinkUnavailableError: No broker answers, or they stopped to.
    """
    try:
        connection = for_aiokafka(settings)
    except SecurityError as error:
        raise SinkUnavailableError(str(error)) from None
    consumer = AIOKafkaConsumer(
        **{**connection, "client_id": f"{settings.client_id}-output"},
        enable_auto_commit=False,
        fetch_max_bytes=FETCH_BYTES,
        request_timeout_ms=int(settings.request_timeout_seconds * 1000),
    )
    try:
        async with asyncio.timeout(2 * settings.request_timeout_seconds):
            await consumer.start()
            ends = await _seek(consumer, settings.topic, wanted)
        async for message in _messages(consumer, ends):
            for piece in _open(message, wanted, problems):
                yield piece
    except (KafkaError, TimeoutError) as error:
        servers = ",".join(settings.bootstrap_servers)
        raise SinkUnavailableError(
            f"no Kafka broker answers at {servers}: {str(error) or 'timeout'}"
        ) from error
    finally:
        with contextlib.suppress(KafkaError):
            await consumer.stop()


async def _seek(
    consumer: AIOKafkaConsumer, topic: str, wanted: Wanted
) -> dict[TopicPartition, int]:
    """Go to where the wanted records may begin; returns where each partition ends now.

    All partitions: which one a node's records are in changes with their number.
    """
    if topic not in await consumer.topics():
        return {}
    # Named only now: who asks for a topic that is not there may make it. The caller's time limit
    # ends the wait for its partitions.
    consumer.subscribe([topic])
    while not (partitions := sorted(consumer.assignment())):  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(POLL_SECONDS)
    ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
    starts = await consumer.offsets_for_times(
        dict.fromkeys(partitions, int(wanted.not_before * 1000))
    )
    left = {}
    for partition, end in ends.items():
        start = starts.get(partition)
        # None: nothing was stored there since.
        if start is not None and start.offset < end:
            consumer.seek(partition, start.offset)
            left[partition] = end
    consumer.pause(*(set(partitions) - left.keys()))
    return left


async def _messages(
    consumer: AIOKafkaConsumer, ends: dict[TopicPartition, int]
) -> AsyncIterator[Any]:
    """The messages up to the ends, partition by partition as they come."""
    while left := [p for p, end in ends.items() if await consumer.position(p) < end]:
        async with asyncio.timeout(SILENCE_SECONDS):
            while not (fetched := await consumer.getmany(*left, timeout_ms=500)):
                # Past what retention deleted meanwhile, or a marker, there is nothing to come.
                left = [p for p in left if await consumer.position(p) < ends[p]]
                if not left:
                    return
        for messages in fetched.values():
            for message in messages:
                yield message


def _open(message: Any, wanted: Wanted, problems: list[str]) -> Iterator[Piece]:
    headers = dict(message.headers)
    if headers.get(HEADER_NODE) != wanted.node.encode():
        return
    try:
        # Most batches need not be opened.
        if not may_hold_output(map(int, headers.get(HEADER_TYPES, b"0").split(b","))):
            return
        yield from pieces_of(decode_message(message.headers, message.value), wanted)
    except ValueError as error:  # BatchError is one
        if len(problems) < MAX_PROBLEMS:
            problems.append(f"{message.topic}/{message.partition}/{message.offset}: {error}")
