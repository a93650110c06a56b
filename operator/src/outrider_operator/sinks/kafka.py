"""Batches in a Kafka topic: one message each, exactly as the agent compressed it.

The producer is idempotent with acks=all, so that a batch is stored on all replicas in sync before
it is acknowledged. After an error that such a producer cannot leave by itself it is made anew; a
batch may then be stored twice, never lost: readers drop repeats by agent, epoch and seq. While no
broker answers, batches wait with their streams, within the bound; nothing is thrown away.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    RecordTooLargeError,
)
from outrider_proto import limits
from outrider_proto.records import headers
from outrider_proto.v1.agent_pb2 import RecordBatch
from outrider_runtime.backoff import Backoff
from outrider_runtime.health import Health
from outrider_runtime.logs import get_logger
from outrider_runtime.settings import address

from outrider_operator.core.sink import Origin, SinkRejectedError, SinkUnavailableError
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import KafkaSinkSettings
from outrider_operator.sinks.base import SinkState
from outrider_operator.sinks.kafka_log import BrokerLog
from outrider_operator.sinks.kafka_topic import MESSAGE_BYTES, TopicError, ensure_topic

#: Messages for one partition go together up to this size, bytes, and wait so long for company,
#: milliseconds. Below the usual limit of a topic, 1 MiB.
GROUP_BYTES: Final = 512 * limits.KIB
LINGER_MILLIS: Final = 5
#: The brokers are asked for a sign of life so often, seconds.
PROBE_SECONDS: Final = 3.0
#: aiokafka waits so long between its own tries, milliseconds.
RETRY_MILLIS: Final = 250
#: What is on its way at the end gets so long to be stored, and connections to be closed, seconds.
FLUSH_SECONDS: Final = 10.0
CLOSE_SECONDS: Final = 5.0
TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError, RecordTooLargeError)

log = get_logger(__name__)


class _Producer:
    """One producer, and whether it has to be replaced."""

    def __init__(self, settings: KafkaSinkSettings) -> None:
        self._timeout = settings.request_timeout_seconds
        self._topic = settings.topic
        self._producer = AIOKafkaProducer(
            bootstrap_servers=list(settings.bootstrap_servers),
            client_id=settings.client_id,
            request_timeout_ms=int(settings.request_timeout_seconds * 1000),
            retry_backoff_ms=RETRY_MILLIS,
            acks="all",
            enable_idempotence=True,
            compression_type=None,  # agents have compressed the batches
            max_request_size=MESSAGE_BYTES,
            max_batch_size=GROUP_BYTES,
            linger_ms=LINGER_MILLIS,
        )
        self.broken = asyncio.Event()
        self.reason = ""

    async def open(self) -> None:
        async with asyncio.timeout(2 * self._timeout):
            await self._producer.start()
            # Known now, the first batches need not wait for it, and the sink is really ready.
            await self._producer.partitions_for(self._topic)

    def give_up(self, reason: str) -> None:
        """Have this producer replaced."""
        if not self.broken.is_set():
            self.reason = reason
            self.broken.set()

    async def send(self, **message: Any) -> None:
        await self._producer.send_and_wait(self._topic, **message)

    async def answers(self) -> bool:
        """Whether a broker answers at all."""
        try:
            async with asyncio.timeout(self._timeout):
                return bool(await self._producer.client.force_metadata_update())
        except (KafkaError, TimeoutError):
            return False

    async def close(self) -> None:
        """Close the connections; what is still waiting fails and is tried with the next one."""
        if self.broken.is_set():
            # Without this `stop` waits until brokers have taken all, which may be never.
            accumulator = self._producer._message_accumulator  # noqa: SLF001
            accumulator.fail_all(KafkaError("the producer is made anew"))
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._producer.stop()
        except (KafkaError, TimeoutError, OSError) as error:
            log.warning("producer not closed in order", error=str(error) or "timeout")
            with contextlib.suppress(KafkaError, OSError):
                await self._producer.client.close()


class KafkaSink:
    """Stores batches in Kafka.

    Args:
        settings: brokers, topic, bounds.
        metrics: of the server.
        health: the condition "sink" is set here.

    Raises:
        SettingsError: an address is none.
    """

    def __init__(self, settings: KafkaSinkSettings, metrics: ServerMetrics, health: Health) -> None:
        for server in settings.bootstrap_servers:
            address(server, setting="sink.kafka.bootstrapServers")
        self._settings = settings
        self._metrics = metrics
        self._state = SinkState("kafka", metrics, health)
        self._log = BrokerLog()
        self._producer: _Producer | None = None
        self._opened = asyncio.Event()
        self._stopped = False
        self._pending = 0
        self._pending_bytes = 0
        self._moved_at = time.monotonic()
        self._idle = asyncio.Event()
        self._idle.set()

    async def store(self, origin: Origin, batch: RecordBatch) -> None:
        """Store a batch; waits while no broker answers.

        Raises:
            SinkUnavailableError: not stored now.
            SinkRejectedError: larger than the topic takes.
        """
        size = len(batch.records)
        if self._pending and self._pending_bytes + size > self._settings.max_inflight_bytes:
            self._metrics.sink_stores.labels("unavailable").inc()
            raise SinkUnavailableError("sink.kafka.maxInflightBytes are on their way already")
        if not self._pending:
            self._moved_at = time.monotonic()
        self._count(1, size)
        try:
            await self._send(origin, batch)
        except SinkUnavailableError:
            self._metrics.sink_stores.labels("unavailable").inc()
            raise
        except SinkRejectedError:
            self._metrics.sink_stores.labels("rejected").inc()
            raise
        finally:
            self._count(-1, -size)
        self._moved_at = time.monotonic()
        self._metrics.sink_stores.labels("stored").inc()
        self._metrics.sink_bytes.inc(size)

    async def run(self, stop: asyncio.Event) -> None:
        """Keep a producer open until `stop` is set, then send what waits and return."""
        self._log.install()
        backoff = Backoff(0.5, self._settings.retry_cap_seconds)
        try:
            while not stop.is_set():
                producer = await self._open()
                if producer is None:
                    await _first(stop.wait(), seconds=backoff.next())
                    continue
                backoff.reset()
                await self._use(producer, stop)
        finally:
            self._stopped = True
            self._state.unwell("the server stops")
            self._opened.set()

    async def _send(self, origin: Origin, batch: RecordBatch) -> None:
        await self._opened.wait()
        producer = self._producer
        if producer is None or self._stopped:
            raise SinkUnavailableError(self._state.reason)
        try:
            await producer.send(
                key=origin.agent_id.encode(),
                value=batch.records,
                headers=headers(origin.agent_id, origin.node, batch, origin.received_unix_nanos),
            )
        except TOO_LARGE as error:
            raise SinkRejectedError(
                f"{len(batch.records)} bytes are more than the topic takes: raise its "
                f"max.message.bytes to {MESSAGE_BYTES}"
            ) from error
        except KafkaTimeoutError as error:
            raise SinkUnavailableError("no broker took the batch in time") from error
        except KafkaError as error:
            # Such as a sequence number out of order: this producer would stay stuck.
            producer.give_up(type(error).__name__)
            raise SinkUnavailableError(str(error)) from error

    async def _open(self) -> _Producer | None:
        producer = _Producer(self._settings)
        try:
            await ensure_topic(self._settings)
            await producer.open()
        except (KafkaError, TopicError, TimeoutError, OSError) as error:
            self._state.unwell(self._why(error))
            producer.give_up("NotOpened")
            await producer.close()
            return None
        except BaseException:
            producer.give_up("Stopped")
            await producer.close()
            raise
        return producer

    async def _use(self, producer: _Producer, stop: asyncio.Event) -> None:
        """Let batches through a producer until it is broken, or all is stored after `stop`."""
        self._producer = producer
        self._moved_at = time.monotonic()
        self._log.last = ""
        self._state.well()
        self._opened.set()
        try:
            while not stop.is_set() and not producer.broken.is_set():
                await _first(stop.wait(), producer.broken.wait(), seconds=PROBE_SECONDS)
                await self._watch(producer, stop)
            if stop.is_set():
                await self._flush()
        finally:
            self._opened.clear()
            self._producer = None
            if stop.is_set() and (self._pending or not self._state.ok):
                producer.give_up("Stopped")
            elif producer.broken.is_set():
                self._metrics.sink_restarts.labels(_label(producer.reason)).inc()
                self._state.unwell(f"producer is made anew after {producer.reason}")
            await producer.close()

    async def _watch(self, producer: _Producer, stop: asyncio.Event) -> None:
        """See that brokers answer and that what waits moves on; ends early on `stop`."""
        timeout = self._settings.request_timeout_seconds
        probe = asyncio.ensure_future(producer.answers())
        await _first(probe, stop.wait(), producer.broken.wait(), seconds=2 * timeout)
        if stop.is_set() or producer.broken.is_set() or not probe.done():
            return
        answers = probe.result()
        silent = time.monotonic() - self._moved_at if self._pending else 0.0
        if not answers:
            self._state.unwell(self._why(None))
        elif silent > 2 * timeout:
            # Brokers answer and yet nothing moves: a stuck producer, by experience.
            producer.give_up("Stalled")
        else:
            self._state.well()

    async def _flush(self) -> None:
        """Wait until what was handed over is stored, for a while."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await self._idle.wait()

    def _why(self, error: BaseException | None) -> str:
        servers = ",".join(self._settings.bootstrap_servers)
        if isinstance(error, TopicError):
            return str(error)
        detail = self._log.last or (str(error) if error else "") or "timeout"
        return f"no Kafka broker answers at {servers}: {detail}"

    def _count(self, batches: int, size: int) -> None:
        self._pending += batches
        self._idle.clear() if self._pending else self._idle.set()
        self._pending_bytes += size
        self._metrics.sink_pending.set(self._pending_bytes)


def _label(reason: str) -> str:
    known = ("Stalled", "OutOfOrderSequenceNumber", "ProducerFenced", "ProducerClosed")
    return reason if reason in known else "KafkaError"


async def _first(*waits: Awaitable[object], seconds: float) -> None:
    """Wait until one of these is done, at most so long; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
