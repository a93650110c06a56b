"""What a record sink promises, so that the gateway and the sinks need not know each other.

Only the contract: no sink is made here, and nothing is stored.
"""

from dataclasses import dataclass
from typing import Protocol

from outrider_proto.v1.agent_pb2 import RecordBatch


@dataclass(frozen=True)
class Origin:
    """Where a batch comes from, as the agent's token says.

    Attributes:
        agent_id: UID of the Node; the key in Kafka.
        node: name of the node.
        received_unix_nanos: when the gateway took it, nanoseconds since the Unix epoch.
    """

    agent_id: str
    node: str
    received_unix_nanos: int


class SinkError(Exception):
    """A batch was not stored."""


class SinkUnavailableError(SinkError):
    """Not stored now; the same batch may be handed over again later."""


class SinkRejectedError(SinkError):
    """Never to be stored, however often it is tried: too large for the sink, for one."""


class Sink(Protocol):
    """Where record batches go. One object serves all streams of a process."""

    async def store(self, origin: Origin, batch: RecordBatch) -> None:
        """Store a batch and return once it is safe; may wait as long as the sink needs.

        Safe means: it is there after this process and, for what the sink promises, its machine
        or broker was killed. A batch may be stored twice, never not at all.

        Raises:
            SinkUnavailableError: not stored, try again later.
            SinkRejectedError: not stored, and never will be.
        """
