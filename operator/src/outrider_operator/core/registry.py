"""Who is connected where, and what the Agent object of each node ought to say.

Fed with what gateways tell; the newest stream of a node wins, by its session number. Every call is
given now. Objects are written elsewhere, and only when what stands here differs from them.
"""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from outrider_proto.v1.fleet_pb2 import AgentSession

from outrider_operator.core.nodes import NodeFacts
from outrider_operator.core.plans import AgentView, Roster
from outrider_operator.core.status import condition
from outrider_operator.core.times import seconds, seconds_of

#: Why an agent whose gateway cannot be reached counts as gone.
GATEWAY_LOST: Final = "GatewayUnreachable"


@dataclass(frozen=True, slots=True)
class Session:
    """One agent's stream, as its gateway tells it.

    Attributes:
        session: fencing number; the higher one of a node is the newer.
        gateway: the link it came by.
        server: name of the replica.
        since: when the leader learned of it, seconds since the Unix epoch.
        reported: when its last complete run report came; None: none yet.
    """

    node: str
    node_uid: str
    session: int
    gateway: str
    server: str
    since: float
    pod: str = ""
    address: str = ""
    version: str = ""
    net_mode: str = ""
    platform: str = ""
    kernel: str = ""
    instance: str = ""
    reported: float | None = None


def session_of(told: AgentSession, gateway: str, server: str, since: float) -> Session:
    """A stream as the gateway told of it, its texts cut to what an Agent object takes.

    Texts that thousands of agents have in common are kept once.
    """
    hello = told.hello
    return Session(
        node=told.node,
        node_uid=told.node_uid,
        session=told.session,
        gateway=gateway,
        server=server,
        since=since,
        pod=told.pod[:253],
        address=told.address[:256],
        version=sys.intern(hello.version[:128]),
        net_mode=sys.intern(hello.net_mode[:16]),
        platform=sys.intern(hello.platform[:128]),
        kernel=sys.intern(hello.kernel[:256]),
        instance=hello.instance[:128],
    )


@dataclass(frozen=True, slots=True)
class Departure:
    """An agent that is gone: since when, and a CamelCase word for why."""

    since: float
    reason: str


class Registry:
    """The sessions of the fleet, merged from all gateways. `since`: when this leader began.

    A node's older streams at other gateways are kept until they end: session numbers go by the
    gateways' clocks, so one that looks older can be the one that is left.
    """

    def __init__(self, since: float) -> None:
        self.since = since
        self.sessions: dict[str, Session] = {}
        self._others: dict[str, dict[str, Session]] = {}
        self.departures: dict[str, Departure] = {}

    def remember(self, node: str, status: Mapping[str, Any]) -> None:
        """Take what an Agent object says of the time before this leader."""
        if node in self.sessions or node in self.departures:
            return
        ready = _ready(status)
        if ready is not None and ready.get("status") == "False":
            since = seconds_of(ready.get("lastTransitionTime")) or self.since
            self.departures[node] = Departure(since, ready.get("reason", "Unknown"))
        else:
            # It was there when the leader changed: it has all the time to come back.
            self.departures[node] = Departure(self.since, "NotSeenYet")

    def forget(self, node: str) -> None:
        """Drop a node that is gone for good."""
        self.departures.pop(node, None)

    def joined(self, session: Session) -> bool:
        """A stream began; False when a newer one of the node is known."""
        known = self.sessions.get(session.node)
        if known is not None and known.gateway != session.gateway:
            older = min(known, session, key=lambda s: s.session)
            self._others.setdefault(session.node, {})[older.gateway] = older
        if known is not None and known.session > session.session:
            return False
        self._forget_other(session.node, session.gateway)
        self.sessions[session.node] = session
        self.departures.pop(session.node, None)
        return True

    def at(self, gateway: str) -> list[Session]:
        """All streams that a gateway told of, also those that are not their node's newest."""
        known = [s for s in self.sessions.values() if s.gateway == gateway]
        return known + [others[gateway] for others in self._others.values() if gateway in others]

    def left(self, node: str, session: int, reason: str, now: float) -> bool:
        """A stream ended; False when it was not the node's newest."""
        known = self.sessions.get(node)
        if known is None or known.session != session:
            for other in list(self._others.get(node, {}).values()):
                if other.session == session:
                    self._forget_other(node, other.gateway)
            return False
        self._depart(known, reason or "Closed", now)
        return True

    def _depart(self, known: Session, reason: str, now: float) -> None:
        """A node's newest stream is gone: another one of its takes its place, if there is one."""
        del self.sessions[known.node]
        others = self._others.get(known.node)
        if others:
            rest = max(others.values(), key=lambda s: s.session)
            self._forget_other(known.node, rest.gateway)
            self.sessions[known.node] = replace(rest, since=now)
        else:
            self.departures[known.node] = Departure(now, reason)

    def _forget_other(self, node: str, gateway: str) -> None:
        others = self._others.get(node, {})
        others.pop(gateway, None)
        if not others:
            self._others.pop(node, None)

    def gateway_lost(self, gateway: str, now: float) -> list[str]:
        """A gateway is gone, and with it its streams. Returns the nodes."""
        for node in list(self._others):
            self._forget_other(node, gateway)
        gone = [s for s in self.sessions.values() if s.gateway == gateway]
        for session in gone:
            self._depart(session, GATEWAY_LOST, now)
        return [session.node for session in gone]

    def complete_report(self, node: str, session: int, now: float) -> bool:
        """A complete run report came; False when it is not of the node's newest stream."""
        known = self.sessions.get(node)
        if known is None or known.session != session:
            return False
        self.sessions[node] = replace(known, reported=now)
        return True

    def roster(self, nodes: Collection[str], facts: Mapping[str, NodeFacts]) -> Roster:
        """Who is there, for the planner. `nodes`: names of all Nodes; `facts`: more of them."""
        return Roster(
            agents={
                name: AgentView(s.session, s.since, s.reported) for name, s in self.sessions.items()
            },
            away={name: departure.since for name, departure in self.departures.items()},
            since=self.since,
            nodes=frozenset(nodes),
            facts=facts,
        )


def agent_status(
    session: Session | None,
    departure: Departure | None,
    previous: Mapping[str, Any],
    generation: int,
    now: float,
) -> dict[str, Any]:
    """The status an Agent object ought to have.

    Equal to `previous` when nothing changed, so that nothing is written then.
    """
    made = dict(previous)
    before = _ready(previous)
    if session is not None:
        facts = {
            "version": session.version,
            "server": session.server,
            "address": session.address,
            "netMode": session.net_mode,
            "pod": session.pod,
            "nodeUID": session.node_uid,
            "platform": session.platform,
            "kernel": session.kernel,
            "instance": session.instance,
            "connectedSince": seconds(session.session / 1e9),
        }
        made.update((key, value) for key, value in facts.items() if value)
        ready = condition(
            "Ready", True, "Connected", f"connected to {session.server}", generation, before, now
        )
    else:
        reason = departure.reason if departure is not None else "Unknown"
        message = "the agent has no stream to any server"
        ready = condition("Ready", False, reason, message, generation, before, now)
    made["observedGeneration"] = generation
    made["conditions"] = [ready]
    if made != dict(previous):
        made["lastSeen"] = seconds(departure.since if departure and not session else now)
    return made


def _ready(status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for item in status.get("conditions", []):
        if item.get("type") == "Ready" and isinstance(item, Mapping):
            return item
    return None
