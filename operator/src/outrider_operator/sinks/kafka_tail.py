"""Reads records from the topics of the Kafka sink, up to their ends or on and on.

Joins no group and commits nothing: servers and other readers notice nothing of it. Damaged
messages are named and left out.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from outrider_proto import limits
from outrider_proto.batches import BatchError
from outrider_proto.lines import Line, Wanted, lines_of
from outrider_proto.records import HEADER_NODE, HEADER_TYPES, decode_message

from outrider_operator.core.sink import SinkUnavailableError
from outrider_operator.settings import KafkaSinkSettings
from outrider_operator.sinks.kafka_security import SecurityError, for_aiokafka

#: Asked of the brokers at a time, bytes: this runs beside a server, in the memory of its Pod.
FETCH_BYTES: Final = 8 * limits.MIB
#: Time between two looks at what a consumer has no event for, seconds.
POLL_SECONDS: Final = 0.05
#: How long to wait for messages before the caller has a turn, seconds.
TURN_SECONDS: Final = 0.5
#: Without messages the brokers are asked so often whether they are there, seconds.
ASK_SECONDS: Final = 10.0
#: Producers' and brokers' clocks may differ from the servers' by so much, seconds.
CLOCK_SLACK_SECONDS: Final = 60.0


def topics_of(settings: KafkaSinkSettings) -> list[str]:
    """All topics that hold records; what was set aside is not among them."""
    return sorted({settings.topic, *(route.topic for route in settings.routes)})


async def lines(
    settings: KafkaSinkSettings, wanted: Wanted, problems: list[str], *, follow: bool
) -> AsyncIterator[Line | None]:
    """The wanted records, repeats and all; None whenever nothing came for a while.

    Args:
        settings: Brokers and topics.
        wanted: Which records.
        problems: What could not be read is added here; the caller empties it.
        follow: Go on at the end. Brokers that stop to answer are then waited for.

    Raises:
        SinkUnavailableError: No broker answers, or they stopped to.
    """
    servers = ",".join(settings.bootstrap_servers)
    try:
        consumer = AIOKafkaConsumer(
            **{**for_aiokafka(settings), "client_id": f"{settings.client_id}-records"},
            enable_auto_commit=False,
            # Of partitions that are made later nothing is to be missed.
            auto_offset_reset="earliest",
            fetch_max_bytes=FETCH_BYTES,
            request_timeout_ms=int(settings.request_timeout_seconds * 1000),
        )
    except SecurityError as error:
        raise SinkUnavailableError(str(error)) from error
    try:
        async with asyncio.timeout(2 * settings.request_timeout_seconds):
            await consumer.start()
        while not (there := set(topics_of(settings)) & await consumer.topics()):
            if not follow:
                return
            _note(problems, f"waiting: there is no topic {' or '.join(topics_of(settings))} yet")
            yield None
            await asyncio.sleep(TURN_SECONDS)
        async with asyncio.timeout(2 * settings.request_timeout_seconds):
            ends = await _seek(consumer, there, wanted)
        source = _live(consumer, servers, problems) if follow else _up_to(consumer, ends)
        async for message in source:
            if message is None:
                yield None
                continue
            for line in _open(message, wanted, problems):
                yield line
    except (KafkaError, TimeoutError) as error:
        raise SinkUnavailableError(
            f"no Kafka broker answers at {servers}: {str(error) or 'timeout'}"
        ) from error
    finally:
        with contextlib.suppress(KafkaError):
            await consumer.stop()


async def _seek(
    consumer: AIOKafkaConsumer, topics: set[str], wanted: Wanted
) -> dict[TopicPartition, int]:
    """Go to where wanted records may begin; returns where each partition with some ends now."""
    consumer.subscribe(sorted(topics))
    while not (partitions := sorted(consumer.assignment())):  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(POLL_SECONDS)
    ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
    since = int(max(0.0, wanted.since - CLOCK_SLACK_SECONDS) * 1000)
    starts = await consumer.offsets_for_times(dict.fromkeys(partitions, since))
    left = {}
    for partition, end in ends.items():
        start = starts.get(partition)
        # None: nothing was stored there since.
        consumer.seek(partition, end if start is None else start.offset)
        if start is not None and start.offset < end:
            left[partition] = end
    return left


async def _up_to(
    consumer: AIOKafkaConsumer, ends: dict[TopicPartition, int]
) -> AsyncIterator[Any | None]:
    """The messages before these ends."""
    silent_since = time.monotonic()
    while left := [p for p, end in ends.items() if await consumer.position(p) < end]:
        # Past what retention deleted meanwhile, or a marker, nothing comes: the position tells.
        fetched = await consumer.getmany(*left, timeout_ms=int(TURN_SECONDS * 1000))
        if not fetched:
            if time.monotonic() - silent_since > 2 * ASK_SECONDS:
                raise TimeoutError(f"nothing came for {2 * ASK_SECONDS:g} s")
            yield None
            continue
        silent_since = time.monotonic()
        for partition, messages in fetched.items():
            for message in messages:
                if message.offset < ends[partition]:
                    yield message
        yield None


async def _live(
    consumer: AIOKafkaConsumer, servers: str, problems: list[str]
) -> AsyncIterator[Any | None]:
    """Messages as they come, for ever; says when brokers do not answer, and waits for them."""
    asked = time.monotonic()
    while True:
        fetched = await consumer.getmany(timeout_ms=int(TURN_SECONDS * 1000))
        for messages in fetched.values():
            for message in messages:
                yield message
        yield None
        if fetched:
            asked = time.monotonic()
        if time.monotonic() - asked >= ASK_SECONDS:
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    await consumer.end_offsets(list(consumer.assignment()))
            except (KafkaError, TimeoutError):
                _note(problems, f"waiting: no Kafka broker answers at {servers}")
            asked = time.monotonic()


def _note(problems: list[str], text: str) -> None:
    if text not in problems:
        problems.append(text)


def _open(message: Any, wanted: Wanted, problems: list[str]) -> Iterator[Line]:
    headers = dict(message.headers)
    try:
        # Most batches need not be opened.
        types = map(int, filter(None, headers.get(HEADER_TYPES, b"").split(b",")))
        node = headers.get(HEADER_NODE, b"").decode("utf-8", "replace")
        if wanted.nodes and node not in wanted.nodes:
            return
        if wanted.data_types and not wanted.may_be_in(node, types, 2**63):
            return
        yield from lines_of(decode_message(message.headers, message.value or b""), wanted)
    except (BatchError, ValueError) as error:
        problems.append(f"{message.topic}/{message.partition}/{message.offset}: {error}")
