"""What streams of batches and streams of plain records have in common: one call of Transfer.

The call's own task reads; ending it from elsewhere cancels that task, with the reason kept here.
Holds the stream's window: what is in flight of it, and the wait for room. Sends nothing.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio
from outrider_runtime.logs import get_logger

from outrider_operator.core.batch import Batch
from outrider_operator.core.identity import Identity
from outrider_operator.core.sink import NO_ENVELOPE, Envelope, Origin
from outrider_operator.gateway.hub import TOKEN_EXPIRED, End, Hub
from outrider_operator.gateway.intake import Intake
from outrider_operator.gateway.pace import Limiter
from outrider_operator.gateway.plain_room import PlainRoom
from outrider_operator.gateway.session import Event, Refused, SessionProtocol
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import AuthSettings, GatewaySettings

#: Batches of one stream that may be in flight, however small they are.
STREAM_BATCHES: Final = 256
#: A stream whose agent has closed its side may still store and acknowledge for so long, seconds.
CLOSE_SECONDS: Final = 5.0
#: A stream whose token states no end lives so long, seconds.
UNKNOWN_EXPIRY_SECONDS: Final = 3600.0
#: Rejected batches of one stream that are each told in the log; the others are only counted.
TOLD_REJECTS: Final = 5

log = get_logger(__name__)


@dataclass(frozen=True)
class Shared:
    """What all streams of a gateway have in common.

    Attributes:
        calls: all open streams, of both kinds.
    """

    settings: GatewaySettings
    auth: AuthSettings
    hub: Hub
    intake: Intake
    limiter: Limiter
    plain: PlainRoom
    metrics: ServerMetrics
    replica: str
    version: str
    draining: Callable[[], bool]
    calls: "set[Stream]" = field(default_factory=set)


class Stream:
    """One call of Transfer, as an owner of batches.

    Args:
        shared: the gateway's parts.
        identity: who the agent is.
        context: grpc's, to read and write bytes.
    """

    __slots__ = (
        "_changed",
        "_context",
        "_end",
        "_held_batches",
        "_held_bytes",
        "_identity",
        "_protocol",
        "_rejects",
        "_shared",
        "_task",
        "closed",
        "envelope",
        "expires",
    )

    #: A batch that is too large can be given back.
    splits = False

    def __init__(
        self, shared: Shared, identity: Identity, context: Any, protocol: SessionProtocol
    ) -> None:
        self._shared = shared
        self._identity = identity
        self._context = context
        self._protocol = protocol
        self._task: asyncio.Task[Any] | None = None
        self._end: End | None = None
        self._held_bytes = 0
        self._held_batches = 0
        self._rejects = 0
        # Resolved when something of the window was given back; there while the reader waits.
        self._changed: asyncio.Future[None] | None = None
        self.envelope: Envelope = NO_ENVELOPE
        self.closed = False
        self.expires = self._expiry()

    def end(self, end: End) -> None:
        """End the stream; only the first end counts."""
        if self._end is None:
            self._end = end
            if self._task is not None:
                self._task.cancel()

    def sweep(self, now: float, monotonic: float) -> None:
        """Look at the clock; called for all streams, once a second or so."""
        del monotonic
        if now >= self.expires:
            self.end(TOKEN_EXPIRED)

    async def _until_end(self, work: Callable[[], Awaitable[End]]) -> End:
        """How the stream ends: as `work` says, or as `end` was told meanwhile.

        Raises:
            asyncio.CancelledError: the peer has gone, or the server stops.
        """
        task = self._task = asyncio.current_task()
        assert task is not None
        try:
            if self._told() is None:
                found = await work()
                if self._told() is None:
                    self._end = found
                else:
                    await asyncio.sleep(0)  # `end` has cancelled this task: it comes out here
        except asyncio.CancelledError:
            if self._told() is None or task.uncancel() > 0:
                raise
        finally:
            self._task = None
        end = self._told()
        assert end is not None
        return end

    def _told(self) -> End | None:
        """How the stream is to end; another may have said so during any wait."""
        return self._end

    def _expiry(self) -> float:
        """When the stream is to end, seconds since the Unix epoch."""
        if self._identity.expires is None:
            return time.time() + UNKNOWN_EXPIRY_SECONDS
        return self._identity.expires + self._shared.auth.expiry_grace_seconds

    async def _read(self) -> Event | None:
        """The next message, as the protocol understands it; None: the peer has closed its side."""
        data = await self._read_bytes()
        return None if data is None else self._protocol.receive(data)

    async def _read_bytes(self) -> bytes | None:
        data: Any = await self._context.read()
        if data is grpc.aio.EOF:
            return None
        self._shared.metrics.messages_up.inc()
        self._shared.metrics.bytes_up.inc(len(data))
        found: bytes = data
        return found

    def refuse(self, refused: Refused) -> End:
        """Count and log a breach of the contract, as an End."""
        self._shared.metrics.refusals.labels(refused.code, refused.reason).inc()
        log.warning(
            "stream refused",
            node=self._identity.node,
            reason=refused.reason,
            error=refused.message,
        )
        return End("Refused", refused.code, refused.message)

    def _origin(self) -> Origin:
        return Origin(self._identity.node_uid, self._identity.node, time.time_ns(), self.envelope)

    # The window.

    async def _window(self, count: int, size: int) -> None:
        """Take room in the stream's own window; waits until there is some."""
        while self._held_batches and (
            self._held_batches + count > STREAM_BATCHES
            or self._held_bytes + size > self._shared.settings.window_bytes
        ):
            await self._wait_for_change()
        self._held_batches += count
        self._held_bytes += size

    def _give_back(self, count: int, size: int) -> None:
        self._held_batches -= count
        self._held_bytes -= size
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    async def _wait_for_change(self) -> None:
        self._changed = asyncio.get_running_loop().create_future()
        try:
            await self._changed
        finally:
            self._changed = None

    async def _all_settled(self) -> None:
        while self._held_batches:
            await self._wait_for_change()

    # As an owner of batches.

    def stored(self, batch: Batch, size: int) -> None:
        """A batch is safe."""
        del batch
        self._give_back(1, size)

    def split(self, batch: Batch, size: int, max_bytes: int) -> None:
        """Never called: this stream does not split."""
        raise AssertionError(f"a batch of {size} bytes cannot be split here ({max_bytes=})")

    def dropped(self, batch: Batch, size: int) -> None:
        """A batch is not held any more."""
        del batch
        self._give_back(1, size)

    def rejected(self, batch: Batch, error: str) -> None:
        """A batch is set aside."""
        self._rejects += 1
        if self._rejects > TOLD_REJECTS:
            return
        log.error(
            "sink rejects batch, it is set aside",
            node=self._identity.node,
            epoch=batch.epoch,
            seq=batch.seq,
            records=batch.count,
            error=error,
            last_told=self._rejects == TOLD_REJECTS,
        )
