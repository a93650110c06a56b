"""The way to the brokers: opened, watched, and made anew when it cannot go on.

Says through the readiness condition what is wrong and what to do. Knows no batch.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from confluent_kafka import KafkaException
from outrider_proto import limits
from outrider_runtime.backoff import Backoff

from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings_kafka import KafkaSinkSettings
from outrider_operator.sinks.base import SinkState
from outrider_operator.sinks.kafka_producer import KafkaProducer
from outrider_operator.sinks.kafka_security import SecurityError, for_librdkafka
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
#: Reasons for a new producer that have a name of their own in the metrics.
RESTARTS: Final = ("Stalled", "LimitChanged", "SecretChanged", "UnknownTopic", "Fatal")


class Connection:
    """A producer with its topics, one after another.

    Args:
        settings: brokers, bounds, times.
        names: the topics of records; the dead-letter topic comes to them.
        state: whether batches are taken.
        metrics: where restarts are counted.
        fetched: called after reports were fetched.
        silent: for how long nothing was stored that waits to be, seconds.

    Attributes:
        producer: the one in use; None while there is none.
        refusal: set by whoever is not allowed to write: why, and what to do.
        limits: what the topics take, as far as known.
        least_room: largest batch that every topic of records takes, bytes.
    """

    def __init__(
        self,
        settings: KafkaSinkSettings,
        names: Sequence[str],
        state: SinkState,
        metrics: ServerMetrics,
        *,
        fetched: Callable[[], None],
        silent: Callable[[], float],
    ) -> None:
        self.producer: KafkaProducer | None = None
        self.refusal = ""
        self.limits: dict[str, TopicLimits] = {}
        self._settings = settings
        self._names = names
        self.least_room = limits.BATCH_BYTES
        self._state = state
        self._metrics = metrics
        self._fetched = fetched
        self._silent = silent
        self._problem = ""
        self._used: dict[str, Any] = {}

    def room(self, topic: str) -> int:
        """Largest value of a message that a topic takes, bytes."""
        return self.limits.get(topic, TopicLimits()).message_bytes - OVERHEAD_BYTES

    async def run(
        self,
        stop: asyncio.Event,
        opened: Callable[[], None],
        closing: Callable[[], Awaitable[None]],
    ) -> None:
        """Keep a producer open until `stop` is set.

        Args:
            stop: ends it.
            opened: called when there is a new producer.
            closing: awaited after `stop`, before the last one is closed.
        """
        backoff = Backoff(0.5, self._settings.retry_cap_seconds)
        while not stop.is_set():
            found = await self._open(stop)
            if found is None:
                await first(stop.wait(), seconds=backoff.next())
                continue
            backoff.reset()
            self.producer, topics = found
            self._problem = ""
            self._state.well()
            try:
                opened()
                await self._watch(self.producer, topics, stop)
                if stop.is_set():
                    await closing()
            finally:
                await self._close(topics, stop)

    async def _close(self, topics: Topics, stop: asyncio.Event) -> None:
        producer, self.producer = self.producer, None
        assert producer is not None
        if producer.broken.is_set() and not stop.is_set():
            reason = producer.reason
            self._metrics.sink_restarts.labels(reason if reason in RESTARTS else "Other").inc()
            self._state.unwell(self.refusal or f"producer is made anew after {reason}")
        await producer.close()
        await topics.close()

    # ------------------------------------------------------------------ opening

    async def _open(self, stop: asyncio.Event) -> tuple[KafkaProducer, Topics] | None:
        opening = asyncio.ensure_future(self._try_open())
        stopping = asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([opening, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            return await opening
        return None

    async def _try_open(self) -> tuple[KafkaProducer, Topics] | None:
        topics: Topics | None = None
        try:
            connection = self._used = for_librdkafka(self._settings)
            names = [*self._names, self._settings.dead_letters]
            topics = Topics(connection, self._settings, names, self._told)
            self._take(await topics.ensure())
            producer = KafkaProducer(
                connection,
                self._settings,
                message_bytes=MESSAGE_BYTES,
                group_bytes=self._group_bytes(),
                fetched=self._fetched,
                problem=self._told,
            )
            return producer, topics
        except (KafkaException, TopicError, SecurityError, TimeoutError) as error:
            if topics is not None:
                topics.poll()
                await topics.close()
            self._state.unwell(self._why(error))
            return None
        except BaseException:
            if topics is not None:
                await topics.close()
            raise

    def _take(self, found: dict[str, TopicLimits]) -> None:
        self.limits = found
        self.least_room = min(limits.BATCH_BYTES, *map(self.room, self._names))

    def _group_bytes(self) -> int:
        """Brokers take a group of messages as one: none of its messages, where it is too large."""
        return min(found.message_bytes for found in self.limits.values())

    # ------------------------------------------------------------------ watching

    async def _watch(self, producer: KafkaProducer, topics: Topics, stop: asyncio.Event) -> None:
        """See that brokers answer and that what waits moves on, until `stop` or a broken one."""
        read_at = time.monotonic()
        while not stop.is_set() and not producer.broken.is_set():
            await first(stop.wait(), producer.broken.wait(), seconds=PROBE_SECONDS)
            await self._probe(producer, topics, stop)
            if time.monotonic() - read_at > LIMITS_SECONDS and self._state.ok:
                read_at = time.monotonic()
                await self._read_limits(producer, topics)

    async def _probe(self, producer: KafkaProducer, topics: Topics, stop: asyncio.Event) -> None:
        timeout = self._settings.request_timeout_seconds
        probe = asyncio.ensure_future(topics.answers())
        await first(probe, stop.wait(), producer.broken.wait(), seconds=2 * timeout)
        topics.poll()
        producer.poll()
        if stop.is_set() or producer.broken.is_set() or not probe.done() or probe.cancelled():
            return
        if not probe.result():
            self._state.unwell(self._why(None))
            if self._files_changed():
                producer.give_up("SecretChanged")
            return
        self._problem = ""
        trouble, silent = self.refusal, self._silent()
        if silent > timeout and not trouble:
            with contextlib.suppress(KafkaException, TopicError, TimeoutError):
                trouble = await topics.trouble(self.limits)
        if trouble:
            self._state.unwell(trouble)
        elif silent > 2 * timeout:
            # Brokers answer, all is in order, and yet nothing moves.
            producer.give_up("Stalled")
        else:
            self._state.well()

    def _files_changed(self) -> bool:
        """Whether a new producer would log in with something else than this one."""
        try:
            return for_librdkafka(self._settings) != self._used
        except SecurityError:
            return False

    async def _read_limits(self, producer: KafkaProducer, topics: Topics) -> None:
        before = self._group_bytes()
        try:
            self._take(await topics.limits())
        except TopicError:
            producer.give_up("LimitChanged")  # why is said when it is opened again
        except (KafkaException, TimeoutError):
            return  # the next probe tells
        if self._group_bytes() != before:
            producer.give_up("LimitChanged")

    def _told(self, problem: str) -> None:
        self._problem = problem

    def _why(self, error: BaseException | None) -> str:
        if isinstance(error, (TopicError, SecurityError)):
            return str(error)
        servers = ",".join(self._settings.bootstrap_servers)
        detail = self._problem or (str(error) if error else "") or "timeout"
        if "uthentication" in detail:
            return (
                f"the Kafka brokers at {servers} refuse this user: look at the files of "
                f"sink.kafka.security: {detail}"
            )
        return f"no Kafka broker answers at {servers}: {detail}"


async def first(*waits: Awaitable[object], seconds: float) -> None:
    """Wait until one of these is done, at most so long; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
