"""A stream of plain records, from an agent of another kind: made into batches here.

That protocol has no hello, no acknowledgements and no commands that such an agent would need:
flow control alone holds it back. So nothing of it is ever let go, and what is in flight when the
server dies is lost; docs/records.md says so.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

import grpc
import grpc.aio
from outrider_proto import batches, limits
from outrider_proto.v1.agent_pb2 import CODEC_NONE, CODEC_ZSTD, EncodedRecord, RecordBatch
from outrider_runtime.logs import get_logger

from outrider_operator.core.identity import Identity
from outrider_operator.gateway.hub import CLOSED, PEER_GONE, End
from outrider_operator.gateway.session import PlainCame, Refused, SessionProtocol
from outrider_operator.gateway.stream import CLOSE_SECONDS, Shared, Stream

#: Records go together up to this size before compression, bytes.
GROUP_BYTES: Final = 512 * limits.KIB
#: Below this compression is not worth its head, bytes.
COMPRESS_BYTES: Final = 512

log = get_logger(__name__)


class PlainStream(Stream):
    """One stream of plain records; its batches have an epoch of their own."""

    __slots__ = ("_epoch", "_seq")

    def __init__(
        self, shared: Shared, identity: Identity, context: Any, protocol: SessionProtocol
    ) -> None:
        super().__init__(shared, identity, context, protocol)
        self._epoch = secrets.randbelow(2**63 - 1) + 1
        self._seq = 0

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
            self._shared.calls.discard(self)
            self._shared.metrics.plain_streams.dec()
            log.info("plain stream ended", node=self._identity.node, reason=end.reason)
        return end

    async def _exchange(self, came: PlainCame) -> End:
        try:
            while True:
                await self._take(came.records)
                came.records.clear()  # others still refer to the list
                event = await self._read()
                if event is None:
                    break
                if isinstance(event, Refused):
                    return self.refuse(event)
                assert isinstance(event, PlainCame)
                came = event
        except (grpc.RpcError, grpc.aio.BaseError):
            return PEER_GONE
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._all_settled()
        return CLOSED

    async def _take(self, records: list[EncodedRecord]) -> None:
        most = min(GROUP_BYTES, self._shared.intake.sink.max_batch_bytes)
        for group in groups(records, most):
            batch = self._batch(group)
            size = batch.ByteSize()
            await self._window(1, size)
            # Room is given back by whoever settles the batch, but not before it is handed over.
            admitted = False
            try:
                admitted = await self._shared.intake.admit([(batch, size)], patience=None)
            finally:
                if not admitted:
                    self._give_back(1, size)
            self._shared.intake.store(self, self._origin(), [(batch, size)])
            self._shared.metrics.plain_records.inc(len(group))
            debt = self._shared.limiter.spend(self._identity.node_uid, len(group), size)
            if debt:
                self._shared.metrics.held_reads.inc()
                await asyncio.sleep(debt)

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
