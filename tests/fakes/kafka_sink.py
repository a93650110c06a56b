"""A Kafka sink that runs, and what its topic holds."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer
from fakes.gateway import eventually
from fakes.sink_suite import SinkCase
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import KafkaSinkSettings
from outrider_operator.sinks.kafka import KafkaSink
from outrider_proto.records import Decoded, decode_message
from outrider_runtime.health import Health
from prometheus_client import CollectorRegistry


async def raw_messages(bootstrap: str, topic: str) -> list[Any]:
    """All messages of a topic, as they are now, unopened."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.subscribe([topic])
        await eventually(lambda: bool(consumer.assignment()))
        ends = await consumer.end_offsets(list(consumer.assignment()))
        found: list[Any] = []
        for partition, end in ends.items():
            while await consumer.position(partition) < end:
                found.append(await consumer.getone(partition))
        return found
    finally:
        await consumer.stop()


async def read_topic(bootstrap: str, topic: str) -> list[Decoded]:
    """All messages of a topic, as they are now, opened."""
    messages = await raw_messages(bootstrap, topic)
    assert all(message.key == dict(message.headers)["outrider-agent"] for message in messages)
    return [decode_message(message.headers, message.value or b"") for message in messages]


@asynccontextmanager
async def running_sink(bootstrap: str, topic: str, **settings: Any) -> AsyncIterator[SinkCase]:
    """A sink of its own; keywords are fields of KafkaSinkSettings."""
    health, stop = Health(), asyncio.Event()
    fields: dict[str, Any] = {"request_timeout_seconds": 5.0, "partitions": 3} | settings
    sink = KafkaSink(
        KafkaSinkSettings(bootstrap_servers=[bootstrap], topic=topic, **fields),
        ServerMetrics(CollectorRegistry()),
        health,
    )

    async def read() -> list[Decoded]:
        return await read_topic(bootstrap, topic)

    async def read_aside() -> list[Decoded]:
        return await read_topic(bootstrap, f"{topic}.dead-letter")

    task = asyncio.create_task(sink.run(stop))
    try:
        yield SinkCase(sink, health, read, stop, task, read_aside)
    finally:
        stop.set()
        async with asyncio.timeout(60):
            await task
