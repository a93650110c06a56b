"""The listener for people and machines that look after a program: /metrics, /healthz, /readyz.

A small HTTP/1.1 server on top of h11, since a DaemonSet pays for every megabyte of a web framework
on every node. Answers GET and HEAD, bounds connections, header size and time; serves nothing else.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Self

import h11
from msgspec import Meta
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from outrider_runtime.health import Condition, Health
from outrider_runtime.settings import Section, SettingsError, address

#: Connections served at once. A probe and a few scrapers need five; for one more, the oldest that
#: has not asked anything yet goes, so that silent connections keep no probe out.
MAX_CONNECTIONS = 64
#: Largest head of a request, bytes.
MAX_HEAD_BYTES = 16 * 1024
#: Longest wait for a request on an open connection, and for a reader of the answer, seconds.
IDLE_SECONDS = 30.0
_TEXT = "text/plain; charset=utf-8"


class OpsSettings(Section, frozen=True):
    """The listener for metrics and health."""

    address: Annotated[
        str, Meta(description='Where /metrics, /healthz and /readyz are served, "host:port".')
    ] = ":8080"


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    content_type: str = _TEXT


def _report(conditions: list[Condition], ok: str) -> _Answer:
    """The answer of the API server's /readyz?verbose, which operators of clusters know."""
    lines = [f"[+]{c.name} ok" if c.ok else f"[-]{c.name} failed: {c.reason}" for c in conditions]
    good = all(c.ok for c in conditions)
    lines.append(ok if good else f"not {ok}")
    return _Answer(200 if good else 503, "\n".join([*lines, ""]).encode())


class OpsServer:
    """Serves one program's metrics and health; an async context manager.

    Raises:
        SettingsError: On entry, when the address cannot be listened on.
    """

    def __init__(
        self,
        listen: str,
        registry: CollectorRegistry,
        health: Health,
        *,
        setting: str = "ops.address",
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._listen = listen
        self._setting = setting
        self._registry = registry
        self._health = health
        self._idle_seconds = idle_seconds
        self._server: asyncio.Server | None = None
        #: In the order of their coming; True while a request of it is being answered.
        self._connections: dict[asyncio.Task[None], bool] = {}
        self._routes: dict[str, Callable[[], _Answer]] = {
            "/healthz": lambda: _report(self._health.liveness(), "healthy"),
            "/readyz": self._readyz,
        }

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aenter__(self) -> Self:
        host, port = address(self._listen, setting=self._setting)
        try:
            self._server = await asyncio.start_server(
                self._accept, host or None, port, limit=MAX_HEAD_BYTES, reuse_port=False
            )
        except OSError as error:
            raise SettingsError(
                f'setting "{self._setting}": cannot listen on {self._listen}: '
                f"{error.strerror or error}"
            ) from None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        open_ones = list(self._connections)
        for task in open_ones:
            task.cancel()
        await asyncio.gather(*open_ones, return_exceptions=True)
        await self._server.wait_closed()

    def _readyz(self) -> _Answer:
        conditions = self._health.readiness()
        if not conditions:
            conditions = [Condition("start", False, "still starting")]
        return _report(conditions, "ready")

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            silent = next((task for task, busy in self._connections.items() if not busy), None)
            if silent is None:
                writer.close()
                return
            silent.cancel()
            del self._connections[silent]
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="ops")
        self._connections[task] = False
        task.add_done_callback(lambda done: self._connections.pop(done, None))

    def _busy(self, busy: bool) -> None:
        """Note whether the connection of the present task has a request to be answered."""
        task = asyncio.current_task()
        if task in self._connections:
            self._connections[task] = busy

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        try:
            while await self._exchange(connection, reader, writer):
                connection.start_next_cycle()
        except (OSError, TimeoutError, h11.ProtocolError):
            pass  # the peer's fault or its end: there is nobody to tell
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _exchange(
        self,
        connection: h11.Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; True when the connection can take another."""
        request: h11.Request | None = None
        async with asyncio.timeout(self._idle_seconds):
            while True:
                try:
                    event = connection.next_event()
                except h11.RemoteProtocolError as error:
                    answer = _Answer(error.error_status_hint, b"bad request\n")
                    await self._send(connection, writer, answer, with_body=True)
                    return False
                if event is h11.NEED_DATA:
                    connection.receive_data(await reader.read(MAX_HEAD_BYTES))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.EndOfMessage):
                    break
                elif isinstance(event, h11.ConnectionClosed):
                    return False
        assert request is not None
        self._busy(True)
        answer = await self._answer(request)
        async with asyncio.timeout(self._idle_seconds):
            await self._send(connection, writer, answer, with_body=request.method != b"HEAD")
        self._busy(False)
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE

    async def _answer(self, request: h11.Request) -> _Answer:
        if request.method not in (b"GET", b"HEAD"):
            return _Answer(405, b"only GET and HEAD are served\n")
        path = request.target.split(b"?", 1)[0].decode("ascii", "replace")
        if path == "/metrics":
            body = await asyncio.to_thread(generate_latest, self._registry)
            return _Answer(200, body, CONTENT_TYPE_LATEST)
        if path in self._routes:
            return self._routes[path]()
        return _Answer(404, b"not found: try /metrics, /healthz or /readyz\n")

    async def _send(
        self,
        connection: h11.Connection,
        writer: asyncio.StreamWriter,
        answer: _Answer,
        *,
        with_body: bool,
    ) -> None:
        headers = [
            ("content-type", answer.content_type),
            ("content-length", str(len(answer.body))),
            ("x-content-type-options", "nosniff"),
        ]
        out = connection.send(h11.Response(status_code=answer.status, headers=headers)) or b""
        if with_body:
            out += connection.send(h11.Data(data=answer.body)) or b""
        out += connection.send(h11.EndOfMessage()) or b""
        writer.write(out)
        await writer.drain()
