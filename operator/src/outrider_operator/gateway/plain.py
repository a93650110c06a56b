"""A stream of plain records, from an agent of another kind: made into batches here.

That protocol has no hello, no acknowledgements and no commands that such an agent would need:
flow control alone holds it back. So nothing of it is ever let go, and a stream that is told to end
first hands over what it has read. What is lost all the same is counted; docs/records.md says when.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Iterable, Iterator
from typing import Any, Final, TypeVar

import grpc
import grpc.aio
from outrider_proto import batches, limits
from outrider_proto.v1.agent_pb2 import (
    CODEC_NONE,
    CODEC_ZSTD,
    EncodedRecord,
    PackagedData,
    RecordBatch,
)
from outrider_runtime.logs import get_logger

from outrider_operator.core.batch import Batch
from outrider_operator.core.identity import Identity
from outrider_operator.gateway.hub import CLOSED, PEER_GONE, End
from outrider_operator.gateway.plain_room import size_of
from outrider_operator.gateway.session import Event, PlainCame, Refused, SessionProtocol
from outrider_operator.gateway.stream import CLOSE_SECONDS, Shared, Stream

#: Records go together up to this size before compression, bytes.
GROUP_BYTES: Final = 512 * limits.KIB
#: Below this compression is not worth its head, bytes.
COMPRESS_BYTES: Final = 512

T = TypeVar("T")
log = get_logger(__name__)


class PlainStream(Stream):
    """One stream of plain records; its batches have an epoch of their own."""

    __slots__ = ("_epoch", "_last_call", "_open_bytes", "_resting", "_seq")

    def __init__(
        self, shared: Shared, identity: Identity, context: Any, protocol: SessionProtocol
    ) -> None:
        super().__init__(shared, identity, context, protocol)
        self._epoch = secrets.randbelow(2**63 - 1) + 1
        self._seq = 0
        # It waits for what is no loss when it does not come.
        self._resting = False
        self._last_call: asyncio.TimerHandle | None = None
        # Of the message that is being taken, as counted in the room of all.
        self._open_bytes = 0

    async def serve(self, first: PlainCame) -> End:
        """Serve the stream from its first message to its end, and say how it ended.

        Raises:
            asyncio.CancelledError: the peer has gone, or the server stops.
        """
        self.envelope = first.envelope
        self._shared.calls.add(self)
        self._shared.metrics.plain_streams.inc()
        log.info("plain stream opened", node=self._identity.node)
        end = PEER_GONE
        try:
            end = await self._until_end(lambda: self._exchange(first))
        finally:
            # Not closed: what it has handed over is nowhere else, and is tried again to the end.
            if self._last_call is not None:
                self._last_call.cancel()
            self._close_message()
            self._shared.calls.discard(self)
            self._shared.metrics.plain_streams.dec()
            log.info("plain stream ended", node=self._identity.node, reason=end.reason)
        return end

    def end(self, end: End) -> None:
        """End the stream once what was read of it is stored, or after a while; the first counts."""
        if self._end is not None:
            return
        self._end = end
        if self._task is None:
            return
        if self._resting:
            self._task.cancel()
        loop = asyncio.get_running_loop()
        self._last_call = loop.call_later(CLOSE_SECONDS, self._cut_off)

    def _cut_off(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _exchange(self, first: PlainCame) -> End:
        try:
            await self._open_first(first)
            came: Event | None = first
            while isinstance(came, PlainCame):
                await self._take(came.records)
                came.records.clear()  # others still refer to the list
                self._close_message()
                came = None if self._told() else await self._next()
            if isinstance(came, Refused):
                return self.refuse(came)
        except (grpc.RpcError, grpc.aio.BaseError):
            return PEER_GONE
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._all_settled()
        return CLOSED

    async def _open_first(self, first: PlainCame) -> None:
        """Have room for the first message, which is open already: it is closed while it waits."""
        size = sum(len(record.data) for record in first.records)
        if not self._shared.plain.take_at_once(size):
            count = len(first.records)
            data = PackagedData(records=first.records).SerializeToString()
            first.records.clear()
            await self._take_room(size, count)
            first.records.extend(PackagedData.FromString(data).records)
        self._open_bytes = size

    async def _next(self) -> Event | None:
        """The next message, once there is room to open it; None: there is none to come."""
        data = await self._unless_told(self._read_bytes())
        if data is None:
            return None
        size = size_of(data)
        if not self._shared.plain.take_at_once(size):
            # How many records are in it is not known before it is opened.
            await self._take_room(size, 1)
        self._open_bytes = size
        return self._protocol.receive(data)

    async def _take_room(self, size: int, records: int) -> None:
        try:
            await self._shared.plain.take(size)
        except asyncio.CancelledError:
            self._shared.plain.lose(records)
            raise

    def _close_message(self) -> None:
        if self._open_bytes:
            self._shared.plain.give_back(self._open_bytes)
            self._open_bytes = 0

    async def _unless_told(self, wait: Awaitable[T]) -> T | None:
        """What `wait` returns; None: the stream was told to end, before or meanwhile."""
        task = self._task
        assert task is not None
        self._resting = True
        try:
            return await wait
        except asyncio.CancelledError:
            if self._told() is None or task.uncancel() > 0:
                raise
            return None
        finally:
            self._resting = False

    async def _take(self, records: list[EncodedRecord]) -> None:
        most = min(GROUP_BYTES, self._shared.intake.sink.max_batch_bytes)
        left = len(records)
        try:
            for group in groups(records, most):
                debt = await self._hand_over(group)
                left -= len(group)
                if debt and not self._told():
                    self._shared.metrics.held_reads.inc()
                    await self._unless_told(asyncio.sleep(debt))
        finally:
            if left:
                self._shared.plain.lose(left)

    async def _hand_over(self, group: list[EncodedRecord]) -> float:
        """Have records stored; returns for how long to wait with the next ones, seconds."""
        shared = self._shared
        batch = self._batch(group)
        size = batch.ByteSize()
        await self._window(1, size)
        # Room is given back by whoever settles the batch, but not before it is handed over.
        admitted = False
        try:
            admitted = await shared.intake.admit([(batch, size)], patience=None)
        finally:
            if not admitted:
                self._give_back(1, size)
        shared.plain.handed_over(batch.count)
        shared.intake.store(self, self._origin(), [(batch, size)])
        shared.metrics.plain_records.inc(len(group))
        return shared.limiter.spend(self._identity.node_uid, len(group), size)

    # As an owner of batches.

    def stored(self, batch: Batch, size: int) -> None:
        """A batch is safe."""
        super().stored(batch, size)
        self._shared.plain.settled(batch.count)

    def dropped(self, batch: Batch, size: int) -> None:
        """A batch is given up: the server stops."""
        super().dropped(batch, size)
        self._shared.plain.settled(batch.count)
        self._shared.plain.lose(batch.count)

    def _batch(self, group: list[EncodedRecord]) -> RecordBatch:
        self._seq += 1
        large = sum(len(record.data) for record in group) > COMPRESS_BYTES
        return batches.encode(
            group,
            epoch=self._epoch,
            seq=self._seq,
            codec=CODEC_ZSTD if large else CODEC_NONE,
            created_unix_nanos=time.time_ns(),
        )


def groups(records: Iterable[EncodedRecord], most: int) -> Iterator[list[EncodedRecord]]:
    """Cut records into groups of at most so many bytes and as many records as a batch may have.

    One record alone may be larger.
    """
    group: list[EncodedRecord] = []
    held = 0
    for record in records:
        size = record.ByteSize() + 8  # its tag and length
        if group and (held + size > most or len(group) == limits.BATCH_RECORDS):
            yield group
            group, held = [], 0
        group.append(record)
        held += size
    if group:
        yield group
