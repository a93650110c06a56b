"""One stream: carries what core.session decides over a gRPC call, until either side ends it.

Reads batches from the outbox and hands requests to the runs; decides nothing about order, windows
or time. Opens no connection: see `uplink`.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import grpc.aio
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.core import session as protocol
from outrider_agent.core.runs import RunKey
from outrider_agent.core.session import End, Session, Want
from outrider_agent.core.storage import Outbox
from outrider_agent.core.traffic import Traffic
from outrider_agent.metrics import AgentMetrics

log = get_logger("outrider.uplink")

#: Longest wait for the server to end a stream that we half-closed, seconds.
CLOSE_SECONDS = 2.0


class Runs(Protocol):
    """Who carries out what servers ask for."""

    async def submit(self, commands: Sequence[pb.RunCommand]) -> None:
        """Take runs."""
        ...

    async def cancel(self, keys: Sequence[RunKey]) -> None:
        """End runs early."""
        ...

    async def acknowledge(self, keys: list[RunKey]) -> None:
        """Forget results."""
        ...

    async def foreign(self, task: pb.Task) -> None:
        """Do what a task in the form of other servers asks of the agent itself."""
        ...

    async def report(self) -> list[pb.RunState]:
        """The states of all runs whose result was not acknowledged yet."""
        ...


class StreamClosedError(Exception):
    """The server ended the stream without an error."""


Call = grpc.aio.StreamStreamCall[pb.PackagedData, pb.Command]


class Stream:
    """The agent's side of one stream."""

    def __init__(
        self,
        call: Call,
        first: pb.PackagedData,
        outbox: Outbox,
        runs: Runs,
        metrics: AgentMetrics,
        traffic: Traffic,
        on_welcome: Callable[[protocol.Welcomed], None],
    ) -> None:
        self._call = call
        self._first = first
        self._outbox = outbox
        self._runs = runs
        self._metrics = metrics
        self._traffic = traffic
        self._on_welcome = on_welcome
        self._session = Session(outbox.epoch, random.Random(), time.monotonic())
        self._wake = asyncio.Event()
        self._due = asyncio.Event()
        self._sending = False
        self._closing = False

    @property
    def idle(self) -> bool:
        """Whether every report of a run was handed to the transport."""
        return self._session.idle and not self._sending

    def changed(self, state: pb.RunState) -> None:
        """Report a run's new state."""
        self._session.changed(state)
        self._wake.set()

    def appended(self) -> None:
        """The outbox has a new batch."""
        self._session.appended()
        self._wake.set()

    async def run(self) -> End:
        """Carry the stream until the session ends it; why it did.

        Raises:
            grpc.aio.AioRpcError: The server or the network ended it with an error.
            StreamClosedError: The server ended it without one.
            ProtocolError: The server did what it must not.
            StorageError: The disk failed.
        """
        reader = asyncio.create_task(self._read(), name="uplink reader")
        writer = asyncio.create_task(self._write(), name="uplink writer")
        # Of its own, since the writer may be held up by a server that does not read.
        timer = asyncio.create_task(self._watch(), name="uplink timer")
        try:
            await asyncio.wait({reader, writer, timer}, return_when=asyncio.FIRST_COMPLETED)
            # The reader first: it knows the status with which the server ended the call.
            if reader.done() or writer.done():
                await self._raise_cause(reader, writer)
            await self._close(reader, writer)
            return timer.result()
        finally:
            for task in (reader, writer, timer):
                task.cancel()
            await asyncio.gather(reader, writer, timer, return_exceptions=True)
            self._call.cancel()

    async def _watch(self) -> End:
        """Wait until the session is to be ended by us."""
        while (end := self._session.ended(time.monotonic())) is None:
            self._due.clear()
            await _wait(self._due, self._session.wake_at() - time.monotonic())
        return end

    async def _raise_cause(
        self, reader: asyncio.Task[None], writer: asyncio.Task[None]
    ) -> NoReturn:
        """Raise what ended the stream."""
        if not reader.done() and isinstance(
            writer.exception(), grpc.aio.AioRpcError | asyncio.InvalidStateError
        ):
            # A write on an ended call; the reader learns the status in a moment.
            await asyncio.wait({reader}, timeout=CLOSE_SECONDS)
        for task in (reader, writer):
            error = task.exception() if task.done() else None
            # InvalidStateError says only that a write came after the end of the call.
            if error is not None and not isinstance(error, asyncio.InvalidStateError):
                raise error
        raise StreamClosedError("the server ended the stream")

    async def _close(self, reader: asyncio.Task[None], writer: asyncio.Task[None]) -> None:
        """Say that no more will come, and take what the server still says."""
        # Not by cancelling the writer: that would cancel the call with what it is writing.
        self._closing = True
        self._wake.set()
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.wait({writer})
                await self._call.done_writing()
                await asyncio.wait({reader})

    # Up.

    async def _write(self) -> None:
        while not self._closing:
            now = time.monotonic()
            want = self._session.next(now)
            if want is None:
                self._sending = False
                await _wait(self._wake, self._session.wake_at() - now)
                self._wake.clear()
                continue
            self._sending = True
            await self._send_wanted(want)

    async def _send_wanted(self, want: Want) -> None:
        session = self._session
        if want is Want.HELLO:
            session.sent_hello(time.monotonic())
            await self._send(self._first, want)
        elif want is Want.REPORT:
            session.begin_report()
            report = pb.RunReport(runs=await self._runs.report(), complete=True)
            await self._send(pb.PackagedData(run_report=report), want)
            session.sent(time.monotonic())
        elif want is Want.CHANGES:
            report = pb.RunReport(runs=session.take_changes())
            await self._send(pb.PackagedData(run_report=report), want)
            session.sent(time.monotonic())
        elif want is Want.HEARTBEAT:
            backlog = self._outbox.backlog
            beat = pb.Heartbeat(
                unix_nanos=time.time_ns(),
                backlog_bytes=backlog.bytes,
                backlog_batches=backlog.batches,
            )
            session.sent_heartbeat(time.monotonic())
            await self._send(pb.PackagedData(heartbeat=beat), want)
        else:
            await self._send_batches()

    async def _send_batches(self) -> None:
        """Send what fits the window, but for what is more urgent: that goes in between."""
        session = self._session
        at_least_one = session.nothing_in_flight
        session.begin_read()
        waiting = await self._outbox.batches_after(
            session.cursor, session.budget, at_least_one=at_least_one
        )
        for item in waiting:
            session.sent_batch(item.seq, item.size, time.monotonic())
            await self._send(pb.PackagedData(batches=[item.batch]), Want.BATCHES)
            self._metrics.sent_records.inc(item.batch.count)
            self._traffic.sent_records += item.batch.count
            if self._closing or session.next(time.monotonic()) not in (Want.BATCHES, None):
                return  # what was not sent is read again: the cursor did not pass it

    async def _send(self, message: pb.PackagedData, want: Want) -> None:
        await self._call.write(message)
        size = message.ByteSize()
        self._traffic.sent_bytes += size
        self._metrics.sent_bytes.inc(size)
        self._metrics.sent_messages.labels(want.value).inc()

    # Down.

    async def _read(self) -> None:
        while True:
            command = await self._call.read()
            if command is grpc.aio.EOF:
                code = await self._call.code()
                if code is grpc.StatusCode.OK:
                    raise StreamClosedError("the server ended the stream")
                raise grpc.aio.AioRpcError(
                    code,
                    await self._call.initial_metadata(),
                    await self._call.trailing_metadata(),
                    await self._call.details(),
                )
            assert isinstance(command, pb.Command)
            size = command.ByteSize()
            self._traffic.received_bytes += size
            self._traffic.received_messages += 1
            self._metrics.received_bytes.inc(size)
            self._metrics.received_messages.inc()
            effects = self._session.receive(command, time.monotonic(), time.time_ns())
            self._wake.set()
            self._due.set()
            for effect in effects:
                await self._apply(effect)

    async def _apply(self, effect: protocol.Effect) -> None:
        match effect:
            case protocol.Welcomed():
                self._on_welcome(effect)
            case protocol.BatchesAcked(epoch, first, last):
                await self._outbox.ack_batches(epoch, first, last)
            case protocol.RunsRequested(commands):
                await self._runs.submit(commands)
            case protocol.CancelsRequested(keys):
                await self._runs.cancel(keys)
            case protocol.RunsAcked(keys):
                await self._runs.acknowledge(keys)
            case protocol.TaskRequested(task):
                await self._runs.foreign(task)
            case protocol.Draining(reason):
                log.info("the server asks us to go elsewhere", reason=reason)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, at most so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.01, seconds)):
            await event.wait()
