"""Takes reports from programs on the node over TCP, in the frames of core.frames.

A report is answered once it is on the agent's disk, so that one that was answered is not lost; a
program that gets no answer may send it again. While there is no room for records the connection is
not read. Whoever sends rubbish, nothing, or does not read answers loses its connection, and only
that one.
"""

import asyncio
import base64
import contextlib
import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from outrider_proto import records
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger
from outrider_runtime.settings import SettingsError, address

from outrider_agent.core import frames
from outrider_agent.core.config import ConfigError
from outrider_agent.core.frames import FrameError, Frames, Packet
from outrider_agent.core.records import RecordClass, RecordSink
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings_config import FramedTcpSettings

log = get_logger("outrider.listeners")

NAME: Final = "framedTcp"
#: Bytes that are taken of a connection at once, and that the system may hold beside them.
READ_BYTES: Final = 32 * 1024
_BACKLOG: Final = 128
_KINDS: Final = {frames.HEARTBEAT: "heartbeat", frames.REPORT: "report"}


def parse(text: str, *, allow_remote: bool) -> tuple[str, int]:
    """The address of a listener.

    Raises:
        ConfigError: It is none, or not one of loopback where only those may be.
    """
    try:
        host, port = address(text, setting=f"listeners.{NAME}.address")
        number = ipaddress.ip_address(host or "0.0.0.0")  # noqa: S104 - refused below by default
    except (SettingsError, ValueError):
        raise ConfigError(f"{text!r} is no address such as 127.0.0.1:9876") from None
    if not (number.is_loopback or allow_remote):
        raise ConfigError(
            f"{text} is not an address of loopback, and the setting "
            f"listeners.{NAME}.allowRemote of this node is false"
        )
    return str(number), port


def bind(host: str, port: int, beside: socket.socket | None = None) -> socket.socket:
    """A socket that listens; who connects waits until it is served.

    Args:
        host: IP address.
        port: 0 for any.
        beside: Our own socket that may have a part of the same address, until it is closed.

    Raises:
        ConfigError: It cannot listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    # Only between our own two: else another agent could listen there by mistake, too.
    pair = [] if beside is None else [made, beside]
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            for one in pair:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            made.bind((host, port))
            made.listen(_BACKLOG)
        finally:
            for one in pair:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    except OSError as error:
        made.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return made


class _Stored:
    """Waits until what was taken is on the disk; one flush serves all who came before it."""

    def __init__(self, sink: RecordSink) -> None:
        self._sink = sink
        self._lock = asyncio.Lock()
        self._asked = 0
        self._done = 0

    async def wait(self) -> None:
        self._asked += 1
        mine = self._asked
        async with self._lock:
            if self._done >= mine:
                return
            upto = self._asked
            await self._sink.flush(RecordClass.LOG)
            self._done = upto


class Listener:
    """Serves one socket that listens, until it is closed."""

    def __init__(
        self,
        made: socket.socket,
        settings: FramedTcpSettings,
        sink: RecordSink,
        metrics: AgentMetrics,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.socket = made
        self._settings = settings
        self._sink = sink
        self._metrics = metrics
        self._wall = wall
        self._stored = _Stored(sink)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: set[str] = set()
        self._closed = False

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.socket.getsockname()[1])

    @property
    def serving(self) -> bool:
        """Whether connections are taken."""
        return self._server is not None and self._server.is_serving()

    async def start(self) -> None:
        """Take connections."""
        self._server = await asyncio.start_server(self._accept, sock=self.socket, limit=READ_BYTES)

    async def close(self) -> None:
        """Take no more, and close those there are."""
        self._closed = True
        if self._server is not None:
            self._server.close()
        self.socket.close()
        for task in list(self._tasks):
            self._count("moved")
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        gauge = self._metrics.listener_connections.labels(NAME)
        if self._closed:  # it was on its way meanwhile
            writer.transport.abort()
            return
        if len(self._tasks) >= self._settings.max_connections:
            self._close("crowded", "more than listeners.framedTcp.maxConnections at once")
            writer.transport.abort()
            return
        self._tasks.add(task)
        gauge.inc()
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            pass  # by `close` only: a task of asyncio's streams must not end so
        finally:
            self._tasks.discard(task)
            gauge.dec()
            # Not `close`: that would wait for one who does not read.
            with contextlib.suppress(OSError):
                if writer.transport.get_write_buffer_size():
                    writer.transport.abort()
                else:
                    writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        source = f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
        loop, found = asyncio.get_running_loop(), Frames()
        idle = self._settings.idle_seconds
        until = loop.time() + idle
        reason = "idle"
        try:
            while True:
                reason = "idle"
                async with asyncio.timeout_at(until):
                    data = await reader.read(READ_BYTES)
                if not data:
                    return
                packets = found.feed(data)
                if not packets:
                    continue
                await self._take(packets, source)
                reason = "slow"
                writer.write(b"".join(frames.ANSWERS[packet.kind] for packet in packets))
                async with asyncio.timeout(idle):
                    await writer.drain()
                until = loop.time() + idle
        except TimeoutError:
            self._close(reason, f"nothing whole came, or no answer was read, for {idle:g} s")
        except FrameError as error:
            self._close("rubbish", str(error))
        except OSError:
            pass  # the program ended; what it got no answer for it knows

    async def _take(self, packets: Sequence[Packet], source: str) -> None:
        reports = [packet for packet in packets if packet.kind == frames.REPORT]
        for packet in reports:
            await self._sink.put(self._record(packet, source), RecordClass.LOG)
        if reports:
            await self._stored.wait()
        for packet in packets:
            self._metrics.listener_packets.labels(NAME, _KINDS[packet.kind]).inc()

    def _record(self, packet: Packet, source: str) -> pb.EncodedRecord:
        try:
            text, encoding = packet.content.decode(), "utf-8"
        except UnicodeDecodeError:
            text, encoding = base64.b64encode(packet.content).decode(), "base64"
        fields = {"listener": NAME, "source": source, "report": text, "encoding": encoding}
        when = packet.timestamp
        # One that makes no sense as seconds is not taken for a time.
        when = when if 0 < when < 2**33 else int(self._wall())
        return records.payload(records.LOCAL_REPORT, when, fields)

    def _count(self, reason: str) -> None:
        self._metrics.listener_closed.labels(NAME, reason).inc()

    def _close(self, reason: str, why: str) -> None:
        """Tell of a connection that is closed: each reason once in the log, counted always."""
        self._count(reason)
        tell = log.debug if reason in self._told else log.warning
        self._told.add(reason)
        tell("closing a local program's connection", listener=NAME, reason=reason, error=why)
