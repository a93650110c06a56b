"""One batch on its way into Kafka: in one message or in many, done when all are stored.

Knows what became of its messages, and nothing of producers. There is one for each batch, so that it
is the Future of it as well: a real one, and a turn of the loop, would be a good part of its cost.
"""

import asyncio
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException

from outrider_operator.core.sink import SinkError

#: Errors that have a name of their own in the metrics; all others are "Other".
KINDS: Final = {
    KafkaError._MSG_TIMED_OUT: "TimedOut",  # noqa: SLF001 - its public name, as below
    KafkaError._PURGE_QUEUE: "MadeAnew",  # noqa: SLF001
    KafkaError._PURGE_INFLIGHT: "MadeAnew",  # noqa: SLF001
    KafkaError._QUEUE_FULL: "QueueFull",  # noqa: SLF001
    KafkaError._UNKNOWN_TOPIC: "UnknownTopic",  # noqa: SLF001
    KafkaError._UNKNOWN_PARTITION: "UnknownTopic",  # noqa: SLF001
    KafkaError.UNKNOWN_TOPIC_OR_PART: "UnknownTopic",
    KafkaError.MSG_SIZE_TOO_LARGE: "TooLarge",
    KafkaError.RECORD_LIST_TOO_LARGE: "TooLarge",
    KafkaError.INVALID_RECORD: "InvalidRecord",
    KafkaError.INVALID_TIMESTAMP: "ClockAhead",
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "NotAllowed",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "NotAllowed",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "NotAllowed",
}


class Sending:
    """A batch on its way; as core.sink.Storing.

    Args:
        size: bytes of the batch's records.
        cost: bytes it counts for in the bound.
        topics: where it goes, for counting.
        ended: told when its last message is.

    Attributes:
        left: messages whose report is still to come; below 1: it is over.
        failure: why it cannot be stored, found before any broker was asked.
        error: what a broker or the library said of a message.
        refused_by: the topic of the message with that error, where it is known.
        errors: messages that were not stored.
    """

    __slots__ = (
        "_call",
        "_done",
        "_ended",
        "_result",
        "cost",
        "error",
        "errors",
        "failure",
        "left",
        "refused_by",
        "size",
        "topics",
    )

    def __init__(
        self,
        size: int,
        cost: int,
        topics: tuple[str, ...],
        ended: "Callable[[Sending], None]",
    ) -> None:
        self.size = size
        self.cost = cost
        self.topics = topics
        self.left = len(topics)
        self.failure: SinkError | None = None
        self.error: KafkaError | None = None
        self.errors = 0
        self.refused_by = ""
        self._done = False
        self._ended = ended
        self._call: Callable[[Sending], object] | None = None
        self._result: SinkError | None = None

    def __call__(self, error: KafkaError | None, message: Any) -> None:
        """The report of one message."""
        if error is not None:
            self.errors += 1
            if self.error is None:
                self.error = error
                self.refused_by = message.topic() if message is not None else ""
        self.left -= 1
        if not self.left:
            self._ended(self)

    def refused(self, error: Exception) -> None:
        """One message was not taken at all; `error` is what the producer raised."""
        found = error.args[0] if isinstance(error, KafkaException) and error.args else None
        if not isinstance(found, KafkaError):
            found = KafkaError(KafkaError._QUEUE_FULL)  # noqa: SLF001 - its public name
        self(found, None)

    def fail(self, failure: SinkError) -> None:
        """It is over, whatever is still under way."""
        if self.left > 0:
            self.failure = failure
            self.left = 0
            self._ended(self)

    def settle(self, result: SinkError | None) -> None:
        """It is done; tells whoever waits."""
        self._done = True
        self._result = result
        if self._call is not None:
            call, self._call = self._call, None
            call(self)

    # As a Future.

    def add_done_callback(self, call: "Callable[[Any], object]", /) -> None:
        """Have `call` called when it is done; it must not raise. One caller may ask."""
        if self._done:
            asyncio.get_running_loop().call_soon(call, self)
        else:
            assert self._call is None
            self._call = call

    def done(self) -> bool:
        """Whether it is known what became of it."""
        return self._done

    def cancelled(self) -> bool:
        """Never."""
        return False

    def exception(self) -> SinkError | None:
        """Why it was not stored."""
        return self._result

    def __await__(self) -> Generator[Any, None, None]:
        """Wait until it is done; raises why it was not stored."""
        if not self._done:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.add_done_callback(lambda _: None if waiter.done() else waiter.set_result(None))
            yield from waiter
        if self._result is not None:
            raise self._result


def kind_of(error: KafkaError) -> str:
    """A word for an error, out of a small set."""
    if error.fatal():
        return "Fatal"
    return KINDS.get(error.code(), "Other")


def refusal_of(kind: str, topics: Sequence[str], error: KafkaError) -> str:
    """Why brokers take nothing from this server at all, and what to do; empty: it is not that."""
    names = ", ".join(filter(None, topics)) or "their topic"
    if kind == "NotAllowed":
        return (
            f"the brokers do not let this user write to {names}: allow it Write, and "
            f"IdempotentWrite on the cluster ({error.name()})"
        )
    if kind == "ClockAhead":
        return (
            f"this server's clock is ahead of the broker's by more than {names} allows, an hour "
            "unless message.timestamp.after.max.ms says otherwise: set the clocks of this node and "
            "of the brokers, or the topic's message.timestamp.type to LogAppendTime"
        )
    return ""
