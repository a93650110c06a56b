"""A leader that may crash between any two requests, and agents that come, go, refuse and are slow.

Whatever happens: nobody is sent what is not written, never two trials at once, the budget is kept
over leaders, and in the end every agent has what the spec asks for, or what was settled before.
"""

import asyncio
import json
from typing import Any

from fakes.configs import ConfigFleet, MemoryConfigs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from outrider_operator.core.config_rollout import place_of
from outrider_operator.core.config_status import rollout_of
from outrider_operator.core.ports import ClusterUnavailableError
from outrider_proto.v1 import agent_pb2 as pb

NODES = 6
ALLOWED = 2
#: Agents refuse what asks for this or more.
BAD = 100


class Crash(BaseException):
    """The leader is gone from one moment to the next."""


def interval(config: bytes) -> int:
    """What a configuration asks for; 0: nothing."""
    found: dict[str, Any] = json.loads(config)
    return int(found.get("collectors", {}).get("host", {}).get("intervalSeconds", 0))


def refuses(config: pb.EffectiveConfig) -> str:
    return "bad" if interval(config.content) >= BAD else ""


class ConfigMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryConfigs()
        self.fleet = ConfigFleet(self.store, NODES)
        self.fleet.on_send = self.sent
        for agent in self.fleet.agents.values():
            agent.refuses = refuses
        self.loop = asyncio.new_event_loop()
        self.number = 1
        #: Nobody came or went since the last change: those that come back cannot be held off.
        self.calm = True

    def teardown(self) -> None:
        self.loop.close()

    def apply(self, number: int) -> None:
        rollout = {
            "maxUnavailable": ALLOWED,
            "canary": {"nodes": 1, "soakSeconds": 10},
            "progressDeadlineSeconds": 60,
            "onFailure": "Rollback",
        }
        collectors = {"host": {"intervalSeconds": number}}
        self.store.apply("a", {"collectors": collectors, "rollout": rollout})
        self.calm = all(agent.connected for agent in self.fleet.agents.values())

    @initialize()
    def begin(self) -> None:
        self.apply(self.number)
        self.loop.run_until_complete(self.fleet.begin())
        self.loop.run_until_complete(self.fleet.run(120))
        assert self.fleet.phase("a") == "Settled"

    def sent(self, node: str, config: pb.EffectiveConfig) -> None:
        """What is sent follows from what is written, not from what is meant to be."""
        state = rollout_of(self.store.status("a"))
        asked = interval(config.content)
        kept = {
            revision["metadata"]["name"].partition("-")[2]: revision["data"]["collectors"]["host"]
            for revision in self.store.revisions.values()
        }
        known = {name: item["intervalSeconds"] for name, item in kept.items()}
        assert asked in {known.get(state.settled), known.get(state.trial)}
        if self.calm and asked == known.get(state.trial):
            uid = self.store.configs["a"]["metadata"]["uid"]
            waited_for = [
                name
                for name, agent in self.fleet.agents.items()
                if place_of(uid, name) <= state.through and interval(agent.content) != asked
            ]
            assert len(waited_for) <= ALLOWED, (state, waited_for)

    def work(self) -> None:
        """One look; a leader that crashes is followed by another."""
        try:
            self.loop.run_until_complete(self.fleet.work())
        except BaseExceptionGroup as error:
            assert error.subgroup(Crash) is not None, error
        except Crash:
            pass
        else:
            return
        self.store.fault = lambda _request: None
        self.loop.run_until_complete(self.fleet.begin())

    @rule(good=st.booleans())
    def change(self, good: bool) -> None:
        self.number += 1
        self.apply(self.number % BAD if good else BAD + self.number)

    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        revisions = sorted(self.store.revisions)
        name = data.draw(st.sampled_from(revisions))
        chosen = self.store.revisions[name]["data"]["collectors"]["host"]["intervalSeconds"]
        self.apply(chosen)

    @rule()
    def retry(self) -> None:
        self.number += 1
        self.store.annotate("a", "outrider.dev/retry", str(self.number))

    @rule(after=st.integers(0, 6), gone=st.booleans())
    def crash(self, after: int, gone: bool) -> None:
        """The leader crashes at some request from now on, or the API server is away for it."""
        left = after

        def fault(_request: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                if gone:
                    raise Crash
                raise ClusterUnavailableError("away")

        self.store.fault = fault
        self.step(1.0)
        self.store.fault = lambda _request: None

    @rule(seconds=st.sampled_from([0.2, 1.0, 5.0, 30.0]))
    def step(self, seconds: float) -> None:
        self.fleet.now += seconds
        self.work()

    @rule(node=st.integers(0, NODES - 1))
    def answer(self, node: int) -> None:
        agent = self.fleet.agents[f"n{node}"]
        if agent.answer():
            self.fleet.tell(agent)

    @rule()
    def all_answer(self) -> None:
        self.fleet.answers()

    @rule(node=st.integers(0, NODES - 1))
    def come_or_go(self, node: int) -> None:
        self.calm = False
        name = f"n{node}"
        if self.fleet.agents[name].connected:
            self.fleet.disconnect(name)
        else:
            self.fleet.connect(name)

    @invariant()
    def a_trial_is_of_another_revision(self) -> None:
        """What is tried is never what is settled."""
        if "a" not in self.store.configs or "status" not in self.store.configs["a"]:
            return
        state = rollout_of(self.store.status("a"))
        if state.phase.value in ("Canary", "Soaking", "Rolling", "Paused"):
            assert state.trial not in ("", state.settled)

    @rule()
    def all_becomes_quiet(self) -> None:
        """With everybody there, and nobody crashing, it comes to an end."""
        for name, agent in self.fleet.agents.items():
            if not agent.connected:
                self.fleet.connect(name)
        self.loop.run_until_complete(self.fleet.run(400))
        status = self.store.status("a")
        state = rollout_of(status)
        asked = self.store.configs["a"]["spec"]["collectors"]["host"]["intervalSeconds"]
        running = {interval(agent.content) for agent in self.fleet.agents.values()}
        if asked < BAD:
            assert state.phase.value in ("Settled", "RolledBack"), status
        else:
            assert state.phase.value == "RolledBack", status
        if state.phase.value == "Settled":
            assert running == {asked}
            assert status["counts"]["applied"] == NODES
        else:
            assert len(running) == 1
        assert max(running) < BAD
        assert len(status["history"]) <= 10


ConfigMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestConfigs = ConfigMachine.TestCase
