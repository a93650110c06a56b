"""The Kafka sink against a real broker: stored means stored, also through a kill -9 under load."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from cluster.kafka import KafkaBroker
from cluster.supervised import free_port
from confluent_kafka import KafkaError
from confluent_kafka.admin import AdminClient, NewTopic
from fakes.gateway import eventually
from fakes.kafka_sink import running_sink
from fakes.sink_suite import SinkCase, SinkSuite, batch, names, origin
from outrider_operator.core.sink import SinkRejectedError, SinkUnavailableError
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import KafkaSinkSettings
from outrider_operator.sinks import kafka as kafka_module
from outrider_operator.sinks import kafka_producer
from outrider_operator.sinks.kafka import KafkaSink
from outrider_runtime.health import Health
from outrider_runtime.settings import SettingsError
from prometheus_client import CollectorRegistry


@pytest.fixture
async def sink_case(kafka: KafkaBroker, kafka_topic: str) -> AsyncIterator[SinkCase]:
    async with running_sink(kafka.bootstrap, kafka_topic) as case:
        await eventually(lambda: case.health.ready)
        yield case


async def make_topic(kafka: KafkaBroker, name: str, max_message_bytes: int) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    config = {"max.message.bytes": str(max_message_bytes)}
    made = admin.create_topics([NewTopic(name, 1, 1, config=config)])
    await asyncio.to_thread(made[name].result, 30)


def reason(case: SinkCase) -> str:
    (condition,) = case.health.readiness()
    return condition.reason


class TestKafkaSink(SinkSuite):
    pass


async def test_batches_of_one_agent_stay_in_order(sink_case: SinkCase) -> None:
    await asyncio.gather(*(sink_case.sink.store(origin("a"), batch(n)) for n in range(1, 101)))
    assert [item.seq for item in await sink_case.read()] == list(range(1, 101))


async def test_killed_under_load_loses_nothing_that_was_acknowledged(
    kafka: KafkaBroker, kafka_topic: str
) -> None:
    acknowledged: set[tuple[str, int, int]] = set()
    unready = 0

    async def agent(case: SinkCase, name: str, goes_on: asyncio.Event) -> None:
        seq = 0
        while not goes_on.is_set():
            seq += 1
            sent = False
            while not sent:
                try:
                    await case.sink.store(origin(name), batch(seq, b"y" * 500))
                    sent = True
                except SinkUnavailableError:
                    await asyncio.sleep(0.05)
            acknowledged.add((name, 3, seq))

    async with running_sink(kafka.bootstrap, kafka_topic) as case:
        await eventually(lambda: case.health.ready)
        done = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(agent(case, f"agent-{number}", done))
            for _ in range(2):
                before = len(acknowledged)
                await eventually(lambda b=before: len(acknowledged) > b + 500)  # type: ignore[misc]
                await asyncio.to_thread(kafka.kill)
                # What the broker answered before is in the socket still; that it is gone is read
                # behind all of that.
                await eventually(lambda: not case.health.ready)
                held = len(acknowledged)
                await asyncio.sleep(0.5)
                assert len(acknowledged) == held  # nobody is there to store anything
                unready += 1
                await asyncio.to_thread(kafka.resume)
                await eventually(lambda: case.health.ready, 60)
                await eventually(lambda h=held: len(acknowledged) > h, 60)  # type: ignore[misc]
            done.set()
        found = names(await case.read())
    assert unready == 2
    assert len(acknowledged) > 1000
    assert acknowledged <= found


async def test_frozen_broker_acknowledges_nothing_and_holds_a_bound(
    kafka: KafkaBroker, kafka_topic: str
) -> None:
    limit = 4 * 1024 * 1024
    async with running_sink(kafka.bootstrap, kafka_topic, max_inflight_bytes=limit) as case:
        await eventually(lambda: case.health.ready)
        kafka.freeze()
        try:
            storing = [case.sink.store(origin(), _fat(seq)) for seq in range(1, 21)]
            await eventually(lambda: not case.health.ready, 30)
            assert "no Kafka broker answers" in reason(case)
            refused = [task for task in storing if task.done()]
            assert len(refused) >= 15
            assert all(isinstance(task.exception(), SinkUnavailableError) for task in refused)
        finally:
            kafka.thaw()
        await eventually(lambda: case.health.ready, 60)
        results = await asyncio.gather(*storing, return_exceptions=True)
        stored = {("uid-1", 3, seq) for seq, result in enumerate(results, 1) if result is None}
        assert stored
        assert stored <= names(await case.read())


def _fat(seq: int) -> Any:
    return batch(seq, os.urandom(900_000), records=1)


async def test_broker_away_at_start(kafka: KafkaBroker, kafka_topic: str) -> None:
    await asyncio.to_thread(kafka.kill)
    try:
        async with running_sink(kafka.bootstrap, kafka_topic, retry_cap_seconds=0.5) as case:
            await eventually(lambda: "no Kafka broker answers" in reason(case))
            storing = case.sink.store(origin(), batch(1))
            await asyncio.sleep(0)
            assert not storing.done()
            await asyncio.to_thread(kafka.resume)
            await asyncio.wait_for(storing, 60)
            assert case.health.ready
            assert names(await case.read()) == {("uid-1", 3, 1)}
    finally:
        with suppress(Exception):
            await asyncio.to_thread(kafka.resume)


async def test_stops_in_time_while_the_broker_is_away(kafka_topic: str) -> None:
    async with running_sink(f"127.0.0.1:{free_port('127.0.0.1')}", kafka_topic) as case:
        await eventually(lambda: "no Kafka broker answers" in reason(case))
        storing = case.sink.store(origin(), batch(1))
        await asyncio.sleep(0)
        began = time.monotonic()
        case.stop.set()
        await asyncio.wait_for(case.task, 20)
        assert time.monotonic() - began < 5
        with pytest.raises(SinkUnavailableError):
            await storing


async def test_stops_in_time_while_the_broker_is_frozen(
    kafka: KafkaBroker, kafka_topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_module, "FLUSH_SECONDS", 0.5)
    monkeypatch.setattr(kafka_producer, "CLOSE_SECONDS", 0.5)
    timeout = 30.0  # of a broker: the end must not wait for that
    async with running_sink(kafka.bootstrap, kafka_topic, request_timeout_seconds=timeout) as case:
        await eventually(lambda: case.health.ready)
        kafka.freeze()
        try:
            storing = case.sink.store(origin(), batch(1))
            await eventually(lambda: bool(case.sink._pending))  # type: ignore[attr-defined]
            case.stop.set()
            await asyncio.wait_for(case.task, 10)
            with pytest.raises(SinkUnavailableError):
                await storing
        finally:
            kafka.thaw()


async def test_fatal_producer_is_made_anew(sink_case: SinkCase) -> None:
    sink: Any = sink_case.sink
    await sink.store(origin(), batch(1))
    broken = sink._producer
    # What librdkafka says when it cannot go on, such as a sequence number out of order.
    broken._on_error(
        KafkaError(KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, "out of order", fatal=True)
    )
    await eventually(lambda: sink._producer not in (None, broken))
    await sink.store(origin(), batch(2))
    assert names(await sink_case.read()) == {("uid-1", 3, 1), ("uid-1", 3, 2)}
    assert sink._metrics.sink_restarts.labels("Other")._value.get() == 1


async def test_what_a_given_up_producer_held_comes_back_at_once(
    kafka: KafkaBroker, sink_case: SinkCase
) -> None:
    sink: Any = sink_case.sink
    kafka.freeze()
    try:
        storing = sink.store(origin(), batch(1))
        assert len(sink._producer) == 1
        sink._producer.give_up("Stalled")
        with pytest.raises(SinkUnavailableError):
            await asyncio.wait_for(storing, 4)
    finally:
        kafka.thaw()
    await sink.store(origin(), batch(1))
    assert names(await sink_case.read()) == {("uid-1", 3, 1)}
    assert sink._metrics.sink_errors.labels("MadeAnew")._value.get() == 1


async def test_topic_that_must_not_be_made(kafka: KafkaBroker, kafka_topic: str) -> None:
    async with running_sink(kafka.bootstrap, kafka_topic, create_topic=False) as case:
        await eventually(lambda: "createTopic" in reason(case))


async def test_batch_larger_than_the_topic_takes(kafka: KafkaBroker, kafka_topic: str) -> None:
    await make_topic(kafka, kafka_topic, 10_000)
    async with running_sink(kafka.bootstrap, kafka_topic) as case:
        await eventually(lambda: case.health.ready)
        with pytest.raises(SinkRejectedError, match="max.message.bytes"):
            await case.sink.store(origin(), _fat(1))
        await case.sink.store(origin(), batch(2))
        assert names(await case.read()) == {("uid-1", 3, 2)}


def test_address_that_is_none_names_the_setting() -> None:
    with pytest.raises(SettingsError, match=r"sink\.kafka\.bootstrapServers"):
        KafkaSink(
            KafkaSinkSettings(bootstrap_servers=["kafka"]),
            ServerMetrics(CollectorRegistry()),
            Health(),
        )
