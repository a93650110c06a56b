"""One batch on its way into Kafka: in one message or in many, done when all are stored.

Knows what became of its messages, and nothing of producers.
"""

import asyncio
from collections.abc import Callable
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
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "NotAllowed",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "NotAllowed",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "NotAllowed",
}


class Sending:
    """A batch on its way.

    Args:
        future: what the gateway waits for.
        size: bytes of the batch's records.
        cost: bytes it counts for in the bound.
        topics: where it goes, for counting.
        ended: told when its last message is.

    Attributes:
        left: messages whose report is still to come; below 1: it is over.
        failure: why it cannot be stored, found before any broker was asked.
        error: what a broker or the library said of a message.
    """

    __slots__ = ("_ended", "cost", "error", "failure", "future", "left", "size", "topics")

    def __init__(
        self,
        future: "asyncio.Future[None]",
        size: int,
        cost: int,
        topics: tuple[str, ...],
        ended: "Callable[[Sending], None]",
    ) -> None:
        self.future = future
        self.size = size
        self.cost = cost
        self.topics = topics
        self.left = len(topics)
        self.failure: SinkError | None = None
        self.error: KafkaError | None = None
        self._ended = ended

    def __call__(self, error: KafkaError | None, _message: Any) -> None:
        """The report of one message."""
        if error is not None and self.error is None:
            self.error = error
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


def kind_of(error: KafkaError) -> str:
    """A word for an error, out of a small set."""
    if error.fatal():
        return "Fatal"
    return KINDS.get(error.code(), "Other")
