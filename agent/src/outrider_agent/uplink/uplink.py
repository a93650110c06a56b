"""Keeps the agent connected: finds servers, tries them in order, backs off, and begins again.

Each change of state is logged once, not each try. The token and the certificates are read anew at
every connect. What goes over a stream is `stream`'s matter.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
from outrider_proto.channel import TokenFile, connect
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.backoff import Backoff
from outrider_runtime.discovery import DiscoveryError, resolve
from outrider_runtime.logs import get_logger

from outrider_agent.core.effects import Welcomed
from outrider_agent.core.pacing import TokenBucket
from outrider_agent.core.routes import MAX_DISCOVERED, Route, plan, pushback
from outrider_agent.core.session import End, ProtocolError
from outrider_agent.core.storage import Outbox, StorageError
from outrider_agent.core.traffic import Traffic
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings import ServerSettings
from outrider_agent.uplink.messages import open_transfer
from outrider_agent.uplink.stream import Configuration, Runs, Stream, StreamClosedError

log = get_logger("outrider.uplink")

#: A stream that lasted this long was a success: the next back-off begins anew, seconds.
STEADY_SECONDS = 10.0
#: After a stream that ended as planned we connect at once, unless it was as short as this, seconds.
QUICK_SECONDS = 1.0

#: Most different problems that are logged between two connections.
MAX_TOLD = 64

_REFUSALS = {
    grpc.StatusCode.UNAUTHENTICATED: "the server does not accept our token",
    grpc.StatusCode.PERMISSION_DENIED: "the server does not let our token speak for this node",
}


#: Where a call ends while its first message is being written, grpc.aio (1.85, `_write` of
#: grpc/aio/_call.py) puts this in the place of its status. It is a server that lets nobody in now,
#: for it reads first from all others: we come back after a time of our own, within these seconds.
_UNREAD: Final = (grpc.StatusCode.INTERNAL, "Internal error from Core")
UNREAD_SECONDS: Final = (1.0, 5.0)


class DialError(Exception):
    """An address did not connect in time, or what we need to connect cannot be read."""


@dataclass(frozen=True)
class Identity:
    """What the agent says of itself; `hello` without its net mode."""

    hello: pb.Hello
    envelope: pb.PackagedData

    def first_message(self, route: Route) -> pb.PackagedData:
        """The first message of a stream."""
        message = pb.PackagedData()
        message.CopyFrom(self.envelope)
        message.hello.CopyFrom(self.hello)
        message.hello.net_mode = route.mode.value
        return message


class Uplink:
    """The agent's connection. `set_connected` is told of each change, with the reason."""

    def __init__(
        self,
        settings: ServerSettings,
        identity: Identity,
        outbox: Outbox,
        metrics: AgentMetrics,
        set_connected: Callable[[bool, str], None],
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._outbox = outbox
        self._metrics = metrics
        self._set_connected = set_connected
        self._token = TokenFile(settings.token_file)
        self._backoff = Backoff(settings.backoff_base_seconds, settings.backoff_cap_seconds)
        self._stream: Stream | None = None
        self._rng = random.Random()
        self._told: set[str] = set()
        self._welcomed_at = 0.0
        self._avoid = ""
        #: Where a server asked us to come later: its address, and after how many seconds.
        self._later: tuple[str, float] | None = None
        # The same for all streams: a new one is no reason for another burst.
        self._bucket = TokenBucket(settings.max_bytes_per_second)
        #: Called with the terms of each server that takes us.
        self.on_welcome: Callable[[Welcomed], None] = lambda _: None
        #: Who puts configurations into force; None: they are neither taken nor reported.
        self.config: Configuration | None = None
        #: How the server in use was found: "sd", "private" or "public"; empty before the first.
        self.net_mode = ""
        self.traffic = Traffic()
        metrics.in_flight_bytes.set_function(
            lambda: 0 if self._stream is None else self._stream.in_flight_bytes
        )
        set_connected(False, "not connected yet")

    def run_changed(self, state: pb.RunState) -> None:
        """Report a run's new state. Without a stream it is in the next complete report."""
        if self._stream is not None:
            self._stream.changed(state)

    def config_changed(self) -> None:
        """Report how the agent stands to its configuration; every new stream begins with that."""
        if self._stream is not None:
            self._stream.config_changed()

    def set_max_bytes_per_second(self, rate: int) -> None:
        """Another bound for records, bytes per second; 0: none."""
        self._bucket.set_rate(rate, time.monotonic())
        if self._stream is not None:
            self._stream.bandwidth_changed()

    def batch_appended(self) -> None:
        """The outbox has a new batch."""
        if self._stream is not None:
            self._stream.appended()

    async def settle(self, seconds: float) -> bool:
        """Wait until all reports of runs were sent, at most so long; False if they were not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._stream is not None and self._stream.idle:
                return True
            await asyncio.sleep(0.02)
        return False

    async def run(self, runs: Runs) -> None:
        """Keep connected for ever."""
        while True:
            planned = False
            for route in await self._routes():
                end = await self._use(route, runs)
                planned = end is not None and end.planned
                self._avoid = route.address if end is End.DRAIN else ""
                if self._later is not None:
                    break  # the other servers would only be asked for the same favour
                if planned or self._lasted(STEADY_SECONDS):
                    break  # look for servers anew: there may be others by now
            if self._lasted(STEADY_SECONDS):
                self._backoff.reset()
            if self._later is not None:
                await asyncio.sleep(self._later[1])
            elif not planned or not self._lasted(QUICK_SECONDS):
                await asyncio.sleep(self._backoff.next())

    def _lasted(self, seconds: float) -> bool:
        """Whether the last stream was taken by its server, and so long ago."""
        return bool(self._welcomed_at) and time.monotonic() - self._welcomed_at >= seconds

    async def _routes(self) -> list[Route]:
        settings = self._settings
        found: list[str] = []
        if settings.target:
            try:
                addresses = await resolve(settings.target, limit=MAX_DISCOVERED + 1)
                found = [str(address) for address in addresses]
            except DiscoveryError as error:
                self._metrics.discovery_failures.inc()
                self._tell(f"no server found: {error}")
        return plan(
            found,
            private=settings.private.get(settings.region, ""),
            public=settings.public.get(settings.region, ""),
            avoid=self._avoid,
            prefer="" if self._later is None else self._later[0],
        )

    async def _use(self, route: Route, runs: Runs) -> End | None:
        """Connect to one address and stay; why we left of our own will, None for an error."""
        self._welcomed_at = 0.0
        self._later = None
        result = "failed"
        try:
            end = await self._stay(route, runs)
        except DialError as error:
            result = "unreachable"
            self._tell(str(error))
        except grpc.aio.AioRpcError as error:
            result = self._take_error(route, error)
        except (StreamClosedError, ProtocolError, StorageError) as error:
            self._tell(f"{route.address}: {error}")
        else:
            result = end.name.lower()
            self._leave(f"{route.address}: {end.value}", planned=end.planned)
            if self._welcomed_at:
                self._metrics.disconnects.labels(result).inc()
            return end
        if self._welcomed_at:
            self._metrics.disconnects.labels(result).inc()
        else:
            self._metrics.connects.labels(route.mode.value, result).inc()
        return None

    def _take_error(self, route: Route, error: grpc.aio.AioRpcError) -> str:
        """A stream that ended with an error: tell of it; its result for the metrics."""
        seconds = pushback(error.trailing_metadata() or (), self._rng)
        if seconds is None and not self._welcomed_at and _ended_unread(error):
            seconds = self._rng.uniform(*UNREAD_SECONDS)
        if seconds is None:
            self._tell(_explain(route, error))
            return "refused" if error.code() in _REFUSALS else "failed"
        self._later = (route.address, seconds)
        details = error.details() or error.code().name
        self._tell(f"{route.address}: the server asks us to come later: {details}", seconds)
        return "pushed_back"

    async def _stay(self, route: Route, runs: Runs) -> End:
        try:
            ca = await asyncio.to_thread(Path(self._settings.ca_file).read_bytes)
            token = await asyncio.to_thread(self._token.read)
        except (OSError, ValueError) as error:
            raise DialError(f"cannot read what it takes to connect: {error}") from None
        channel = connect(route.address, ca=ca, server_name=self._settings.server_name)
        try:
            await self._dial(channel, route)
            stream = Stream(
                open_transfer(channel, token),
                self._identity.first_message(route),
                self._outbox,
                runs,
                self._metrics,
                self.traffic,
                self._bucket,
                on_welcome=lambda welcomed: self._welcome(route, welcomed),
                config=self.config,
            )
            self._stream = stream
            try:
                return await stream.run()
            finally:
                self._stream = None
        finally:
            await channel.close()

    async def _dial(self, channel: grpc.aio.Channel, route: Route) -> None:
        """Wait for the connection; a failed one is not waited for, there are other addresses."""
        seconds = self._settings.dial_timeout_seconds
        why = f"not within {seconds:g} s"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                state = channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                    if state is grpc.ChannelConnectivity.READY:
                        return
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
                why = (
                    "nobody listens there, or its certificate is not one of server.caFile for "
                    f"{self._settings.server_name}"
                )
        raise DialError(f"{route.address}: no TLS connection: {why}")

    def _welcome(self, route: Route, welcomed: Welcomed) -> None:
        self._welcomed_at = time.monotonic()
        self._told.clear()
        self.net_mode = route.mode.value
        self._metrics.connects.labels(route.mode.value, "ok").inc()
        self._metrics.connected.set(1)
        self._set_connected(True, "")
        log.info(
            "connected",
            server=welcomed.server,
            server_version=welcomed.version,
            address=route.address,
            net_mode=route.mode.value,
            agent_id=welcomed.agent_id,
        )
        self.on_welcome(welcomed)

    def _leave(self, reason: str, *, planned: bool) -> None:
        if planned:
            # Back in a moment: not worth a failed probe, only a line.
            log.info("leaving the server", reason=reason)
            self._metrics.connected.set(0)
        else:
            self._tell(reason)

    def _tell(self, problem: str, seconds: float | None = None) -> None:
        """Not connected, and why: logged when it is news; `seconds`: until we try again."""
        self._metrics.connected.set(0)
        self._set_connected(False, problem)
        # Several addresses fail in turn: each problem is news once, until we were connected.
        if problem not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(problem)
            tell, event = log.warning, "not connected"
        else:
            tell, event = log.debug, "still not connected"
        more = {} if seconds is None else {"seconds": round(seconds, 1)}
        tell(event, reason=problem, failures=self._backoff.failures, **more)


def _ended_unread(error: grpc.aio.AioRpcError) -> bool:
    """Whether the status of a refused call was lost."""
    return (error.code(), error.details()) == _UNREAD


def _explain(route: Route, error: grpc.aio.AioRpcError) -> str:
    code = error.code()
    lead = _REFUSALS.get(code, "the stream ended")
    return f"{route.address}: {lead}: {code.name}: {error.details() or 'no details'}"
