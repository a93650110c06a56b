"""confluent-kafka's producer on the event loop: no thread of ours, one callback for each message.

librdkafka sends in threads of its own and has delivery reports wait until they are fetched; here a
timer of the loop fetches them, often while something moves and seldom while nothing does. Decides
nothing about batches: what a report means is up to whoever handed the message over.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final

from confluent_kafka import KafkaError, Producer
from outrider_proto import limits
from outrider_runtime.logs import get_logger

from outrider_operator.settings_kafka import KafkaSinkSettings

#: Messages for one partition go together up to this size, bytes, and wait so long for company,
#: milliseconds. Below the usual limit of a topic, 1 MiB. Fewer and larger requests cost us and the
#: broker less; the wait is a small part of the time that an agent gathers records.
GROUP_BYTES: Final = 512 * limits.KIB
LINGER_MILLIS: Final = 25
#: Reports are fetched so often while they come, and when none came for a while, seconds.
POLL_SECONDS: Final = 0.01
SLOW_POLL_SECONDS: Final = 0.05
QUIET_POLLS: Final = 40
#: A message is given up when it was not stored within so many times the request timeout; nothing
#: else ends the tries of an idempotent producer.
TIMEOUTS: Final = 6
#: What was given up must have come back within this, seconds.
CLOSE_SECONDS: Final = 5.0

Report = Callable[[KafkaError | None, Any], None]
LIBRARY_LOG: Final = logging.getLogger("librdkafka")
log = get_logger(__name__)


def tell(error: KafkaError, problem: Callable[[str], None]) -> None:
    """Pass on what an error says, unless it only counts brokers that are down: others say why."""
    if error.code() != KafkaError._ALL_BROKERS_DOWN:  # noqa: SLF001 - its public name
        problem(error.str())


class KafkaProducer:
    """One producer, and whether it has to be replaced.

    Args:
        connection: brokers and security, in librdkafka's words.
        settings: bounds and times.
        message_bytes: largest message that any of the topics takes, bytes.
        group_bytes: largest group of messages that all of the topics take, bytes.
        fetched: called after reports were fetched, for what is done once for many.
        problem: told what the library says is wrong, in words.

    Raises:
        confluent_kafka.KafkaException: a certificate or other setting cannot be used.
    """

    def __init__(
        self,
        connection: dict[str, Any],
        settings: KafkaSinkSettings,
        *,
        message_bytes: int,
        group_bytes: int,
        fetched: Callable[[], None],
        problem: Callable[[str], None],
    ) -> None:
        timeout = int(settings.request_timeout_seconds * 1000)
        self._fetched = fetched
        self._problem = problem
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._quiet = 0
        self.broken = asyncio.Event()
        self.reason = ""
        self._producer: Producer | None = Producer(
            {
                **connection,
                "acks": "all",
                "enable.idempotence": True,
                "compression.type": "none",  # agents have compressed the batches
                # As Java's: a key is in the same partition whoever writes it.
                "partitioner": "murmur2_random",
                "message.max.bytes": message_bytes,
                "batch.size": min(GROUP_BYTES, group_bytes),
                "linger.ms": LINGER_MILLIS,
                "socket.timeout.ms": timeout,
                "message.timeout.ms": TIMEOUTS * timeout,
                # The bound is the sink's own; this one must never come first.
                "queue.buffering.max.kbytes": 2 * settings.max_inflight_bytes // limits.KIB,
                "queue.buffering.max.messages": 0,
                "socket.keepalive.enable": True,
                "error_cb": self._on_error,
                "logger": LIBRARY_LOG,
            }
        )

    def __len__(self) -> int:
        """Messages whose report was not fetched yet."""
        return 0 if self._producer is None else len(self._producer)

    def give_up(self, reason: str) -> None:
        """Have this producer replaced; `reason` is a word."""
        if not self.broken.is_set():
            self.reason = reason
            self.broken.set()

    def produce(
        self, topic: str, key: bytes, value: bytes, headers: list[tuple[str, str]], report: Report
    ) -> None:
        """Hand a message over; its report comes later, from the loop.

        Raises:
            confluent_kafka.KafkaException: it was not taken.
            BufferError: there is no room.
        """
        assert self._producer is not None
        self._producer.produce(topic, value, key, headers=headers, on_delivery=report)  # type: ignore[arg-type]
        if self._timer is None or self._quiet:
            self._quiet = 0
            self._again(POLL_SECONDS)

    def poll(self) -> None:
        """Fetch what there is: reports, errors and lines for the log."""
        if self._producer is None:
            return
        try:
            fetched = self._producer.poll(0)
            self._quiet = 0 if fetched else self._quiet + 1
            self._fetched()
        finally:
            if len(self):
                self._again(POLL_SECONDS if self._quiet < QUIET_POLLS else SLOW_POLL_SECONDS)
            else:
                self._stop_timer()

    async def close(self) -> None:
        """Close the connections; what was not stored is reported as purged."""
        producer = self._producer
        if producer is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                producer.purge(blocking=False)
                while len(producer):
                    producer.poll(0)
                    await asyncio.sleep(POLL_SECONDS)
        if len(producer):
            log.warning("producer not closed in order", messages=len(producer))
        self._producer = None
        self._stop_timer()
        self._fetched()
        last = [producer]
        del producer
        # What takes time is when the last one lets go of it: its threads are waited for.
        await asyncio.to_thread(last.clear)

    def _again(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._poll_again)

    def _poll_again(self) -> None:
        self._timer = None
        self.poll()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_error(self, error: KafkaError) -> None:
        tell(error, self._problem)
        if error.fatal():
            self.give_up(error.name())
