"""One agent's stream on the wire: the thin shell around session.py and outgoing.py.

Reads, writes, hands batches over and keeps the times; decides nothing of its own. A stream ends in
one place only, with one reason, and takes its writer with it. An idle stream has no task but the
call's own, no timer, and nothing that waits.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any, Final

import grpc
import grpc.aio
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import Command, DataTypes, Drain, Welcome
from outrider_proto.v1.fleet_pb2 import AgentSession
from outrider_runtime.logs import get_logger

from outrider_operator.core.batch import Batch
from outrider_operator.core.identity import Identity
from outrider_operator.core.rates import Pauses
from outrider_operator.gateway.auth import current_identity
from outrider_operator.gateway.hub import CLOSED, DRAINING, PEER_GONE, TOO_SLOW, End
from outrider_operator.gateway.outgoing import Outgoing, OutgoingFullError
from outrider_operator.gateway.pace import window
from outrider_operator.gateway.plain import PlainStream
from outrider_operator.gateway.session import (
    BatchesCame,
    ConfigReported,
    HeartbeatCame,
    Opened,
    PlainCame,
    Refused,
    RunsReported,
    SessionProtocol,
)
from outrider_operator.gateway.stream import CLOSE_SECONDS, STREAM_BATCHES, Shared, Stream

#: Refusing a peer that reads nothing must not wait for it for ever, seconds.
ABORT_SECONDS: Final = 5.0
#: Acknowledgements of a stream are gathered for so long after the last ones were sent, seconds,
#: unless this share of its window is free again. An agent with a full window sends what it has room
#: for: many small acknowledgements would make many small messages of it. Others do not wait for
#: them, and nothing else does.
GATHER_SECONDS: Final = 0.5
GATHER_SHARE: Final = 0.5
#: Where nothing of the stream is in flight any more they wait only so long, seconds: its agent may
#: have no room for the next batch, if that is a large one.
QUIET_SECONDS: Final = 0.05

log = get_logger(__name__)


async def transfer(shared: Shared, context: Any) -> None:
    """Serve one call of Transfer until it ends."""
    end = _sent_away(shared) if shared.draining() else await _serve(shared, context)
    if end not in (CLOSED, PEER_GONE):
        # Where even the status cannot be sent, grpc drops the call when this returns.
        async with asyncio.timeout(ABORT_SECONDS):
            await context.abort(grpc.StatusCode[end.code], end.message)


async def _serve(shared: Shared, context: Any) -> End:
    identity = current_identity()
    protocol = SessionProtocol(identity, plain=shared.settings.accept_plain_records)
    stream = AgentStream(shared, identity, context, protocol)
    first = await _first(stream, shared.settings.hello_timeout_seconds)
    if isinstance(first, Refused):
        return stream.refuse(first)
    if shared.draining():  # since the call began; nobody would tell this stream
        return _sent_away(shared)
    if isinstance(first, PlainCame):
        return await PlainStream(shared, identity, context, protocol).serve(first)
    return await stream.serve(first)


async def _first(stream: "AgentStream", seconds: float) -> Opened | PlainCame | Refused:
    """Wait for the first message, and see that it will do."""
    try:
        async with asyncio.timeout(seconds):
            event = await stream.read()
    except TimeoutError:
        return Refused("DEADLINE_EXCEEDED", "HelloTimeout", f"no hello within {seconds:g} s")
    if event is None:
        return Refused("INVALID_ARGUMENT", "NoHello", "closed before hello")
    assert isinstance(event, Opened | PlainCame | Refused)
    return event


def _sent_away(shared: Shared) -> End:
    shared.metrics.refusals.labels(DRAINING.code, DRAINING.reason).inc()
    return DRAINING


class AgentStream(Stream):
    """One agent's stream.

    Args:
        shared: the gateway's parts.
        identity: who the agent is.
        context: grpc's, to read and write bytes.
        protocol: what its messages mean; has seen none yet.
    """

    __slots__ = (
        "_acked_batches",
        "_acked_bytes",
        "_gather",
        "_granted",
        "_letting_go",
        "_outgoing",
        "_pauses",
        "_sent_at",
        "_writer",
        "_writing_since",
        "config_report",
        "info",
    )

    splits = True

    def __init__(
        self, shared: Shared, identity: Identity, context: Any, protocol: SessionProtocol
    ) -> None:
        super().__init__(shared, identity, context, protocol)
        # These three are there only while they are needed.
        self._outgoing: Outgoing | None = None
        self._pauses: Pauses | None = None
        self._writer: asyncio.Task[None] | None = None
        self._gather: asyncio.TimerHandle | None = None
        self._writing_since = 0.0
        self._sent_at = 0.0
        self._acked_bytes = 0
        self._acked_batches = 0
        self._granted = 0
        self._letting_go = False
        self.config_report = b""
        self.info = AgentSession(
            node=identity.node,
            node_uid=identity.node_uid,
            pod=identity.pod,
            session=shared.hub.next_number(),
            address=_address(context.peer()),
        )

    @property
    def waits(self) -> bool:
        """Something waits to be sent."""
        return self._outgoing is not None

    def push(self, command: Command) -> None:
        """Send a command, merged with what waits; ends the stream when too much waits."""
        try:
            self._out().merge(command)
        except OutgoingFullError:
            self.end(TOO_SLOW)
        self._wake()

    def tell_drain(self, reason: str, spread_seconds: float) -> None:
        """Tell the agent to connect elsewhere and close this stream."""
        self._out().drain(Drain(reason=reason, spread_millis=int(spread_seconds * 1000)))
        self._wake()

    def sweep(self, now: float, monotonic: float) -> None:
        """Look at the clock: the token's end, and a write that does not come to its own."""
        super().sweep(now, monotonic)
        if self._granted:
            self._grant(window(self._shared.settings, len(self._shared.hub)))
        began = self._writing_since
        if began and monotonic - began > self._shared.settings.write_timeout_seconds:
            self.end(TOO_SLOW)

    async def serve(self, first: Opened) -> End:
        """Serve the stream after its hello to its end, and say how it ended.

        Raises:
            asyncio.CancelledError: the peer has gone, or the server stops.
        """
        self.info.hello.CopyFrom(first.hello)
        self.envelope = first.envelope
        shared, node, session = self._shared, self.info.node, self.info.session
        shared.hub.join(self)
        shared.calls.add(self)
        log.info("stream opened", node=node, session=session, address=self.info.address)
        end = PEER_GONE
        try:
            end = await self._until_end(self._exchange)
        finally:
            self.closed = True
            shared.calls.discard(self)
            shared.intake.forget(self._tell_again)
            shared.hub.leave(self, end.reason)
            self._stop_writing()
            log.info("stream ended", node=node, session=session, reason=end.reason)
        return end

    def _grant(self, most: int) -> None:
        """Give the agent another window where the share it has is far from what it is now."""
        if not self._granted / 2 < most < self._granted * 2:
            self._granted = most
            self._out().window(most)
            self._wake()

    def _welcome(self) -> Command:
        shared = self._shared
        sink = shared.intake.sink
        self._granted = window(shared.settings, len(shared.hub))
        return Command(
            welcome=Welcome(
                server=shared.replica,
                version=shared.version,
                agent_id=self._identity.node_uid,
                expires_unix_nanos=int(self.expires * 1e9),
                window_bytes=self._granted,
                window_batches=STREAM_BATCHES,
                max_batch_bytes=sink.max_batch_bytes,
                separate=[DataTypes(data_types=group) for group in sink.separate],
            )
        )

    # What comes up.

    async def read(self) -> Any:
        """The next message as an event; None: the agent has closed its side."""
        return await self._read()

    async def _exchange(self) -> End:
        try:
            await self._send(self._welcome())
            self._wake()
            while (event := await self._read()) is not None:
                if isinstance(event, BatchesCame):
                    await self._take(event)
                elif isinstance(event, RunsReported):
                    self._shared.hub.report(self, event.report)
                    await self._shared.hub.room(self.info.node)
                elif isinstance(event, ConfigReported):
                    self._shared.hub.config_reported(self, event.report)
                elif isinstance(event, HeartbeatCame):
                    self._out().answer(event.heartbeat)
                    self._wake()
                elif isinstance(event, Refused):
                    return self.refuse(event)
                # Else it would be kept until the next one comes, with all that it holds.
                del event
        except (grpc.RpcError, grpc.aio.BaseError):
            return PEER_GONE
        return await self._finish()

    async def _finish(self) -> End:
        """The agent has closed its side: store and acknowledge what is in flight, for a while.

        Where the connection is gone, grpc cancels this call's task instead.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._all_settled()
        self._wake()
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=CLOSE_SECONDS)
        return CLOSED

    async def _take(self, came: BatchesCame) -> None:
        """Have batches stored; holds the reading up while there is no room for them.

        A message may hold more than the window: then it goes in parts.
        """
        debt = self._slow_down(came)
        window = self._shared.settings.window_bytes
        if came.size <= window:
            await self._take_part(came.batches, came.size)
        else:
            part: list[tuple[Batch, int]] = []
            held = 0
            for batch, size in came.batches:
                if part and held + size > window:
                    await self._take_part(part, held)
                    part, held = [], 0
                part.append((batch, size))
                held += size
            await self._take_part(part, held)
        if debt:
            self._shared.metrics.held_reads.inc()
            await asyncio.sleep(debt)

    async def _take_part(self, part: Sequence[tuple[Batch, int]], size: int) -> None:
        intake, count = self._shared.intake, len(part)
        await self._window(count, size)
        admitted = False
        try:
            patience = 0 if self._letting_go else intake.patience
            admitted = await intake.admit(part, patience=patience)
        finally:
            if not admitted:
                self._give_back(count, size)
        if admitted:
            intake.store(self, self._origin(), part)
        elif not self._letting_go:
            # The agent sends them again on its next stream; tell it when that is of use.
            self._letting_go = True
            intake.when_room(self._tell_again)
            log.warning("batches let go, the sink takes none", node=self.info.node)

    def _tell_again(self) -> None:
        # At once: the intake tells no more agents than there is room for.
        self.tell_drain("batches were let go while the sink took none: send them again", 0.0)

    def _slow_down(self, came: BatchesCame) -> float:
        """Ask the agent for a pause where it sends more than its share, or the sink is slow.

        Returns the seconds for which it is not to be read: it was asked before.
        """
        shared = self._shared
        debt = shared.limiter.spend(self._identity.node_uid, came.records, came.size)
        pressure = shared.intake.pressure()
        if not (debt or pressure):
            return 0.0
        pauses = self._pauses = self._pauses or Pauses()
        tell, hold = pauses.step(max(debt, pressure), time.monotonic())
        if tell:
            reason = "limit" if debt >= pressure else "sink"
            shared.metrics.slow_downs.labels(reason).inc()
            texts = {"limit": "more than this agent's share", "sink": "the record sink is slow"}
            self._out().slow_down(math.ceil(tell * 1000), texts[reason])
            if debt:
                self._wake()
            elif self._writer is None:
                self._wake_for_acks()  # with the next acknowledgements: the bound holds
        return min(hold, debt)

    # As an owner of batches.

    def stored(self, batch: Batch, size: int) -> None:
        """A batch is safe: acknowledge it, with all others of this turn of the loop."""
        self._give_back(1, size)
        if self.closed:
            return
        try:
            self._out().acknowledge(batch.epoch, batch.seq)
        except OutgoingFullError:
            self.end(TOO_SLOW)
        self._acked_bytes += size
        self._acked_batches += 1
        if self._writer is None:
            self._wake_for_acks()

    def split(self, batch: Batch, size: int, max_bytes: int) -> None:
        """A batch is too large: the agent makes smaller ones of it."""
        self._give_back(1, size)
        if self.closed:
            return
        try:
            self._out().reject(batch.epoch, batch.seq, max_bytes)
        except OutgoingFullError:
            self.end(TOO_SLOW)
        self._wake()

    # What goes down.

    def _out(self) -> Outgoing:
        if self._outgoing is None:
            self._outgoing = Outgoing()
        return self._outgoing

    def _wake_for_acks(self) -> None:
        """Send acknowledgements now, or with those that follow soon."""
        if (
            self._acked_bytes >= GATHER_SHARE * self._granted
            or self._acked_batches >= GATHER_SHARE * STREAM_BATCHES
        ):
            self._wake()
            return
        loop = asyncio.get_running_loop()
        seconds = GATHER_SECONDS if self._held_batches else QUIET_SECONDS
        if loop.time() - self._sent_at >= seconds:
            self._wake()
        elif self._gather is None:
            self._gather = loop.call_later(seconds, self._wake)
        elif not self._held_batches and self._gather.when() > loop.time() + QUIET_SECONDS:
            self._gather.cancel()
            self._gather = loop.call_later(QUIET_SECONDS, self._wake)

    def _wake(self) -> None:
        """Have what waits sent, by a task that is there only as long as something waits."""
        if self._gather is not None:
            self._gather.cancel()
            self._gather = None
        # Before the welcome nothing is sent: then the call's own task does it.
        if self._writer is None and self._outgoing is not None and self._sent_at:
            self._writer = asyncio.get_running_loop().create_task(self._write(), name="write")

    def _stop_writing(self) -> None:
        if self._gather is not None:
            self._gather.cancel()
        if self._writer is not None:
            self._writer.cancel()

    async def _write(self) -> None:
        try:
            while self._outgoing is not None:
                self._acked_bytes = self._acked_batches = 0
                command = self._outgoing.take()
                if command is None:
                    self._outgoing = None
                else:
                    await self._send(command)
        except (grpc.RpcError, grpc.aio.BaseError):
            self.end(PEER_GONE)
        finally:
            self._writer = None

    async def _send(self, command: Command) -> None:
        data = command.SerializeToString()
        if len(data) > limits.MESSAGE_BYTES:
            raise AssertionError(f"a command of {len(data)} bytes was made")
        self._writing_since = time.monotonic()
        try:
            await self._context.write(data)
        finally:
            self._writing_since = 0.0
        self._sent_at = asyncio.get_running_loop().time()
        self._shared.metrics.messages_down.inc()
        self._shared.metrics.bytes_down.inc(len(data))


def _address(peer: str) -> str:
    """Turn grpc's "ipv4:10.0.0.1:5000" or "ipv6:%5B::1%5D:5000" into "host:port"."""
    return peer.partition(":")[2].replace("%5B", "[").replace("%5D", "]")
