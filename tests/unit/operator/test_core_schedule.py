"""What is decided about a schedule: a table of the conventions of CronJob, and what we add."""

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from outrider_operator.core.model import TaskPhase
from outrider_operator.core.schedule import Plan, decide
from outrider_operator.core.schedule_model import (
    Child,
    Schedule,
    owner_of,
    parse_child,
    parse_schedule,
    task_body,
    task_name,
)
from outrider_operator.core.times import seconds


def at(text: str) -> float:
    return datetime.fromisoformat(f"2026-11-20T{text}+00:00").timestamp()


CREATED = at("08:00:00")
TEN = at("10:00:00")


def schedule(status: dict[str, Any] | None = None, **spec: Any) -> Schedule:
    body = {
        "metadata": {
            "name": "s",
            "namespace": "ns",
            "uid": "u",
            "generation": 3,
            "creationTimestamp": seconds(CREATED),
        },
        "spec": {
            "schedule": "0 * * * *",
            "taskTemplate": {"spec": {"run": {"builtin": "Ping"}}},
            **spec,
        },
        "status": status or {},
    }
    return parse_schedule(body)


def child(due: float, phase: str = "Running", **fields: Any) -> Child:
    ended = phase in ("Succeeded", "Failed", "Cancelled")
    made = Child(
        uid=f"uid-{int(due)}",
        name=f"s-{int(due) // 60}",
        due=due,
        phase=TaskPhase(phase),
        deleting=False,
        completed=due + 30 if ended else None,
    )
    return replace(made, **fields)


def told(plan: Plan) -> list[str]:
    return [notice.reason for notice in plan.notices]


def ready(plan: Plan) -> tuple[str, str]:
    (condition,) = plan.status["conditions"]
    return condition["status"], condition["reason"]


NINE = {"lastScheduleTime": seconds(at("09:00:00"))}
RUNS, DONE = [child(at("09:00:00"))], [child(at("09:00:00"), "Succeeded")]


@pytest.mark.parametrize(
    ("now", "status", "children", "spec", "create", "reasons"),
    [
        # Never made a task.
        ("08:59:59", {}, [], {}, None, []),
        ("09:00:00", {}, [], {}, "09:00:00", []),
        ("09:00:10", {}, [], {}, "09:00:00", []),
        ("09:00:10", {}, [], {"suspend": True}, None, []),
        ("09:00:10", {}, [], {"startingDeadlineSeconds": 5}, None, ["MissSchedule"]),
        ("09:00:05", {}, [], {"startingDeadlineSeconds": 5}, "09:00:00", []),
        # The task before is done.
        ("09:59:59", NINE, DONE, {}, None, []),
        ("10:00:00", NINE, DONE, {}, "10:00:00", []),
        ("10:00:00", NINE, DONE, {"concurrencyPolicy": "Forbid"}, "10:00:00", []),
        ("10:00:00", NINE, DONE, {"concurrencyPolicy": "Replace"}, "10:00:00", []),
        ("10:00:00", NINE, DONE, {"suspend": True}, None, []),
        # The task before is under way.
        ("10:00:00", NINE, RUNS, {}, "10:00:00", []),
        ("10:00:00", NINE, RUNS, {"concurrencyPolicy": "Forbid"}, None, ["TaskAlreadyActive"]),
        ("10:00:00", NINE, RUNS, {"concurrencyPolicy": "Replace"}, "10:00:00", []),
        ("09:30:00", NINE, RUNS, {"concurrencyPolicy": "Replace"}, None, []),
        # Its deletion was asked for, but what it runs is not ended.
        (
            "10:00:00",
            NINE,
            [replace(RUNS[0], deleting=True)],
            {"concurrencyPolicy": "Forbid"},
            None,
            ["TaskAlreadyActive"],
        ),
        # Several were missed: only the latest is made up for.
        ("12:30:00", NINE, DONE, {}, "12:00:00", ["MissSchedule"]),
        ("12:30:00", NINE, DONE, {"startingDeadlineSeconds": 1799}, None, ["MissSchedule"]),
        ("12:30:00", NINE, DONE, {"startingDeadlineSeconds": 1800}, "12:00:00", ["MissSchedule"]),
        ("12:30:00", NINE, RUNS, {"concurrencyPolicy": "Forbid"}, None, ["TaskAlreadyActive"]),
        # Too many to count.
        ("23:59:00", NINE, DONE, {"schedule": "* * * * *"}, "23:59:00", ["TooManyMissedTimes"]),
        # The leader died after it made the task and before it wrote that down.
        ("10:00:10", NINE, [child(TEN)], {}, None, []),
        # The clock was set back.
        ("07:00:00", NINE, DONE, {}, None, ["ClockBehind"]),
        ("08:59:30", NINE, DONE, {}, None, []),
        # Wrong specs.
        ("10:00:00", NINE, DONE, {"schedule": "5-1 * * * *"}, None, ["UnparseableSchedule"]),
        ("10:00:00", NINE, DONE, {"timeZone": "Mars/Crater"}, None, ["UnknownTimeZone"]),
        ("10:00:00", NINE, DONE, {"schedule": "* * */20 * 1L"}, None, ["NeverDue"]),
    ],
)
def test_the_conventions(now, status, children, spec, create, reasons) -> None:
    plan = decide(schedule(status, **spec), children, at(now))
    assert plan.create == (None if create is None else at(create))
    assert told(plan) == reasons
    replaces = spec.get("concurrencyPolicy") == "Replace" and children == RUNS and create
    assert list(plan.replace) == (RUNS if replaces else [])


def test_a_missed_time_is_told_once() -> None:
    spec = {"startingDeadlineSeconds": 60}
    plan = decide(schedule(NINE, **spec), DONE, at("12:30:00"))
    assert plan.missed == 3
    assert plan.status["lastMissedTime"] == seconds(at("12:00:00"))
    assert plan.status["lastScheduleTime"] == seconds(at("09:00:00"))
    again = decide(schedule(dict(plan.status), **spec), DONE, at("12:31:00"))
    assert (again.missed, told(again), again.create) == (0, [], None)
    later = decide(schedule(dict(plan.status), **spec), DONE, at("13:30:00"))
    assert (later.missed, told(later)) == (1, ["MissSchedule"])
    assert "the due time 2026-11-20T13:00:00Z" in later.notices[0].text


def test_the_zone_decides_what_nine_is() -> None:
    made = schedule(schedule="0 18 * * *", timeZone="Asia/Tokyo")
    assert decide(made, [], at("08:59:00")).create is None
    assert decide(made, [], at("09:00:00")).create == at("09:00:00")
    assert decide(made, [], at("08:30:00")).status["nextScheduleTime"] == seconds(at("09:00:00"))


def test_the_oldest_ended_tasks_go_first() -> None:
    children = [child(at(f"0{hour}:00:00"), "Succeeded") for hour in range(1, 6)]
    children += [child(at("06:00:00"), "Failed"), child(at("07:00:00"), "Cancelled")]
    children += [child(at("00:30:00"))]
    plan = decide(schedule(NINE), children, at("09:30:00"))
    assert [c.due for c in plan.prune] == [at("01:00:00"), at("02:00:00"), at("06:00:00")]
    none = {"successfulTasksHistoryLimit": 0, "failedTasksHistoryLimit": 0}
    assert len(decide(schedule(NINE, **none), children, at("09:30:00")).prune) == 7
    suspended = schedule(NINE, suspend=True)
    assert decide(suspended, children, at("09:30:00")).prune == plan.prune


def test_the_status_says_what_is_and_what_was() -> None:
    gone = {"name": "s-1", "uid": "gone"}
    active = {"name": DONE[0].name, "uid": DONE[0].uid}
    status = {**NINE, "active": [gone, active], "lastSuccessfulTime": seconds(at("08:30:00"))}
    plan = decide(schedule(status), [*DONE, child(TEN)], at("10:10:00"))
    assert told(plan) == ["MissingTask", "SawCompletedTask"]
    assert plan.notices[1].text == f"saw completed task: {DONE[0].name}, phase: Succeeded"
    conditions = plan.status.pop("conditions")  # type: ignore[attr-defined]
    assert plan.status == {
        "observedGeneration": 3,
        "active": [
            {
                "apiVersion": "outrider.dev/v1alpha1",
                "kind": "AgentTask",
                "namespace": "ns",
                "name": child(TEN).name,
                "uid": child(TEN).uid,
            }
        ],
        "activeCount": 1,
        "lastScheduleTime": seconds(TEN),
        "lastSuccessfulTime": seconds(at("09:00:30")),
        "nextScheduleTime": seconds(at("11:00:00")),
    }
    assert (conditions[0]["status"], conditions[0]["reason"]) == ("True", "Scheduled")
    assert plan.wake == at("11:00:00")


def test_the_status_stays_within_its_bound() -> None:
    many = [child(CREATED + 60 * n) for n in range(250)]
    status = decide(schedule(), many, at("23:00:00")).status
    assert len(status["active"]) == 100
    assert status["active"][-1]["name"] == many[-1].name
    assert status["activeCount"] == 250


@pytest.mark.parametrize(
    ("spec", "trouble", "expected"),
    [
        ({}, None, ("True", "Scheduled")),
        ({}, "s-1 was not made: quota", ("False", "FailedCreate")),
        ({"suspend": True}, "s-1 was not made: quota", ("False", "Suspended")),
        ({"schedule": "x"}, "s-1 was not made: quota", ("False", "UnparseableSchedule")),
    ],
)
def test_readiness_says_what_is_in_the_way(spec, trouble, expected) -> None:
    plan = decide(schedule(**spec), [], at("08:30:00"), trouble)
    assert ready(plan) == expected
    assert ("nextScheduleTime" in plan.status) == (not spec)


def test_a_task_is_named_by_its_due_time_and_owned() -> None:
    template: dict[str, Any] = {
        "metadata": {"labels": {"a": "b", "outrider.dev/schedule": "x"}, "annotations": {"c": "d"}},
        "spec": {"run": {"builtin": "Ping"}, "timeoutSeconds": 7},
    }
    made = schedule(taskTemplate=template)
    body = task_body(made, TEN)
    assert body["metadata"]["name"] == f"s-{int(TEN) // 60}" == task_name(made, TEN)
    assert body["metadata"]["labels"] == {"a": "b", "outrider.dev/schedule": "s"}
    assert body["metadata"]["annotations"] == {
        "c": "d",
        "outrider.dev/scheduled-timestamp": "2026-11-20T10:00:00Z",
    }
    assert body["spec"]["timeoutSeconds"] == 7
    assert body["spec"]["ttlSecondsAfterFinished"] == 315_360_000
    template["spec"]["ttlSecondsAfterFinished"] = 5
    kept = task_body(schedule(taskTemplate=template), TEN)["spec"]
    assert kept["ttlSecondsAfterFinished"] == 5
    body["metadata"]["uid"] = "t"
    assert owner_of(body) == "u"
    assert parse_child(body, "s").due == TEN
    # One that somebody gave to the schedule says nothing about due times.
    body["metadata"]["name"] = "other-99999999"
    assert parse_child(body, "s").due is None
