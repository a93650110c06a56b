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
from outrider_proto.batches import BatchError
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.core import effects
from outrider_agent.core.lanes import READ_BYTES
from outrider_agent.core.pacing import TokenBucket
from outrider_agent.core.runs import RunKey
from outrider_agent.core.session import End, Session, Want
from outrider_agent.core.storage import Outbox
from outrider_agent.core.traffic import Traffic
from outrider_agent.metrics import AgentMetrics
from outrider_agent.uplink.acks import Acks
from outrider_agent.uplink.alarm import Alarm
from outrider_agent.uplink.messages import Call, of_batches

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


class Configuration(Protocol):
    """Who puts configurations into force."""

    def ask(self, config: pb.EffectiveConfig) -> None:
        """A server asks for this one; it is put into force in its own time."""
        ...

    def answered(self) -> None:
        """A server took us."""
        ...

    def report(self) -> pb.ConfigReport:
        """How the agent stands to it now."""
        ...


class StreamClosedError(Exception):
    """The server ended the stream without an error."""


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
        bucket: TokenBucket,
        on_welcome: Callable[[effects.Welcomed], None],
        config: Configuration | None = None,
    ) -> None:
        self._call = call
        self._first = first
        self._outbox = outbox
        self._runs = runs
        self._metrics = metrics
        self._traffic = traffic
        self._on_welcome = on_welcome
        self._config = config
        self._session = Session(outbox.epoch, random.Random(), time.monotonic(), bucket)
        if config is not None:
            self._session.config_changed()
        self._acks = Acks(outbox, outbox.epoch)
        self._sent = {want: metrics.sent_messages.labels(want.value) for want in Want}
        #: Tells the writer that there may be something to send.
        self._wake = Alarm()
        #: Tells the timer that the stream may be at its end.
        self._due = Alarm()
        self._pause_reason = ""
        self._rejects_told: set[str] = set()
        self._sending = False
        self._closing = False

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of batches on their way without an acknowledgement."""
        return self._session.in_flight_bytes

    @property
    def idle(self) -> bool:
        """Whether every report of a run was handed to the transport."""
        return self._session.idle and not self._sending

    def changed(self, state: pb.RunState) -> None:
        """Report a run's new state."""
        self._session.changed(state)
        self._wake.set()

    def config_changed(self) -> None:
        """Tell how the agent stands to its configuration."""
        self._session.config_changed()
        self._wake.set()

    def bandwidth_changed(self) -> None:
        """More or less may go from now on."""
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
        # So is the reader's share of the disk: acknowledgements come faster than it takes them.
        acks = asyncio.create_task(self._acks.run(), name="uplink acknowledgements")
        tasks = (reader, writer, timer, acks)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            # The reader first: it knows the status with which the server ended the call.
            if reader.done() or writer.done() or acks.done():
                await self._raise_cause(reader, writer, acks)
            await self._close(reader, writer)
            return timer.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._call.cancel()
            self._wake.cancel()
            self._due.cancel()
            self._metrics.slowed_seconds.inc(self._session.pause.elapsed(time.monotonic()))
            await self._acks.flush()

    async def _watch(self) -> End:
        """Wait until the session is to be ended by us."""
        while (end := self._session.ended(time.monotonic())) is None:
            await self._due.wait(self._session.wake_at())
        return end

    async def _raise_cause(
        self, reader: asyncio.Task[None], writer: asyncio.Task[None], acks: asyncio.Task[None]
    ) -> NoReturn:
        """Raise what ended the stream."""
        if (
            not reader.done()
            and writer.done()
            and isinstance(writer.exception(), grpc.aio.AioRpcError | asyncio.InvalidStateError)
        ):
            # A write on an ended call; the reader learns the status in a moment.
            await asyncio.wait({reader}, timeout=CLOSE_SECONDS)
        for task in (reader, writer, acks):
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
            self._note_pause(now)
            want = self._session.next(now)
            if want is None:
                self._sending = False
                times = (self._session.wake_at(), self._session.batches_at(now))
                await self._wake.wait(min(when for when in times if when is not None))
                continue
            self._sending = True
            await self._send_wanted(want)

    async def _send_wanted(self, want: Want) -> None:
        session = self._session
        if want is Want.HELLO:
            session.sent_hello(time.monotonic())
            await self._send(self._first.SerializeToString(), want)
        elif want is Want.REPORT:
            session.begin_report()
            report = pb.RunReport(runs=await self._runs.report(), complete=True)
            await self._send_report(report, want)
        elif want is Want.CHANGES:
            await self._send_report(pb.RunReport(runs=session.take_changes()), want)
        elif want is Want.CONFIG:
            session.begin_config()
            if self._config is not None:
                message = pb.PackagedData(config_report=self._config.report()).SerializeToString()
                await self._send(message, want)
                session.sent(len(message), time.monotonic())
        elif want is Want.HEARTBEAT:
            backlog = self._outbox.backlog
            beat = pb.Heartbeat(
                unix_nanos=time.time_ns(),
                backlog_bytes=backlog.bytes,
                backlog_batches=backlog.batches,
            )
            session.sent_heartbeat(time.monotonic())
            await self._send(pb.PackagedData(heartbeat=beat).SerializeToString(), want)
        elif want is Want.LOOK:
            await self._look()
        else:
            await self._send_batches()

    async def _look(self) -> None:
        look = self._session.begin_look(time.monotonic())
        if look is None:
            return
        found = await self._outbox.batches_after(
            look.after, READ_BYTES, upto=look.upto, classes=look.classes, at_least_one=True
        )
        self._session.found(look, found, self._outbox.last_seq)

    async def _send_batches(self) -> None:
        items = self._session.take_batches(time.monotonic())
        if not items:
            return
        await self._send(of_batches(items), Want.BATCHES)
        records = sum(item.batch.count for item in items)
        self._metrics.sent_records.inc(records)
        self._traffic.sent_records += records

    async def _send_report(self, report: pb.RunReport, want: Want) -> None:
        message = pb.PackagedData(run_report=report).SerializeToString()
        await self._send(message, want)
        self._session.sent(len(message), time.monotonic())

    async def _send(self, message: bytes, want: Want) -> None:
        await self._call.write(message)
        size = len(message)
        self._traffic.sent_bytes += size
        self._metrics.sent_bytes.inc(size)
        self._sent[want].inc()

    def _note_pause(self, now: float) -> None:
        """Count the time in which the server wanted no batches, and tell when that changes."""
        pause = self._session.pause
        if seconds := pause.elapsed(now):
            self._metrics.slowed_seconds.inc(seconds)
        news = pause.news(now)
        if news:
            log.warning(
                "the server asks for no records for a while; they wait in the outbox",
                reason=self._pause_reason,
                seconds=round(pause.until - now, 3),
            )
        elif news is False:
            log.info("the server takes all our records again")

    # Down.

    async def _read(self) -> None:
        while True:
            data = await self._call.read()
            if not isinstance(data, bytes):  # grpc.aio.EOF
                code = await self._call.code()
                if code is grpc.StatusCode.OK:
                    raise StreamClosedError("the server ended the stream")
                raise grpc.aio.AioRpcError(
                    code,
                    await self._call.initial_metadata(),
                    await self._call.trailing_metadata(),
                    await self._call.details(),
                )
            size = len(data)
            self._traffic.received_bytes += size
            self._traffic.received_messages += 1
            self._metrics.received_bytes.inc(size)
            self._metrics.received_messages.inc()
            command = pb.Command.FromString(data)
            asked = self._session.receive(command, time.monotonic(), time.time_ns())
            self._wake.set()
            self._due.set()
            for effect in asked:
                await self._apply(effect)

    async def _apply(self, effect: effects.Effect) -> None:
        match effect:
            case effects.Welcomed():
                self._session.begin_batches(self._outbox.last_seq)
                self._wake.set()
                self._on_welcome(effect)
            case effects.BatchesAcked(_, ranges):
                await self._acks.add(ranges)
            case effects.BatchTooLarge() | effects.BatchRefused():
                await self._take_back(effect)
            case effects.PauseAsked(_, reason):
                self._pause_reason = reason
                self._note_pause(time.monotonic())
            case effects.RunsRequested(commands):
                await self._runs.submit(commands)
            case effects.CancelsRequested(keys):
                await self._runs.cancel(keys)
            case effects.RunsAcked(keys):
                await self._runs.acknowledge(keys)
            case effects.TaskRequested(task):
                await self._runs.foreign(task)
            case effects.ConfigRequested(config):
                if self._config is not None:
                    self._config.ask(config)
            case effects.Draining(reason):
                log.info("the server asks us to go elsewhere", reason=reason)

    async def _take_back(self, effect: effects.BatchTooLarge | effects.BatchRefused) -> None:
        """A batch that the server does not take as it is."""
        what, text = "other", "the server refuses a batch; it is kept, for the next connection"
        if isinstance(effect, effects.BatchTooLarge):
            what, text = "too_large", "a batch was too large for the server: made into smaller ones"
            if not await self._split(effect):
                what = "indivisible"
                text = "a batch is too large for the server and cannot be split; it is kept"
        self._metrics.rejected_batches.labels(what).inc()
        # Many may follow one another for the same cause.
        tell = log.debug if what in self._rejects_told else log.warning
        self._rejects_told.add(what)
        tell(text, **{name: getattr(effect, name) for name in effect.__dataclass_fields__})

    async def _split(self, effect: effects.BatchTooLarge) -> bool:
        try:
            pieces = await self._outbox.split_batch(effect.epoch, effect.seq, effect.max_bytes)
        except BatchError as error:
            log.error("a batch cannot be opened", seq=effect.seq, error=str(error))  # noqa: TRY400 - the text says it all
            return False
        return pieces > 0
