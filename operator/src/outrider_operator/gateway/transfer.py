"""One agent's stream on the wire: the thin shell around session.py and outgoing.py.

Reads, writes, stores and keeps the times; decides nothing of its own. A stream ends in one place
only, with one reason, and takes all its tasks with it.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import Command, Drain, RecordBatch, Welcome
from outrider_proto.v1.fleet_pb2 import AgentSession
from outrider_runtime.logs import get_logger

from outrider_operator.core.identity import Identity
from outrider_operator.core.sink import Origin
from outrider_operator.gateway.auth import current_identity
from outrider_operator.gateway.hub import (
    CLOSED,
    DRAINING,
    PEER_GONE,
    TOKEN_EXPIRED,
    TOO_SLOW,
    End,
    Hub,
)
from outrider_operator.gateway.intake import ByteBudget, Intake
from outrider_operator.gateway.outgoing import Outgoing, OutgoingFullError
from outrider_operator.gateway.session import (
    BatchesCame,
    Event,
    HeartbeatCame,
    Opened,
    Refused,
    RunsReported,
    SessionProtocol,
)
from outrider_operator.gateway.signal import Signal
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import AuthSettings, GatewaySettings

#: Batches of one stream that may be in flight, however small they are.
STREAM_BATCHES: Final = 256
#: A stream whose agent has closed its side may still store and acknowledge for so long, seconds.
CLOSE_SECONDS: Final = 5.0
#: A stream whose token states no end lives so long, seconds.
UNKNOWN_EXPIRY_SECONDS: Final = 3600.0
#: Refusing a peer that reads nothing must not wait for it for ever, seconds.
ABORT_SECONDS: Final = 5.0

log = get_logger(__name__)


@dataclass(frozen=True)
class Shared:
    """What all streams of a gateway have in common."""

    settings: GatewaySettings
    auth: AuthSettings
    hub: Hub
    intake: Intake
    metrics: ServerMetrics
    replica: str
    version: str
    draining: Callable[[], bool]


async def transfer(shared: Shared, context: Any) -> None:
    """Serve one call of AgentService/Transfer until it ends."""
    if shared.draining():
        end = _sent_away(shared)
    else:
        end = await AgentStream(shared, current_identity(), context).serve()
    if end not in (CLOSED, PEER_GONE):
        # Where even the status cannot be sent, grpc drops the call when this returns.
        async with asyncio.timeout(ABORT_SECONDS):
            await context.abort(grpc.StatusCode[end.code], end.message)


def _sent_away(shared: Shared) -> End:
    shared.metrics.refusals.labels(DRAINING.code, DRAINING.reason).inc()
    return DRAINING


class AgentStream:
    """One agent's stream.

    Args:
        shared: the gateway's parts.
        identity: who the agent is.
        context: grpc's, to read and write bytes.
    """

    def __init__(self, shared: Shared, identity: Identity, context: Any) -> None:
        self._shared = shared
        self._identity = identity
        self._context = context
        self._protocol = SessionProtocol(identity)
        self._outgoing = Outgoing()
        self._wake = Signal()
        self._flushed = Signal()
        self._ended: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._window = ByteBudget(shared.settings.window_bytes)
        self._places = asyncio.Semaphore(STREAM_BATCHES)
        self._stores: set[asyncio.Task[None]] = set()
        self._letting_go = False
        self.info = AgentSession(
            node=identity.node,
            node_uid=identity.node_uid,
            pod=identity.pod,
            session=shared.hub.next_number(),
            address=_address(context.peer()),
        )
        self._log = log.bind(node=identity.node, session=self.info.session)

    def push(self, command: Command) -> None:
        """Send a command, merged with what waits; ends the stream when too much waits."""
        try:
            self._outgoing.merge(command)
        except OutgoingFullError:
            self.end(TOO_SLOW)
        self._wake.set()

    def tell_drain(self, reason: str, spread_seconds: float) -> None:
        """Tell the agent to connect elsewhere and close this stream."""
        self._outgoing.drain(Drain(reason=reason, spread_millis=int(spread_seconds * 1000)))
        self._wake.set()

    def end(self, end: End) -> None:
        """End the stream; only the first end counts."""
        if not self._ended.done():
            self._ended.set_result(end)

    async def serve(self) -> End:
        """Serve the stream from its hello to its end, and say how it ended.

        Raises:
            asyncio.CancelledError: the peer has gone, or the server stops.
        """
        refused = await self._hello()
        if refused is not None:
            return refused
        if self._shared.draining():  # since the call began; nobody would tell this stream
            return _sent_away(self._shared)
        self._shared.hub.join(self)
        self._log.info("stream opened", address=self.info.address)
        end = PEER_GONE
        try:
            end = await self._exchange()
        finally:
            self._shared.intake.forget(self._tell_again)
            self._shared.hub.leave(self, end.reason)
            self._log.info("stream ended", reason=end.reason)
        return end

    async def _hello(self) -> End | None:
        """Wait for the hello; an End when there was none that will do."""
        seconds = self._shared.settings.hello_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                data = await self._context.read()
        except TimeoutError:
            message = f"no hello within {seconds:g} s"
            return self._refuse(Refused("DEADLINE_EXCEEDED", "HelloTimeout", message))
        if data is grpc.aio.EOF:
            return self._refuse(Refused("INVALID_ARGUMENT", "NoHello", "closed before hello"))
        event = self._receive(data)
        if isinstance(event, Refused):
            return self._refuse(event)
        assert isinstance(event, Opened)
        self.info.hello.CopyFrom(event.hello)
        return None

    def _refuse(self, refused: Refused) -> End:
        self._shared.metrics.refusals.labels(refused.code, refused.reason).inc()
        self._log.warning("stream refused", reason=refused.reason, error=refused.message)
        return End("Refused", refused.code, refused.message)

    def _receive(self, data: bytes) -> Event:
        self._shared.metrics.messages.labels("up").inc()
        self._shared.metrics.bytes.labels("up").inc(len(data))
        return self._protocol.receive(data)

    async def _exchange(self) -> End:
        loop = asyncio.get_running_loop()
        expires = self._expiry()
        timer = loop.call_later(max(0.0, expires - time.time()), self.end, TOKEN_EXPIRED)
        try:
            async with asyncio.TaskGroup() as group:
                writer = group.create_task(self._write(self._welcome(expires)), name="write")
                reader = group.create_task(self._read(group), name="read")
                end = await self._ended
                for task in (reader, writer, *self._stores):
                    task.cancel()
        finally:
            timer.cancel()
        return end

    def _expiry(self) -> float:
        """When the stream is to end, seconds since the Unix epoch."""
        if self._identity.expires is None:
            return time.time() + UNKNOWN_EXPIRY_SECONDS
        return self._identity.expires + self._shared.auth.expiry_grace_seconds

    def _welcome(self, expires: float) -> Command:
        return Command(
            welcome=Welcome(
                server=self._shared.replica,
                version=self._shared.version,
                agent_id=self._identity.node_uid,
                expires_unix_nanos=int(expires * 1e9),
                window_bytes=self._shared.settings.window_bytes,
            )
        )

    # What comes up.

    async def _read(self, group: asyncio.TaskGroup) -> None:
        try:
            while (data := await self._context.read()) is not grpc.aio.EOF:
                event = self._receive(data)
                if isinstance(event, Refused):
                    self.end(self._refuse(event))
                    return
                if isinstance(event, BatchesCame):
                    for batch in event.batches:
                        await self._take(batch, group)
                elif isinstance(event, RunsReported):
                    self._shared.hub.report(self, event.report)
                    await self._shared.hub.room(self.info.node)
                elif isinstance(event, HeartbeatCame):
                    self._outgoing.answer(event.heartbeat)
                    self._wake.set()
        except (grpc.RpcError, grpc.aio.BaseError):
            self.end(PEER_GONE)
            return
        await self._finish()

    async def _finish(self) -> None:
        """The agent has closed its side: store and acknowledge what is in flight, for a while.

        Where the connection is gone, grpc cancels this call's task instead.
        """
        if self._stores:
            await asyncio.wait(self._stores, timeout=CLOSE_SECONDS)
        self._flushed.clear()
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._flushed.wait()
        self.end(CLOSED)

    async def _take(self, batch: RecordBatch, group: asyncio.TaskGroup) -> None:
        """Make room for a batch and have it stored; holds the reading up while there is none."""
        origin = Origin(self._identity.node_uid, self._identity.node, time.time_ns())
        size = len(batch.records)
        await self._places.acquire()
        await self._window.take(size)
        if not await self._admit(batch):
            self._places.release()
            self._window.give_back(size)
            return
        task = group.create_task(self._store(origin, batch), name="store")
        self._stores.add(task)
        # Not in the task itself: one that is cancelled before its first step runs none of it.
        task.add_done_callback(functools.partial(self._settled, batch))

    async def _admit(self, batch: RecordBatch) -> bool:
        if self._letting_go:
            return await self._shared.intake.admit(batch, at_once=True)
        if await self._shared.intake.admit(batch):
            return True
        # The agent sends it again on its next stream; tell it when that is of use.
        self._letting_go = True
        self._shared.intake.when_room(self._tell_again)
        self._log.warning("batches let go, the sink takes none")
        return False

    def _tell_again(self) -> None:
        spread = self._shared.settings.drain_spread_seconds
        self.tell_drain("batches were let go while the sink took none: send them again", spread)

    async def _store(self, origin: Origin, batch: RecordBatch) -> None:
        try:
            await self._shared.intake.store(origin, batch)
            self._outgoing.acknowledge(batch.epoch, batch.seq)
            self._wake.set()
        except OutgoingFullError:
            self.end(TOO_SLOW)

    def _settled(self, batch: RecordBatch, task: asyncio.Task[None]) -> None:
        self._stores.discard(task)
        self._shared.intake.release(batch)
        self._window.give_back(len(batch.records))
        self._places.release()

    # What goes down.

    async def _write(self, welcome: Command) -> None:
        try:
            await self._send(welcome)
            while True:
                self._wake.clear()
                while (command := self._outgoing.take()) is not None:
                    await self._send(command)
                self._flushed.set()
                await self._wake.wait()
        except TimeoutError:
            self.end(TOO_SLOW)
        except (grpc.RpcError, grpc.aio.BaseError):
            self.end(PEER_GONE)

    async def _send(self, command: Command) -> None:
        data = command.SerializeToString()
        if len(data) > limits.MESSAGE_BYTES:
            raise AssertionError(f"a command of {len(data)} bytes was made")
        async with asyncio.timeout(self._shared.settings.write_timeout_seconds):
            await self._context.write(data)
        self._shared.metrics.messages.labels("down").inc()
        self._shared.metrics.bytes.labels("down").inc(len(data))


def _address(peer: str) -> str:
    """Turn grpc's "ipv4:10.0.0.1:5000" or "ipv6:%5B::1%5D:5000" into "host:port"."""
    return peer.partition(":")[2].replace("%5B", "[").replace("%5D", "]")
