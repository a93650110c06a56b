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
from collections.abc import Collection, Sequence
from typing import Final

from confluent_kafka import KafkaException
from outrider_proto import limits
from outrider_runtime.health import Health
from outrider_runtime.settings import address

from outrider_operator.core.batch import Batch
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
from outrider_operator.sinks.kafka_connection import Connection
from outrider_operator.sinks.kafka_log import BrokerLog
from outrider_operator.sinks.kafka_messages import Headers, Messages
from outrider_operator.sinks.kafka_producer import KafkaProducer
from outrider_operator.sinks.kafka_records import RecordWriter, cost_of
from outrider_operator.sinks.kafka_sending import Sending, kind_of, refusal_of
from outrider_operator.sinks.kafka_topic import MESSAGE_BYTES, TopicLimits

#: What is on its way at the end gets so long to be stored, seconds.
FLUSH_SECONDS: Final = 10.0


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
        self._connection = Connection(
            settings,
            self._routes.topics,
            self._state,
            metrics,
            fetched=self._fetched,
            silent=lambda: time.monotonic() - self._moved_at if self._sendings else 0.0,
        )
        # What came while there was no producer, in order.
        self._early: deque[tuple[Sending, Origin, Batch]] = deque()
        self._sendings: set[Sending] = set()
        self._stopped = False
        # Limits that a broker did not keep to, and that were read again for it.
        self._doubted: dict[str, TopicLimits] | None = None
        self._pending_bytes = 0
        self._moved_at = time.monotonic()
        self._idle = asyncio.Event()
        self._idle.set()
        self._moved = False
        self._stored = 0
        self._stored_bytes = 0
        self._by_topic: Counter[str] = Counter()
        self._writer: RecordWriter | None = None
        if settings.format == "record":
            self._writer = RecordWriter(self._routes, self._produce, self._connection.room)

    @property
    def max_batch_bytes(self) -> int:
        """Largest RecordBatch.records that fits into a message of every topic, bytes."""
        return limits.BATCH_BYTES if self._writer is not None else self._connection.least_room

    @property
    def separate(self) -> Sequence[Sequence[int]]:
        """Groups of data types that have topics of their own."""
        return self._routes.separate

    @property
    def _pending(self) -> int:
        return len(self._sendings)

    @property
    def _producer(self) -> KafkaProducer | None:
        return self._connection.producer

    def cost(self, batch: Batch) -> int:
        """The library has a copy of each message until it is stored."""
        return len(batch.records) if self._writer is None else cost_of(batch)

    def store(self, origin: Origin, batch: Batch) -> Sending:
        """Store a batch; done once all replicas in sync have it, waits while no broker answers.

        Raises (when awaited):
            SinkUnavailableError: not stored now.
            SinkRejectedError: larger than a topic takes, or nothing that can be opened.
        """
        size = len(batch.records)
        # Where records are written one by one, the opening counts as a message.
        topics = self._routes.of(batch.data_types) if self._writer is None else ("",)
        cost = self.cost(batch)
        sending = Sending(size, cost, topics, self._ended)
        failure = self._unfit(size) or self._no_room(cost)
        if failure is not None:
            self._count_failure(failure)
            sending.settle(failure)
            return sending
        self._begin(sending)
        if self._producer is None:
            self._early.append((sending, origin, batch))
        else:
            self._send(sending, origin, batch)
        return sending

    async def set_aside(self, origin: Origin, batch: Batch, reason: str) -> None:
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
        room = self._connection.room(topic)
        while True:
            key, headers, value = self._messages.dead_letter(origin, batch, reason, room)
            # Of no size: it is not counted as a batch that was stored.
            sending = Sending(0, size, (topic,), self._ended)
            self._begin(sending)
            self._produce(topic, key, value, headers, sending)
            try:
                await sending
                break
            except SinkRejectedError as error:
                # The broker takes less than it says: at last there is nothing but the headers.
                if not value or sending.error is None or kind_of(sending.error) != "TooLarge":
                    raise SinkUnavailableError(str(error)) from error
            room = len(value) // 2
        self._metrics.sink_stores.labels("set_aside").inc()

    async def run(self, stop: asyncio.Event) -> None:
        """Keep a producer open until `stop` is set, then send what waits and return."""
        BrokerLog().install()
        writing = asyncio.ensure_future(self._write_records())
        running = asyncio.ensure_future(self._connection.run(stop, self._opened, self._flush))
        try:
            # Neither ends by itself; an error of either is this sink's end.
            await asyncio.wait([running, writing], return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            await running
        finally:
            self._stopped = True
            running.cancel()
            writing.cancel()
            await asyncio.wait([running, writing])
            self._state.unwell("the server stops")
            self._early.clear()
            self._fail(SinkUnavailableError(self._state.reason))

    # ------------------------------------------------------------------ single batches

    def _unfit(self, size: int) -> SinkError | None:
        most = self.max_batch_bytes
        if size <= most:
            return None
        return SinkRejectedError(
            f"{size} bytes are more than the topic takes: raise its max.message.bytes to "
            f"{MESSAGE_BYTES}",
            max_bytes=most,
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

    def _send(self, sending: Sending, origin: Origin, batch: Batch) -> None:
        if self._writer is not None:
            self._writer.put(sending, origin, batch)
            return
        key, headers = self._messages.batch(origin, batch)
        for topic in sending.topics:
            self._produce(topic, key, batch.records, headers, sending)

    def _produce(
        self, topic: str, key: bytes, value: bytes, headers: Headers, sending: Sending
    ) -> None:
        producer = self._connection.producer
        if producer is None:
            sending.fail(SinkUnavailableError(self._state.reason))
            return
        self._by_topic[topic] += 1
        try:
            producer.produce(topic, key, value, headers, sending)
        except (KafkaException, BufferError) as error:
            sending.refused(error)

    def _ended(self, sending: Sending) -> None:
        self._sendings.discard(sending)
        self._pending_bytes -= sending.cost
        failure = sending.failure or (self._failure(sending) if sending.error else None)
        if failure is None:
            self._moved = True
            if sending.size:
                self._stored += 1
                self._stored_bytes += sending.size
        else:
            self._count_failure(failure)
        if not self._sendings:
            self._idle.set()
        sending.settle(failure)

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
        refusal = refusal_of(kind, sending.topics, error)
        if refusal:
            self._connection.refusal = refusal
            self._state.unwell(refusal)
        elif self._producer is not None and kind in ("Fatal", "UnknownTopic"):
            self._producer.give_up(kind)
        return SinkUnavailableError(error.str())

    def _too_large(self, sending: Sending) -> SinkError:
        """A broker took less than the topic's limit that we know: it was changed, or is hidden."""
        anew = self._producer is not None and self._doubted != self._connection.limits
        if self._producer is not None and anew:
            self._doubted = self._connection.limits
            self._producer.give_up("LimitChanged")
        if sending.errors < len(sending.topics):
            # Not again as parts: where it is stored the records would be there twice, in batches
            # that readers cannot tell to be the same.
            return SinkRejectedError(
                f"{sending.size} bytes are more than the topic {sending.refused_by!r} takes, other "
                f"topics have the batch: raise its max.message.bytes to {MESSAGE_BYTES}"
            )
        if anew:
            return SinkUnavailableError("the topic's max.message.bytes is read again")
        return SinkRejectedError(
            f"{sending.size} bytes are more than the broker takes: raise the topic's "
            f"max.message.bytes to {MESSAGE_BYTES}",
            max_bytes=0 if self._writer else max(1, sending.size // 2),
        )

    def _count_failure(self, failure: SinkError) -> None:
        result = "rejected" if isinstance(failure, SinkRejectedError) else "unavailable"
        self._metrics.sink_stores.labels(result).inc()

    def _opened(self) -> None:
        # What an earlier producer never reported will not be any more.
        early = {sending for sending, _, _ in self._early}
        self._fail(SinkUnavailableError("the producer was made anew"), keep=early)
        self._moved_at = time.monotonic()
        while self._early:
            self._send(*self._early.popleft())

    def _fail(self, failure: SinkError, keep: Collection[Sending] = ()) -> None:
        for sending in self._sendings.difference(keep):
            sending.fail(failure)
        self._fetched()

    def _fetched(self) -> None:
        """What is done once for many reports."""
        if self._moved:
            self._moved = False
            self._moved_at = time.monotonic()
            self._connection.refusal = ""
            self._metrics.sink_stores.labels("stored").inc(self._stored)
            self._metrics.sink_bytes.inc(self._stored_bytes)
            self._stored = self._stored_bytes = 0
        for topic, count in self._by_topic.items():
            self._metrics.sink_messages.labels(topic).inc(count)
        self._by_topic.clear()
        self._metrics.sink_pending.set(self._pending_bytes)

    async def _write_records(self) -> None:
        if self._writer is None:
            await asyncio.Event().wait()
        else:
            await self._writer.run()

    async def _flush(self) -> None:
        """Wait until what was handed over is stored, for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._idle.wait()
