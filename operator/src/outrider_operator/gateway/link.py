"""What waits to be sent to the linked leader: roster changes and reports, merged and bounded.

Without input or output. Roster changes and config reports keep only the newest of each node, so
that they are bounded by the number of nodes (the reports are the very bytes their streams keep).
Run reports are bounded in bytes, and past that the link is to be closed: agents report again when
the next one opens, so nothing is lost by it.
"""

from collections import deque
from typing import Final

from outrider_proto import limits
from outrider_proto.v1.fleet_pb2 import (
    AgentLeft,
    AgentSession,
    LinkResponse,
    NodeConfigReport,
    NodeRunReport,
)

#: Most bytes of run reports that wait for the leader.
PENDING_REPORT_BYTES: Final = 64 * limits.MIB
#: Most of that from one node before its stream is read on: one agent must not close the link.
NODE_REPORT_BYTES: Final = limits.MIB
#: A message is closed at this size, bytes; a single report may be larger.
MESSAGE_BYTES: Final = limits.MIB
#: Most roster changes in one message.
MESSAGE_CHANGES: Final = 1000


class LinkOutgoing:
    """The messages that wait for one leader."""

    def __init__(self) -> None:
        self._joined: dict[str, AgentSession] = {}
        self._left: dict[str, AgentLeft] = {}
        self._reports: deque[tuple[NodeRunReport, int]] = deque()
        self._node_bytes: dict[str, int] = {}
        self._configs: dict[str, tuple[int, bytes]] = {}
        self.report_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._joined or self._left or self._reports or self._configs)

    @property
    def full(self) -> bool:
        """More reports wait than may."""
        return self.report_bytes > PENDING_REPORT_BYTES

    def holds_up(self, node: str) -> bool:
        """So much waits of one node that it should report no more for now."""
        return self._node_bytes.get(node, 0) > NODE_REPORT_BYTES

    def joined(self, session: AgentSession) -> None:
        """A stream began."""
        self._joined[session.node] = session
        self._left.pop(session.node, None)

    def left(self, left: AgentLeft) -> None:
        """A stream ended."""
        waiting = self._joined.get(left.node)
        if waiting is not None and waiting.session > left.session:
            return
        # Its beginning goes out even so: it tells the leader that an older stream is gone as well.
        self._left[left.node] = left
        told = self._configs.get(left.node)
        if told is not None and told[0] <= left.session:
            del self._configs[left.node]

    def config_reported(self, node: str, session: int, report: bytes) -> None:
        """An agent told how it stands to its configuration; `report`: a serialized ConfigReport."""
        self._configs[node] = (session, report)

    def reported(self, report: NodeRunReport) -> None:
        """An agent reported runs."""
        size = report.ByteSize()
        self._reports.append((report, size))
        self.report_bytes += size
        self._node_bytes[report.node] = self._node_bytes.get(report.node, 0) + size

    def take(self) -> LinkResponse | None:
        """The next message: beginnings before ends, and both before reports; None: nothing waits.

        Beginnings have messages of their own, so that nobody can read an end before them.
        """
        if not self:
            return None
        message = LinkResponse()
        if self._joined:
            for node in list(self._joined)[:MESSAGE_CHANGES]:
                message.joined.append(self._joined.pop(node))
            return message
        for node in list(self._left)[:MESSAGE_CHANGES]:
            message.left.append(self._left.pop(node))
        taken = 0
        while self._reports and (not taken or taken + self._reports[0][1] <= MESSAGE_BYTES):
            report, size = self._reports.popleft()
            taken += size
            self._node_bytes[report.node] -= size
            if not self._node_bytes[report.node]:
                del self._node_bytes[report.node]
            message.run_reports.append(report)
        self.report_bytes -= taken
        if not taken:
            self._take_configs(message)
        return message

    def _take_configs(self, message: LinkResponse) -> None:
        taken = 0
        for node in list(self._configs)[:MESSAGE_CHANGES]:
            session, report = self._configs[node]
            if taken and taken + len(report) > MESSAGE_BYTES:
                break
            taken += len(report)
            del self._configs[node]
            told = NodeConfigReport(node=node, session=session)
            told.report.ParseFromString(report)
            message.config_reports.append(told)
