"""A real gateway on loopback with TLS, on a fake TokenReview and a sink in memory."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from fakes.certificates import SERVER_NAME, Authority, write_pair
from fakes.memory_sink import MemorySink
from fakes.token_review import FakeTokenReview
from outrider_operator.core.sink import Sink
from outrider_operator.gateway.server import Gateway
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import AuthSettings, GatewaySettings, TlsSettings
from outrider_proto import batches
from outrider_proto.channel import bearer, connect
from outrider_proto.v1.agent_pb2 import (
    CODEC_NONE,
    Command,
    EncodedRecord,
    Hello,
    PackagedData,
    RecordBatch,
)
from outrider_runtime.health import Health
from prometheus_client import CollectorRegistry

TRANSFER = "/outrider.v1.AgentService/Transfer"


@dataclass
class RunningGateway:
    """A gateway that runs, with what is behind it."""

    gateway: Gateway
    reviews: FakeTokenReview
    sink: MemorySink
    registry: CollectorRegistry
    health: Health
    authority: Authority
    tls_folder: Path
    stop: asyncio.Event
    task: asyncio.Task[None]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.gateway.port}"

    def connect(self) -> grpc.aio.Channel:
        """A channel to it; close it."""
        return connect(self.address, ca=self.authority.pem, server_name=SERVER_NAME)

    def metric(self, name: str, **labels: str) -> float:
        """Value of a metric, 0 when it was never counted."""
        return self.registry.get_sample_value(f"outrider_server_{name}", labels) or 0.0

    def refused(self, code: str, reason: str) -> float:
        """How many calls were refused so."""
        return self.metric("refusals_total", code=code, reason=reason)


@contextlib.asynccontextmanager
async def running_gateway(
    folder: Path,
    *,
    sink: Sink | None = None,
    auth: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[RunningGateway]:
    """Run a gateway while the body runs; keywords are fields of GatewaySettings."""
    authority = Authority()
    write_pair(folder, authority.issue())
    tls = TlsSettings(
        cert_file=str(folder / "tls.crt"), key_file=str(folder / "tls.key"), check_seconds=0.05
    )
    registry, reviews, memory = CollectorRegistry(), FakeTokenReview(), MemorySink()
    health = Health()
    fields: dict[str, Any] = {
        "address": "127.0.0.1:0",
        "tls": tls,
        "drain_spread_seconds": 0.0,
    } | settings
    gateway = Gateway(
        GatewaySettings(**fields),
        AuthSettings(**(auth or {})),
        sink=sink or memory,
        review=reviews,
        metrics=ServerMetrics(registry),
        health=health,
        replica="gateway-0",
        version="0.0.0",
    )
    stop = asyncio.Event()
    task = asyncio.create_task(gateway.run(stop))
    started = asyncio.create_task(gateway.started.wait())
    await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
    started.cancel()
    if task.done():
        await task
    try:
        yield RunningGateway(
            gateway, reviews, memory, registry, health, authority, folder, stop, task
        )
    finally:
        stop.set()
        await task


class RawAgent:
    """The client's end of Transfer, bytes in and bytes out: it can be as rude as a test needs."""

    def __init__(self, channel: grpc.aio.Channel, token: str | None) -> None:
        metadata = bearer(token) if token is not None else None
        self.call: Any = channel.stream_stream(TRANSFER)(metadata=metadata)

    async def send(self, message: PackagedData | bytes) -> None:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        await self.call.write(data)

    async def receive(self, seconds: float = 20) -> Command:
        """The next command, within so many seconds.

        Raises:
            EOFError: the stream has ended well.
            grpc.aio.AioRpcError: it has ended otherwise.
        """
        async with asyncio.timeout(seconds):
            data = await self.call.read()
        if data is grpc.aio.EOF:
            raise EOFError
        return Command.FromString(data)

    async def code(self) -> grpc.StatusCode:
        """The status the stream ends with."""
        async with asyncio.timeout(20):
            with contextlib.suppress(grpc.aio.AioRpcError, EOFError):
                while True:
                    await self.receive()
            code: grpc.StatusCode = await self.call.code()
            return code

    async def details(self) -> str:
        """The sentence that goes with the status."""
        return str(await self.call.details())


def hello(node: str) -> PackagedData:
    """A good first message."""
    return PackagedData(hello=Hello(node=node, version="0.0.0", net_mode="sd", instance="i"))


async def open_stream(channel: grpc.aio.Channel, token: str, node: str) -> RawAgent:
    """A stream after hello and welcome."""
    agent = RawAgent(channel, token)
    await agent.send(hello(node))
    first = await agent.receive()
    assert first.HasField("welcome"), first
    return agent


def make_batch(seq: int, *, size: int = 10, epoch: int = 7) -> RecordBatch:
    """A batch with one record of so many bytes."""
    record = EncodedRecord(data_type=1000, timestamp=1, data=b"x" * size)
    return batches.encode(
        [record], epoch=epoch, seq=seq, codec=CODEC_NONE, created_unix_nanos=time.time_ns()
    )


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], seconds: float = 20.0
) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found if isinstance(found, bool) else await found:
            return
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not come to hold")
        await asyncio.sleep(0.01)
