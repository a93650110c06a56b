"""The gateway's end of the link to the leader: rosters and run reports up, commands down.

One leader at a time, the one with the highest term; keeps nothing for a leader that is not linked.
A new leader knows nothing of what agents reported before, so all agents are asked anew.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import Command
from outrider_proto.v1.fleet_pb2 import (
    AgentLeft,
    AgentSession,
    GatewayHello,
    LinkRequest,
    LinkResponse,
    NodeRunReport,
)
from outrider_runtime.logs import get_logger

from outrider_operator.gateway.auth import current_identity
from outrider_operator.gateway.hub import Hub
from outrider_operator.gateway.link import LinkOutgoing
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import GatewaySettings

#: A term is forgotten when no leader was linked for so long, seconds: far above the length of a
#: lease, and so that a Lease that was deleted and counts from 0 again does not lock leaders out.
TERM_MEMORY_SECONDS: Final = 120.0
#: Agents are asked for their runs in groups of this size, so long apart in seconds.
ASK_GROUP: Final = 100
ASK_PAUSE_SECONDS: Final = 0.05
#: Refusing a peer that reads nothing must not wait for it for ever, seconds.
ABORT_SECONDS: Final = 5.0

log = get_logger(__name__)


@dataclass(frozen=True)
class LinkEnd:
    """Why a link ends: a word for metrics, a gRPC status code by name, a sentence."""

    reason: str
    code: str
    message: str


CLOSED = LinkEnd("Closed", "OK", "")
PEER_GONE = LinkEnd("PeerGone", "CANCELLED", "")
NO_HELLO = LinkEnd("NoHello", "INVALID_ARGUMENT", "the first message must hold hello")
UNPARSABLE = LinkEnd("Unparsable", "INVALID_ARGUMENT", "the message is no LinkRequest")
OLD_TERM = LinkEnd("OldTerm", "FAILED_PRECONDITION", "a leader with a higher term was here")
REPLACED = LinkEnd("Replaced", "FAILED_PRECONDITION", "a newer link took this one's place")
TOO_SLOW = LinkEnd("TooSlow", "RESOURCE_EXHAUSTED", "the leader does not read what is sent to it")
TOKEN_EXPIRED = LinkEnd(
    "TokenExpired", "UNAUTHENTICATED", "the token has expired: link again with a fresh one"
)
DRAINING = LinkEnd("Draining", "UNAVAILABLE", "this gateway leaves")


class FleetLinks:
    """Serves FleetService/Link.

    Args:
        hub: the agent streams.
        settings: of the gateway.
        grace_seconds: how long a link may outlive its token.
        metrics: where links are counted.
        replica: name of this gateway.
        version: its version.
        monotonic: seconds, for the memory of the term.
    """

    def __init__(
        self,
        hub: Hub,
        settings: GatewaySettings,
        grace_seconds: float,
        metrics: ServerMetrics,
        replica: str,
        version: str,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hub = hub
        self.settings = settings
        self.grace_seconds = grace_seconds
        self.metrics = metrics
        self.hello = GatewayHello(replica=replica, version=version)
        self._monotonic = monotonic
        self._current: Link | None = None
        self._term = 0
        self._last_seen = float("-inf")
        self._draining = False

    async def serve(self, context: Any) -> None:
        """Serve one call of FleetService/Link until it ends."""
        end = DRAINING if self._draining else await Link(self, context).serve()
        self.metrics.link_ends.labels(end.reason).inc()
        if end.code == "INVALID_ARGUMENT":
            self.metrics.refusals.labels(end.code, end.reason).inc()
        if end not in (CLOSED, PEER_GONE):
            async with asyncio.timeout(ABORT_SECONDS):
                await context.abort(grpc.StatusCode[end.code], end.message)

    def drain(self) -> None:
        """Take no more links; the one that is open stays until it is closed."""
        self._draining = True

    def close(self) -> None:
        """End the open link."""
        self._draining = True
        if self._current is not None:
            self._current.end(DRAINING)

    def take_place(self, link: "Link", term: int) -> bool:
        """Make `link` the one that is served; False when its term is too low."""
        if self._current is None and self._monotonic() - self._last_seen > TERM_MEMORY_SECONDS:
            self._term = 0
        if term < self._term:
            return False
        if self._current is not None:
            self._current.end(REPLACED)
        self._term = term
        self._current = link
        self.hub.listen(link)
        self.metrics.links.set(1)
        return True

    def leave_place(self, link: "Link") -> None:
        """`link` is served no more."""
        if self._current is not link:
            return
        self._current = None
        self._last_seen = self._monotonic()
        self.hub.listen(None)
        self.metrics.links.set(0)
        self.metrics.link_pending.set(0)


class Link:
    """One leader's link; a Listener of the hub."""

    def __init__(self, links: FleetLinks, context: Any) -> None:
        self._links = links
        self._context = context
        self._outgoing = LinkOutgoing()
        self._wake = asyncio.Event()
        # Set, and replaced by another, each time that something was taken.
        self._taken = asyncio.Event()
        self._ended: asyncio.Future[LinkEnd] = asyncio.get_running_loop().create_future()

    def joined(self, session: AgentSession) -> None:
        """A stream began."""
        self._outgoing.joined(session)
        self._wake.set()

    def left(self, left: AgentLeft) -> None:
        """A stream ended."""
        self._outgoing.left(left)
        self._wake.set()

    def reported(self, report: NodeRunReport) -> None:
        """An agent reported runs; past the bound the link ends."""
        self._outgoing.reported(report)
        self._links.metrics.link_pending.set(self._outgoing.report_bytes)
        self._wake.set()
        if self._outgoing.full:
            self.end(TOO_SLOW)

    def config_reported(self, node: str, session: int, report: bytes) -> None:
        """An agent told how it stands to its configuration."""
        self._outgoing.config_reported(node, session, report)
        self._wake.set()

    async def room(self, node: str) -> None:
        """Wait until most of what a node reported has been taken, or the link has ended."""
        while self._outgoing.holds_up(node) and not self._ended.done():
            await self._taken.wait()

    def end(self, end: LinkEnd) -> None:
        """End the link; only the first end counts."""
        if not self._ended.done():
            self._ended.set_result(end)
        self._note_taken()

    def _note_taken(self) -> None:
        self._taken.set()
        self._taken = asyncio.Event()

    async def serve(self) -> LinkEnd:
        """Serve the link from its hello to its end."""
        try:
            async with asyncio.timeout(self._links.settings.hello_timeout_seconds):
                request = await self._receive()
        except TimeoutError:
            return NO_HELLO
        if request is None or not request.HasField("hello"):
            return NO_HELLO if request is not None else UNPARSABLE
        hello = request.hello
        bound = log.bind(leader=hello.replica, term=hello.term)
        if not self._links.take_place(self, hello.term):
            bound.warning("link refused, its term is too low")
            return OLD_TERM
        bound.info("link opened", agents=len(self._links.hub))
        end = PEER_GONE
        try:
            end = await self._exchange(request)
        finally:
            self.end(end)  # where it was cancelled, nobody has said so yet
            self._links.leave_place(self)
            bound.info("link ended", reason=end.reason)
        return end

    async def _exchange(self, first: LinkRequest) -> LinkEnd:
        expires = current_identity().expires
        timer: asyncio.TimerHandle | None = None
        if expires is not None:
            left = expires + self._links.grace_seconds - time.time()
            loop = asyncio.get_running_loop()
            timer = loop.call_later(max(0.0, left), self.end, TOKEN_EXPIRED)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._write(), name="link-write"),
                    group.create_task(self._read(first), name="link-read"),
                    group.create_task(self._ask_all(), name="link-ask"),
                ]
                end = await self._ended
                for task in tasks:
                    task.cancel()
        finally:
            if timer is not None:
                timer.cancel()
        return end

    async def _receive(self) -> LinkRequest | None:
        """The next message; None for one that cannot be read, an empty one at the end."""
        data = await self._context.read()
        if data is grpc.aio.EOF:
            self.end(CLOSED)
            return LinkRequest()
        try:
            return LinkRequest.FromString(data)
        except DecodeError:
            return None

    async def _read(self, first: LinkRequest) -> None:
        request: LinkRequest | None = first
        try:
            while not self._ended.done():
                if request is None:
                    self.end(UNPARSABLE)
                    return
                self._dispatch(request)
                request = await self._receive()
        except (grpc.RpcError, grpc.aio.BaseError):
            self.end(PEER_GONE)

    def _dispatch(self, request: LinkRequest) -> None:
        for item in request.commands:
            self._links.hub.send(item.node, item.command)

    async def _ask_all(self) -> None:
        """Ask all agents for their runs, a group at a time so that not all answer at once."""
        for number, stream in enumerate(self._links.hub.streams(), 1):
            stream.push(Command(report_runs=True))
            if number % ASK_GROUP == 0:
                await asyncio.sleep(ASK_PAUSE_SECONDS)

    async def _write(self) -> None:
        try:
            hub = self._links.hub
            for stream in hub.streams():
                if stream.config_report:
                    self.config_reported(
                        stream.info.node, stream.info.session, stream.config_report
                    )
            await self._send(LinkResponse(hello=self._links.hello, joined=hub.roster()))
            while True:
                self._wake.clear()
                while (message := self._outgoing.take()) is not None:
                    self._links.metrics.link_pending.set(self._outgoing.report_bytes)
                    self._note_taken()
                    await self._send(message)
                await self._wake.wait()
        except TimeoutError:
            self.end(TOO_SLOW)
        except (grpc.RpcError, grpc.aio.BaseError):
            self.end(PEER_GONE)

    async def _send(self, message: LinkResponse) -> None:
        data = message.SerializeToString()
        if len(data) > limits.MESSAGE_BYTES:
            raise AssertionError(f"a link message of {len(data)} bytes was made")
        async with asyncio.timeout(self._links.settings.write_timeout_seconds):
            await self._context.write(data)
