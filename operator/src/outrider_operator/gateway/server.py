"""The gateway: one TLS port for agents, the replicas' own links, health and reflection.

Puts the parts together and owns their lives: from listening to the last stream gone. What a call
may do is on the explicit list in core/identity.py, and checked before the call is dispatched.
"""

import asyncio
import contextlib
import time
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import PingRequest, PingResponse
from outrider_runtime.health import Health
from outrider_runtime.logs import get_logger
from outrider_runtime.settings import SettingsError, address

from outrider_operator.core.sink import Sink
from outrider_operator.gateway.auth import (
    Authenticator,
    AuthInterceptor,
    Review,
    current_identity,
)
from outrider_operator.gateway.fleet_service import FleetLinks
from outrider_operator.gateway.hub import DRAINING, Hub
from outrider_operator.gateway.intake import Intake
from outrider_operator.gateway.pace import Limiter
from outrider_operator.gateway.plain import PlainStream
from outrider_operator.gateway.plain_room import PlainRoom
from outrider_operator.gateway.stream import Shared
from outrider_operator.gateway.tls import Certificate
from outrider_operator.gateway.transfer import AgentStream, transfer
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import AuthSettings, GatewaySettings

AGENT_SERVICE: Final = "outrider.v1.AgentService"
FLEET_SERVICE: Final = "outrider.v1.FleetService"
#: As agents of other kinds name it.
PLAIN_SERVICE: Final = "grpc.Transfer"
#: What grpc itself takes as a message. Twice the contract's limit, so that what is somewhat too
#: large is still seen, refused and counted here; grpc refuses the rest with the same code.
GRPC_MESSAGE_BYTES: Final = 2 * limits.MESSAGE_BYTES
#: Calls at once on one connection: the stream, a Ping, health, reflection.
CONCURRENT_CALLS: Final = 16
#: Largest TLS record that is sent, bytes: each connection has a buffer of that size.
TLS_FRAME_BYTES: Final = 2 * limits.KIB
#: Streams that were told to end get so long to do it, seconds.
STOP_GRACE_SECONDS: Final = 2.0

#: Tokens that end and writes that hang are looked for so often, seconds.
SWEEP_SECONDS: Final = 1.0

log = get_logger(__name__)


def server_options(settings: GatewaySettings) -> list[tuple[str, int]]:
    """Channel arguments of the gateway's server; see grpc's channel_arg_names.h for each."""
    keepalive = settings.keepalive
    return [
        # On, two servers would share the port without a word.
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", CONCURRENT_CALLS),
        ("grpc.server_handshake_timeout_ms", _millis(keepalive.handshake_seconds)),
        ("grpc.keepalive_time_ms", _millis(keepalive.time_seconds)),
        ("grpc.keepalive_timeout_ms", _millis(keepalive.timeout_seconds)),
        # Without it a dead peer is only found 60 s after the ping.
        ("grpc.http2.ping_timeout_ms", _millis(keepalive.timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _millis(keepalive.min_interval_seconds)),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.max_connection_idle_ms", _millis(keepalive.max_idle_seconds)),
        # The defaults let a hundred busy streams hold gigabytes; these hold tens of megabytes.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 16 * limits.KIB),
        # A message of a few KiB may unpack to gigabytes: grpc is not to do that, see session.py.
        ("grpc.per_message_decompression", 0),
        # What each connection holds for its whole life. Small frames of TLS, for what goes to
        # agents is small; no table of headers, for each connection has one call.
        ("grpc.tsi.max_frame_size", TLS_FRAME_BYTES),
        ("grpc.http2.hpack_table_size.decoder", 0),
        ("grpc.http2.hpack_table_size.encoder", 0),
        ("grpc.max_receive_message_length", GRPC_MESSAGE_BYTES),
        ("grpc.max_send_message_length", limits.MESSAGE_BYTES),
        ("grpc.max_metadata_size", limits.METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", 2 * limits.METADATA_BYTES),
    ]


class Gateway:
    """The gateway of one replica.

    Args:
        settings: address, certificate, bounds.
        auth: whose tokens are taken.
        sink: where batches go; its life is its owner's.
        review: asks the API server about a token.
        metrics: of the server.
        health: readiness of the program; the condition "tls" is set here, and grpc's health
            service follows the whole.
        replica: name of this replica.
        version: of the program.

    Raises:
        SettingsError: the certificate cannot be used.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        auth: AuthSettings,
        *,
        sink: Sink,
        review: Review,
        metrics: ServerMetrics,
        health: Health,
        replica: str,
        version: str,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._health = health
        self._replica = replica
        self._version = version
        self._authenticator = Authenticator(auth, review, metrics)
        self._certificate = Certificate(settings.tls, metrics, health)
        self._draining = False
        self._drained_at = 0.0
        self._left = asyncio.Event()
        self._calls = 0
        self.hub = Hub(metrics)
        self.links = FleetLinks(
            self.hub, settings, auth.expiry_grace_seconds, metrics, replica, version
        )
        self._shared = Shared(
            settings=settings,
            auth=auth,
            hub=self.hub,
            intake=Intake(sink, settings.max_inflight_bytes, metrics),
            limiter=Limiter(settings.limits, settings.max_connections),
            plain=PlainRoom(settings.max_inflight_bytes, metrics),
            metrics=metrics,
            replica=replica,
            version=version,
            draining=lambda: self._draining,
        )
        #: The port that is listened on, once `started` is set.
        self.port = 0
        self.started = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then send the agents elsewhere and return.

        Raises:
            SettingsError: the address cannot be listened on.
        """
        status = grpc_health.aio.HealthServicer()
        server = self._server(status)
        self.port = self._listen(server)
        await server.start()
        log.info("listening", address=self._settings.address, port=self.port)
        self.started.set()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._certificate.watch(), name="certificate"),
                    group.create_task(self._follow_health(status), name="health"),
                    group.create_task(self._sweep(), name="sweep"),
                ]
                await stop.wait()
                await self._drain(status)
                for task in tasks:
                    task.cancel()
        finally:
            await server.stop(STOP_GRACE_SECONDS)
            await self._settle()
            log.info("not listening any more", port=self.port)

    async def _settle(self) -> None:
        """Have plain records stored until the time to drain is over: they are nowhere else."""
        plain = self._shared.plain
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._drained_at):
                await plain.all_settled()
        self._shared.intake.close()
        if plain.unstored or plain.lost:
            log.error(
                "plain records were not stored before the server stopped: the sink was away for "
                "longer than gateway.drainSeconds, or streams broke while it was slow",
                lost=plain.lost,
                still_with_the_sink=plain.unstored,
            )

    def _server(self, status: Any) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=[AuthInterceptor(self._authenticator, self._settings, self._metrics)],
            options=server_options(self._settings),
        )
        # Bytes in, bytes out: grpc answers INTERNAL to what its own handlers cannot parse.
        methods: dict[str, dict[str, Any]] = {
            AGENT_SERVICE: {
                "Transfer": grpc.stream_stream_rpc_method_handler(self._transfer),
                "Ping": grpc.unary_unary_rpc_method_handler(self._ping),
            },
            FLEET_SERVICE: {"Link": grpc.stream_stream_rpc_method_handler(self._link)},
            # Named anyway: the interceptor says whether it is there.
            PLAIN_SERVICE: {"Transfer": grpc.stream_stream_rpc_method_handler(self._transfer)},
            grpc_health.SERVICE_NAME: {
                "Check": grpc.stream_stream_rpc_method_handler(self._check),
                "Watch": grpc.unary_stream_rpc_method_handler(
                    status.Watch,
                    request_deserializer=health_pb2.HealthCheckRequest.FromString,
                    response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
                ),
            },
        }
        server.add_generic_rpc_handlers(
            tuple(
                grpc.method_handlers_generic_handler(service, handlers)
                for service, handlers in methods.items()
            )
        )
        names = (AGENT_SERVICE, FLEET_SERVICE, grpc_health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _listen(self, server: grpc.aio.Server) -> int:
        host, port = address(self._settings.address, setting="gateway.address")
        shown = f"[{host or '::'}]:{port}" if ":" in host or not host else f"{host}:{port}"
        try:
            bound = server.add_secure_port(shown, self._certificate.credentials())
        except RuntimeError:
            bound = 0
        if not bound:
            raise SettingsError(
                f'setting "gateway.address": cannot listen on {self._settings.address}: '
                "the address is in use, or not one of this machine"
            )
        return bound

    async def _follow_health(self, status: Any) -> None:
        """Make grpc's health service say what /readyz says."""
        changed = asyncio.Event()
        self._health.watch(lambda _ready: changed.set())
        while True:
            changed.clear()
            await self._set_status(status, self._health.ready)
            await changed.wait()

    async def _set_status(self, status: Any, serving: bool) -> None:
        states = health_pb2.HealthCheckResponse
        for service in ("", AGENT_SERVICE, FLEET_SERVICE):
            await status.set(service, states.SERVING if serving else states.NOT_SERVING)

    async def _sweep(self) -> None:
        """Look at the clock for all streams: thousands of timers would be thousands of objects."""
        seconds = min(SWEEP_SECONDS, self._settings.write_timeout_seconds / 2)
        while True:
            await asyncio.sleep(seconds)
            now, monotonic = time.time(), time.monotonic()
            for stream in list(self._shared.calls):
                stream.sweep(now, monotonic)

    async def _drain(self, status: Any) -> None:
        """Take no more streams, tell the agents to leave, and wait until they have."""
        self._draining = True
        self._drained_at = asyncio.get_running_loop().time() + self._settings.drain_seconds
        self.links.drain()
        await status.enter_graceful_shutdown()
        streams = self.hub.streams()
        log.info("draining", agents=len(streams))
        for stream in streams:
            if isinstance(stream, AgentStream):
                stream.tell_drain("the server leaves", self._settings.drain_spread_seconds)
        for call in list(self._shared.calls):
            if isinstance(call, PlainStream):  # it cannot be told, and takes a while to end
                call.end(DRAINING)
        try:
            async with asyncio.timeout_at(self._drained_at):
                await self._all_gone()
        except TimeoutError:
            log.warning("agents did not leave in time", agents=len(self._shared.calls))
        for call in list(self._shared.calls):
            call.end(DRAINING)
        self.links.close()

    async def _all_gone(self) -> None:
        while self._shared.calls:
            self._left.clear()
            await self._left.wait()

    # The calls. grpc has authenticated their callers by now, but for health checks.

    async def _check(self, _requests: Any, context: Any) -> None:
        """Answer Health/Check for the whole server, whichever service is asked for.

        Anybody may ask, so the request is not read: grpc would take a message of any size that
        any other call may have, from thousands of connections at once.
        """
        states = health_pb2.HealthCheckResponse
        serving = self._health.ready and not self._draining
        status = states.SERVING if serving else states.NOT_SERVING
        await context.write(health_pb2.HealthCheckResponse(status=status).SerializeToString())

    async def _transfer(self, _requests: Any, context: Any) -> None:
        try:
            await transfer(self._shared, context)
        finally:
            self._left.set()

    async def _link(self, _requests: Any, context: Any) -> None:
        await self.links.serve(context)

    async def _ping(self, data: bytes, context: Any) -> bytes:
        try:
            request = PingRequest.FromString(data)
        except DecodeError:
            await self._refuse(context, "INVALID_ARGUMENT", "Unparsable", "no PingRequest")
            raise AssertionError("abort raises") from None
        if len(request.payload) > limits.PING_BYTES:
            message = f"a payload has at most {limits.PING_BYTES} bytes"
            await self._refuse(context, "RESOURCE_EXHAUSTED", "TooLarge", message)
        self._metrics.pings.inc()
        return PingResponse(
            payload=request.payload,
            server=self._replica,
            version=self._version,
            unix_nanos=time.time_ns(),
            caller=current_identity().caller,
        ).SerializeToString()

    async def _refuse(self, context: Any, code: str, reason: str, message: str) -> None:
        self._metrics.refusals.labels(code, reason).inc()
        await context.abort(grpc.StatusCode[code], message)


def _millis(seconds: float) -> int:
    return max(1, int(seconds * 1000))
