"""A change of configuration: canary, soak, the rest, and back; whatever nodes do meanwhile."""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from outrider_operator.core.config_rollout import (
    IN_TRIAL,
    TRANSITIONS,
    NodeView,
    Plan,
    Rollout,
    RolloutPhase,
    Standing,
    budget,
    place_of,
    step,
)

P = RolloutPhase
PLAN = Plan(max_unavailable=2, canary_nodes=1, soak_seconds=60, progress_seconds=120)


@dataclass
class Node:
    """A node with its agent; it refuses every revision whose name begins with "bad"."""

    name: str
    created: float = 0.0
    connected: bool = True
    runs: str = "old"
    tried: str = "old"
    told: str = "old"
    since: float = 0.0

    @property
    def place(self) -> str:
        return place_of("uid", self.name)

    def answer(self, now: float) -> None:
        if self.tried == self.told or not self.connected:
            return
        self.tried = self.told
        self.since = now
        if not self.tried.startswith("bad"):
            self.runs = self.tried


@dataclass
class Fleet:
    """Nodes, the state, and the clock."""

    plan: Plan = PLAN
    nodes: dict[str, Node] = field(default_factory=dict)
    state: Rollout = field(default_factory=lambda: Rollout(settled="old"))
    target: str = "old"
    now: float = 1000.0

    def view(self, node: Node) -> NodeView:
        base = NodeView(node.name, node.place, node.created, Standing.WELL, node.since)
        wanted = self.wanted(base)
        if not node.connected:
            left = self.state.phase is not P.SETTLED and node.since > self.state.started
            standing = Standing.LEFT if left else Standing.ABSENT
        elif node.tried != wanted:
            standing = Standing.APPLYING
        else:
            standing = Standing.WELL if node.runs == wanted else Standing.FAILED
        return NodeView(node.name, node.place, node.created, standing, node.since)

    def wanted(self, view: NodeView) -> str:
        return self.state.trial if self.state.in_trial(view) else self.state.settled

    def views(self) -> list[NodeView]:
        return [self.view(node) for node in self.nodes.values()]

    def step(self) -> Rollout:
        before = self.state
        self.state = step(before, self.target, self.plan, self.views(), self.now)
        self.tell()
        return before

    def tell(self) -> None:
        for node in self.nodes.values():
            wanted = self.wanted(self.view(node))
            if node.connected and node.told != wanted:
                node.told, node.since = wanted, self.now

    def run(self, seconds: float = 2000.0) -> None:
        """Let everything happen in time, until nothing more does."""
        end = self.now + seconds
        quiet = self.now + 300.0
        while self.now < min(end, quiet):
            before = self.step()
            for node in self.nodes.values():
                node.answer(self.now)
            if before != self.state:
                quiet = self.now + 300.0
            self.now += 10.0


def fleet(count: int, plan: Plan = PLAN) -> Fleet:
    return Fleet(plan, {f"n{i}": Node(f"n{i}") for i in range(count)})


def test_a_good_change_reaches_all_after_the_soak() -> None:
    world = fleet(10)
    world.target = "new"
    seen = []
    while world.state.phase is not P.SETTLED or world.state.settled != "new":
        world.step()
        seen.append((world.state.phase, sum(n.told == "new" for n in world.nodes.values())))
        for node in world.nodes.values():
            node.answer(world.now)
        world.now += 10
    assert [n for phase, n in seen if phase is P.CANARY] == [1]
    assert [n for phase, n in seen if phase is P.SOAKING] == [1] * 6
    assert [n for phase, n in seen if phase is P.ROLLING] == [3, 5, 7, 9, 10]
    assert all(node.runs == "new" for node in world.nodes.values())


def test_a_bad_change_touches_the_canary_only_and_goes_back() -> None:
    world = fleet(10)
    world.target = "bad"
    world.run()
    assert world.state.phase is P.ROLLED_BACK
    assert world.state.settled == "old"
    assert sum(node.tried == "old" for node in world.nodes.values()) == 10
    assert "1 node failed with it: n" in world.state.message
    assert all(node.runs == "old" for node in world.nodes.values())


def test_pause_leaves_all_as_it_is_until_tried_again() -> None:
    world = fleet(4, Plan(canary_nodes=1, soak_seconds=0, rollback=False))
    world.target = "bad"
    world.run()
    assert world.state.phase is P.PAUSED
    assert sum(node.told == "bad" for node in world.nodes.values()) == 1
    again = step(world.state, "bad", world.plan, world.views(), world.now, attempt="2")
    assert again.phase is P.CANARY
    assert again.started == world.now


def test_what_was_rolled_back_is_not_tried_again_by_itself() -> None:
    world = fleet(3)
    world.target = "bad"
    world.run()
    before = world.state
    world.run()
    assert world.state == before


def test_a_change_that_is_taken_back_settles_at_once() -> None:
    world = fleet(5)
    world.target = "new"
    world.step()
    world.target = "old"
    world.step()
    assert (world.state.phase, world.state.trial) == (P.SETTLED, "")
    world.run()
    assert all(node.runs == "old" for node in world.nodes.values())


def test_a_newer_change_takes_the_place_of_one_under_way() -> None:
    world = fleet(10)
    world.target = "new"
    world.run(100)
    assert world.state.phase is P.ROLLING
    world.target = "newer"
    world.step()
    assert world.state.trial == "newer"
    assert not any(node.told == "new" for node in world.nodes.values())
    world.run()
    assert all(node.runs == "newer" for node in world.nodes.values())


def test_a_new_node_gets_the_settled_revision() -> None:
    world = fleet(5)
    world.target = "new"
    world.step()
    world.nodes["late"] = Node("late", created=world.now, runs="", tried="", told="")
    world.nodes["late"].created = world.now + 1
    world.step()
    world.nodes["late"].answer(world.now)
    assert world.nodes["late"].runs == "old"
    world.run()
    assert world.nodes["late"].runs == "new"


def test_absent_agents_do_not_hold_a_change_up() -> None:
    world = fleet(6)
    for name in ("n1", "n2", "n3"):
        world.nodes[name].connected = False
    world.target = "new"
    world.run()
    assert world.state == Rollout(settled="new", reason="Settled")
    world.nodes["n1"].connected = True
    world.run(50)
    assert world.nodes["n1"].runs == "new"


@pytest.mark.parametrize("away", range(5))
def test_an_absent_agent_before_the_canary_does_not_hold_it_up(away: int) -> None:
    world = fleet(10)
    first = sorted(world.nodes.values(), key=lambda node: node.place)
    first[away].connected = False
    world.target = "new"
    world.run()
    assert world.state.settled == "new"


def test_a_moment_without_connections_gives_the_change_to_no_more() -> None:
    world = fleet(20)
    world.target = "new"
    while world.state.phase is not P.ROLLING:
        world.step()
        for node in world.nodes.values():
            node.answer(world.now)
        world.now += 10
    known = {n.name for n in world.nodes.values() if world.state.in_trial(world.view(n))}
    world.now += 1
    for node in world.nodes.values():
        node.connected, node.since = False, world.now
    world.step()
    reached = {n.name for n in world.nodes.values() if world.state.in_trial(world.view(n))}
    assert reached == known


def test_without_any_agent_a_change_waits() -> None:
    world = fleet(2)
    for node in world.nodes.values():
        node.connected = False
    world.target = "new"
    world.run()
    assert (world.state.phase, world.state.reason) == (P.CANARY, "NoAgents")


def test_without_nodes_a_change_is_settled() -> None:
    world = fleet(0)
    world.target = "new"
    world.step()
    assert world.state.settled == "new"


def test_an_agent_that_leaves_with_the_canary_is_a_failure() -> None:
    world = fleet(5)
    world.target = "new"
    world.step()
    (canary,) = (node for node in world.nodes.values() if node.told == "new")
    world.now += 1
    canary.connected, canary.since = False, world.now
    world.run(200)
    assert world.state.phase in (P.ROLLING_BACK, P.ROLLED_BACK)
    assert f"{canary.name} (Left)" in world.state.message


def test_an_unhealthy_plugin_starts_the_soak_anew() -> None:
    nodes = [NodeView("a", "1", 0, Standing.UNHEALTHY, 100)]
    state = Rollout(P.SOAKING, "old", "new", "", "1", started=50, soaking_since=90)
    assert step(state, "new", PLAN, nodes, 110).phase is P.CANARY
    assert step(state, "new", PLAN, nodes, 220).phase is P.ROLLING_BACK


def test_few_failures_within_the_budget_settle_and_are_named() -> None:
    nodes = [NodeView(str(n), str(n), 0, Standing.WELL, 100) for n in range(9)]
    nodes.append(NodeView("x", "9", 0, Standing.FAILED, 100, "no space"))
    state = Rollout(P.ROLLING, "old", "new", "", "9", started=50)
    after = step(state, "new", PLAN, nodes, 110)
    assert (after.settled, after.reason) == ("new", "NodesFailed")
    assert "x (no space)" in after.message


@pytest.mark.parametrize(("amount", "total", "most"), [("10%", 5, 1), ("10%", 50, 5), (3, 50, 3)])
def test_budget(amount: str | int, total: int, most: int) -> None:
    nodes = [NodeView(str(n), str(n), 0, Standing.WELL, 0) for n in range(total)]
    assert budget(Plan(max_unavailable=amount), nodes) == most


class RolloutMachine(RuleBasedStateMachine):
    """Nodes come, go and answer in any order; specs change at any time."""

    @initialize(
        count=st.integers(0, 8),
        most=st.sampled_from([1, 2, "25%", "100%"]),
        canary=st.sampled_from([0, 1, 2, "50%"]),
        soak=st.sampled_from([0.0, 30.0]),
        rollback=st.booleans(),
    )
    def begin(
        self, count: int, most: int | str, canary: int | str, soak: float, rollback: bool
    ) -> None:
        self.world = fleet(count, Plan(most, canary, soak, rollback, 120))
        self.number = 0

    def pick(self, number: int) -> Node | None:
        nodes = list(self.world.nodes.values())
        return nodes[number % len(nodes)] if nodes else None

    @rule(seconds=st.sampled_from([0.0, 1.0, 40.0, 130.0]))
    def look(self, seconds: float) -> None:
        world = self.world
        world.now += seconds
        fresh = world.target not in (world.state.settled, world.state.trial)
        reverted = world.target == world.state.settled
        known = {n.name for n in world.nodes.values() if world.state.in_trial(world.view(n))}
        busy = sum(
            v.standing not in (Standing.WELL, Standing.ABSENT)
            for v in world.views()
            if world.state.in_trial(v)
        )
        before = world.step()
        after = world.state
        if not fresh and not reverted:
            assert after.phase in TRANSITIONS[before.phase]
        if after.phase is P.ROLLING and before.phase is P.ROLLING and not fresh:
            given = [
                v
                for v in world.views()
                if after.in_trial(v) and v.name not in known and world.nodes[v.name].connected
            ]
            taking_part = [v for v in world.views() if after.takes_part(v)]
            allowed = budget(world.plan, taking_part)
            assert not given or busy + len(given) <= allowed

    @rule(number=st.integers(0, 50))
    def answer(self, number: int) -> None:
        node = self.pick(number)
        if node is not None:
            node.answer(self.world.now)

    @rule(number=st.integers(0, 50))
    def come_or_go(self, number: int) -> None:
        node = self.pick(number)
        if node is not None:
            self.world.now += 1
            node.connected, node.since = not node.connected, self.world.now
            node.told = node.tried
            self.world.tell()

    @rule()
    def join(self) -> None:
        self.number += 1
        self.world.now += 1
        name = f"late{self.number}"
        self.world.nodes[name] = Node(name, self.world.now, runs="", tried="", told="")
        self.world.tell()

    @rule(good=st.booleans())
    def change(self, good: bool) -> None:
        self.number += 1
        self.world.target = f"{'good' if good else 'bad'}{self.number}"

    @invariant()
    def newcomers_get_what_is_settled(self) -> None:
        if not hasattr(self, "world"):
            return
        state = self.world.state
        for view in self.world.views():
            if view.created > state.started:
                assert not state.in_trial(view)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        for node in world.nodes.values():
            if not node.connected:
                node.connected, node.since = True, world.now
        world.now += 1
        world.tell()
        world.run(4000)
        state = world.state
        assert state.phase not in IN_TRIAL - {P.PAUSED}
        if state.phase is P.SETTLED:
            assert state.settled == world.target
        if world.target.startswith("bad") and any(
            n.created <= state.started for n in world.nodes.values()
        ):
            assert state.phase in (P.ROLLED_BACK, P.PAUSED)
        if state.phase is P.ROLLED_BACK:
            assert not any(node.told == state.trial for node in world.nodes.values())
        if state.phase is P.SETTLED and world.target.startswith("good"):
            assert all(node.runs == world.target for node in world.nodes.values())


TestRolloutMachine = RolloutMachine.TestCase
TestRolloutMachine.settings = settings(
    max_examples=60, stateful_step_count=30, suppress_health_check=list(HealthCheck), deadline=None
)
