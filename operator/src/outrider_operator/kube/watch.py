"""Watches Outrider's kinds and Nodes with kopf, and passes on what it sees.

kopf runs in a thread and loop of its own, for it cancels every asyncio task that was born after it
when it stops. Handlers only hand over: no decision, no request, no state on objects. When kopf
ends, or its watches go blind, it is begun anew; it never ends the program.
"""

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Literal

import kopf
from kopf._core.engines.peering import Identity  # only there; the argument wants this type
from kubernetes.aio.client import Configuration
from outrider_runtime.backoff import Backoff
from outrider_runtime.logs import get_logger

from outrider_operator.core import nodes
from outrider_operator.core.ports import Change, version_of
from outrider_operator.metrics import ServerMetrics

#: A watch loop that did not run for so long hangs, seconds.
HANGS_SECONDS: Final = 60.0
#: What the API server lists and no watch has shown after so long was missed, seconds.
BLIND_SECONDS: Final = 45.0
#: kopf has so long to end when it is told to, seconds.
STOP_SECONDS: Final = 10.0

Kind = Literal["AgentTask", "AgentTaskSchedule", "AgentConfig", "Node", "Agent"]
#: Kinds that are listed now and then, to see whether the watches have shown them.
CHECKED: Final = ("AgentTask", "AgentTaskSchedule")


class _WatchLoop(asyncio.SelectorEventLoop):
    """A loop that leaves no connection half closed when it ends.

    A watch that is cancelled closes its connection as TLS has it, and waits for the API server to
    do the same. kopf does not wait for that, and an API server that hangs never does it: the
    sockets would stay open until the garbage collector finds them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._connections: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    async def create_connection(self, *args: Any, **options: Any) -> Any:
        """As of every loop; the connection is remembered."""
        transport, protocol = await super().create_connection(*args, **options)
        self._connections.add(transport)
        return transport, protocol

    async def abort_connections(self) -> None:
        """Close all that is still open, without a word to the other side."""
        for transport in list(self._connections):
            transport.abort()
        await asyncio.sleep(0)  # sockets are closed in the loop's next round


class Watches:
    """The watches of a leader.

    Args:
        config: how the API server is reached.
        on_change: told each change, on the loop that `run` runs on.
        metrics: the server's.
    """

    def __init__(
        self,
        config: Configuration,
        on_change: Callable[[Change], None],
        metrics: ServerMetrics,
    ) -> None:
        self._config = config
        self._on_change = on_change
        self._metrics = metrics
        self._owner = asyncio.get_running_loop()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._stopping = False
        self._error: BaseException | None = None
        self._beat = time.monotonic()
        self._seen: dict[str, int] = {}
        self._missing: dict[str, float] = {}
        self._log = get_logger("outrider.watch")
        _quiet_kopf()

    def problem(self) -> str | None:
        """For the liveness probe: None when the watch loop runs."""
        silent = time.monotonic() - self._beat
        return f"the watches hang for {silent:.0f} s" if silent > HANGS_SECONDS else None

    async def run(self, on_restart: Callable[[], Awaitable[Any]]) -> None:
        """Watch for ever. `on_restart` is awaited after the watches were begun anew."""
        backoff = Backoff(1.0, 30.0)
        while True:
            began = time.monotonic()
            ended = asyncio.Event()
            self._stopping = False
            thread = threading.Thread(
                target=self._thread, args=(ended,), name="watches", daemon=True
            )
            thread.start()
            try:
                await ended.wait()
            finally:
                await self._end(ended)
            self._metrics.watch_restarts.labels("failed" if self._error else "blind").inc()
            self._log.warning("watches begin anew", error=str(self._error or "none"))
            if time.monotonic() - began > 60:
                backoff.reset()
            await asyncio.sleep(backoff.next())
            await on_restart()

    async def _end(self, ended: asyncio.Event) -> None:
        """Have kopf stop, and wait until it has."""
        self._request_stop()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await ended.wait()
        except TimeoutError:
            # A daemon thread does not keep the program alive, and hands over nothing any more.
            self._log.error("watches did not stop in time")
        self._loop = self._stop = None
        self._beat = time.monotonic()

    def _request_stop(self) -> None:
        self._stopping = True
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None:
            with contextlib.suppress(RuntimeError):  # its loop may have ended meanwhile
                loop.call_soon_threadsafe(stop.set)

    def check(self, listed: Iterable[Mapping[str, Any]]) -> None:
        """Compare what was listed with what the watches showed; begin anew when they are blind."""
        now = time.monotonic()
        bodies = list(listed)
        missing = {
            body["metadata"]["uid"]
            for body in bodies
            if self._seen.get(body["metadata"]["uid"], -1) < version_of(body)
        }
        self._missing = {uid: self._missing.get(uid, now) for uid in missing}
        uids = {body["metadata"]["uid"] for body in bodies}
        self._seen = {uid: version for uid, version in self._seen.items() if uid in uids}
        if any(now - since > BLIND_SECONDS for since in self._missing.values()):
            self._log.error("the watches miss changes", objects=len(missing))
            self._missing = {}
            self._request_stop()

    # In the thread.

    def _thread(self, ended: asyncio.Event) -> None:
        self._error = None
        try:
            with asyncio.Runner(loop_factory=_WatchLoop) as runner:
                runner.run(self._operate())
        except Exception as error:  # noqa: BLE001 - whatever ends kopf, it is begun anew
            self._error = error
        finally:
            self._to_owner(ended.set)

    async def _operate(self) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        if self._stopping:  # asked before there was anything to ask
            self._stop.set()
        beat = asyncio.create_task(self._keep_beating(), name="beat")
        try:
            await kopf.operator(
                registry=self._registry(),
                settings=_settings(),
                standalone=True,
                clusterwide=True,
                stop_flag=self._stop,
                # Else kopf asks for the user's name, which a container's user id does not have.
                identity=Identity("outrider-server"),
            )
        finally:
            beat.cancel()
            assert isinstance(loop, _WatchLoop)
            await loop.abort_connections()

    async def _keep_beating(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(1.0)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(self._login)
        watched: tuple[tuple[tuple[str, ...], Kind], ...] = (
            (("outrider.dev", "v1alpha1", "agenttasks"), "AgentTask"),
            (("outrider.dev", "v1alpha1", "agenttaskschedules"), "AgentTaskSchedule"),
            (("outrider.dev", "v1alpha1", "agentconfigs"), "AgentConfig"),
            (("outrider.dev", "v1alpha1", "agents"), "Agent"),
            (("", "v1", "nodes"), "Node"),
        )
        for resource, kind in watched:
            kopf.on.event(*resource, id=kind, registry=registry)(self._handler(kind))
        return registry

    def _login(self, **_: Any) -> kopf.ConnectionInfo:
        config: Any = self._config  # its types leave out what can be set later
        if config.refresh_api_key_hook is not None:
            config.refresh_api_key_hook(config)
        scheme, _sep, token = (config.api_key.get("BearerToken") or "").partition(" ")
        return kopf.ConnectionInfo(
            server=config.host,
            ca_path=config.ssl_ca_cert,
            insecure=not config.verify_ssl,
            certificate_path=config.cert_file,
            private_key_path=config.key_file,
            username=config.username or None,
            password=config.password or None,
            scheme=scheme.capitalize() or None,
            token=token or None,
        )

    def _handler(self, kind: Kind) -> Callable[..., Awaitable[None]]:
        async def handle(event: dict[str, Any], **_: Any) -> None:
            seen = event["object"]
            body = nodes.slim(seen) if kind == "Node" else dict(seen)
            gone = event["type"] == "DELETED"
            change = Change(kind, gone, body)
            self._to_owner(lambda: self._hand_over(change))
            _empty(seen)

        return handle

    def _to_owner(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the server may have ended meanwhile
            self._owner.call_soon_threadsafe(call)

    # On the owner's loop again.

    def _hand_over(self, change: Change) -> None:
        self._metrics.watch_events.labels(change.kind).inc()
        self._metrics.watch_last.set_to_current_time()
        if change.kind in CHECKED:
            self._seen[change.body["metadata"]["uid"]] = version_of(change.body)
        self._on_change(change)


def _empty(seen: dict[str, Any]) -> None:
    """Leave kopf of an object only what it looks at after the handler: its metadata.

    It keeps each event in circles of references until the next full garbage collection, which for
    thousands of agents and nodes is more than all that is known of them.
    """
    seen.pop("spec", None)
    seen.pop("status", None)
    # Made anew: the metadata is part of what was handed over.
    kept = {key: value for key, value in seen["metadata"].items() if key != "managedFields"}
    seen["metadata"] = kept


def _quiet_kopf() -> None:
    """Have kopf tell of troubles only: it writes a line, with all its settings, per handler run."""
    logging.getLogger("kopf").setLevel(logging.WARNING)
    # It warns at each start that signals are not its business here.
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)


def _settings() -> kopf.OperatorSettings:
    # Else a line for each event that was handed over: several a minute and node, for ever.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    settings = kopf.OperatorSettings()
    settings.posting.level = logging.WARNING
    settings.peering.standalone = True
    # The server ends each watch in time, and one that says nothing, not even bookmarks, is ended
    # here; both limits together bound how long a dropped watch stays unnoticed.
    settings.watching.server_timeout = 600
    settings.watching.client_timeout = 660
    settings.watching.inactivity_timeout = 75
    settings.watching.reconnect_backoff = 1.0
    settings.networking.request_timeout = 60
    settings.networking.connect_timeout = 10
    # The last is how late a watch may notice that the API server is back.
    settings.networking.error_backoffs = (1, 1, 2, 2, 3, 3, 5, 5)
    # A worker's slot is held while it idles: with a limit, idling must be short.
    settings.queueing.worker_limit = 200
    settings.queueing.idle_timeout = 0.5
    # It would kill the whole server.
    settings.process.ultimate_exiting_timeout = None
    return settings
