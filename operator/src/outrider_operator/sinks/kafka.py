"""Batches in Kafka topics: one message each as the agent compressed it, or one for each record.

The producer is idempotent with acks=all, so that a batch is stored on all replicas in sync before
it is acknowledged. After an error that such a producer cannot leave by itself it is made anew; a
batch may then be stored twice, never lost: readers drop repeats by agent, epoch and seq. While no
broker answers, batches wait here, within the bound; nothing is thrown away.
"""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Awaitable, Sequence
from typing import Final

from confluent_kafka import KafkaException
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import RecordBatch
from outrider_runtime.backoff import Backoff
from outrider_runtime.health import Health
from outrider_runtime.settings import address

from outrider_operator.core.routing import Routes
from outrider_operator.core.sink import (
    Origin,
    SinkError,
    SinkRejectedError,
    SinkUnavailableError,
)
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings_kafka import KafkaSinkSettings, check_kafka
from outrider_operator.sinks.base import SinkState
from outrider_operator.sinks.kafka_log import BrokerLog
from outrider_operator.sinks.kafka_messages import Headers, Messages
from outrider_operator.sinks.kafka_producer import KafkaProducer
from outrider_operator.sinks.kafka_records import RecordWriter, cost_of
from outrider_operator.sinks.kafka_security import SecurityError, for_librdkafka
from outrider_operator.sinks.kafka_sending import Sending, kind_of
from outrider_operator.sinks.kafka_topic import (
    MESSAGE_BYTES,
    OVERHEAD_BYTES,
    TopicError,
    TopicLimits,
    Topics,
)

#: The brokers are asked for a sign of life so often, and what topics take so often, seconds.
PROBE_SECONDS: Final = 3.0
LIMITS_SECONDS: Final = 60.0
#: What is on its way at the end gets so long to be stored, seconds.
FLUSH_SECONDS: Final = 10.0
#: Reasons for a new producer that have a name of their own in the metrics.
RESTARTS: Final = ("Stalled", "LimitChanged", "UnknownTopic", "Fatal")


class KafkaSink:
    """Stores batches in Kafka.

    Args:
        settings: brokers, topics, bounds.
        metrics: of the server.
        health: the condition "sink" is set here.

    Raises:
        SettingsError: an address is none, or settings contradict each other.
    """

    def __init__(self, settings: KafkaSinkSettings, metrics: ServerMetrics, health: Health) -> None:
        for server in settings.bootstrap_servers:
            address(server, setting="sink.kafka.bootstrapServers")
        check_kafka(settings)
        self._settings = settings
        self._metrics = metrics
        self._state = SinkState("kafka", metrics, health)
        self._routes = Routes(
            ((route.data_types, route.topic) for route in settings.routes), settings.topic
        )
        self._messages = Messages()
        self._writer: RecordWriter | None = None
        self._limits: dict[str, TopicLimits] = {}
        self._max_batch_bytes = limits.BATCH_BYTES
        self._producer: KafkaProducer | None = None
        # What came while there was no producer, in order.
        self._early: deque[tuple[Sending, Origin, RecordBatch]] = deque()
        self._sendings: set[Sending] = set()
        self._stopped = False
        self._doubted = False
        self._problem = ""
        self._refusal = ""
        self._pending_bytes = 0
        self._moved_at = time.monotonic()
        self._idle = asyncio.Event()
        self._idle.set()
        self._moved = False
        self._stored = 0
        self._stored_bytes = 0
        self._by_topic: Counter[str] = Counter()
        if settings.format == "record":
            self._writer = RecordWriter(self._routes, self._produce, self._room)

    @property
    def max_batch_bytes(self) -> int:
        """Largest RecordBatch.records that fits into a message of every topic, bytes."""
        return self._max_batch_bytes

    @property
    def separate(self) -> Sequence[Sequence[int]]:
        """Groups of data types that have topics of their own."""
        return self._routes.separate

    @property
    def _pending(self) -> int:
        return len(self._sendings)

    def store(self, origin: Origin, batch: RecordBatch) -> "asyncio.Future[None]":
        """Store a batch; done once all replicas in sync have it, waits while no broker answers.

        Raises (when awaited):
            SinkUnavailableError: not stored now.
            SinkRejectedError: larger than a topic takes, or nothing that can be opened.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        size = len(batch.records)
        cost = size if self._writer is None else cost_of(batch)
        failure = self._unfit(size) or self._no_room(cost)
        if failure is not None:
            self._count_failure(failure)
            future.set_exception(failure)
            return future
        # Where records are written one by one, the opening counts as a message.
        topics = self._routes.of(batch.data_types) if self._writer is None else ("",)
        sending = Sending(future, size, cost, topics, self._ended)
        self._begin(sending)
        if self._producer is None:
            self._early.append((sending, origin, batch))
        else:
            self._send(sending, origin, batch)
        return future

    async def set_aside(self, origin: Origin, batch: RecordBatch, reason: str) -> None:
        """Put a batch into the dead-letter topic, cut to what that takes.

        Raises:
            SinkUnavailableError: not done, try again later.
        """
        size = len(batch.records)
        failure = self._no_room(size)
        if failure is None and self._producer is None:
            failure = SinkUnavailableError(self._state.reason)
        if failure is not None:
            raise failure
        topic = self._settings.dead_letters
        key, headers, value = self._messages.dead_letter(origin, batch, reason, self._room(topic))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Of no size: it is not counted as a batch that was stored.
        sending = Sending(future, 0, size, (topic,), self._ended)
        self._begin(sending)
        self._produce(topic, key, value, headers, sending)
        try:
            await future
        except SinkRejectedError as error:
            raise SinkUnavailableError(str(error)) from error
        self._metrics.sink_stores.labels("set_aside").inc()

    async def run(self, stop: asyncio.Event) -> None:
        """Keep a producer open until `stop` is set, then send what waits and return."""
        BrokerLog().install()
        backoff = Backoff(0.5, self._settings.retry_cap_seconds)
        writing = asyncio.ensure_future(self._write_records())
        try:
            while not stop.is_set():
                opened = await self._open(stop)
                if opened is None:
                    await _first(stop.wait(), seconds=backoff.next())
                    continue
                backoff.reset()
                await self._use(*opened, stop, writing)
        finally:
            self._stopped = True
            writing.cancel()
            self._state.unwell("the server stops")
            self._fail_all(SinkUnavailableError(self._state.reason))

    # ------------------------------------------------------------------ single batches

    def _unfit(self, size: int) -> SinkError | None:
        if size <= self._max_batch_bytes:
            return None
        return SinkRejectedError(
            f"{size} bytes are more than the topic takes: raise its max.message.bytes to "
            f"{MESSAGE_BYTES}",
            max_bytes=self._max_batch_bytes,
        )

    def _no_room(self, cost: int) -> SinkError | None:
        if self._stopped:
            return SinkUnavailableError(self._state.reason)
        if self._sendings and self._pending_bytes + cost > self._settings.max_inflight_bytes:
            return SinkUnavailableError("sink.kafka.maxInflightBytes are on their way already")
        return None

    def _begin(self, sending: Sending) -> None:
        if not self._sendings:
            self._moved_at = time.monotonic()
            self._idle.clear()
        self._sendings.add(sending)
        self._pending_bytes += sending.cost

    def _send(self, sending: Sending, origin: Origin, batch: RecordBatch) -> None:
        if self._writer is not None:
            self._writer.put(sending, origin, batch)
            return
        key, headers = self._messages.batch(origin, batch)
        for topic in sending.topics:
            self._produce(topic, key, batch.records, headers, sending)

    def _produce(
        self, topic: str, key: bytes, value: bytes, headers: Headers, sending: Sending
    ) -> None:
        if self._producer is None:
            sending.fail(SinkUnavailableError(self._state.reason))
            return
        self._by_topic[topic] += 1
        try:
            self._producer.produce(topic, key, value, headers, sending)
        except (KafkaException, BufferError) as error:
            sending.refused(error)

    def _ended(self, sending: Sending) -> None:
        self._sendings.discard(sending)
        self._pending_bytes -= sending.cost
        future = sending.future
        failure = sending.failure or (self._failure(sending) if sending.error else None)
        if failure is None:
            self._moved = True
            if sending.size:
                self._stored += 1
                self._stored_bytes += sending.size
            if not future.done():
                future.set_result(None)
        else:
            self._count_failure(failure)
            if not future.done():
                future.set_exception(failure)
        if not self._sendings:
            self._idle.set()

    def _failure(self, sending: Sending) -> SinkError:
        """What an error of a message means for its batch, and for the producer."""
        error = sending.error
        assert error is not None
        kind = kind_of(error)
        self._metrics.sink_errors.labels(kind).inc()
        if kind == "TooLarge":
            return self._too_large(sending)
        if kind == "InvalidRecord":
            return SinkRejectedError(f"the brokers refuse the message: {error.str()}")
        if kind == "MadeAnew":
            return SinkUnavailableError("the producer was made anew")
        if kind == "TimedOut":
            return SinkUnavailableError("no broker took the batch in time")
        if kind == "NotAllowed":
            self._refusal = (
                f"the brokers do not let this user write to {', '.join(sending.topics)}: allow it "
                f"Write, and IdempotentWrite on the cluster ({error.name()})"
            )
            self._state.unwell(self._refusal)
        elif self._producer is not None and kind in ("Fatal", "UnknownTopic"):
            self._producer.give_up(kind)
        return SinkUnavailableError(error.str())

    def _too_large(self, sending: Sending) -> SinkError:
        """A broker took less than the topic's limit that we know: it was changed, or is hidden."""
        if self._producer is not None and not self._doubted:
            self._doubted = True
            self._producer.give_up("LimitChanged")
            return SinkUnavailableError("the topic's max.message.bytes is read again")
        return SinkRejectedError(
            f"{sending.size} bytes are more than the broker takes: raise the topic's "
            f"max.message.bytes to {MESSAGE_BYTES}",
            max_bytes=0 if self._writer else max(1, sending.size // 2),
        )

    def _count_failure(self, failure: SinkError) -> None:
        result = "rejected" if isinstance(failure, SinkRejectedError) else "unavailable"
        self._metrics.sink_stores.labels(result).inc()

    def _fail_all(self, failure: SinkError) -> None:
        self._early.clear()
        for sending in list(self._sendings):
            sending.fail(failure)
        self._fetched()

    def _fetched(self) -> None:
        """What is done once for many reports."""
        if self._moved:
            self._moved = False
            self._moved_at = time.monotonic()
            self._refusal = ""
            self._doubted = False
            self._metrics.sink_stores.labels("stored").inc(self._stored)
            self._metrics.sink_bytes.inc(self._stored_bytes)
            self._stored = self._stored_bytes = 0
        for topic, count in self._by_topic.items():
            self._metrics.sink_messages.labels(topic).inc(count)
        self._by_topic.clear()
        self._metrics.sink_pending.set(self._pending_bytes)

    def _room(self, topic: str) -> int:
        return self._limits.get(topic, TopicLimits()).message_bytes - OVERHEAD_BYTES

    async def _write_records(self) -> None:
        if self._writer is not None:
            await self._writer.run()

    # ------------------------------------------------------------------ the producer's life

    async def _open(self, stop: asyncio.Event) -> tuple[KafkaProducer, Topics] | None:
        opening = asyncio.ensure_future(self._try_open())
        try:
            await asyncio.wait(
                [opening, waiting := asyncio.ensure_future(stop.wait())],
                return_when=asyncio.FIRST_COMPLETED,
            )
            waiting.cancel()
            if opening.done():
                return opening.result()
        finally:
            opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await opening
        return None

    async def _try_open(self) -> tuple[KafkaProducer, Topics] | None:
        topics: Topics | None = None
        try:
            connection = for_librdkafka(self._settings)
            names = [*self._routes.topics, self._settings.dead_letters]
            topics = Topics(connection, self._settings, names, self._told)
            self._take_limits(await topics.ensure())
            return self._make(connection), topics
        except (KafkaException, TopicError, SecurityError, TimeoutError, ValueError) as error:
            if topics is not None:
                topics.poll()
            self._state.unwell(self._why(error))
        except asyncio.CancelledError:
            if topics is not None:
                await topics.close()
            raise
        if topics is not None:
            await topics.close()
        return None

    def _make(self, connection: dict[str, object]) -> KafkaProducer:
        return KafkaProducer(
            connection,
            self._settings,
            message_bytes=MESSAGE_BYTES,
            group_bytes=self._group_bytes(),
            fetched=self._fetched,
            problem=self._told,
        )

    def _take_limits(self, found: dict[str, TopicLimits]) -> None:
        if found != self._limits:
            self._doubted = False
        self._limits = found
        if self._writer is None:
            room = min(self._room(topic) for topic in self._routes.topics)
            self._max_batch_bytes = min(limits.BATCH_BYTES, room)

    def _group_bytes(self) -> int:
        """Brokers take a group of messages as one: none of its messages, where it is too large."""
        return min(found.message_bytes for found in self._limits.values())

    async def _use(
        self,
        producer: KafkaProducer,
        topics: Topics,
        stop: asyncio.Event,
        writing: "asyncio.Future[None]",
    ) -> None:
        """Let batches through a producer until it is broken, or all is stored after `stop`."""
        self._producer = producer
        self._moved_at = time.monotonic()
        self._problem = ""
        self._state.well()
        while self._early:
            self._send(*self._early.popleft())
        read_at = time.monotonic()
        try:
            while not stop.is_set() and not producer.broken.is_set():
                await _first(stop.wait(), producer.broken.wait(), seconds=PROBE_SECONDS)
                await self._watch(producer, topics, stop)
                if writing.done() and self._writer is not None:
                    writing.result()
                if time.monotonic() - read_at > LIMITS_SECONDS and self._state.ok:
                    read_at = time.monotonic()
                    await self._read_limits(producer, topics)
            if stop.is_set():
                await self._flush()
        finally:
            self._stopped = stop.is_set()
            self._producer = None
            if producer.broken.is_set() and not stop.is_set():
                reason = producer.reason
                self._metrics.sink_restarts.labels(reason if reason in RESTARTS else "Other").inc()
                self._state.unwell(f"producer is made anew after {reason}")
            await producer.close()
            await topics.close()
            early = {sending for sending, _, _ in self._early}
            for sending in self._sendings - early:
                sending.fail(SinkUnavailableError("the producer was made anew"))

    async def _watch(self, producer: KafkaProducer, topics: Topics, stop: asyncio.Event) -> None:
        """See that brokers answer and that what waits moves on; ends early on `stop`."""
        timeout = self._settings.request_timeout_seconds
        probe = asyncio.ensure_future(topics.answers())
        await _first(probe, stop.wait(), producer.broken.wait(), seconds=2 * timeout)
        topics.poll()
        producer.poll()
        if stop.is_set() or producer.broken.is_set() or not probe.done() or probe.cancelled():
            return
        if not probe.result():
            self._state.unwell(self._why(None))
            return
        silent = time.monotonic() - self._moved_at if self._sendings else 0.0
        trouble = self._refusal
        if silent > timeout and not trouble:
            with contextlib.suppress(KafkaException, TopicError, TimeoutError):
                trouble = await topics.trouble(self._limits)
        if trouble:
            self._state.unwell(trouble)
        elif silent > 2 * timeout:
            # Brokers answer, all is in order, and yet nothing moves.
            producer.give_up("Stalled")
        else:
            self._state.well()

    async def _read_limits(self, producer: KafkaProducer, topics: Topics) -> None:
        before = self._group_bytes()
        try:
            self._take_limits(await topics.limits())
        except TopicError as error:
            producer.give_up("LimitChanged")
            self._problem = str(error)
        except (KafkaException, TimeoutError):
            return  # the next probe tells
        if self._group_bytes() != before:
            producer.give_up("LimitChanged")

    async def _flush(self) -> None:
        """Wait until what was handed over is stored, for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._idle.wait()

    def _told(self, problem: str) -> None:
        self._problem = problem

    def _why(self, error: BaseException | None) -> str:
        if isinstance(error, (TopicError, SecurityError)):
            return str(error)
        servers = ",".join(self._settings.bootstrap_servers)
        detail = self._problem or (str(error) if error else "") or "timeout"
        if "uthentication" in detail:
            return (
                f"the Kafka brokers at {servers} refuse this user: look at the Secret of "
                f"sink.kafka.security: {detail}"
            )
        return f"no Kafka broker answers at {servers}: {detail}"


async def _first(*waits: Awaitable[object], seconds: float) -> None:
    """Wait until one of these is done, at most so long; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
