"""The listener for framed messages, over real connections."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
from fakes.agent_parts import ListSink, value
from outrider_agent.core.config import ConfigError
from outrider_agent.core.frames import HEARTBEAT, REPORT, Packet, frame
from outrider_agent.core.records import RecordClass
from outrider_agent.listeners.framed_tcp import Listener, bind, parse
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings_config import FramedTcpSettings
from outrider_proto import records
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry

CLOSED = "outrider_agent_listener_closed_total"


class SlowSink(ListSink):
    """Takes and stores only while it may."""

    def __init__(self) -> None:
        super().__init__()
        self.room, self.disk = asyncio.Event(), asyncio.Event()
        self.room.set()
        self.disk.set()
        self.flushes = 0

    async def put(self, record: pb.EncodedRecord, record_class: RecordClass) -> None:
        await self.room.wait()
        self.submit(record, record_class)

    async def flush(self, record_class: RecordClass) -> None:
        self.flushes += 1
        await self.disk.wait()


@dataclass
class Bench:
    listener: Listener
    sink: SlowSink
    registry: CollectorRegistry

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.listener.port)

    def closed(self, reason: str) -> float:
        return value(self.registry, CLOSED, listener="framedTcp", reason=reason)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def listening(**change: object) -> AsyncIterator[Bench]:
    registry, sink = CollectorRegistry(), SlowSink()
    settings = FramedTcpSettings(**change)  # type: ignore[arg-type] # of the test
    made = bind("127.0.0.1", 0)
    listener = Listener(made, settings, sink, AgentMetrics(registry), wall=lambda: 1234.5)
    await listener.start()
    try:
        yield Bench(listener, sink, registry)
    finally:
        await listener.close()


async def end_of(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the connection ends."""
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            return await reader.read()
    return b""


async def test_reports_become_records_and_are_answered_once_stored() -> None:
    async with listening() as bench:
        reader, writer = await bench.connect()
        bench.sink.disk.clear()
        text = b'{"content": "load", "rand": 7, "timestamp": 1700000000}'
        writer.write(frame(Packet(REPORT, text)) + frame(Packet(HEARTBEAT, b"{}")))
        await bench.until(lambda: bench.sink.flushes)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await reader.readline()
        bench.sink.disk.set()
        assert await reader.readline() == b"Report data has recive\n"
        assert await reader.readline() == b"heartBeat\n"
        [(record, record_class)] = bench.sink.records
        assert record_class is RecordClass.LOG
        assert (record.data_type, record.timestamp) == (records.LOCAL_REPORT, 1_700_000_000)
        port = writer.get_extra_info("sockname")[1]
        assert records.fields_of(record) == {
            "listener": "framedTcp",
            "source": f"127.0.0.1:{port}",
            "report": text.decode(),
            "encoding": "utf-8",
        }
        name = "outrider_agent_listener_packets_total"
        assert value(bench.registry, name, listener="framedTcp", kind="report") == 1
        assert value(bench.registry, name, listener="framedTcp", kind="heartbeat") == 1
        writer.close()


async def test_a_report_that_is_no_text_is_kept_as_it_is() -> None:
    async with listening() as bench:
        reader, writer = await bench.connect()
        writer.write(frame(Packet(REPORT, b"\xff\x00")))
        await reader.readline()
        fields = records.fields_of(bench.sink.records[0][0])
        assert (fields["report"], fields["encoding"]) == ("/wA=", "base64")
        assert bench.sink.records[0][0].timestamp == 1234
        writer.close()


async def test_many_programs_share_the_wait_for_the_disk() -> None:
    async with listening() as bench:
        bench.sink.disk.clear()
        pairs = [await bench.connect() for _ in range(20)]
        for _, writer in pairs:
            writer.write(frame(Packet(REPORT, b"{}")))
        await bench.until(lambda: len(bench.sink.records) == 20)
        bench.sink.disk.set()
        for reader, writer in pairs:
            assert await reader.readline()
            writer.close()
        assert bench.sink.flushes <= 3


async def test_while_there_is_no_room_nothing_is_read() -> None:
    async with listening() as bench:
        bench.sink.room.clear()
        reader, writer = await bench.connect()
        raw = frame(Packet(REPORT, b"x" * 40_000))
        sent = 0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                while sent < 50_000_000:
                    writer.write(raw)
                    await writer.drain()
                    sent += len(raw)
        assert sent < 20_000_000  # what the system holds for the socket
        bench.sink.room.set()
        assert await reader.readline()
        writer.transport.abort()


@pytest.mark.parametrize("raw", [b"GET / HTTP/1.1\r\n", frame(Packet(REPORT, b"{}"))[:-1] + b"x"])
async def test_rubbish_costs_its_sender_the_connection_and_nobody_else(raw: bytes) -> None:
    async with listening() as bench:
        good, other = await bench.connect()
        reader, writer = await bench.connect()
        writer.write(raw)
        assert await end_of(reader) == b""
        assert bench.closed("rubbish") == 1
        assert bench.sink.records == []
        other.write(frame(Packet(HEARTBEAT, b"")))
        assert await good.readline() == b"heartBeat\n"
        other.close()
        writer.close()


async def test_one_who_sends_nothing_whole_is_closed() -> None:
    async with listening(idle_seconds=0.3) as bench:
        silent, one = await bench.connect()
        slow, other = await bench.connect()
        raw = frame(Packet(REPORT, b"x" * 1000))
        ended = asyncio.create_task(end_of(slow))
        for byte in raw[:-1]:  # a byte now and then does not count
            if ended.done():
                break
            other.write(bytes([byte]))
            await asyncio.sleep(0.02)
        assert ended.done()
        assert await end_of(silent) == b""
        assert bench.closed("idle") == 2
        one.close()
        other.close()


async def test_one_who_does_not_read_answers_is_closed() -> None:
    async with listening(idle_seconds=0.3) as bench:
        # Connections inherit it: little is held for one who does not read.
        bench.listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with socket.socket() as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            made.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(made, ("127.0.0.1", bench.listener.port))
            raw = frame(Packet(HEARTBEAT, b"")) * 50_000
            sending = asyncio.create_task(loop.sock_sendall(made, raw))
            async with asyncio.timeout(60):
                while not bench.closed("slow"):
                    await asyncio.sleep(0.01)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        assert [bench.closed(reason) for reason in ("slow", "rubbish", "idle")] == [1, 0, 0]


async def test_there_are_only_so_many_connections() -> None:
    async with listening(max_connections=2) as bench:
        first = [await bench.connect() for _ in range(2)]
        for reader, writer in first:
            writer.write(frame(Packet(HEARTBEAT, b"")))
            assert await reader.readline()
        gauge = "outrider_agent_listener_connections"
        assert value(bench.registry, gauge, listener="framedTcp") == 2
        third, writer = await bench.connect()
        assert await end_of(third) == b""
        writer.close()
        assert bench.closed("crowded") == 1
        first[0][1].close()
        await bench.until(lambda: value(bench.registry, gauge, listener="framedTcp") == 1)
        reader, writer = await bench.connect()
        writer.write(frame(Packet(HEARTBEAT, b"")))
        assert await reader.readline()
        writer.close()
        first[1][1].close()


async def test_closing_it_ends_its_connections() -> None:
    async with listening() as bench:
        reader, writer = await bench.connect()
        writer.write(frame(Packet(HEARTBEAT, b"")))
        assert await reader.readline()
        port = bench.listener.port
        await bench.listener.close()
        assert await end_of(reader) == b""
        assert not bench.listener.serving
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
        writer.close()


@pytest.mark.parametrize(
    ("text", "remote", "found"),
    [
        ("127.0.0.1:9876", False, ("127.0.0.1", 9876)),
        ("[::1]:1", False, ("::1", 1)),
        ("127.9.9.9:0", False, ("127.9.9.9", 0)),
        (":9876", True, ("0.0.0.0", 9876)),
        ("10.0.0.1:1", True, ("10.0.0.1", 1)),
    ],
)
def test_addresses(text: str, remote: bool, found: tuple[str, int]) -> None:
    assert parse(text, allow_remote=remote) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (":9876", "allowRemote"),
        ("0.0.0.0:1", "allowRemote"),
        ("10.0.0.1:1", "allowRemote"),
        ("[::]:1", "allowRemote"),
        ("localhost:1", "no address"),
        ("127.0.0.1", "no address"),
        ("127.0.0.1:99999", "no address"),
        ("nonsense", "no address"),
    ],
)
def test_addresses_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(text, allow_remote=False)


def test_an_address_in_use_is_an_error_but_not_our_own() -> None:
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with pytest.raises(ConfigError, match="in use"):
        bind("127.0.0.1", port)
    wider = bind("0.0.0.0", port, beside=first)
    with pytest.raises(ConfigError, match="in use"):
        bind("127.0.0.1", port)
    assert [one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for one in (first, wider)] == [
        0,
        0,
    ]
    first.close()
    wider.close()
