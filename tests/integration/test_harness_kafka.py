"""The Kafka broker of the harness keeps what it acknowledged, and can be frozen and restarted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaError
from cluster.kafka import BROKER, KafkaBroker

RECORDS = 200


@asynccontextmanager
async def producing(broker: KafkaBroker) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(
        bootstrap_servers=broker.bootstrap,
        acks="all",
        enable_idempotence=True,
        request_timeout_ms=5000,
        retry_backoff_ms=50,
    )
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def consume(broker: KafkaBroker, topic: str, wanted: set[bytes]) -> list[bytes]:
    """Read a topic from its beginning until all wanted values were seen, or for 20 s."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=broker.bootstrap, auto_offset_reset="earliest"
    )
    await consumer.start()
    found: list[bytes] = []
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                while not wanted <= set(found):
                    found.append((await consumer.getone()).value or b"")
    finally:
        await consumer.stop()
    return found


async def test_round_trip(kafka: KafkaBroker, kafka_topic: str) -> None:
    sent = {b"%d" % number for number in range(RECORDS)}
    async with producing(kafka) as producer:
        await asyncio.gather(*[producer.send_and_wait(kafka_topic, value) for value in sent])
    assert sorted(await consume(kafka, kafka_topic, sent)) == sorted(sent)


async def test_what_was_acknowledged_survives_a_kill(kafka: KafkaBroker, kafka_topic: str) -> None:
    acknowledged: set[bytes] = set()

    async def send(producer: AIOKafkaProducer, first: int) -> None:
        for number in range(first, first + RECORDS):
            value = b"%d" % number
            await producer.send_and_wait(kafka_topic, value)
            acknowledged.add(value)

    async with producing(kafka) as producer:
        await send(producer, 0)
        sending = asyncio.create_task(send(producer, RECORDS))
        await asyncio.to_thread(kafka.kill)
        assert not kafka.processes.running(BROKER)
        await asyncio.to_thread(kafka.resume)
        # Under way when the broker died: either acknowledged by now, or given up with an error.
        with contextlib.suppress(KafkaError):
            await sending
    assert len(acknowledged) >= RECORDS
    assert acknowledged <= set(await consume(kafka, kafka_topic, acknowledged))


async def test_a_frozen_broker_acknowledges_nothing(kafka: KafkaBroker, kafka_topic: str) -> None:
    async with producing(kafka) as producer:
        await producer.send_and_wait(kafka_topic, b"before")
        kafka.freeze()
        try:
            late = asyncio.create_task(producer.send_and_wait(kafka_topic, b"late"))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(late), 1)
        finally:
            kafka.thaw()
        await asyncio.wait_for(late, 20)
    wanted = {b"before", b"late"}
    assert set(await consume(kafka, kafka_topic, wanted)) == wanted


def test_a_clean_stop_and_start_keep_the_port(kafka: KafkaBroker) -> None:
    before = kafka.bootstrap
    kafka.terminate()
    kafka.resume()
    assert kafka.bootstrap == before


def test_stop_leaves_no_file(kafka_jars_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kafka"
    with KafkaBroker(folder) as broker:
        assert broker.processes.running(BROKER)
    assert not folder.exists()
