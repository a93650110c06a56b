"""A small server for agents: real gRPC over TLS on loopback, all it gets kept in lists.

Acknowledges batches unless told not to; what it sends is up to the test.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from fakes.certificates import SERVER_NAME, Authority
from outrider_proto import batches, effective
from outrider_proto.effective import Effective
from outrider_proto.v1 import agent_pb2 as pb
from outrider_proto.v1.agent_pb2_grpc import (
    AgentServiceServicer,
    add_AgentServiceServicer_to_server,
)

TOKEN = "token-of-node-a"


@dataclass
class FakeStream:
    """One stream that an agent opened."""

    hello: pb.PackagedData
    token: str
    outgoing: "asyncio.Queue[pb.Command | None]" = field(default_factory=asyncio.Queue)
    complete_reports: list[pb.RunReport] = field(default_factory=list)
    reports: list[pb.RunReport] = field(default_factory=list)
    batches: list[pb.RecordBatch] = field(default_factory=list)
    config_reports: list[pb.ConfigReport] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    half_closed: bool = False
    unacknowledged: int = 0
    most_unacknowledged: int = 0

    def send(self, command: pb.Command) -> None:
        self.outgoing.put_nowait(command)

    def configure(self, wanted: Effective) -> str:
        """Ask for a configuration; its hash."""
        packed = effective.pack(wanted)
        self.send(pb.Command(config=packed))
        return packed.hash

    def close(self) -> None:
        """End the stream without an error."""
        self.outgoing.put_nowait(None)


class FakeGateway(AgentServiceServicer):
    """The server's side. Every attribute may be changed while it runs."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self.all_batches: dict[tuple[int, int], pb.RecordBatch] = {}
        self.repeats = 0
        self.states: dict[tuple[str, int], pb.RunState] = {}
        self.history: list[tuple[str, int, int]] = []
        self.acknowledge = True
        self.ack_runs = False
        self.answer_heartbeats = True
        self.welcome = True
        self.window_bytes = 1024 * 1024
        #: More of the welcome.
        self.terms: dict[str, Any] = {}
        #: Batches are acknowledged so long after they came, seconds.
        self.acknowledge_after = 0.0
        #: Batches of more bytes and more than one record are rejected; those of other numbers
        #: for a reason that agents do not know.
        self.max_batch_bytes: int | None = None
        self.refuse_batches: set[int] = set()
        self.expires_in = 600.0
        self.refuse: tuple[grpc.StatusCode, str] | None = None
        #: With `refuse`: when to come again, milliseconds.
        self.pushback: str | None = None
        self.tried_at: list[float] = []
        self.attempts = 0
        self._news = asyncio.Condition()

    # For tests.

    async def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        """Wait for a condition on what came in; fails with what there is after so long."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    async with self._news:
                        with contextlib.suppress(TimeoutError):
                            async with asyncio.timeout(0.1):
                                await self._news.wait()
        except TimeoutError:
            raise AssertionError(
                f"not within {seconds} s: {self.attempts} calls, {len(self.streams)} streams, "
                f"{len(self.all_batches)} batches, states {self.history}"
            ) from None

    async def stream(self, number: int = 0, seconds: float = 20.0) -> FakeStream:
        """The stream of that number, once the agent has opened it."""
        await self.until(lambda: len(self.streams) > number, seconds)
        return self.streams[number]

    async def final(self, task_uid: str, attempt: int = 1, seconds: float = 20.0) -> pb.RunState:
        """The final state of a run, once it is reported."""
        key = (task_uid, attempt)
        await self.until(
            lambda: key in self.states and self.states[key].phase >= pb.RUN_PHASE_SUCCEEDED, seconds
        )
        return self.states[key]

    async def configured(
        self,
        stream: FakeStream,
        tried: str,
        phase: pb.ConfigPhase.ValueType = pb.CONFIG_PHASE_APPLIED,
        seconds: float = 20.0,
    ) -> pb.ConfigReport:
        """The newest report of a stream, once it says this of that configuration."""
        found = stream.config_reports

        def told() -> bool:
            return bool(found) and (found[-1].tried_hash, found[-1].phase) == (tried, phase)

        try:
            await self.until(told, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; {found[-3:]}") from None
        return found[-1]

    def records(self, data_type: int | None = None) -> list[pb.EncodedRecord]:
        """All records that came, each batch once, in the order of their numbers."""
        found = [r for _, b in sorted(self.all_batches.items()) for r in batches.decode(b)]
        return [r for r in found if data_type in (None, r.data_type)]

    # The service.

    async def Transfer(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:  # type: ignore[override,type-arg] # the reader and writer form of a handler
        self.attempts += 1
        self.tried_at.append(time.monotonic())
        if self.refuse:
            later = () if self.pushback is None else (("grpc-retry-pushback-ms", self.pushback),)
            await context.abort(*self.refuse, trailing_metadata=later)
        metadata = dict(context.invocation_metadata() or ())
        first = await context.read()
        stream = FakeStream(first, str(metadata.get("authorization", "")).removeprefix("Bearer "))
        stream.kinds.append("hello")
        self.streams.append(stream)
        if self.welcome:
            expires = time.time_ns() + int(self.expires_in * 1e9)
            await context.write(
                pb.Command(
                    welcome=pb.Welcome(
                        server="fake-0",
                        version="0",
                        agent_id="uid-of-node-a",
                        expires_unix_nanos=expires,
                        window_bytes=self.window_bytes,
                        **self.terms,
                    )
                )
            )
        await self._tell()
        reading = asyncio.create_task(self._read(stream, context))
        try:
            while (command := await stream.outgoing.get()) is not None:
                await context.write(command)
        finally:
            reading.cancel()

    async def Ping(self, request: pb.PingRequest, context: object) -> pb.PingResponse:
        return pb.PingResponse(payload=request.payload, server="fake-0")

    async def _read(self, stream: FakeStream, context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg] # of the bytes of two messages
        while (message := await context.read()) is not grpc.aio.EOF:
            self._take(stream, message)
            await self._tell()
        stream.half_closed = True
        stream.close()
        await self._tell()

    def _take(self, stream: FakeStream, message: pb.PackagedData) -> None:
        if message.batches:
            stream.messages.append(len(message.batches))
        for batch in message.batches:
            stream.kinds.append("batch")
            self._take_batch(stream, batch)
        if message.HasField("run_report"):
            report = message.run_report
            stream.kinds.append("complete" if report.complete else "changes")
            (stream.complete_reports if report.complete else stream.reports).append(report)
            for state in report.runs:
                key = (state.id.task_uid, state.id.attempt)
                self.states[key] = state
                self.history.append((*key, state.phase))
                if self.ack_runs and state.phase >= pb.RUN_PHASE_SUCCEEDED:
                    stream.send(pb.Command(run_acks=[state.id]))
        elif message.HasField("config_report"):
            stream.kinds.append("config")
            stream.config_reports.append(message.config_report)
        elif message.HasField("heartbeat"):
            stream.kinds.append("heartbeat")
            if self.answer_heartbeats:
                stream.send(pb.Command(heartbeat=message.heartbeat))

    def _take_batch(self, stream: FakeStream, batch: pb.RecordBatch) -> None:
        stream.batches.append(batch)
        stream.unacknowledged += batch.ByteSize()
        stream.most_unacknowledged = max(stream.most_unacknowledged, stream.unacknowledged)
        reject = self._rejected(batch)
        if reject is not None:
            stream.unacknowledged -= batch.ByteSize()
            stream.send(pb.Command(batch_rejects=[reject]))
            return
        name = (batch.epoch, batch.seq)
        if name in self.all_batches:
            self.repeats += 1
            assert self.all_batches[name] == batch, f"batch {name} has two contents"
        self.all_batches[name] = batch
        if self.acknowledge and self.acknowledge_after:
            asyncio.get_running_loop().call_later(
                self.acknowledge_after, self._acknowledge, stream, batch
            )
        elif self.acknowledge:
            self._acknowledge(stream, batch)

    def _acknowledge(self, stream: FakeStream, batch: pb.RecordBatch) -> None:
        stream.unacknowledged -= batch.ByteSize()
        ack = pb.BatchAck(epoch=batch.epoch, first=batch.seq, last=batch.seq)
        stream.send(pb.Command(batch_acks=[ack]))

    def _rejected(self, batch: pb.RecordBatch) -> pb.BatchReject | None:
        reject = pb.BatchReject(epoch=batch.epoch, seq=batch.seq)
        if batch.seq in self.refuse_batches:
            return reject
        most = self.max_batch_bytes
        if most is None or len(batch.records) <= most or batch.count < 2:
            return None
        reject.reason = pb.REJECT_REASON_TOO_LARGE
        reject.max_bytes = most
        return reject

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()


@dataclass
class RunningGateway:
    """A fake gateway that listens."""

    gateway: FakeGateway
    server: grpc.aio.Server
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


async def listen(
    gateway: FakeGateway, authority: Authority, port: int = 0, name: str = SERVER_NAME
) -> RunningGateway:
    """Start serving on loopback."""
    certificate, key = authority.issue(name)
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add_AgentServiceServicer_to_server(gateway, server)
    credentials = grpc.ssl_server_credentials([(key, certificate)])
    bound = server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    return RunningGateway(gateway, server, bound)


@contextlib.asynccontextmanager
async def serving(
    authority: Authority, gateway: FakeGateway | None = None, port: int = 0
) -> AsyncIterator[RunningGateway]:
    """A fake gateway for the time of a test."""
    running = await listen(gateway or FakeGateway(), authority, port)
    try:
        yield running
    finally:
        await running.server.stop(0)


def credentials(folder: Path, authority: Authority) -> tuple[Path, Path]:
    """The files an agent needs: the authority's certificate and a token."""
    ca, token = folder / "ca.crt", folder / "token"
    ca.write_bytes(authority.pem)
    token.write_text(TOKEN)
    return ca, token
