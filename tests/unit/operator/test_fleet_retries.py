"""Second attempts, nodes that come late, and the reasons of nodes that wait."""

from typing import Any

import pytest
from fakes.cluster import MemoryCluster
from fakes.leader import Leader
from outrider_operator.core.nodes import NodeFacts
from outrider_operator.core.registry import Session
from outrider_proto.v1.agent_pb2 import RunPhase

FAILED, DONE = RunPhase.RUN_PHASE_FAILED, RunPhase.RUN_PHASE_SUCCEEDED
ALL: dict[str, Any] = {"maxConcurrent": "100%", "waves": ["100%"], "maxFailures": 0}
PING: dict[str, Any] = {"run": {"builtin": "Ping"}, "rollout": ALL}


@pytest.fixture
def cluster() -> MemoryCluster:
    return MemoryCluster()


def join(leader: Leader, node: str, number: int = 50, **labels: str) -> None:
    leader.labels[node] = labels
    leader.registry.joined(Session(node, node, number, "gateway", "server", leader.now))


async def test_a_failed_attempt_is_followed_by_another_after_a_while(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "retries": 2})
    await leader.advance()
    leader.says("a", FAILED, reason="NonZeroExit", exit_code=7, preview=b"no\n")
    assert await leader.advance() == pytest.approx(5, abs=0.01)
    row = cluster.rows()["a"]
    assert (row["phase"], row["reason"], row["attempt"]) == ("Pending", "WaitingForRetry", 1)
    assert (row["lastPhase"], row["lastReason"], row["exitCode"]) == ("Failed", "NonZeroExit", 7)
    assert row["message"] == "attempt 1 of 3 ended Failed (NonZeroExit)"
    assert leader.acks() == ["a"]
    assert sum(leader.retried) == 1
    assert leader.status["phase"] == "Running"
    assert leader.status["counts"]["failed"] == 0, "only the last attempt counts"
    leader.now += 5
    await leader.advance()
    assert leader.attempts() == [("a", 1), ("a", 2)]
    row = cluster.rows()["a"]
    assert (row["phase"], row["attempt"], row["lastReason"]) == ("Dispatched", 2, "NonZeroExit")
    assert not {"exitCode", "preview", "retryTime", "reason"} & row.keys(), "those of attempt 1"
    leader.says("a", FAILED, attempt=2)
    assert await leader.advance() == pytest.approx(10, abs=0.01)
    leader.now += 10
    await leader.advance()
    leader.says("a", DONE, attempt=3, exit_code=0)
    await leader.advance()
    assert leader.status["phase"] == "Succeeded"
    row = cluster.rows()["a"]
    assert (row["phase"], row["attempt"], row["lastPhase"]) == ("Succeeded", 3, "Failed")


async def test_the_last_attempt_counts(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "retries": 1})
    await leader.advance()
    leader.says("a", FAILED)
    await leader.advance()
    leader.now += 5
    await leader.advance()
    leader.says("a", RunPhase.RUN_PHASE_TIMED_OUT, attempt=2)
    await leader.advance()
    assert cluster.rows()["a"]["phase"] == "TimedOut"
    assert (leader.status["phase"], leader.status["counts"]["timedOut"]) == ("Failed", 1)


@pytest.mark.parametrize("phase", ["CANCELLED", "REJECTED", "SUCCEEDED"])
async def test_what_is_no_failure_of_the_run_is_not_tried_again(cluster, phase) -> None:
    leader = Leader(cluster, ["a"], {**PING, "retries": 3})
    await leader.advance()
    leader.says("a", RunPhase.Value(f"RUN_PHASE_{phase}"))
    await leader.advance()
    assert cluster.rows()["a"]["phase"] == phase.capitalize()


async def test_the_waiting_time_survives_a_change_of_leader(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "retries": 1})
    await leader.advance()
    leader.says("a", FAILED)
    await leader.advance()
    leader.sent.clear()
    leader.now += 3
    leader.lead()
    assert await leader.advance() == pytest.approx(2, abs=0.01)
    assert leader.attempts() == []
    leader.now += 2
    await leader.advance()
    assert leader.attempts() == [("a", 2)]


async def test_a_leader_with_another_clock_does_not_wait_for_ever(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "retries": 1})
    leader.now += 3000
    await leader.advance()
    leader.says("a", FAILED)
    await leader.advance()
    leader.sent.clear()
    leader.now -= 3000
    leader.lead()
    assert await leader.advance() == pytest.approx(5, abs=0.01)
    leader.now += 5
    await leader.advance()
    assert leader.attempts() == [("a", 2)]


async def test_the_wait_is_doubled_up_to_a_cap(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "retries": 10})
    await leader.advance()
    waits = []
    for attempt in range(1, 9):
        leader.says("a", FAILED, attempt=attempt)
        wait = await leader.advance()
        assert wait is not None
        waits.append(round(wait))
        leader.now += wait
        await leader.advance()
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]


async def test_a_late_word_about_an_older_attempt_is_acknowledged_and_changes_nothing(
    cluster,
) -> None:
    leader = Leader(cluster, ["a"], {**PING, "retries": 1})
    await leader.advance()
    leader.says("a", FAILED)
    await leader.advance()
    leader.now += 5
    await leader.advance()
    before, leader.sent[:] = cluster.rows(), []
    leader.says("a", DONE, attempt=1)
    await leader.advance()
    assert cluster.rows() == before
    assert leader.acks() == ["a"]


async def test_one_that_waits_gives_its_place_to_others_but_holds_up_its_wave(cluster) -> None:
    rollout = {"maxConcurrent": 1, "maxFailures": 0, "waves": [2, "100%"]}
    leader = Leader(cluster, list("abc"), {**PING, "rollout": rollout, "retries": 1})
    await leader.advance()
    (first,) = leader.runs()
    leader.says(first, FAILED)
    await leader.advance()
    assert len(leader.runs()) == 2, "the place of the one that waits is free"
    second = leader.runs()[1]
    leader.says(second, DONE)
    await leader.advance()
    assert len(leader.runs()) == 2, "its wave is not over"
    (third,) = set("abc") - {first, second}
    assert cluster.rows()[third]["reason"] == "WaitingForWave"
    leader.now += 5
    await leader.advance()
    assert leader.attempts()[2] == (first, 2)


@pytest.mark.parametrize(
    ("stop", "says"),
    [
        ({"cancel": True}, "spec.cancel was set"),
        ({}, "the task took longer than 100 s"),
    ],
)
async def test_one_that_waits_when_the_task_stops_ends_as_it_last_did(cluster, stop, says) -> None:
    leader = Leader(cluster, ["a"], {**PING, "retries": 1, "activeDeadlineSeconds": 100})
    await leader.advance()
    leader.says("a", RunPhase.RUN_PHASE_TIMED_OUT, reason="TimeLimit")
    await leader.advance()
    if stop:
        cluster.change_spec("t", **stop)
    else:
        leader.now += 100
    await leader.advance()
    row = cluster.rows()["a"]
    assert (row["phase"], row["reason"], row["attempt"]) == ("TimedOut", "TimeLimit", 1)
    assert row["message"] == f"attempt 1 of 2 ended TimedOut (TimeLimit); not tried again: {says}"
    assert leader.status["phase"] in ("Cancelled", "Failed")
    again = await leader.advance()
    assert (cluster.rows()["a"], leader.attempts()) == (row, [("a", 1)])
    assert again is None


async def test_past_the_error_budget_nobody_tries_again(cluster) -> None:
    leader = Leader(cluster, list("ab"), {**PING, "retries": 1})
    await leader.advance()
    leader.says("a", FAILED)
    leader.says("b", RunPhase.RUN_PHASE_REJECTED)
    await leader.advance()
    assert cluster.rows()["a"]["phase"] == "Failed"
    assert (leader.status["phase"], leader.attempts()) == ("Failed", [("a", 1), ("b", 1)])


async def test_one_that_waits_and_goes_away_is_named_then_lost(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "retries": 1})
    await leader.advance()
    leader.says("a", FAILED, reason="NonZeroExit")
    leader.registry.left("a", 1, "PeerGone", leader.now)
    await leader.advance()
    row = cluster.rows()["a"]
    assert (row["phase"], row["reason"]) == ("Pending", "AgentNotConnected")
    assert "attempt 1 of 2 ended Failed (NonZeroExit)" in row["message"]
    leader.now += 300
    await leader.advance()
    row = cluster.rows()["a"]
    assert (row["phase"], row["reason"]) == ("Lost", "AgentNotConnected")
    assert leader.status["phase"] == "Failed"


async def test_reasons_of_nodes_that_wait(cluster) -> None:
    rollout = {"maxConcurrent": 1, "waves": [2, "100%"]}
    leader = Leader(cluster, list("abcd"), {**PING, "rollout": rollout, "suspend": True})
    await leader.advance()
    assert {row["reason"] for row in cluster.rows().values()} == {"Suspended"}
    cluster.change_spec("t", suspend=False)
    await leader.advance()
    reasons = sorted(row.get("reason", "") for row in cluster.rows().values())
    assert reasons == ["", "WaitingForTurn", "WaitingForWave", "WaitingForWave"]


async def test_reasons_cost_no_writes_of_their_own(cluster, monkeypatch) -> None:
    monkeypatch.setattr("outrider_operator.core.slices.MAX_ROWS", 1)
    rollout = {"maxConcurrent": 1, "waves": [2, "100%"]}
    leader = Leader(cluster, list("abcd"), {**PING, "rollout": rollout})
    await leader.advance()
    assert cluster.requests.count("create_report") == 4
    assert cluster.requests.count("replace_report") == 1, "the one that begins"


# Nodes that come late.


async def test_late_nodes_are_left_out_or_taken_in(cluster) -> None:
    leader = Leader(cluster, ["a"], PING)
    await leader.advance()
    assert not leader.runner.concerns("b")
    join(leader, "b")
    await leader.advance()
    assert set(cluster.rows()) == {"a"}


async def test_a_late_node_is_run_too_and_counted(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "lateNodes": "Run"})
    await leader.advance()
    join(leader, "b")
    assert leader.runner.concerns("b")
    await leader.advance()
    assert leader.runs() == ["a", "b"]
    assert leader.status["counts"]["targeted"] == 2
    assert len(cluster.reports) == 1, "there was room in the report"
    leader.lead()
    join(leader, "b", 60)
    for node in "ab":
        leader.says(node, DONE)
    await leader.advance()
    assert leader.status["phase"] == "Succeeded"
    join(leader, "c")
    await leader.advance()
    assert set(cluster.rows()) == {"a", "b"}, "the task has ended"


async def test_late_nodes_get_reports_of_their_own_where_the_last_is_full(
    cluster, monkeypatch
) -> None:
    monkeypatch.setattr("outrider_operator.core.slices.MAX_ROWS", 2)
    leader = Leader(cluster, list("abc"), {**PING, "lateNodes": "Run"})
    await leader.advance()
    for number, node in enumerate("defgh"):
        join(leader, node, 50 + number)
    await leader.advance()
    assert sorted(len(report["nodes"]) for report in cluster.reports.values()) == [2, 2, 2, 2]
    assert sorted(leader.runs()) == list("abcdefgh")


async def test_late_nodes_must_fit_the_target(cluster) -> None:
    target = {"nodeSelector": {"matchLabels": {"os": "linux"}}}
    leader = Leader(cluster, [], {**PING, "lateNodes": "Run", "target": target})
    join(leader, "a", os="linux")
    await leader.advance()
    join(leader, "b", 51, os="plan9")
    leader.labels["c"] = {"os": "linux"}
    leader.facts["c"] = NodeFacts("", leader.now)
    await leader.advance()
    assert set(cluster.rows()) == {"a", "c"}
    assert cluster.rows()["c"]["reason"] == "AgentNotConnected"


async def test_a_late_node_has_all_its_time_to_bring_its_agent(cluster) -> None:
    target = {"nodeSelector": {"matchLabels": {"os": "linux"}}}
    rollout = {**ALL, "maxFailures": "100%"}
    spec = {**PING, "lateNodes": "Run", "target": target, "rollout": rollout}
    leader = Leader(cluster, [], spec)
    join(leader, "a", os="linux")
    await leader.advance()
    leader.says("a", RunPhase.RUN_PHASE_RUNNING)
    leader.now += 400
    leader.labels["c"] = {"os": "linux"}
    leader.facts["c"] = NodeFacts("", leader.now)
    await leader.advance()
    assert cluster.rows()["c"]["phase"] == "Pending"
    leader.now += 300
    await leader.advance()
    assert cluster.rows()["c"]["phase"] == "Lost"
    join(leader, "c", 51, os="linux")
    await leader.advance()
    assert leader.runs() == ["a", "c"], "it comes after all, and late nodes are wanted"


@pytest.mark.parametrize(("sample", "most"), [(3, 3), ("50%", 10)])
async def test_a_sample_stays_of_its_size(cluster, sample, most) -> None:
    target = {"sample": sample}
    leader = Leader(cluster, [], {**PING, "lateNodes": "Run", "target": target})
    for number in range(20):
        join(leader, f"node-{number:02}", number + 1)
        await leader.advance()
    assert 1 <= len(leader.runs()) <= most
    assert len(leader.runs()) == len(set(leader.runs()))


# The state of the node.


async def test_the_state_of_a_node_is_shown_while_it_is_not_done(cluster) -> None:
    leader = Leader(cluster, list("ab"), PING)
    leader.facts["a"] = NodeFacts("Cordoned")
    await leader.advance()
    assert cluster.rows()["a"]["nodeState"] == "Cordoned"
    assert "nodeState" not in cluster.rows()["b"]
    leader.facts["a"] = NodeFacts("Cordoned,NotReady")
    leader.facts["b"] = NodeFacts("NotReady")
    leader.says("a", DONE)
    await leader.advance()
    assert cluster.rows()["a"]["nodeState"] == "Cordoned", "as it was when it ran"
    assert cluster.rows()["b"]["nodeState"] == "NotReady"
    leader.facts["b"] = NodeFacts()
    await leader.advance()
    assert "nodeState" not in cluster.rows()["b"]
