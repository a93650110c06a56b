"""The agent streams of this replica, by node, and who listens to them: the linked leader.

At most one stream a node: a newer one takes the older one's place, for a half-open connection must
not lock an agent out. Keeps nothing that a restart may not lose.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from outrider_proto.v1.agent_pb2 import Command, RunReport
from outrider_proto.v1.fleet_pb2 import AgentLeft, AgentSession, NodeRunReport

from outrider_operator.metrics import ServerMetrics


@dataclass(frozen=True)
class End:
    """Why a stream ends.

    Attributes:
        reason: a CamelCase word of a small fixed set, for metrics and the roster.
        code: gRPC status code by name.
        message: for the agent's log.
    """

    reason: str
    code: str
    message: str


CLOSED = End("Closed", "OK", "")
PEER_GONE = End("PeerGone", "CANCELLED", "the connection is gone")
REPLACED = End("Replaced", "ABORTED", "a newer stream of the same node took its place")
TOKEN_EXPIRED = End(
    "TokenExpired", "UNAUTHENTICATED", "the token has expired: connect again with a fresh one"
)
DRAINING = End("Draining", "UNAVAILABLE", "the server leaves: connect to another one")
TOO_SLOW = End("TooSlow", "RESOURCE_EXHAUSTED", "the agent does not read what is sent to it")


class Stream(Protocol):
    """One agent's stream, as far as the hub knows it."""

    info: AgentSession
    #: The newest ConfigReport, serialized, for leaders to come; empty: none came yet.
    config_report: bytes

    def push(self, command: Command) -> None:
        """Send a command, merged with what waits; ends the stream when too much waits."""

    def end(self, end: End) -> None:
        """End the stream; only the first end counts."""


class Listener(Protocol):
    """Somebody who follows the streams: a link. No method raises, and none but `room` waits."""

    def joined(self, session: AgentSession) -> None:
        """A stream began."""

    def left(self, left: AgentLeft) -> None:
        """A stream ended."""

    def reported(self, report: NodeRunReport) -> None:
        """An agent reported runs."""

    def config_reported(self, node: str, session: int, report: bytes) -> None:
        """An agent told how it stands to its configuration; replaces what it told before."""

    async def room(self, node: str) -> None:
        """Wait until most of what a node reported has been taken, or nobody follows any more."""


class Hub:
    """All agent streams of one gateway.

    Args:
        metrics: where streams are counted.
        now_nanos: nanoseconds since the Unix epoch.
    """

    def __init__(self, metrics: ServerMetrics, now_nanos: Callable[[], int] = time.time_ns) -> None:
        self._metrics = metrics
        self._now_nanos = now_nanos
        self._streams: dict[str, Stream] = {}
        self._listener: Listener | None = None
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._streams)

    def next_number(self) -> int:
        """A fencing number above all before, and above those of gateways that began earlier."""
        self._last_number = max(self._last_number + 1, self._now_nanos())
        return self._last_number

    def join(self, stream: Stream) -> None:
        """Add a stream; an older one of the same node is ended, be it this one."""
        node = stream.info.node
        before = self._streams.get(node)
        if before is not None and before.info.session > stream.info.session:
            # Its hello came late, from a connection that its agent has left. The leader goes by
            # the numbers, and would hear nothing of this one.
            stream.end(REPLACED)
            return
        self._streams[node] = stream
        self._metrics.streams.set(len(self._streams))
        if before is not None:
            before.end(REPLACED)
        if self._listener is not None:
            self._listener.joined(stream.info)

    def leave(self, stream: Stream, reason: str) -> None:
        """Remove a stream that ended, unless a newer one has its place."""
        self._metrics.stream_ends.labels(reason).inc()
        node = stream.info.node
        if self._streams.get(node) is not stream:
            return
        del self._streams[node]
        self._metrics.streams.set(len(self._streams))
        if self._listener is not None:
            left = AgentLeft(node=node, session=stream.info.session, reason=reason)
            self._listener.left(left)

    def report(self, stream: Stream, report: RunReport) -> None:
        """Pass on what an agent reported; without a leader it is dropped, for the next one asks."""
        if self._streams.get(stream.info.node) is not stream:
            self._metrics.run_reports.labels("stale").inc()
        elif self._listener is None:
            self._metrics.run_reports.labels("no_leader").inc()
        else:
            self._metrics.run_reports.labels("forwarded").inc()
            info = stream.info
            self._listener.reported(
                NodeRunReport(node=info.node, session=info.session, report=report)
            )

    def config_reported(self, stream: Stream, report: bytes) -> None:
        """Keep how an agent stands to its configuration, and pass it on if there is a leader."""
        if self._streams.get(stream.info.node) is not stream:
            self._metrics.config_reports.labels("stale").inc()
            return
        stream.config_report = report
        if self._listener is None:
            self._metrics.config_reports.labels("no_leader").inc()
            return
        self._metrics.config_reports.labels("forwarded").inc()
        self._listener.config_reported(stream.info.node, stream.info.session, report)

    async def room(self, node: str) -> None:
        """Wait until a node may report more: a flood of reports waits with its agent."""
        if self._listener is not None:
            await self._listener.room(node)

    def send(self, node: str, command: Command) -> None:
        """Send a command to a node; dropped where it has no stream here, the roster tells."""
        stream = self._streams.get(node)
        self._metrics.commands.labels("no_stream" if stream is None else "queued").inc()
        if stream is not None:
            stream.push(command)

    def listen(self, listener: Listener | None) -> None:
        """Set who follows the streams from now on; only one does."""
        self._listener = listener

    def roster(self) -> Iterable[AgentSession]:
        """All streams, as they are now."""
        return [stream.info for stream in self._streams.values()]

    def streams(self) -> list[Stream]:
        """All streams, as they are now."""
        return list(self._streams.values())
