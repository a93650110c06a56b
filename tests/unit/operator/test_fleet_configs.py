"""AgentConfigs carried out: against an API server and agents in memory, with leaders that crash."""

import asyncio
import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from fakes.configs import ROLLOUT, ConfigFleet, MemoryConfigs
from outrider_operator.core.ports import ClusterError, ClusterUnavailableError
from outrider_operator.fleet.config_revisions import KEPT
from outrider_proto.v1 import agent_pb2 as pb

SOURCE = {"urls": ["https://example.org/x"], "sha256": "0" * 64}


def spec(seconds: int, **more: Any) -> dict[str, Any]:
    return {"collectors": {"host": {"intervalSeconds": seconds}}, **more}


def rollout(**more: Any) -> dict[str, Any]:
    return {**ROLLOUT, **more}


CANARY = rollout(maxUnavailable=2, canary={"nodes": 1, "soakSeconds": 60})


def content(seconds: int) -> bytes:
    return b'{"collectors":{"host":{"intervalSeconds":%d}}}' % seconds


def refuses(seconds: int, why: str = "no such thing") -> Callable[[pb.EffectiveConfig], str]:
    return lambda config: why if config.content == content(seconds) else ""


async def fleet(nodes: int, **configs: Any) -> ConfigFleet:
    made = ConfigFleet(MemoryConfigs(), nodes)
    for name, body in configs.items():
        made.store.apply(name, body)
    await made.begin()
    return made


async def settled(nodes: int, body: dict[str, Any]) -> ConfigFleet:
    made = await fleet(nodes, a=body)
    await made.run(200)
    assert made.phase("a") == "Settled"
    made.sent.clear()
    made.store.events.clear()
    return made


async def test_a_new_config_reaches_all_and_says_so() -> None:
    made = await fleet(5, a=spec(1))
    await made.run(20)
    status = made.status("a")
    assert {made.runs(node) for node in made.agents} == {content(1)}
    assert status["counts"] == {
        "targeted": 5, "updated": 5, "applied": 5, "failed": 0, "pending": 0, "absent": 0
    }  # fmt: skip
    assert status["revision"] == status["settledRevision"] == status["rollout"]["settled"]
    assert status["observedGeneration"] == 1
    assert made.condition("a", "Ready")["status"] == "True"
    assert made.condition("a", "Progressing")["status"] == "False"
    assert [entry["result"] for entry in status["history"]] == ["Applied"]
    assert made.reasons() == ["RolloutStarted", "Settled"]
    (revision,) = made.store.revisions.values()
    assert revision["metadata"]["name"] == f"a-{status['revision']}"
    assert revision["metadata"]["labels"] == {"outrider.dev/agentconfig": "a"}
    assert revision["metadata"]["ownerReferences"][0]["kind"] == "AgentConfig"
    assert revision["data"]["collectors"] == spec(1)["collectors"]
    assert "rollout" not in revision["data"]
    assert made.metric("configs") == 1
    assert made.metric("config_rollouts", phase="Settled") == 1
    assert made.metric("config_settle_seconds_count") == 1


async def test_nobody_is_said_to_run_what_was_only_just_given_out() -> None:
    made = await settled(5, spec(1))
    made.store.apply("a", spec(2))
    made.store.written.clear()
    await made.work()
    (_, status), *_ = made.store.written
    assert (status["counts"]["updated"], status["counts"]["applied"]) == (5, 0)
    assert status["counts"]["pending"] == 5
    await made.run(20)
    assert made.status("a")["counts"]["applied"] == 5


async def test_nothing_is_written_or_sent_when_nothing_changes() -> None:
    made = await settled(3, spec(1))
    before = len(made.store.requests)
    await made.run(300)
    assert len(made.store.requests) == before
    assert made.sent == []


async def test_what_is_sent_is_written_before() -> None:
    made = await settled(6, spec(1, rollout=CANARY))
    made.store.apply("a", spec(2, rollout=CANARY))

    def sent(node: str, config: pb.EffectiveConfig) -> None:
        state = made.status("a")["rollout"]
        assert config.content == content(2)
        assert state["phase"] in ("Canary", "Rolling")
        assert f"a-{state['revision']}" in made.store.revisions

    made.on_send = sent
    await made.run(300)
    assert {made.runs(node) for node in made.agents} == {content(2)}


async def test_canary_soak_and_the_rest_in_order() -> None:
    made = await settled(6, spec(1))
    made.store.apply("a", spec(2, rollout=CANARY))
    began = made.now
    phases: dict[str, list[int]] = {}
    while made.status("a")["settledRevision"] != made.status("a")["revision"] or not phases:
        await made.work()
        running = sum(made.runs(node) == content(2) for node in made.agents)
        phases.setdefault(made.phase("a"), []).append(running)
        made.answers()
        made.now += 1.0
        assert made.now < began + 200
    assert list(phases) == ["Canary", "Soaking", "Rolling", "Settled"]
    assert max(phases["Soaking"]) == 1
    assert len(phases["Soaking"]) >= 60
    assert made.reasons() == ["RolloutStarted", "CanaryWell", "Settled"]


async def test_a_status_is_written_once_a_second_at_most() -> None:
    made = await settled(40, spec(1))
    made.store.written.clear()
    made.store.apply("a", spec(2, rollout=rollout(maxUnavailable=1)))
    began = made.now
    while made.phase("a") != "Settled" or made.status("a")["observedGeneration"] != 2:
        await made.work()
        made.answers()
        made.now += 0.1
        assert made.now < began + 200
    assert len(made.store.written) <= made.now - began + 1
    assert len(made.store.written) >= 40


async def test_a_bad_change_is_rolled_back_with_its_reason() -> None:
    made = await settled(6, spec(1))
    for agent in made.agents.values():
        agent.refuses = refuses(2)
    made.store.apply("a", spec(2, rollout=CANARY))
    await made.run(60)
    status = made.status("a")
    assert made.phase("a") == "RolledBack"
    assert status["settledRevision"] != status["revision"]
    assert {made.runs(node) for node in made.agents} == {content(1)}
    tried = {node for node, config in made.sent if config.content == content(2)}
    assert len(tried) == 1
    message = made.condition("a", "Ready")["message"]
    assert re.search(rf"1 node failed with it: {tried.pop()} \(no such thing\)", message)
    assert [entry["result"] for entry in status["history"]] == ["RolledBack", "Applied"]
    assert made.reasons() == ["RolloutStarted", "RollingBack", "RolledBack"]
    (warning,) = [text for kind, reason, text in made.store.events if reason == "RolledBack"]
    assert "no such thing" in warning


async def test_pause_waits_for_a_person_and_is_tried_again() -> None:
    made = await settled(6, spec(1))
    for agent in made.agents.values():
        agent.refuses = refuses(2)
    pausing = rollout(maxUnavailable=2, canary={"nodes": 1, "soakSeconds": 10}, onFailure="Pause")
    made.store.apply("a", spec(2, rollout=pausing))
    await made.run(300)
    assert made.phase("a") == "Paused"
    assert made.status("a")["history"][0]["result"] == "Failed"
    for agent in made.agents.values():
        agent.refuses = lambda _config: ""
    made.sent.clear()
    await made.run(300)
    assert made.sent == []
    # One that is settled is counted first, and looks at the same nodes.
    made.store.apply("0", {})
    await made.run(10)
    made.store.annotate("a", "outrider.dev/retry", "1")
    await made.run(100)
    assert made.phase("a") == "Settled"
    assert {made.runs(node) for node in made.agents} == {content(2)}
    results = [entry["result"] for entry in made.status("a")["history"]]
    assert results == ["Applied", "Failed", "Applied"]


async def test_those_that_refused_try_again_when_a_person_asks() -> None:
    made = await fleet(10)
    made.agents["n3"].refuses = refuses(1)
    made.store.apply("a", spec(1, rollout=rollout(maxUnavailable=3)))
    await made.run(100)
    assert (made.phase("a"), made.condition("a", "Ready")["reason"]) == ("Settled", "NodesFailed")
    assert made.status("a")["counts"]["failed"] == 1
    made.agents["n3"].refuses = lambda _config: ""
    made.sent.clear()
    await made.run(100)
    assert made.sent == []
    made.store.annotate("a", "outrider.dev/retry", "1")
    await made.run(30)
    assert [node for node, _ in made.sent] == ["n3"]
    assert made.condition("a", "Ready")["reason"] == "Applied"


async def test_a_change_in_the_middle_takes_the_place_of_the_first() -> None:
    made = await settled(6, spec(1))
    made.store.apply("a", spec(2, rollout=CANARY))
    await made.run(20)
    assert made.phase("a") == "Soaking"
    made.store.apply("a", spec(3, rollout=CANARY))
    await made.run(300)
    assert {made.runs(node) for node in made.agents} == {content(3)}
    results = [entry["result"] for entry in made.status("a")["history"]]
    assert results == ["Applied", "Superseded", "Applied"]
    assert sum(c.content == content(2) for _, c in made.sent) == 1


async def test_back_to_what_was_ends_the_trial() -> None:
    made = await settled(6, spec(1))
    made.store.apply("a", spec(2, rollout=CANARY))
    await made.run(20)
    made.store.apply("a", spec(1))
    await made.run(20)
    assert made.phase("a") == "Settled"
    assert {made.runs(node) for node in made.agents} == {content(1)}
    assert made.status("a")["history"][0]["result"] == "Superseded"


async def test_a_new_node_gets_the_settled_revision_during_a_trial() -> None:
    made = await settled(6, spec(1))
    made.store.apply("a", spec(2, rollout=CANARY))
    await made.run(10)
    made.add("late")
    await made.run(20)
    assert made.phase("a") == "Soaking"
    assert made.runs("late") == content(1)
    await made.run(200)
    assert made.phase("a") == "Settled"
    assert made.runs("late") == content(2)


async def test_agents_that_are_away_are_waited_for_by_nobody() -> None:
    made = await settled(6, spec(1))
    made.disconnect("n1")
    made.now += 10
    made.store.apply("a", spec(2))
    await made.run(30)
    assert made.phase("a") == "Settled"
    assert made.status("a")["counts"]["absent"] == 1
    assert "1 are not connected" in made.condition("a", "Ready")["message"]
    made.connect("n1")
    await made.run(30)
    assert made.runs("n1") == content(2)
    assert made.status("a")["counts"]["applied"] == 6


async def test_who_does_not_answer_is_sent_it_again_and_fails_in_the_end() -> None:
    made = await settled(3, spec(1))
    made.agents["n1"].silent = True
    made.store.apply("a", spec(2, rollout=rollout(maxUnavailable=1)))
    await made.run(600)
    assert made.phase("a") == "RolledBack"
    again = [c.content for node, c in made.sent if node == "n1" and c.content == content(2)]
    assert 4 <= len(again) <= 5
    assert made.metric("config_sends_total", result="again") >= 3


async def test_a_sick_plugin_is_waited_for_and_a_failed_one_is_not() -> None:
    plugin = {"name": "fim", "version": "2", "source": SOURCE}
    made = await settled(3, spec(1))
    made.store.apply("a", spec(1, plugins=[plugin], rollout=CANARY))
    await made.work()
    (canary,) = [agent for agent in made.agents.values() if agent.answer()]
    state = pb.PluginState(name="fim", version="2", phase=pb.PLUGIN_PHASE_BACKING_OFF)
    canary.report.plugins.append(state)
    made.tell(canary)
    for _ in range(20):
        made.now += 2
        await made.work()
        # That it is still not well is told again and again, and is no news.
        canary.report.plugins[0].restarts += 1
        made.tell(canary)
    assert made.phase("a") == "Canary"
    failed = pb.PluginState(name="fim", phase=pb.PLUGIN_PHASE_FAILED, message="crashed 5 times")
    canary.report.plugins[0].CopyFrom(failed)
    made.tell(canary)
    await made.work()
    assert made.phase("a") == "RollingBack"
    assert "plug-in fim: crashed 5 times" in made.status("a")["rollout"]["message"]


async def test_a_plugin_that_stays_ill_fails_though_it_reports_all_the_time() -> None:
    plugin = {"name": "fim", "version": "2", "source": SOURCE}
    made = await settled(3, spec(1))
    made.store.apply("a", spec(1, plugins=[plugin], rollout=CANARY))
    await made.work()
    (canary,) = [agent for agent in made.agents.values() if agent.answer()]
    canary.report.plugins.append(pb.PluginState(name="fim"))
    for _ in range(70):
        canary.report.plugins[0].restarts += 1
        made.tell(canary)
        made.now += 2
        await made.work()
    assert made.phase("a") == "RollingBack"


async def test_two_configs_are_merged_and_their_conflict_is_told_once() -> None:
    made = await fleet(3, a=spec(1, agent={"logLevel": "info"}), b=spec(2))
    await made.run(30)
    expected = b'{"agent":{"logLevel":"info"},"collectors":{"host":{"intervalSeconds":1}}}'
    assert {made.runs(node) for node in made.agents} == {expected}
    for name in ("a", "b"):
        told = made.condition(name, "Conflicting")
        assert (told["status"], told["reason"]) == ("True", "EqualPriority")
        assert "collectors.host.intervalSeconds: a" in told["message"]
        assert "is heard, not b" in told["message"]
    assert made.reasons().count("Conflict") == 2
    made.store.apply("b", spec(2, priority=200))
    await made.run(30)
    assert made.condition("a", "Conflicting")["status"] == "False"
    assert b'"intervalSeconds":2' in made.runs("n0")


async def test_a_config_that_is_deleted_stops_counting_at_once() -> None:
    made = await settled(3, spec(1))
    body = made.store.configs["a"]
    made.store.delete("a")
    made.configs.seen(body, gone=True)
    await made.run(10)
    assert {made.runs(node) for node in made.agents} == {b"{}"}


async def test_one_of_the_same_name_is_another_one() -> None:
    made = await settled(3, spec(1))
    made.store.delete("a")
    made.store.apply("a", spec(1))
    await made.run(10)
    assert made.phase("a") == "Settled"
    (revision,) = made.store.revisions.values()
    uid = made.store.configs["a"]["metadata"]["uid"]
    assert revision["metadata"]["ownerReferences"][0]["uid"] == uid


async def test_what_cannot_be_read_leaves_the_settled_one_in_force() -> None:
    made = await settled(3, spec(1))
    made.store.apply("a", spec(0))
    await made.run(60)
    assert {made.runs(node) for node in made.agents} == {content(1)}
    ready = made.condition("a", "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "Invalid")
    assert "intervalSeconds" in ready["message"]
    assert made.status("a")["observedGeneration"] == 2
    assert made.reasons() == ["Invalid"]
    made.add("late")
    await made.run(10)
    assert made.runs("late") == content(1)
    made.store.apply("a", spec(3))
    await made.run(30)
    assert made.condition("a", "Ready")["status"] == "True"


async def test_ten_revisions_are_kept_and_those_in_use() -> None:
    made = await fleet(1, a=spec(1))
    for number in range(1, 16):
        made.store.apply("a", spec(number))
        await made.run(10)
    assert len(made.store.revisions) == KEPT
    kept = [r["data"]["collectors"]["host"] for r in made.store.revisions.values()]
    assert {item["intervalSeconds"] for item in kept} == set(range(6, 16))
    assert len(made.status("a")["history"]) == 10
    made.store.apply("a", spec(6))
    await made.run(10)
    made.store.apply("a", spec(99))
    await made.run(10)
    kept = [r["data"]["collectors"]["host"] for r in made.store.revisions.values()]
    # The one that was gone back to is not the oldest any more.
    assert {item["intervalSeconds"] for item in kept} == {6, *range(8, 16), 99}


async def test_a_revision_that_cannot_be_kept_is_not_tried() -> None:
    made = await settled(3, spec(1))

    def fault(request: str) -> None:
        if request == "create_revision":
            raise ClusterError("403: forbidden")

    made.store.fault = fault
    made.store.apply("a", spec(2))
    await made.run(60)
    assert made.sent == []
    ready = made.condition("a", "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "RevisionNotKept")
    assert "403: forbidden" in ready["message"]
    made.store.fault = lambda _request: None
    await made.run(60)
    assert {made.runs(node) for node in made.agents} == {content(2)}


async def test_a_revision_somebody_deleted_is_made_anew() -> None:
    made = await settled(3, spec(1))
    (name,) = made.store.revisions
    made.store.revisions.clear()
    await made.configs.resync()
    assert list(made.store.revisions) == [name]


async def test_a_lost_revision_leaves_its_nodes_alone_until_the_next_has_settled() -> None:
    made = await settled(4, spec(1))
    made.store.revisions.clear()
    made.store.apply("a", spec(2, rollout=CANARY))
    await made.begin()  # a new leader cannot know what the old one said
    await made.run(30)
    assert made.phase("a") == "Soaking"
    assert sorted(made.runs(node) for node in made.agents) == [content(1)] * 3 + [content(2)]
    await made.run(300)
    assert made.phase("a") == "Settled"
    assert {made.runs(node) for node in made.agents} == {content(2)}


async def test_nobody_is_taken_for_gone_before_a_new_leader_knows_who_is_there() -> None:
    made = await settled(4, spec(1))
    made.store.apply("a", spec(2, rollout=CANARY))
    await made.run(20)
    since = made.status("a")["rollout"]["soakingSince"]
    for agent in made.agents.values():
        agent.connected = False
    await made.begin()
    for node in made.agents:
        made.registry.remember(node, {"conditions": [{"type": "Ready", "status": "True"}]})
    for _ in range(3):
        await made.work()
        made.now += 1
    for node in made.agents:
        made.connect(node)
    await made.work()
    assert made.status("a")["rollout"]["soakingSince"] == since


async def test_an_agent_that_never_had_any_is_left_alone() -> None:
    made = await fleet(1)
    made.store.apply("a", spec(1, selector={"matchLabels": {"x": "y"}}))
    await made.run(60)
    assert made.sent == []
    assert made.phase("a") == "Settled"
    assert made.status("a")["counts"]["targeted"] == 0


async def test_labels_decide_who_gets_what() -> None:
    made = await fleet(2)
    made.store.apply("a", spec(1, selector={"matchLabels": {"zone": "a"}}))
    await made.run(10)
    assert made.sent == []
    made.labels["n1"] = {"zone": "a"}
    made.configs.node_changed("n1")
    await made.run(10)
    assert (made.runs("n0"), made.runs("n1")) == (b"{}", content(1))
    del made.labels["n1"]
    made.configs.node_changed("n1")
    await made.run(30)
    assert made.status("a")["counts"]["targeted"] == 0


async def test_an_outage_of_the_api_server_holds_everything_up() -> None:
    made = await settled(3, spec(1))
    made.store.apply("a", spec(2))

    def fault(_request: str) -> None:
        raise ClusterUnavailableError("away")

    made.store.fault = fault
    await made.run(60)
    assert made.sent == []
    made.store.fault = lambda _request: None
    await made.run(60)
    assert {made.runs(node) for node in made.agents} == {content(2)}


async def test_agents_say_what_they_run_but_only_after_a_while() -> None:
    made = await settled(1, spec(1))
    told = made.configs.agent_config("n0")
    revision = made.status("a")["revision"]
    assert told == {
        "hash": made.agents["n0"].report.hash,
        "phase": "Applied",
        "message": "",
        "revisions": [{"name": "a", "revision": revision}],
        "plugins": [],
        "drift": [],
    }
    assert made.agents_written == []


async def test_large_configurations_are_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = await fleet(60, a=spec(1, plugins=[]))
    detail = "x" * 60_000
    plugins = [
        {"name": f"p{n}", "version": "1", "source": SOURCE, "detail": detail} for n in range(10)
    ]
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    monkeypatch.setattr("outrider_operator.fleet.config_sender.asyncio.sleep", sleep)
    made.store.apply("a", {"plugins": plugins})
    await made.work()
    assert len(made.sent) == 60
    assert sum(wait > 0 for wait in waits) >= 3


async def test_nothing_is_done_before_everything_was_read() -> None:
    made = ConfigFleet(MemoryConfigs(), 2)
    made.store.apply("a", spec(1))
    answers = iter([ClusterUnavailableError("away"), ClusterError("403: forbidden")])

    def fault(request: str) -> None:
        if request == "list_revisions":
            error = next(answers, None)
            if error is not None:
                raise error

    made.store.fault = fault
    made.lead()
    made.configs.seen(copy.deepcopy(made.store.configs["a"]), gone=False)
    task = asyncio.create_task(made.configs.run())
    try:
        async with asyncio.timeout(20):
            while not made.sent:
                await asyncio.sleep(0.05)
    finally:
        task.cancel()
    assert made.store.requests.count("list_revisions") == 3
    first = made.store.requests.index("write_config_status")
    assert made.store.requests[:first].count("list_revisions") == 3
