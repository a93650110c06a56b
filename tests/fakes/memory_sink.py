"""A sink in memory, that can be told to hold batches back, to be away, or to reject."""

import asyncio

from outrider_operator.core.sink import Origin, SinkError
from outrider_proto.v1.agent_pb2 import RecordBatch


class MemorySink:
    """Keeps batches in `stored`.

    Attributes:
        open: cleared, batches wait inside the sink.
        error: set, batches are refused with it.
        waiting: number of batches inside the sink.
    """

    def __init__(self) -> None:
        self.stored: list[tuple[Origin, RecordBatch]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.error: SinkError | None = None
        self.waiting = 0

    async def store(self, origin: Origin, batch: RecordBatch) -> None:
        self.waiting += 1
        try:
            await self.open.wait()
        finally:
            self.waiting -= 1
        if self.error is not None:
            raise self.error
        self.stored.append((origin, batch))

    @property
    def names(self) -> list[tuple[str, int, int]]:
        """(agent id, epoch, seq) of what is stored, in order."""
        return [(origin.agent_id, batch.epoch, batch.seq) for origin, batch in self.stored]
