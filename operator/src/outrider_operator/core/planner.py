"""What is to be done next for a task: which nodes begin, which are told again, cancelled, given up.

Pure: rows as they are written, who is connected, and now come in; a Plan comes out. The caller
writes the plan's rows first and sends afterwards, so that a command never goes out whose intent
the next leader could not read.
"""

import math
from typing import Final

import msgspec

from outrider_operator.core.model import (
    DEADLINE_EXCEEDED,
    FAILURES,
    FINAL,
    IN_FLIGHT,
    RETRIED,
    TOO_MANY_FAILURES,
    NodeRun,
    Phase,
    Rows,
    Task,
    resolve,
)
from outrider_operator.core.nodes import NO_FACTS
from outrider_operator.core.plans import AgentView, Memory, Plan, Policy, Roster, Stop
from outrider_operator.core.targeting import NODE_NOT_FOUND, NOT_CONNECTED

#: A dispatched run nothing was heard of for so long is sent again, and so is a cancel; seconds.
SILENCE_SECONDS: Final = 30.0
#: An agent that just connected is given so long to say what it runs, seconds.
COMPLETE_REPORT_SECONDS: Final = 15.0

#: Reasons of rows that wait, besides those of targeting.
FOR_WAVE: Final = "WaitingForWave"
FOR_TURN: Final = "WaitingForTurn"
FOR_RETRY: Final = "WaitingForRetry"
SUSPENDED: Final = "Suspended"
_WAITS: Final = {
    FOR_WAVE: "waits until the waves before its own are over",
    FOR_TURN: "waits until fewer than spec.rollout.maxConcurrent nodes run it",
    SUSPENDED: "spec.suspend is set",
}


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
    else:
        planner.try_again()
        planner.begin()
    planner.note_nodes()
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

    def _absent(self, row: NodeRun) -> None:
        created = self.roster.facts.get(row.node, NO_FACTS).created
        since = self.roster.away.get(row.node, max(self.started, created))
        # A leader that is new to the fleet must not judge before agents could come to it.
        due = max(since + self.policy.lost_after, self.roster.since + COMPLETE_REPORT_SECONDS)
        if row.phase is Phase.PENDING and self.task.spec.suspend and not self.task.spec.cancel:
            return
        missing = row.phase is Phase.PENDING and row.node not in self.roster.nodes
        reason = NODE_NOT_FOUND if missing else NOT_CONNECTED
        waits = row.phase is Phase.PENDING and row.attempt > 0
        before = f"; {self._last(row)}" if waits else ""
        if self.now >= due:
            text = "there is no Node of this name" if missing else "its agent has not come back"
            message = f"{text} within {self.policy.lost_after:g} s{before}"
            self.rows[row.node] = row.to(Phase.LOST, reason, message, retry_nanos=0)
            return
        self.wake(due)
        if row.phase is Phase.PENDING and row.reason != reason:
            text = "there is no Node of this name" if missing else "its agent is not connected"
            self.rows[row.node] = row.noting(reason, text + before)

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
            return Stop(Phase.SKIPPED, DEADLINE_EXCEEDED, message, True)
        if not spec.suspend:
            self.wake(self.deadline)
        failures = sum(
            row.phase in FAILURES and not self._has_attempts_left(row) for row in self.rows.values()
        )
        allowed = resolve(spec.rollout.max_failures, len(self.rows), up=False)
        if failures > allowed:
            message = f"{failures} nodes failed, and spec.rollout.maxFailures allows {allowed}"
            return Stop(Phase.SKIPPED, TOO_MANY_FAILURES, message, False)
        return None

    def end(self, stop: Stop) -> None:
        """Begin nothing more, and end what runs where the reason asks for it."""
        for row in list(self.rows.values()):
            if row.phase is Phase.PENDING and row.last_phase is not None:
                # It has begun and failed: to call it Skipped would hide that.
                message = f"{self._last(row)}; not tried again: {stop.message}"
                self.rows[row.node] = row.to(
                    row.last_phase, row.last_reason, message, last_phase=None, last_reason="",
                    retry_nanos=0,
                )  # fmt: skip
            elif row.phase is Phase.PENDING:
                self.rows[row.node] = row.to(stop.phase, stop.reason, stop.message)
            elif row.phase in IN_FLIGHT and stop.ends_running:
                self._cancel(row, stop)

    def _has_attempts_left(self, row: NodeRun) -> bool:
        return row.phase in RETRIED and row.attempt <= self.task.spec.retries

    def _last(self, row: NodeRun) -> str:
        """How the last attempt of a row that waits for another ended."""
        why = f" ({row.last_reason})" if row.last_reason else ""
        return f"attempt {row.attempt} of {self.task.spec.retries + 1} ended {row.last_phase}{why}"

    def try_again(self) -> None:
        """Put back in line what failed and has attempts left, and what was given up unbegun."""
        late = self.roster.agents if self.task.spec.late_nodes == "Run" else {}
        for row in list(self.rows.values()):
            if self._has_attempts_left(row) or (row.phase is Phase.PENDING and row.attempt):
                self._keep_for_later(row)
            elif row.phase is Phase.LOST and not row.attempt and row.node in late:
                self.rows[row.node] = row.to(Phase.PENDING)

    def _keep_for_later(self, row: NodeRun) -> None:
        at = int((self.now + self.policy.wait(row.attempt)) * 1e9)
        if row.phase is Phase.PENDING:
            # No longer than it ever is: the leader that wrote the time may have had another clock.
            if row.retry_nanos > at:
                self.rows[row.node] = msgspec.structs.replace(row, retry_nanos=at)
            return
        kept = row.to(
            Phase.PENDING, FOR_RETRY, last_phase=row.phase, last_reason=row.reason, retry_nanos=at
        )
        self.rows[row.node] = kept = kept.noting(FOR_RETRY, self._last(kept))
        if row.node not in self.roster.agents:
            self._absent(kept)

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
        for later and holds up nobody. A node that tries again has its place in its wave already.
        """
        spec = self.task.spec
        rows = list(self.rows.values())
        most = max(1, resolve(spec.rollout.max_concurrent, len(rows), up=True))
        room = 0 if spec.suspend else most - sum(row.phase in IN_FLIGHT for row in rows)
        fresh = 0 if spec.suspend else self._wave_end() - sum(row.begun for row in rows)
        for row in rows:
            if row.phase is not Phase.PENDING or row.node not in self.roster.agents:
                continue
            again = row.attempt > 0
            if room > 0 and (self._due(row) if again else fresh > 0):
                self._dispatch(row)
                room -= 1
            elif again:
                self._wait(row, FOR_RETRY, self._last(row))
            else:
                reason = SUSPENDED if spec.suspend else FOR_TURN if fresh > 0 else FOR_WAVE
                self._wait(row, reason, _WAITS[reason])
            # Those that wait for their turn take up room in the wave too.
            fresh -= not again

    def _due(self, row: NodeRun) -> bool:
        """Whether the time before the next attempt is over."""
        self.wake(row.retry_nanos / 1e9)
        return self.now >= row.retry_nanos / 1e9

    def _dispatch(self, row: NodeRun) -> None:
        self.rows[row.node] = NodeRun(
            node=row.node,
            phase=Phase.DISPATCHED,
            attempt=row.attempt + 1,
            last_phase=row.last_phase,
            last_reason=row.last_reason,
        )
        self.sends.append(row.node)
        self.heard[row.node] = self.now
        self.cancelled.pop(row.node, None)

    def _wait(self, row: NodeRun, reason: str, message: str) -> None:
        if (row.reason, row.message) != (reason, message):
            self.rows[row.node] = row.noting(reason, message)

    def note_nodes(self) -> None:
        """Say of nodes that have not ended whether they are cordoned or not ready."""
        facts = self.roster.facts
        for row in self.rows.values():
            if row.phase in FINAL:
                continue
            state = facts.get(row.node, NO_FACTS).state
            if row.node_state != state:
                self.rows[row.node] = msgspec.structs.replace(row, node_state=state)

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
