"""A sink in memory, that can be told to hold batches back, to be away, or to reject."""

import asyncio
from collections.abc import Callable, Sequence

from outrider_operator.core.batch import Batch, message_of
from outrider_operator.core.sink import Origin, SinkError
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import RecordBatch


class Gate:
    """Open, batches pass; closed, they wait inside the sink."""

    def __init__(self, opened: Callable[[], None]) -> None:
        self._opened = opened
        self._open = True

    def set(self) -> None:
        self._open = True
        self._opened()

    def clear(self) -> None:
        self._open = False

    def is_set(self) -> bool:
        return self._open


class MemorySink:
    """Keeps batches in `stored`.

    Attributes:
        open: cleared, batches wait inside the sink.
        error: set, batches are refused with it.
        aside_error: set, batches are not set aside, with it.
        aside: what was set aside, with the reason.
        copies: it counts a copy of each batch, as other sinks do.
        refuse: where it returns an error, that batch is refused with it.
    """

    def __init__(self) -> None:
        self.copies = False
        self.stored: list[tuple[Origin, RecordBatch]] = []
        self.open = Gate(self._let_in)
        self.error: SinkError | None = None
        self.aside_error: SinkError | None = None
        self.aside: list[tuple[Origin, RecordBatch, str]] = []
        self.refuse: Callable[[RecordBatch], SinkError | None] = lambda _: None
        self.max_batch_bytes = limits.BATCH_BYTES
        self.separate: Sequence[Sequence[int]] = ()
        self._inside: list[tuple[Origin, RecordBatch, asyncio.Future[None]]] = []

    @property
    def waiting(self) -> int:
        """Number of batches inside the sink."""
        return len(self._inside)

    def cost(self, batch: Batch) -> int:
        return len(batch.records) if self.copies else 0

    def store(self, origin: Origin, batch: Batch) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inside.append((origin, message_of(batch), future))
        if self.open.is_set():
            self._let_in()
        return future

    async def set_aside(self, origin: Origin, batch: Batch, reason: str) -> None:
        if self.aside_error is not None:
            raise self.aside_error
        self.aside.append((origin, message_of(batch), reason))

    def release(self, count: int) -> None:
        """Let so many through while it is closed, the oldest first."""
        inside, self._inside = self._inside[:count], self._inside[count:]
        for entry in inside:
            self._pass(*entry)

    def _let_in(self) -> None:
        self.release(len(self._inside))

    def _pass(self, origin: Origin, batch: RecordBatch, future: "asyncio.Future[None]") -> None:
        error = self.error or self.refuse(batch)
        if error is None:
            self.stored.append((origin, batch))
        if not future.cancelled():
            future.set_exception(error) if error else future.set_result(None)

    @property
    def names(self) -> list[tuple[str, int, int]]:
        """(agent id, epoch, seq) of what is stored, in order."""
        return [(origin.agent_id, batch.epoch, batch.seq) for origin, batch in self.stored]
