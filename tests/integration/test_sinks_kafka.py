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
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    ResourceType,
)
from fakes.gateway import eventually
from fakes.kafka_sink import raw_messages, read_topic, running_sink
from fakes.sink_suite import SinkCase, SinkSuite, batch, names, origin
from outrider_operator.core.sink import SinkRejectedError, SinkUnavailableError
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings_kafka import KafkaRoute, KafkaSinkSettings
from outrider_operator.sinks import kafka as kafka_module
from outrider_operator.sinks import kafka_connection, kafka_producer
from outrider_operator.sinks.kafka import KafkaSink
from outrider_operator.sinks.kafka_topic import MESSAGE_BYTES
from outrider_proto import batches
from outrider_proto.v1.agent_pb2 import (
    CODEC_NONE,
    CODEC_ZSTD,
    EncodedRecord,
    RecordBatch,
    RecordList,
)
from outrider_proto.v1.sink_pb2 import MQData
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


async def set_config(kafka: KafkaBroker, topic: str, name: str, value: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    (done,) = admin.incremental_alter_configs([resource]).values()
    await asyncio.to_thread(done.result, 30)


async def set_limit(kafka: KafkaBroker, topic: str, max_message_bytes: int) -> None:
    await set_config(kafka, topic, "max.message.bytes", str(max_message_bytes))


async def config_of(kafka: KafkaBroker, topic: str) -> dict[str, str]:
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    (done,) = admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic)]).values()
    entries = await asyncio.to_thread(done.result, 30)
    return {name: entry.value for name, entry in entries.items()}


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
            storing = [
                asyncio.ensure_future(case.sink.store(origin(), _fat(seq))) for seq in range(1, 21)
            ]
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
            storing = asyncio.ensure_future(case.sink.store(origin(), batch(1)))
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
        storing = asyncio.ensure_future(case.sink.store(origin(), batch(1)))
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
            storing = asyncio.ensure_future(case.sink.store(origin(), batch(1)))
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


# ------------------------------------------------------------------ limits, dead letters


async def test_the_largest_batch_is_what_the_topic_takes(
    kafka: KafkaBroker, kafka_topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_connection, "LIMITS_SECONDS", 0.0)
    monkeypatch.setattr(kafka_connection, "PROBE_SECONDS", 0.1)
    await make_topic(kafka, kafka_topic, 100_000)
    async with running_sink(kafka.bootstrap, kafka_topic) as case:
        await eventually(lambda: case.health.ready)
        most = case.sink.max_batch_bytes
        assert 90_000 < most < 100_000
        await case.sink.store(origin(), sized(1, most))
        with pytest.raises(SinkRejectedError) as raised:
            await case.sink.store(origin(), sized(2, most + 1))
        assert raised.value.max_bytes == most
        await set_limit(kafka, kafka_topic, 50_000)
        await eventually(lambda: case.sink.max_batch_bytes < 50_000)
        assert names(await case.read()) == {("uid-1", 3, 1)}


async def test_a_limit_that_was_lowered_unseen_rejects_nothing_that_fits(
    kafka: KafkaBroker, kafka_topic: str
) -> None:
    await make_topic(kafka, kafka_topic, 1_000_000)
    async with running_sink(kafka.bootstrap, kafka_topic) as case:
        await eventually(lambda: case.health.ready)
        await case.sink.store(origin(), batch(1))
        await set_limit(kafka, kafka_topic, 20_000)
        with pytest.raises(SinkUnavailableError):
            await case.sink.store(origin(), sized(2, 30_000))
        await eventually(lambda: case.sink.max_batch_bytes < 20_000)
        with pytest.raises(SinkRejectedError) as raised:
            await case.sink.store(origin(), sized(2, 30_000))
        assert raised.value.max_bytes == case.sink.max_batch_bytes
        await case.sink.store(origin(), sized(3, raised.value.max_bytes))
        assert names(await case.read()) == {("uid-1", 3, 1), ("uid-1", 3, 3)}


def sized(seq: int, size: int) -> RecordBatch:
    """A batch whose records have exactly so many bytes; not compressed."""
    made = RecordBatch(epoch=3, seq=seq, codec=CODEC_NONE, count=1, data_types=[1000])
    overhead = 0
    while len(made.records) != size:
        record = EncodedRecord(data_type=1000, timestamp=1, data=bytes(size - overhead))
        made.records = RecordList(records=[record]).SerializeToString()
        overhead += len(made.records) - size
    made.decompressed_bytes = size
    return made


async def test_a_dead_letter_that_does_not_fit_is_cut_and_says_so(
    kafka: KafkaBroker, kafka_topic: str
) -> None:
    aside = f"aside-{kafka_topic}"
    await make_topic(kafka, aside, 10_000)
    async with running_sink(kafka.bootstrap, kafka_topic, dead_letter_topic=aside) as case:
        await eventually(lambda: case.health.ready)
        poison = sized(7, 50_000)
        await case.sink.set_aside(origin(), poison, "too large")
        (message,) = await raw_messages(kafka.bootstrap, aside)
        found = {name: value.decode() for name, value in message.headers}
        assert found["outrider-cut-from"] == "50000"
        assert found["outrider-reason"] == "too large"
        assert (found["outrider-agent"], found["outrider-seq"]) == ("uid-1", "7")
        assert poison.records.startswith(message.value)
        assert len(message.value) > 4_000
        stores = case.sink._metrics.sink_stores  # type: ignore[attr-defined]
        assert stores.labels("set_aside")._value.get() == 1
        assert stores.labels("stored")._value.get() == 0


@pytest.mark.parametrize("form", ["batch", "record"])
async def test_a_dead_letter_that_the_broker_does_not_take_is_cut_until_it_does(
    kafka: KafkaBroker, kafka_topic: str, form: str
) -> None:
    aside = f"aside-{kafka_topic}"
    await make_topic(kafka, aside, 100_000)
    async with running_sink(
        kafka.bootstrap, kafka_topic, dead_letter_topic=aside, format=form
    ) as case:
        await eventually(lambda: case.health.ready)
        sink: Any = case.sink
        await set_limit(kafka, aside, 10_000)
        # The limits were read anew for it before, and say what they did: a broker of its own mind.
        sink._doubted = sink._connection.limits
        await sink.set_aside(origin(), sized(7, 50_000), "too large")
        (message,) = await raw_messages(kafka.bootstrap, aside)
        assert 5_000 < len(message.value) < 10_000
        assert dict(message.headers)["outrider-cut-from"] == b"50000"


async def test_what_one_topic_has_and_another_does_not_take_is_not_split(
    kafka: KafkaBroker, kafka_topic: str
) -> None:
    async with running_sink(kafka.bootstrap, kafka_topic, routes=routes_of(kafka_topic)) as case:
        await eventually(lambda: case.health.ready)
        await set_limit(kafka, f"{kafka_topic}-Y", 20_000)
        found: SinkRejectedError | None = None
        seq = 1
        while found is None:  # brokers know a new limit a moment later
            seq += 1
            both = sized(seq, 30_000)
            both.data_types[:] = [1000, 1001]
            try:
                await case.sink.store(origin(), both)
            except SinkRejectedError as error:
                found = error
        assert f"{kafka_topic}-Y" in str(found)
        assert found.max_bytes == 0  # it is set aside: nothing comes again in parts
        assert ("uid-1", 3, seq) in names(await read_topic(kafka.bootstrap, f"{kafka_topic}-X"))
        assert ("uid-1", 3, seq) not in names(await read_topic(kafka.bootstrap, f"{kafka_topic}-Y"))
        await eventually(lambda: case.sink.max_batch_bytes < 20_000)  # the limits are read anew


async def test_setting_aside_waits_for_nobody_while_no_broker_is_there(kafka_topic: str) -> None:
    async with running_sink(f"127.0.0.1:{free_port('127.0.0.1')}", kafka_topic) as case:
        with pytest.raises(SinkUnavailableError):
            await case.sink.set_aside(origin(), batch(1), "why")


async def test_a_new_topic_keeps_records_as_long_as_was_said(
    kafka: KafkaBroker, kafka_topic: str
) -> None:
    async with running_sink(kafka.bootstrap, kafka_topic, retention_hours=2, partitions=5) as case:
        await eventually(lambda: case.health.ready)
    for name in (kafka_topic, f"{kafka_topic}.dead-letter"):
        config = await config_of(kafka, name)
        assert config["retention.ms"] == "7200000"


# ------------------------------------------------------------------ routes, records


ROUTES = [KafkaRoute(data_types=[1000], topic="X"), KafkaRoute(data_types=[1001, 5100], topic="Y")]


def routes_of(topic: str) -> list[KafkaRoute]:
    return [
        KafkaRoute(data_types=route.data_types, topic=f"{topic}-{route.topic}") for route in ROUTES
    ]


def typed(seq: int, *types: int) -> RecordBatch:
    made = [EncodedRecord(data_type=kind, timestamp=1, data=b"%d" % kind) for kind in types]
    return batches.encode(made, epoch=3, seq=seq, codec=CODEC_ZSTD, created_unix_nanos=1)


async def test_batches_go_where_their_types_belong(kafka: KafkaBroker, kafka_topic: str) -> None:
    async with running_sink(kafka.bootstrap, kafka_topic, routes=routes_of(kafka_topic)) as case:
        assert [list(group) for group in case.sink.separate] == [[1000], [1001], [5100]]
        sent = [
            typed(1, 1000),
            typed(2, 1001),
            typed(3, 20000),
            typed(4, 1000, 1001),
            typed(5, 5100),
        ]
        await asyncio.gather(*(case.sink.store(origin(), each) for each in sent))
        found = {
            name: sorted(seq for _, _, seq in names(await read_topic(kafka.bootstrap, name)))
            for name in (kafka_topic, f"{kafka_topic}-X", f"{kafka_topic}-Y")
        }
        assert list(found.values()) == [[3, 5], [1, 4], [2, 4, 5]]
        counted = case.sink._metrics.sink_messages  # type: ignore[attr-defined]
        assert counted.labels(f"{kafka_topic}-Y")._value.get() == 3


async def test_each_record_is_a_message_where_it_belongs(
    kafka: KafkaBroker, kafka_topic: str
) -> None:
    fields: dict[str, Any] = {"format": "record", "routes": routes_of(kafka_topic)}
    async with running_sink(kafka.bootstrap, kafka_topic, **fields) as case:
        await case.sink.store(origin(), typed(1, 1000, 1001, 20000, 5100))
        found = {}
        for name in (kafka_topic, f"{kafka_topic}-X", f"{kafka_topic}-Y"):
            messages = await read_topic(kafka.bootstrap, name)
            found[name] = sorted((item.index or 0, item.records[0].data) for item in messages)
            assert names(messages) == {("uid-1", 3, 1)}
        assert list(found.values()) == [
            [(2, b"20000"), (3, b"5100")],
            [(0, b"1000")],
            [(1, b"1001"), (3, b"5100")],
        ]
        (message, *_) = await raw_messages(kafka.bootstrap, f"{kafka_topic}-X")
        data = MQData.FromString(message.value)
        assert (data.data_type, data.body, data.agent_id) == (1000, b"1000", "uid-1")


async def test_a_large_batch_of_records_does_not_hold_the_loop(
    kafka: KafkaBroker, kafka_topic: str
) -> None:
    fields: dict[str, Any] = {"format": "record", "partitions": 1}
    async with running_sink(kafka.bootstrap, kafka_topic, **fields) as case:
        await case.sink.store(origin(), batch(1))
        turns, done = 0, asyncio.Event()

        async def count() -> None:
            nonlocal turns
            while not done.is_set():
                await asyncio.sleep(0)
                turns += 1

        counting = asyncio.create_task(count())
        large = batch(2, b"z" * 1000, records=10_000)
        await asyncio.gather(case.sink.store(origin(), large), case.sink.store(origin(), batch(3)))
        done.set()
        await counting
        assert turns > 40
        found = await case.read()
        order = [(item.seq, item.index) for item in found]
        assert order == [(1, 0), (1, 1), *((2, n) for n in range(10_000)), (3, 0), (3, 1)]


async def test_what_cannot_be_opened_is_rejected(kafka: KafkaBroker, kafka_topic: str) -> None:
    async with running_sink(kafka.bootstrap, kafka_topic, format="record") as case:
        await eventually(lambda: case.health.ready)
        poison = batch(1)
        poison.records = b"this is no zstd frame"
        with pytest.raises(SinkRejectedError, match="cannot be opened") as raised:
            await case.sink.store(origin(), poison)
        assert raised.value.max_bytes == 0
        await case.sink.store(origin(), batch(2))
        assert names(await case.read()) == {("uid-1", 3, 2)}


class Ahead:
    """A producer of the library in a process whose clock is ahead, as long as `seconds` says."""

    def __init__(self, real: Any, seconds: float) -> None:
        self._real = real
        self.seconds = seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __len__(self) -> int:
        return len(self._real)

    def produce(self, *args: Any, **keywords: Any) -> None:
        stamp = int(1000 * (time.time() + self.seconds))
        self._real.produce(*args, timestamp=stamp, **keywords)


async def _clock_ahead(case: SinkCase) -> Ahead:
    """Have the sink's clock two hours ahead from now on."""
    await eventually(lambda: case.health.ready)
    assert isinstance(case.sink, KafkaSink)
    producer = case.sink._connection.producer
    assert producer is not None
    ahead = Ahead(producer._producer, 7200.0)
    producer._producer = ahead  # type: ignore[assignment]
    return ahead


async def test_a_clock_that_is_ahead_is_named_and_loses_nothing(
    kafka: KafkaBroker, kafka_topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_connection, "PROBE_SECONDS", 0.1)
    await make_topic(kafka, kafka_topic, MESSAGE_BYTES)  # its messages have the producer's time
    async with running_sink(kafka.bootstrap, kafka_topic) as case:
        ahead = await _clock_ahead(case)
        for seq in range(1, 4):
            with pytest.raises(SinkUnavailableError):
                await asyncio.wait_for(case.sink.store(origin(), batch(seq)), 20)
        assert "this server's clock is ahead of the broker's" in reason(case)
        await asyncio.sleep(0.5)  # some probes, which the broker answers
        assert not case.health.ready
        ahead.seconds = 0.0
        for seq in range(1, 4):
            await asyncio.wait_for(case.sink.store(origin(), batch(seq)), 20)
        await eventually(lambda: case.health.ready)
        assert names(await case.read()) == {("uid-1", 3, seq) for seq in range(1, 4)}


async def test_a_topic_of_our_own_does_not_mind_a_clock_that_is_ahead(
    kafka: KafkaBroker, kafka_topic: str
) -> None:
    async with running_sink(kafka.bootstrap, kafka_topic) as case:
        await _clock_ahead(case)
        await asyncio.wait_for(case.sink.store(origin(), batch(1)), 20)
        (message,) = await raw_messages(kafka.bootstrap, kafka_topic)
        assert abs(message.timestamp / 1000 - time.time()) < 60
