"""What the planner is given and what it answers: types only, no decision."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from outrider_operator.core.model import NodeRun, Phase
from outrider_operator.core.nodes import NodeFacts


@dataclass(frozen=True)
class AgentView:
    """A connected agent.

    Attributes:
        session: fencing number of its stream.
        since: when this leader learned of the stream, seconds since the Unix epoch.
        reported: when its last complete run report in this stream came; None: none yet.
    """

    session: int
    since: float
    reported: float | None = None


@dataclass(frozen=True)
class Roster:
    """Who is there.

    Attributes:
        agents: connected agents by node name.
        away: since when agents that were here are gone, by node name.
        since: from when this leader could have seen an agent connect; nobody counts as away
            for longer than that unless `away` says so.
        nodes: names of all Nodes.
        facts: state and age of Nodes, by name.
    """

    agents: Mapping[str, AgentView]
    away: Mapping[str, float]
    since: float
    nodes: frozenset[str] = frozenset()
    facts: Mapping[str, NodeFacts] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """What the settings say, in seconds.

    Attributes:
        lost_after: an agent away for so long is given up.
        retry_backoff: time between the first attempt's end and the second; doubled each time.
        retry_cap: longest time between two attempts.
    """

    lost_after: float = 300.0
    retry_backoff: float = 5.0
    retry_cap: float = 300.0

    def wait(self, attempt: int) -> float:
        """Time from the end of an attempt, counted from 1, to the next, seconds."""
        return float(min(self.retry_cap, self.retry_backoff * 2 ** (attempt - 1)))


@dataclass(frozen=True)
class Memory:
    """What only this leader remembers of a task; a new one begins with nothing and loses nothing.

    Attributes:
        heard: when a run was last sent or last reported, by node.
        cancelled: when a cancel was last sent, by node.
        wave: number of nodes in the waves that are done, and since when they are.
    """

    heard: Mapping[str, float] = field(default_factory=dict)
    cancelled: Mapping[str, float] = field(default_factory=dict)
    wave: tuple[int, float] = (0, -math.inf)


@dataclass(frozen=True)
class Stop:
    """Why nothing more begins.

    Attributes:
        phase: what becomes of nodes that have not begun.
        reason: CamelCase word for it.
        message: a sentence for people.
        ends_running: runs in flight are cancelled.
    """

    phase: Phase
    reason: str
    message: str
    ends_running: bool


@dataclass(frozen=True)
class Plan:
    """What to do, in this order: write `rows`, then send.

    Attributes:
        rows: all rows, as they are to be.
        sends: nodes whose run is to be sent (again).
        cancels: nodes whose run is to be cancelled, and that are to say what they run.
        stop: why nothing more begins, if so.
        wakeup: when to plan again even if nothing happens, seconds since the Unix epoch.
        memory: to be passed to the next call.
    """

    rows: dict[str, NodeRun]
    sends: tuple[str, ...]
    cancels: tuple[str, ...]
    stop: Stop | None
    wakeup: float | None
    memory: Memory
