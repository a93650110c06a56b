"""What is to be done next for a task: which nodes begin, which are told again, cancelled, given up.

Pure: rows as they are written, who is connected, and now come in; a Plan comes out. The caller
writes the plan's rows first and sends afterwards, so that a command never goes out whose intent
the next leader could not read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from outrider_operator.core.model import (
    FAILURES,
    FINAL,
    IN_FLIGHT,
    NodeRun,
    Phase,
    Rows,
    Task,
    resolve,
)
from outrider_operator.core.targeting import NODE_NOT_FOUND, NOT_CONNECTED

#: A dispatched run nothing was heard of for so long is sent again, and so is a cancel; seconds.
SILENCE_SECONDS: Final = 30.0
#: An agent that just connected is given so long to say what it runs, seconds.
COMPLETE_REPORT_SECONDS: Final = 15.0


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
    """

    agents: Mapping[str, AgentView]
    away: Mapping[str, float]
    since: float
    nodes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Policy:
    """What the settings say. `lost_after`: an agent away for so many seconds is given up."""

    lost_after: float = 300.0


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


def plan(
    task: Task, rows: Rows, roster: Roster, memory: Memory, policy: Policy, now: float
) -> Plan:
    """Decide what comes next for a task that has started.

    Args:
        task: the task; `started` is set.
        rows: its rows as they are written, in the order of their turns.
        roster: who is there.
        memory: what the last call returned; a fresh one after a change of leader.
        policy: what the settings say.
        now: seconds since the Unix epoch.
    """
    planner = _Planner(task, rows, roster, memory, policy, now)
    planner.give_up_absent()
    stop = planner.find_stop()
    if stop is not None:
        planner.end(stop)
    elif not task.spec.suspend:
        planner.begin()
    planner.send_again(stop)
    return planner.result(stop)


class _Planner:
    """The working state of one call of `plan`."""

    def __init__(
        self, task: Task, rows: Rows, roster: Roster, memory: Memory, policy: Policy, now: float
    ) -> None:
        assert task.started is not None
        self.task, self.roster, self.policy, self.now = task, roster, policy, now
        self.started = task.started
        self.rows = dict(rows)
        self.heard = dict(memory.heard)
        self.cancelled = dict(memory.cancelled)
        self.wave = memory.wave
        self.sends: list[str] = []
        self.cancels: list[str] = []
        self.timers: list[float] = []

    @property
    def deadline(self) -> float:
        """When the task as a whole has had its time."""
        return self.started + self.task.spec.active_deadline_seconds

    def wake(self, at: float) -> None:
        if at > self.now:
            self.timers.append(at)

    def give_up_absent(self) -> None:
        """Nodes whose agent is away for too long are Lost; the rest is woken up for in time."""
        for row in list(self.rows.values()):
            if row.phase in FINAL:
                continue
            agent = self.roster.agents.get(row.node)
            if agent is None:
                self._absent(row)
            elif row.phase in IN_FLIGHT:
                self._unanswered(row)
            elif row.reason:
                self.rows[row.node] = row.noting("", "")

    def _absent(self, row: NodeRun) -> None:
        since = self.roster.away.get(row.node, self.started)
        # A leader that is new to the fleet must not judge before agents could come to it.
        due = max(since + self.policy.lost_after, self.roster.since + COMPLETE_REPORT_SECONDS)
        if row.phase is Phase.PENDING and self.task.spec.suspend and not self.task.spec.cancel:
            return
        missing = row.phase is Phase.PENDING and row.node not in self.roster.nodes
        reason = NODE_NOT_FOUND if missing else NOT_CONNECTED
        if self.now >= due:
            text = "there is no Node of this name" if missing else "its agent has not come back"
            message = f"{text} within {self.policy.lost_after:g} s"
            self.rows[row.node] = row.to(Phase.LOST, reason, message)
            return
        self.wake(due)
        if row.phase is Phase.PENDING and row.reason != reason:
            text = "there is no Node of this name" if missing else "its agent is not connected"
            self.rows[row.node] = row.noting(reason, text)

    def _unanswered(self, row: NodeRun) -> None:
        """A connected agent that answers nothing must not keep a task open for ever."""
        due = self.deadline + self.policy.lost_after
        if self.task.spec.suspend and not self.task.spec.cancel:
            return
        if self.now >= due:
            message = "its agent is connected but has not ended the run after the task's deadline"
            self.rows[row.node] = row.to(Phase.LOST, "NoAnswer", message)
        else:
            self.wake(due)

    def find_stop(self) -> Stop | None:
        """Why nothing more may begin, if there is a reason."""
        spec = self.task.spec
        if self.task.deleting:
            return Stop(Phase.CANCELLED, "TaskDeleted", "the task is being deleted", True)
        if spec.cancel:
            return Stop(Phase.CANCELLED, "TaskCancelled", "spec.cancel was set", True)
        if self.now >= self.deadline and not spec.suspend:
            message = f"the task took longer than {spec.active_deadline_seconds} s"
            return Stop(Phase.SKIPPED, "DeadlineExceeded", message, True)
        if not spec.suspend:
            self.wake(self.deadline)
        failures = sum(row.phase in FAILURES for row in self.rows.values())
        allowed = resolve(spec.rollout.max_failures, len(self.rows), up=False)
        if failures > allowed:
            message = f"{failures} nodes failed, and spec.rollout.maxFailures allows {allowed}"
            return Stop(Phase.SKIPPED, "TooManyFailures", message, False)
        return None

    def end(self, stop: Stop) -> None:
        """Begin nothing more, and end what runs where the reason asks for it."""
        for row in list(self.rows.values()):
            if row.phase is Phase.PENDING:
                self.rows[row.node] = row.to(stop.phase, stop.reason, stop.message)
            elif row.phase in IN_FLIGHT and stop.ends_running:
                self._cancel(row, stop)

    def _cancel(self, row: NodeRun, stop: Stop) -> None:
        agent = self.roster.agents.get(row.node)
        if agent is None:
            return
        if self._unknown_to(agent, row):
            # It never arrived, and nobody will send it now. Should it be under way all the same,
            # the cancel comes after it.
            self.cancels.append(row.node)
            self.rows[row.node] = row.to(Phase.CANCELLED, stop.reason, stop.message)
            return
        last = self.cancelled.get(row.node, -math.inf)
        if last < agent.since or self.now - last >= SILENCE_SECONDS:
            self.cancels.append(row.node)
            self.cancelled[row.node] = last = self.now
        self.wake(last + SILENCE_SECONDS)

    def _unknown_to(self, agent: AgentView, row: NodeRun) -> bool:
        """True when a complete report leaves out a run that can no longer be under way to it.

        That is one not sent in this stream, or one it was asked about after it was sent: a cancel
        asks for a report.
        """
        if row.phase is not Phase.DISPATCHED or agent.reported is None:
            return False
        heard = self.heard.get(row.node, -math.inf)
        asked = self.cancelled.get(row.node, math.inf)
        return heard < agent.since or max(heard, asked) < agent.reported

    def begin(self) -> None:
        """Give nodes their turn, as many as maxConcurrent and the present wave leave room for.

        A wave is a number of nodes, not certain ones: a node that is not connected keeps its turn
        for later and holds up nobody.
        """
        rows = list(self.rows.values())
        in_flight = sum(row.phase in IN_FLIGHT for row in rows)
        begun = sum(row.phase is not Phase.PENDING for row in rows)
        most = max(1, resolve(self.task.spec.rollout.max_concurrent, len(rows), up=True))
        room = min(most - in_flight, self._wave_end() - begun)
        for row in rows:
            if room <= 0:
                break
            if row.phase is not Phase.PENDING or row.node not in self.roster.agents:
                continue
            self.rows[row.node] = row.to(Phase.DISPATCHED, attempt=row.attempt + 1)
            self.sends.append(row.node)
            self.heard[row.node] = self.now
            room -= 1

    def _wave_end(self) -> int:
        """How many nodes may have begun now: as many as the waves up to the present one hold."""
        total = len(self.rows)
        finished = sum(row.phase in FINAL for row in self.rows.values())
        end = done = 0
        for wave in [*self.task.spec.rollout.waves, total]:
            done, end = end, max(end, min(total, resolve(wave, total, up=True)))
            if end > finished:
                break
        if self.wave[0] != done:
            self.wave = (done, self.now)
        opens = self.wave[1] + self.task.spec.rollout.wave_interval_seconds
        if done and self.now < opens:
            self.wake(opens)
            return done
        return end

    def send_again(self, stop: Stop | None) -> None:
        """Send runs again that were dispatched and of which nothing is known."""
        if stop is not None and stop.ends_running:
            return
        for row in self.rows.values():
            agent = self.roster.agents.get(row.node)
            if row.phase is not Phase.DISPATCHED or agent is None or row.node in self.sends:
                continue
            heard = self.heard.get(row.node, -math.inf)
            if heard >= agent.since:
                due = heard + SILENCE_SECONDS
            else:
                due = (
                    self.now
                    if agent.reported is not None
                    else agent.since + COMPLETE_REPORT_SECONDS
                )
            if self.now >= due:
                self.sends.append(row.node)
                self.heard[row.node] = self.now
                due = self.now + SILENCE_SECONDS
            self.wake(due)

    def result(self, stop: Stop | None) -> Plan:
        memory = Memory(self.heard, self.cancelled, self.wave)
        wakeup = min(self.timers, default=None)
        return Plan(self.rows, tuple(self.sends), tuple(self.cancels), stop, wakeup, memory)


def without_intents(before: Rows, after: Rows) -> dict[str, NodeRun]:
    """The rows `after` but for those that begin: what must be written first.

    Where rows stand in several objects, ends must be written before the turns they make room for;
    else a leader that dies in between leaves more in flight than maxConcurrent.
    """
    return {
        name: before[name] if _begins(before[name], row) else row for name, row in after.items()
    }


def _begins(before: NodeRun, after: NodeRun) -> bool:
    return before.phase is Phase.PENDING and after.phase is Phase.DISPATCHED
