"""What a record sink promises, so that the gateway and the sinks need not know each other.

Only the contract: no sink is made here, and nothing is stored.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from outrider_operator.core.batch import Batch


@dataclass(frozen=True)
class Envelope:
    """What an agent says of its host; not to be trusted. One object for each stream.

    Attributes:
        intranet_ipv4: private addresses, joined by ","; the other three likewise.
        hostname: of the host.
        version: of the agent.
        product: name of the agent program.
    """

    intranet_ipv4: str = ""
    extranet_ipv4: str = ""
    intranet_ipv6: str = ""
    extranet_ipv6: str = ""
    hostname: str = ""
    version: str = ""
    product: str = ""


NO_ENVELOPE = Envelope()


@dataclass(frozen=True)
class Origin:
    """Where a batch comes from, as the agent's token says.

    Attributes:
        agent_id: UID of the Node; the key in Kafka.
        node: name of the node.
        received_unix_nanos: when the gateway took it, nanoseconds since the Unix epoch.
        envelope: what the agent says of its host.
    """

    agent_id: str
    node: str
    received_unix_nanos: int
    envelope: Envelope = NO_ENVELOPE


class SinkError(Exception):
    """A batch was not stored."""


class SinkUnavailableError(SinkError):
    """Not stored now; the same batch may be handed over again later."""


class SinkRejectedError(SinkError):
    """Never to be stored as it is, however often it is tried.

    Attributes:
        max_bytes: where the batch is too large: the most bytes of RecordBatch.records that would
            do; 0 for every other reason.
    """

    def __init__(self, text: str, *, max_bytes: int = 0) -> None:
        super().__init__(text)
        self.max_bytes = max_bytes


class Storing(Protocol):
    """A batch on its way into a sink; a Future of asyncio's is one, and its methods are these."""

    def add_done_callback(self, call: Callable[[Any], object], /) -> None:
        """Have `call` called with this when it is done; not before this call returns."""

    def done(self) -> bool:
        """Whether it is known what became of it."""

    def cancelled(self) -> bool:
        """Whether it was given up, by others than the sink."""

    def exception(self) -> BaseException | None:
        """Why the batch was not stored; None: it was."""

    def __await__(self) -> Generator[Any, None, None]:
        """Wait until it is done; raises what `exception` returns."""


class Sink(Protocol):
    """Where record batches go. One object serves all streams of a process."""

    @property
    def max_batch_bytes(self) -> int:
        """Largest RecordBatch.records that is taken now, bytes: agents are told."""
        ...

    @property
    def separate(self) -> Sequence[Sequence[int]]:
        """Groups of data types that go to places of their own: agents are told."""
        ...

    def cost(self, batch: Batch) -> int:
        """Bytes that the sink itself will hold for a batch, from `store` until it is done."""
        ...

    def store(self, origin: Origin, batch: Batch) -> Storing:
        """Store a batch; what is returned is done once it is safe, however long the sink needs.

        Takes no time itself: there is one call for each batch, so that a task for each would be
        what the process does most. Cancelling what is returned does not take the batch back.

        Safe means: it is there after this process and, for what the sink promises, its machine
        or broker was killed. A batch may be stored twice, never not at all.

        Raises (when awaited):
            SinkUnavailableError: not stored, try again later.
            SinkRejectedError: not stored, and never will be.
        """
        ...

    async def set_aside(self, origin: Origin, batch: Batch, reason: str) -> None:
        """Keep a batch that can never be stored where people find it, with the reason.

        Whatever does not fit there either is cut, and said so; this never rejects.

        Raises:
            SinkUnavailableError: not done, try again later.
        """
        ...
