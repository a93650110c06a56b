"""The nodes as AgentConfigs look at them: labels, who is connected, and what agents reported.

Kept up to date node by node, for thousands of them are looked at again and again. Decides nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from outrider_proto.v1 import agent_pb2 as pb
from outrider_proto.v1.fleet_pb2 import NodeConfigReport

from outrider_operator.core.config_objects import report_of
from outrider_operator.core.config_plan import Desired, NodeState, Report
from outrider_operator.core.config_status import agent_config
from outrider_operator.core.nodes import NO_FACTS, NodeFacts
from outrider_operator.core.registry import Registry
from outrider_operator.metrics import ServerMetrics

#: A refusal that is told again so soon after the agent was asked anew is the old one, seconds.
ECHO_SECONDS: Final = 1.0


class ConfigNodes:
    """All nodes. As large as the number of Nodes.

    Args:
        registry: who is connected.
        labels: of all Nodes, by name.
        facts: more of them.
        news: told of each node whose Agent object is to say something else.
        now: seconds since the Unix epoch.
    """

    def __init__(
        self,
        registry: Registry,
        labels: Mapping[str, Mapping[str, str]],
        facts: Mapping[str, NodeFacts],
        news: Callable[[str], None],
        metrics: ServerMetrics,
        now: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._labels = labels
        self._facts = facts
        self._news = news
        self._metrics = metrics
        self._now = now
        self.states: dict[str, NodeState] = {}
        self._changed: set[str] = set(labels)
        #: The newest report of each node: its session, as it came, and as it is decided on. As it
        #: came, but serialized: a message would keep all that came with it in memory.
        self._reports: dict[str, tuple[int, bytes, Report]] = {}
        #: What each node is to have, and since when.
        self._wanted: dict[str, tuple[Desired, float]] = {}

    def changed(self, node: str) -> None:
        """A Node came, went or has other labels, or its agent came or went."""
        self._changed.add(node)

    def reported(self, told: NodeConfigReport) -> None:
        """An agent told how it stands to its configuration."""
        last = self._reports.get(told.node)
        if last is not None and last[0] > told.session:
            self._metrics.config_told.labels("stale").inc()
            return
        before = last[2] if last is not None else None
        now = self._now()
        made = report_of(told.report, before, now)
        if before is not None and made.refused and replace(made, at=before.at) == before:
            state = self.states.get(told.node)
            if state is not None and now - state.told < ECHO_SECONDS:
                made = before  # of its last try: it is only about to begin the next
        data = told.report.SerializeToString(deterministic=True)
        self._reports[told.node] = (told.session, data, made)
        self._metrics.config_told.labels(_phase(told.report.phase)).inc()
        self._changed.add(told.node)
        if last is None or last[1] != data:
            self._news(told.node)

    def refresh(self) -> list[str]:
        """Bring up to date what something has happened to. Returns the nodes that are gone."""
        gone = [name for name in self._changed if name not in self._labels]
        for name in gone:
            for known in (self.states, self._wanted, self._reports):
                known.pop(name, None)
        for name in self._changed:
            if name in self._labels:
                self.states[name] = self._state(name)
        self._changed.clear()
        return gone

    def _state(self, name: str) -> NodeState:
        session = self._registry.sessions.get(name)
        departure = self._registry.departures.get(name)
        found = self._reports.get(name)
        return NodeState(
            labels=self._labels[name],
            created=self._facts.get(name, NO_FACTS).created,
            connected=session.since if session is not None else None,
            left=departure.since if departure is not None else None,
            told=self._wanted[name][1] if name in self._wanted else 0.0,
            report=found[2] if found and session and found[0] == session.session else None,
        )

    def want(self, desired: Mapping[str, Desired]) -> None:
        """Note what each node is to have, and since when where that has changed."""
        now = self._now()
        for node, wanted in desired.items():
            last = self._wanted.get(node)
            if last is not None and last[0] is wanted:
                continue
            if last is None or last[0].packed.hash == wanted.packed.hash:
                self._wanted[node] = (wanted, last[1] if last is not None else 0.0)
            else:
                self._tell(node, wanted, now)
            self._news(node)

    def again(self, node: str) -> None:
        """An agent that refused what it is to have is to try again."""
        found = self._wanted.get(node)
        state = self.states[node]
        if found is not None and state.report is not None and state.report.refused:
            self._tell(node, found[0], self._now())

    def _tell(self, node: str, wanted: Desired, at: float) -> None:
        self._wanted[node] = (wanted, at)
        self.states[node] = replace(self.states[node], told=at)

    def agent_config(self, node: str) -> dict[str, Any] | None:
        """What the Agent object of a node is to say of its configuration; None: nothing known."""
        wanted, found = self._wanted.get(node), self._reports.get(node)
        if wanted is None or found is None:
            return None
        return agent_config(pb.ConfigReport.FromString(found[1]), wanted[0])

    def all_told(self) -> bool:
        """Whether nobody is missed who was there, and all that are have told what they run."""
        if any(d.reason == "NotSeenYet" for d in self._registry.departures.values()):
            return False
        states = self.states.values()
        return all(node.connected is None or node.report is not None for node in states)


def _phase(phase: int) -> str:
    try:
        name = pb.ConfigPhase.Name(phase)  # type: ignore[arg-type] # any number may come
    except ValueError:
        return "unknown"
    return name.removeprefix("CONFIG_PHASE_").lower()
