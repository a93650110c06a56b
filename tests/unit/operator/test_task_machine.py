"""A task carried out by leaders, gateways and agents that die at any step.

The network between them repeats, delays and drops. Whatever happens: an attempt is executed at
most once and only after it was written down, never more are in flight than allowed, nothing begins
past the error budget or before its time, no phase follows one that it must not follow, the counts
are those of the reports, every task ends, and every result is acknowledged in the end.
"""

import asyncio
import copy
from collections import Counter
from typing import Any
from unittest import mock

import hypothesis.strategies as st
from fakes.cluster import MemoryCluster
from hypothesis import Phase as HypothesisPhase
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from outrider_operator.core import slices
from outrider_operator.core.model import (
    FAILURES,
    IN_FLIGHT,
    RETRIED,
    TASK_FINAL,
    TRANSITIONS,
    Phase,
    resolve,
)
from outrider_operator.core.nodes import NodeFacts
from outrider_operator.core.plans import Policy
from outrider_operator.core.ports import ClusterUnavailableError
from outrider_operator.core.registry import Registry, Session
from outrider_operator.core.times import seconds_of
from outrider_operator.fleet.tasks import TaskRunner, World
from outrider_operator.settings import TaskSettings
from outrider_proto.v1.agent_pb2 import Command, RunId, RunPhase, RunState

NODES = [f"node-{n}" for n in range(5)]
#: Nodes that are not there when it begins.
LATE = ["late-0", "late-1"]
GATEWAYS = ["gateway-0", "gateway-1"]
MAX_CONCURRENT = 2
LOST_AFTER = 300.0
DEADLINE = 3600


class Crash(BaseException):
    """The leader was killed."""


class Agent:
    """What an agent promises: a journal that survives, each attempt executed once."""

    def __init__(self) -> None:
        self.journal: dict[int, Any] = {}
        self.tombstones: set[int] = set()
        self.executions: dict[int, int] = {}
        self.session = 0
        self.gateway = GATEWAYS[0]
        self.connected = False

    @property
    def live(self) -> list[int]:
        """Attempts under way."""
        return [a for a, p in self.journal.items() if p < RunPhase.RUN_PHASE_SUCCEEDED]

    def take(self, command: Command) -> None:
        for run in command.runs:
            attempt = run.id.attempt
            if attempt not in self.journal and attempt not in self.tombstones:
                self.journal[attempt] = RunPhase.RUN_PHASE_ACCEPTED
        for cancel in command.cancels:
            if self.journal.get(cancel.attempt) in (1, 2):
                self.journal[cancel.attempt] = RunPhase.RUN_PHASE_CANCELLED
        for ack in command.run_acks:
            if self.journal.get(ack.attempt, 0) >= RunPhase.RUN_PHASE_SUCCEEDED:
                del self.journal[ack.attempt]
                self.tombstones.add(ack.attempt)

    def step(self, final: int) -> None:
        for attempt, phase in self.journal.items():
            if phase == RunPhase.RUN_PHASE_ACCEPTED:
                self.executions[attempt] = self.executions.get(attempt, 0) + 1
                self.journal[attempt] = RunPhase.RUN_PHASE_RUNNING
            elif phase == RunPhase.RUN_PHASE_RUNNING:
                self.journal[attempt] = final

    def restart(self) -> None:
        for attempt, phase in self.journal.items():
            if phase in (RunPhase.RUN_PHASE_ACCEPTED, RunPhase.RUN_PHASE_RUNNING):
                self.journal[attempt] = RunPhase.RUN_PHASE_INTERRUPTED

    def states(self) -> list[RunState]:
        return [
            RunState(id=RunId(task_uid="uid-of-t", attempt=attempt), phase=phase)
            for attempt, phase in self.journal.items()
        ]


class TaskMachine(RuleBasedStateMachine):
    @initialize(
        failures=st.sampled_from([0, "20%", "100%"]),
        waves=st.sampled_from([["100%"], [1, 3, "100%"]]),
        interval=st.sampled_from([0, 40]),
        preview=st.sampled_from([0, 8192]),
        retries=st.sampled_from([0, 2]),
        late=st.sampled_from(["Skip", "Run"]),
        ending=st.sampled_from([3, 3, 4]),
    )
    def begin(
        self,
        failures: Any,
        waves: list[Any],
        interval: int,
        preview: int,
        retries: int,
        late: str,
        ending: int,
    ) -> None:
        self.now = 1_000_000.0
        # Rows stand in several reports, so that a leader can die between them.
        self.patch = mock.patch.object(slices, "MAX_ROWS", 2)
        self.patch.start()
        self.loop = asyncio.new_event_loop()
        self.cluster = MemoryCluster()
        self.agents = {node: Agent() for node in [*NODES, *LATE]}
        self.nodes: dict[str, dict[str, str]] = {node: {} for node in NODES}
        self.facts: dict[str, NodeFacts] = {}
        self.failures, self.retries, self.ending = failures, retries, ending
        #: When a row was first seen to wait for another attempt, by node and attempt.
        self.waiting: dict[tuple[str, int], float] = {}
        self.commands: list[tuple[str, int, Command]] = []
        self.reports: list[tuple[str, int, list[RunState], bool]] = []
        self.numbers = 0
        self.cluster.add_task(
            "t",
            {
                "run": {"builtin": "Ping"},
                "activeDeadlineSeconds": DEADLINE,
                "retries": retries,
                "lateNodes": late,
                "output": {"previewBytes": preview, "maxBytes": 8192},
                "rollout": {
                    "maxConcurrent": MAX_CONCURRENT,
                    "maxFailures": failures,
                    "waves": waves,
                    "waveIntervalSeconds": interval,
                },
            },
        )
        self.lead()
        for node in NODES:
            self.connect(node, GATEWAYS[0])

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            try:
                self.finish()
            finally:
                self.patch.stop()
                self.loop.close()

    # The leader.

    def lead(self) -> None:
        """A leader that knows nothing but what is written; gateways tell it who is there."""
        self.registry = Registry(self.now)
        for node in self.nodes:
            self.registry.remember(node, {})
        world = World(
            cluster=self.cluster,
            registry=self.registry,
            nodes=self.nodes,
            facts=self.facts,
            send=self.sent,
            now=lambda: self.now,
            settings=TaskSettings(lost_after_seconds=LOST_AFTER),
            ended=lambda _: None,
        )
        self.runner = TaskRunner(self.cluster.task("t"), world)
        for node, agent in self.agents.items():
            if agent.connected:
                self.join(node)
                self.say(node, complete=True)

    def join(self, node: str) -> None:
        agent = self.agents[node]
        session = Session(node, node, agent.session, agent.gateway, "server", self.now)
        self.registry.joined(session)

    def sent(self, commands: Any) -> None:
        for node, command in commands:
            session = self.registry.sessions.get(node)
            if session is not None:
                self.commands.append((node, session.session, copy.deepcopy(command)))

    def advance(self) -> None:
        self.runner.update(self.cluster.task("t"))
        before = self.cluster.rows()
        try:
            self.loop.run_until_complete(self.runner.advance())
        finally:
            self.check_step(before, self.cluster.rows())
        counts = self.cluster.task("t").get("status", {}).get("counts")
        if counts is not None:
            self.check_counts(counts)

    def check_counts(self, counts: dict[str, int]) -> None:
        rows = self.cluster.rows()
        shown = {name: number for name, number in counts.items() if number}
        phases = Counter(row["phase"][0].lower() + row["phase"][1:] for row in rows.values())
        assert shown == {"targeted": len(rows), **phases}

    def check_step(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """What one step of a leader wrote, be it to its end or not."""
        begun = []
        for node, row in after.items():
            old = before.get(node, {"phase": "Pending", "attempt": 0})
            first, last, attempt = Phase(old["phase"]), Phase(row["phase"]), row["attempt"]
            middle = {*TRANSITIONS[first], first}
            assert any(last in {*TRANSITIONS[phase], phase} for phase in middle), (old, row)
            assert 0 <= attempt - old["attempt"] <= 1, (old, row)
            assert attempt <= self.retries + 1
            if last is Phase.PENDING and attempt:
                self.waiting.setdefault((node, attempt), self.now)
            if attempt > old["attempt"]:
                begun.append(node)
                assert last is Phase.DISPATCHED, row
            if attempt > old["attempt"] > 0:
                waited = self.now - self.waiting[node, old["attempt"]]
                assert waited >= Policy().wait(old["attempt"]) - 0.001, (old, row)
        failures = [n for n, row in after.items() if self.failed_for_good(row)]
        if begun:
            assert len(failures) <= resolve(self.failures, len(after), up=False), (begun, after)

    def failed_for_good(self, row: dict[str, Any]) -> bool:
        phase = Phase(row["phase"])
        left = phase in RETRIED and row["attempt"] <= self.retries
        return phase in FAILURES and not left

    @rule(calls=st.integers(0, 12), crash=st.booleans())
    def reconcile_and_fail(self, calls: int, crash: bool) -> None:
        """The leader dies, or the API server goes, before or after the so many-th request."""
        left = calls

        def fault(_name: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash if crash else ClusterUnavailableError("away")

        self.cluster.fault = fault
        try:
            self.advance()
            failed = False
        except (Crash, ClusterUnavailableError):
            failed = True
        self.cluster.fault = lambda _name: None
        if crash and failed:
            self.lead()
        elif failed:
            self.runner.reload()

    @rule(again=st.integers(1, 3))
    def reconcile(self, again: int) -> None:
        for _ in range(again):
            self.advance()

    @rule()
    def change_leader(self) -> None:
        self.lead()

    @rule(index=st.integers(0, 100))
    def lose_an_answer(self, index: int) -> None:
        """A write arrives at the API server, but its answer does not come back."""
        count = index % 4
        original = self.cluster.replace_report

        async def replace(report: Any) -> Any:
            nonlocal count
            answer = await original(report)
            count -= 1
            if count < 0:
                raise ClusterUnavailableError("no answer")
            return answer

        self.cluster.replace_report = replace  # type: ignore[method-assign]
        try:
            self.advance()
        except ClusterUnavailableError:
            self.runner.reload()
        finally:
            self.cluster.replace_report = original  # type: ignore[method-assign]

    # The network.

    @precondition(lambda self: self.commands)
    @rule(index=st.integers(0, 1000), repeat=st.booleans())
    def deliver_command(self, index: int, repeat: bool) -> None:
        at = index % len(self.commands)
        node, session, command = self.commands[at]
        if not repeat:
            del self.commands[at]
        agent = self.agents[node]
        if agent.connected and agent.session == session:
            agent.take(command)
            self.say(node, complete=command.report_runs)

    @precondition(lambda self: self.commands)
    @rule(index=st.integers(0, 1000))
    def drop_command(self, index: int) -> None:
        del self.commands[index % len(self.commands)]

    @precondition(lambda self: self.reports)
    @rule(index=st.integers(0, 1000), repeat=st.booleans())
    def deliver_report(self, index: int, repeat: bool) -> None:
        # Of one stream reports come in order; streams overtake one another.
        node, session, _, _ = self.reports[index % len(self.reports)]
        at = next(i for i, r in enumerate(self.reports) if r[0] == node and r[1] == session)
        _, _, states, complete = self.reports[at]
        if not repeat:
            del self.reports[at]
        complete = complete and self.registry.complete_report(node, session, self.now)
        self.runner.report(node, states, complete)

    @rule(node=st.sampled_from(NODES + LATE))
    def say(self, node: str, complete: bool = False) -> None:
        agent = self.agents[node]
        if agent.connected:
            self.reports.append((node, agent.session, agent.states(), complete))

    @rule(
        final=st.sampled_from([3, 3, 4]),
        calls=st.none() | st.integers(0, 8),
        crash=st.booleans(),
        node=st.none() | st.sampled_from(NODES),
    )
    def let_it_run(
        self, final: int, calls: int | None = None, crash: bool = False, node: str | None = None
    ) -> None:
        """Everything arrives, all agents or one of them work, and the leader looks, or tries to."""
        while self.commands:
            self.deliver_command(0, repeat=False)
        for name in self.agents:
            if node in (None, name):
                self.work(name, final)
        while self.reports:
            self.deliver_report(0, repeat=False)
        if calls is None:
            self.advance()
        else:
            self.reconcile_and_fail(calls, crash=crash)

    @rule(
        rounds=st.integers(1, 4),
        final=st.sampled_from([3, 4, 4, 5]),
        seconds=st.sampled_from([5.0, 12.0, 45.0]),
    )
    def let_it_go_on(self, rounds: int, final: int, seconds: float) -> None:
        for _ in range(rounds):
            self.let_it_run(final=final)
            self.now += seconds

    @rule()
    def deliver_all_commands_and_work(self) -> None:
        while self.commands:
            self.deliver_command(0, repeat=False)
        for agent in self.agents.values():
            agent.step(3)

    # The gateways.

    @rule(gateway=st.sampled_from(GATEWAYS), told=st.booleans())
    def kill_gateway(self, gateway: str, told: bool) -> None:
        """What is under way through it is lost; the leader hears of that now or later."""
        ended = {a.session for a in self.agents.values() if a.connected and a.gateway == gateway}
        for agent in self.agents.values():
            agent.connected = agent.connected and agent.gateway != gateway
        self.commands = [c for c in self.commands if c[1] not in ended]
        self.reports = [r for r in self.reports if r[1] not in ended]
        if told:
            self.notice(gateway)

    @rule(gateway=st.sampled_from(GATEWAYS))
    def notice(self, gateway: str) -> None:
        """The leader's link is made anew: it learns which streams are gone."""
        for session in list(self.registry.sessions.values()):
            agent = self.agents[session.node]
            there = agent.connected and agent.session == session.session
            if session.gateway == gateway and not there:
                self.registry.left(session.node, session.session, "Closed", self.now)

    # The agents.

    @rule(node=st.sampled_from(NODES + LATE), final=st.sampled_from([3, 3, 4, 5]))
    def work(self, node: str, final: int) -> None:
        self.agents[node].step(final)
        self.say(node)

    @rule(node=st.sampled_from(NODES + LATE), kill=st.booleans())
    def disconnect(self, node: str, kill: bool) -> None:
        agent = self.agents[node]
        if agent.connected:
            self.registry.left(node, agent.session, "Closed", self.now)
            self.reports = [r for r in self.reports if r[0] != node or not kill]
        agent.connected = False
        if kill:
            agent.restart()

    @rule(node=st.sampled_from(NODES), gateway=st.sampled_from(GATEWAYS))
    def connect(self, node: str, gateway: str) -> None:
        agent = self.agents[node]
        if not agent.connected:
            self.notice(gateway)
            self.numbers += 1
            agent.session = self.numbers
            agent.gateway = gateway
            agent.connected = True
            self.join(node)
            self.say(node, complete=True)

    @rule(node=st.sampled_from(NODES), final=st.sampled_from([3, 4]))
    def give_up_and_come_back(self, node: str, final: int) -> None:
        """It ends while its agent is away for so long that the node is Lost."""
        self.disconnect(node, kill=False)
        self.agents[node].step(final)
        self.now += LOST_AFTER + 10
        self.advance()
        self.advance()
        self.connect(node, GATEWAYS[1])

    # The nodes.

    @rule(node=st.sampled_from(LATE), agent=st.booleans())
    def come_late(self, node: str, agent: bool) -> None:
        self.nodes[node] = {}
        self.facts.setdefault(node, NodeFacts("", self.now))
        if agent:
            self.connect(node, GATEWAYS[1])

    @rule(node=st.sampled_from(NODES), state=st.sampled_from(["", "Cordoned", "NotReady"]))
    def change_node(self, node: str, state: str) -> None:
        self.facts[node] = NodeFacts(state, 0.0)

    # People and time.

    @rule(seconds=st.sampled_from([1.0, 5.0, 35.0, 310.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(value=st.booleans())
    def suspend(self, value: bool) -> None:
        self.cluster.change_spec("t", suspend=value)

    @rule(sure=st.integers(0, 19))
    def cancel(self, sure: int) -> None:
        if sure == 0:
            self.cluster.change_spec("t", cancel=True)

    # What always holds.

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "cluster"):
            return
        rows = self.cluster.rows()
        in_flight = [n for n, row in rows.items() if Phase(row["phase"]) in IN_FLIGHT]
        assert len(in_flight) <= MAX_CONCURRENT, rows
        for node, agent in self.agents.items():
            assert all(count == 1 for count in agent.executions.values()), (node, agent.executions)
            assert set(agent.journal) | set(agent.executions) <= set(range(1, self.retries + 2))
            written = rows.get(node, {"attempt": 0, "phase": "none"})
            assert max(agent.executions, default=0) <= written["attempt"], "ran without an intent"
            assert len(agent.live) <= 1, "two attempts at a time on one node"
            if agent.live:
                assert agent.live == [written["attempt"]]
                # A cancel may overtake its run here, as it does not in a stream.
                assert written["phase"] in ("Dispatched", "Running", "Lost", "Cancelled")

    def finish(self) -> None:
        """Nothing fails any more: the task ends, within its deadline and what Lost takes."""
        self.cluster.change_spec("t", suspend=False)
        for gateway in GATEWAYS:
            self.notice(gateway)
        for node in self.nodes:
            self.connect(node, GATEWAYS[0])
        task = self.cluster.task("t")
        before = {n: row["phase"] for n, row in self.cluster.rows().items()}
        open_still = task.get("status", {}).get("phase") not in TASK_FINAL
        began = self.now
        for _ in range(400):
            if self.ended and not any(agent.journal for agent in self.agents.values()):
                break
            self.now += 20.0
            while self.reports:
                self.deliver_report(0, repeat=False)
            self.advance()
            self.holds()
            while self.commands:
                self.deliver_command(0, repeat=False)
            for node in self.agents:
                self.work(node, self.ending)
        status, rows = self.cluster.task("t")["status"], self.cluster.rows()
        assert self.ended, (status, rows)
        left = {node: agent.journal for node, agent in self.agents.items() if agent.journal}
        assert not left, "results that nobody acknowledges"
        for node, row in rows.items():
            if before.get(node) != "Lost":
                assert row["phase"] != "Lost", f"given up though it answers: {row}"
        if status["reason"] == "DeadlineExceeded":
            started = seconds_of(status["startTime"])
            assert started is not None
            assert started + DEADLINE < began + 1000, "it dawdled until its deadline"
        self.check_counts(status["counts"])
        spec = task["spec"]
        if open_still and spec["lateNodes"] == "Run" and not spec.get("cancel"):
            assert rows.keys() == self.nodes.keys(), "a late node was left out"
        executed = {n for n, agent in self.agents.items() if agent.executions}
        for node, row in rows.items():
            if row["phase"] in ("Succeeded", "Failed", "TimedOut"):
                assert node in executed, row

    @property
    def ended(self) -> bool:
        return self.cluster.task("t").get("status", {}).get("phase") in TASK_FINAL


def test_phases_follow_the_table() -> None:
    assert set(TRANSITIONS) == set(Phase)


TestTaskMachine = TaskMachine.TestCase
TestTaskMachine.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    # Shrinking takes longer than a test may; the steps that are printed are few enough to read.
    phases=[HypothesisPhase.explicit, HypothesisPhase.reuse, HypothesisPhase.generate],
)
