"""One task carried out against an API server in memory: order of writes and sends, start, end."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fakes.cluster import FINALIZER, MemoryCluster
from fakes.leader import Leader
from outrider_operator.core import slices, targeting
from outrider_operator.core.ports import ClusterUnavailableError
from outrider_operator.core.registry import Session
from outrider_proto.v1.agent_pb2 import RunId, RunPhase, RunState

PING: dict[str, Any] = {
    "run": {"builtin": "Ping"},
    "rollout": {"maxConcurrent": "100%", "waves": ["100%"]},
}


@pytest.fixture
def cluster() -> MemoryCluster:
    return MemoryCluster()


def fail_on(method: str, times: int = 1, after: int = 0) -> Callable[[str], None]:
    left = {"skip": after, "fail": times}

    def fault(name: str) -> None:
        if name != method or left["fail"] == 0:
            return
        if left["skip"]:
            left["skip"] -= 1
            return
        left["fail"] -= 1
        raise ClusterUnavailableError("away")

    return fault


async def test_from_apply_to_succeeded(cluster) -> None:
    leader = Leader(cluster, ["a", "b"], PING)
    await leader.advance()
    assert cluster.task("t")["metadata"]["finalizers"] == [FINALIZER]
    assert sorted(leader.runs()) == ["a", "b"]
    assert {r["phase"] for r in cluster.rows().values()} == {"Dispatched"}
    for node in ("a", "b"):
        leader.says(node, RunPhase.RUN_PHASE_SUCCEEDED, exit_code=0, preview=b"pong\xff")
    await leader.advance()
    assert sorted(leader.acks()) == ["a", "b"]
    assert leader.status["phase"] == "Succeeded"
    assert leader.status["outcomes"] == [
        {"nodes": 2, "phase": "Succeeded", "exitCode": 0, "example": "a", "preview": "pong\ufffd"}
    ]
    assert not cluster.task("t")["metadata"]["finalizers"]
    assert leader.ended == ["Succeeded"]
    assert [event[1] for event in cluster.events] == ["Started", "Completed"]


async def test_a_command_is_sent_only_after_its_intent_is_written(cluster) -> None:
    leader = Leader(cluster, ["a"], PING)
    cluster.fault = fail_on("replace_report")
    with pytest.raises(ClusterUnavailableError):
        await leader.advance()
    assert leader.sent == []
    assert cluster.rows()["a"]["phase"] == "Pending"
    leader.runner.reload()
    await leader.advance()
    assert leader.runs() == ["a"]


async def test_a_result_is_acknowledged_only_after_it_is_written(cluster) -> None:
    leader = Leader(cluster, ["a", "b"], PING)
    await leader.advance()
    leader.says("a", RunPhase.RUN_PHASE_FAILED, exit_code=3)
    cluster.fault = fail_on("replace_report")
    with pytest.raises(ClusterUnavailableError):
        await leader.advance()
    assert leader.acks() == []
    leader.runner.reload()
    await leader.advance()
    assert leader.acks() == ["a"]
    assert cluster.rows()["a"]["exitCode"] == 3


async def test_what_is_reported_during_a_write_is_not_lost(cluster) -> None:
    leader = Leader(cluster, ["a", "b"], {**PING, "rollout": {**PING["rollout"], "maxFailures": 9}})
    await leader.advance()
    leader.says("a", RunPhase.RUN_PHASE_RUNNING)
    replace = cluster.replace_report

    async def meanwhile(report: Any) -> Any:
        leader.says("a", RunPhase.RUN_PHASE_SUCCEEDED)
        return await replace(report)

    cluster.replace_report = meanwhile
    await leader.advance()
    cluster.replace_report = replace
    assert cluster.rows()["a"]["phase"] == "Running"
    await leader.advance()
    assert cluster.rows()["a"]["phase"] == "Succeeded"


async def test_ends_are_written_before_the_turns_they_make_room_for(cluster, monkeypatch) -> None:
    monkeypatch.setattr(slices, "MAX_ROWS", 1)
    spec = {"run": {"builtin": "Ping"}, "rollout": {"maxConcurrent": 1, "waves": ["100%"]}}
    leader = Leader(cluster, ["a", "b"], spec)
    first, second = sorted(leader.nodes, key=lambda node: targeting.rank("uid-of-t", node))
    session = leader.registry.sessions.pop(first)
    leader.registry.remember(first, {})
    await leader.advance()
    assert leader.runs() == [second]
    # Now the turn comes to the node whose report is written first.
    leader.registry.joined(session)
    leader.says(second, RunPhase.RUN_PHASE_SUCCEEDED)
    cluster.fault = fail_on("replace_report", after=1)
    with pytest.raises(ClusterUnavailableError):
        await leader.advance()
    assert cluster.rows()[second]["phase"] == "Succeeded"
    assert cluster.rows()[first]["phase"] == "Pending"


async def test_cancel_of_a_run_its_agent_knows_waits_for_the_agent(cluster) -> None:
    leader = Leader(cluster, ["a"], PING)
    await leader.advance()
    leader.registry.complete_report("a", 1, leader.now)
    cluster.change_spec("t", cancel=True)
    leader.now += 1
    await leader.advance()
    (command,) = [c for _, c in leader.sent if c.cancels]
    assert command.report_runs
    assert cluster.rows()["a"]["phase"] == "Dispatched"
    leader.says("a", RunPhase.RUN_PHASE_CANCELLED)
    await leader.advance()
    assert leader.status["phase"] == "Cancelled"


async def test_cancel_of_a_run_that_never_arrived_ends_it(cluster) -> None:
    leader = Leader(cluster, ["a"], PING)
    await leader.advance()
    cluster.change_spec("t", cancel=True)
    leader.now += 1
    await leader.advance()
    leader.now += 1
    leader.registry.complete_report("a", 1, leader.now)
    leader.runner.report("a", [], complete=True)
    await leader.advance()
    assert cluster.rows()["a"]["phase"] == "Cancelled"


async def test_run_its_agent_has_forgotten_is_interrupted(cluster) -> None:
    leader = Leader(cluster, ["a"], PING)
    await leader.advance()
    leader.says("a", RunPhase.RUN_PHASE_RUNNING)
    await leader.advance()
    leader.runner.report("a", [], complete=True)
    await leader.advance()
    row = cluster.rows()["a"]
    assert (row["phase"], row["reason"]) == ("Interrupted", "AgentLostState")


async def test_waves_wait_for_all_before_them_and_the_interval(cluster) -> None:
    rollout = {"maxConcurrent": "100%", "waves": [1, 3, "100%"], "waveIntervalSeconds": 60}
    leader = Leader(cluster, list("abcde"), {**PING, "rollout": rollout})
    await leader.advance()
    assert len(leader.runs()) == 1
    leader.says(leader.runs()[0], RunPhase.RUN_PHASE_SUCCEEDED)
    again = await leader.advance()
    assert again == pytest.approx(60, abs=1)
    assert len(leader.runs()) == 1, "the interval is not over"
    leader.now += 60
    await leader.advance()
    assert len(leader.runs()) == 3
    leader.says(leader.runs()[1], RunPhase.RUN_PHASE_SUCCEEDED)
    leader.says(leader.runs()[2], RunPhase.RUN_PHASE_RUNNING)
    leader.now += 600
    await leader.advance()
    assert len(leader.runs()) == 3, "one of the wave still runs"


async def test_a_new_leader_sends_again_what_never_arrived(cluster) -> None:
    leader = Leader(cluster, ["a", "b"], PING)
    await leader.advance()
    leader.sent.clear()
    leader.now += 5
    leader.lead()
    await leader.advance()
    assert leader.runs() == [], "the agents have not said yet what they know"
    leader.registry.complete_report("a", 1, leader.now)
    state = RunState(id=RunId(task_uid="uid-of-t", attempt=1), phase=RunPhase.RUN_PHASE_ACCEPTED)
    leader.registry.complete_report("b", 2, leader.now)
    leader.runner.report("a", [], complete=True)
    leader.runner.report("b", [state], complete=True)
    await leader.advance()
    assert leader.runs() == ["a"]
    assert cluster.rows()["a"]["attempt"] == 1


async def test_a_start_that_broke_off_is_begun_anew(cluster, monkeypatch) -> None:
    monkeypatch.setattr(slices, "MAX_ROWS", 1)
    leader = Leader(cluster, ["a", "b", "c"], PING)
    cluster.fault = fail_on("create_report", after=2)
    with pytest.raises(ClusterUnavailableError):
        await leader.advance()
    assert leader.runs() == []
    assert "startTime" not in leader.status
    cluster.fault = lambda _: None
    leader.nodes = ["a"]
    leader.lead()
    await leader.advance()
    assert leader.runs() == ["a"]
    assert set(cluster.rows()) == {"a"}
    assert leader.status["counts"]["targeted"] == 1


@pytest.mark.parametrize(
    ("spec", "reason", "names"),
    [
        (
            {"run": {"plugin": {"name": "x", "dataType": 1}}, "user": "x"},
            "NotSupported",
            "spec.run.plugin",
        ),
        (
            {**PING, "target": {"nodeSelector": {"matchLabels": {"no": "such"}}}},
            "NoMatchingNodes",
            "spec.target",
        ),
    ],
)
async def test_what_cannot_be_done_fails_with_the_reason(cluster, spec, reason, names) -> None:
    leader = Leader(cluster, ["a"], spec)
    await leader.advance()
    assert (leader.status["phase"], leader.status["reason"]) == ("Failed", reason)
    failed = next(c for c in leader.status["conditions"] if c["type"] == "Failed")
    assert failed["status"] == "True"
    assert names in failed["message"]
    assert leader.sent == []
    assert cluster.events[-1][0] == "Warning"


async def test_late_result_of_a_lost_node_still_lands(cluster) -> None:
    leader = Leader(cluster, ["a"], PING)
    await leader.advance()
    leader.registry.left("a", 1, "PeerGone", leader.now)
    leader.now += 301
    await leader.advance()
    assert cluster.rows()["a"]["phase"] == "Lost"
    assert leader.status["phase"] == "Failed"
    leader.registry.joined(Session("a", "a", 9, "g", "s", leader.now))
    leader.says("a", RunPhase.RUN_PHASE_SUCCEEDED)
    await leader.advance()
    assert cluster.rows()["a"]["phase"] == "Succeeded"
    assert leader.status["counts"]["succeeded"] == 1
    assert leader.status["phase"] == "Failed", "a task that has ended does not end again"
    assert leader.acks() == ["a"]


@pytest.mark.parametrize("method", ["replace_report", "write_status"])
async def test_late_result_corrects_the_counts_though_the_leader_dies(cluster, method) -> None:
    leader = Leader(cluster, ["a"], PING)
    await leader.advance()
    leader.registry.left("a", 1, "PeerGone", leader.now)
    leader.now += 301
    await leader.advance()
    leader.registry.joined(Session("a", "a", 9, "g", "s", leader.now))
    leader.says("a", RunPhase.RUN_PHASE_SUCCEEDED)
    cluster.fault = fail_on(method)
    with pytest.raises(ClusterUnavailableError):
        await leader.advance()
    assert leader.acks() == [], "the agent must tell the next leader"
    cluster.fault = lambda _: None
    leader.lead()
    leader.says("a", RunPhase.RUN_PHASE_SUCCEEDED)
    await leader.advance()
    assert (leader.status["counts"]["lost"], leader.status["counts"]["succeeded"]) == (0, 1)
    assert leader.acks() == ["a"]


async def test_a_node_that_never_connects_is_named_then_lost(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "target": {"nodeNames": ["a", "ghost"]}})
    await leader.advance()
    assert cluster.rows()["ghost"] | {"message": ""} == {
        "node": "ghost",
        "phase": "Pending",
        "attempt": 0,
        "reason": "NodeNotFound",
        "message": "",
    }
    leader.says("a", RunPhase.RUN_PHASE_SUCCEEDED)
    leader.now += 301
    await leader.advance()
    assert cluster.rows()["ghost"]["phase"] == "Lost"
    assert leader.status["phase"] == "Failed"


async def test_time_stands_still_while_suspended(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "activeDeadlineSeconds": 100, "suspend": True})
    await leader.advance()
    assert leader.status["phase"] == "Suspended"
    assert leader.runs() == []
    leader.now += 1000
    await leader.advance()
    assert leader.status["phase"] == "Suspended"
    cluster.change_spec("t", suspend=False)
    await leader.advance()
    assert leader.runs() == ["a"]
    assert leader.status["phase"] == "Running"


async def test_deletion_ends_runs_first_but_does_not_wait_for_ever(cluster) -> None:
    leader = Leader(cluster, ["a", "b"], PING)
    await leader.advance()
    cluster.delete("t")
    await leader.advance()
    assert sorted(n for n, c in leader.sent if c.cancels) == ["a", "b"]
    leader.says("a", RunPhase.RUN_PHASE_CANCELLED)
    again = await leader.advance()
    assert again is not None
    assert again <= 30
    assert ("default", "t") in cluster.tasks
    leader.now += 31
    await leader.advance()
    assert ("default", "t") not in cluster.tasks


async def test_time_to_live(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "ttlSecondsAfterFinished": 60})
    await leader.advance()
    leader.says("a", RunPhase.RUN_PHASE_SUCCEEDED)
    await leader.advance()
    left = await leader.advance()
    assert left == pytest.approx(60, abs=1)
    leader.now += 61
    await leader.advance()
    assert ("default", "t") not in cluster.tasks
    assert cluster.rows() == {}


async def test_status_is_not_written_again_without_a_change(cluster) -> None:
    leader = Leader(cluster, ["a"], PING)
    await leader.advance()
    cluster.requests.clear()
    await leader.advance()
    await asyncio.sleep(0)
    assert cluster.requests == []


@pytest.mark.parametrize("index", [0, 1, 2])
async def test_a_deleted_report_ends_the_task_and_is_no_success(
    cluster, monkeypatch, index
) -> None:
    monkeypatch.setattr(slices, "MAX_ROWS", 1)
    leader = Leader(cluster, list("abc"), PING)
    await leader.advance()
    del cluster.reports["default", f"t-uid-of-t-{index}"]
    leader.sent.clear()
    leader.lead()
    await leader.advance()
    assert (leader.status["phase"], leader.status["reason"]) == ("Failed", "ReportsLost")
    assert leader.runs() == []
    assert not cluster.task("t")["metadata"]["finalizers"]
    before = leader.status
    for node in "abc":
        leader.says(node, RunPhase.RUN_PHASE_SUCCEEDED)
    await leader.advance()
    assert sorted(leader.acks()) == list("abc"), "or the agents would keep them for ever"
    assert leader.status == before


async def test_the_only_report_deleted_is_no_success_either(cluster) -> None:
    leader = Leader(cluster, ["a"], PING)
    await leader.advance()
    cluster.reports.clear()
    leader.lead()
    await leader.advance()
    assert leader.status["reason"] == "ReportsLost"


async def test_the_deadline_ends_what_runs_and_skips_the_rest(cluster) -> None:
    rollout = {"maxConcurrent": 1, "waves": ["100%"]}
    leader = Leader(cluster, list("ab"), {**PING, "rollout": rollout, "activeDeadlineSeconds": 60})
    await leader.advance()
    (first,) = leader.runs()
    leader.says(first, RunPhase.RUN_PHASE_RUNNING)
    assert await leader.advance() == pytest.approx(60, abs=1)
    leader.now += 60
    await leader.advance()
    assert [node for node, command in leader.sent if command.cancels] == [first]
    (other,) = set("ab") - {first}
    assert cluster.rows()[other]["reason"] == "DeadlineExceeded"
    leader.says(first, RunPhase.RUN_PHASE_CANCELLED)
    await leader.advance()
    assert (leader.status["phase"], leader.status["reason"]) == ("Failed", "DeadlineExceeded")


async def test_an_agent_that_never_answers_does_not_keep_a_task_open(cluster) -> None:
    leader = Leader(cluster, ["a"], {**PING, "activeDeadlineSeconds": 60})
    await leader.advance()
    leader.says("a", RunPhase.RUN_PHASE_RUNNING)
    await leader.advance()
    leader.now += 359
    await leader.advance()
    assert cluster.rows()["a"]["phase"] == "Running"
    leader.now += 1
    await leader.advance()
    assert (cluster.rows()["a"]["phase"], cluster.rows()["a"]["reason"]) == ("Lost", "NoAnswer")
    assert leader.status["phase"] == "Failed"
