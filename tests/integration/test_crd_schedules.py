"""AgentTaskSchedule at a real API server: what is refused, with which words; what is shown."""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest
from cluster.controlplane import ControlPlane, RequestError

SCHEDULES = "/apis/outrider.dev/v1alpha1/namespaces/default/agenttaskschedules"
STRICT = "?dryRun=All&fieldValidation=Strict"
TEMPLATE: dict[str, Any] = {"spec": {"run": {"command": ["uname", "-r"]}}}


def schedule(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTaskSchedule",
        "metadata": {"name": f"schedule-{secrets.token_hex(4)}"},
        "spec": {"schedule": "@daily", "taskTemplate": TEMPLATE, **spec},
    }


def refusal(plane: ControlPlane, body: dict[str, Any]) -> str:
    with pytest.raises(RequestError) as caught:
        plane.request("POST", SCHEDULES + STRICT, body)
    message: str = json.loads(caught.value.message)["message"]
    return message


@pytest.mark.parametrize(
    ("cron", "words"),
    [
        ("", "should be at least 1"),
        ("* * * *", "must have five fields"),
        ("* * * * * *", "must have five fields"),
        ("@every 5m", "must have five fields"),
        ("@fortnightly", "must have five fields"),
        ("TZ=UTC 0 0 * * *", "the time zone has a field of its own, timeZone"),
        ("60 * * * *", "the first field must be minutes from 0 to 59"),
        ("*/0 * * * *", "the first field must be minutes"),
        ("0 24 * * *", "the second field must be hours from 0 to 23"),
        ("0 0 32 * *", "the third field must be days of the month from 1 to 31"),
        ("0 0 0 * *", "the third field must be days of the month"),
        ("0 0 * 13 *", "the fourth field must be months from 1 to 12"),
        ("0 0 * foo *", "the fourth field must be months"),
        ("0 0 * * 8", "the fifth field must be days of the week"),
        ("0 0 * * MON#6", "the fifth field must be days of the week"),
    ],
)
def test_a_wrong_expression_is_refused_in_words(control_plane, cron, words) -> None:
    said = refusal(control_plane, schedule(schedule=cron))
    assert "spec.schedule: " in said
    assert words in said


@pytest.mark.parametrize(
    "cron",
    [
        "* * * * *",
        "*/5 * * * *",
        "0,30 8-18/2 1,15 JAN,jul mon-FRI",
        "5/15 0 ? * 7",
        " 30  2 * * * ",
        "0 0 L * *",
        "0 0 LW,1 * *",
        "0 0 * * 5L",
        "0 0 * * FRI#2,SUN#5",
        "@hourly",
        "@Daily",
        "@midnight",
        "@annually",
    ],
)
def test_expressions_are_taken(control_plane, cron) -> None:
    control_plane.request("POST", SCHEDULES + STRICT, schedule(schedule=cron))


@pytest.mark.parametrize(
    "zone", ["Europe/Berln", "Local", "local", "+01:00", "Mars", "../UTC", " "]
)
def test_an_unknown_time_zone_is_refused_in_words(control_plane, zone) -> None:
    said = refusal(control_plane, schedule(timeZone=zone))
    assert "spec.timeZone: " in said
    assert "must be a name of the IANA time zone database, such as Europe/Berlin" in said


@pytest.mark.parametrize(
    "zone", ["UTC", "Europe/Berlin", "America/Port-au-Prince", "Etc/GMT+5", "EST5EDT"]
)
def test_time_zones_are_taken(control_plane, zone) -> None:
    control_plane.request("POST", SCHEDULES + STRICT, schedule(timeZone=zone))


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"taskTemplate": None}, "spec.taskTemplate", "Required value"),
        ({"taskTemplate": {}}, "spec.taskTemplate.spec", "Required value"),
        ({"taskTemplate": {"spec": {"run": {}}}}, "taskTemplate.spec.run", "names nothing to run"),
        (
            {"taskTemplate": {"spec": {**TEMPLATE["spec"], "cancel": True}}},
            "spec.taskTemplate",
            "suspend the schedule to make no more",
        ),
        ({"concurrencyPolicy": "Queue"}, "concurrencyPolicy", '"Allow", "Forbid", "Replace"'),
        ({"startingDeadlineSeconds": 0}, "startingDeadlineSeconds", "greater than or equal to 1"),
        ({"successfulTasksHistoryLimit": -1}, "successfulTasksHistoryLimit", "greater than or eq"),
        ({"jobTemplate": {}}, "spec.jobTemplate", "unknown field"),
    ],
)
def test_what_makes_no_sense_is_refused(control_plane, spec, field, words) -> None:
    said = refusal(control_plane, schedule(**spec))
    assert field in said
    assert words in said


def test_a_long_name_is_refused(control_plane) -> None:
    body = schedule()
    body["metadata"]["name"] = "n" * 53
    assert "metadata.name must have at most 52 characters" in refusal(control_plane, body)


def test_a_schedule_can_be_changed_and_shows_how_it_is_doing(control_plane) -> None:
    body = schedule(timeZone="Europe/Berlin")
    made = control_plane.request("POST", SCHEDULES, body)
    name = body["metadata"]["name"]
    spec = made["spec"]
    assert spec["concurrencyPolicy"] == "Allow"
    assert spec["successfulTasksHistoryLimit"] == 3
    assert spec["failedTasksHistoryLimit"] == 1
    template = spec["taskTemplate"]["spec"]
    assert template["timeoutSeconds"] == 30
    assert "ttlSecondsAfterFinished" not in template
    changes = {"schedule": "@hourly", "taskTemplate": {"spec": {"timeoutSeconds": 5}}}
    control_plane.request("PATCH", f"{SCHEDULES}/{name}", {"spec": changes})
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Scheduled",
        "message": "a task is made at each due time",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    reference = {"kind": "AgentTask", "namespace": "default", "name": "a", "uid": "u"}
    status = {
        "observedGeneration": 1,
        "active": [{"apiVersion": "outrider.dev/v1alpha1", **reference}],
        "activeCount": 1,
        "lastScheduleTime": "2026-01-01T00:00:00Z",
        "lastSuccessfulTime": "2026-01-01T00:00:01Z",
        "lastMissedTime": "2026-01-01T00:00:00Z",
        "nextScheduleTime": "2126-01-01T00:00:00Z",
        "conditions": [ready],
    }
    written = control_plane.request("PATCH", f"{SCHEDULES}/{name}/status", {"status": status})
    assert written["status"] == status, "a field of the status is not in the definition"
    header, row = control_plane.kubectl("get", "ats", name).splitlines()
    assert header.split("  ")[0] == "NAME"
    assert " ".join(header.split()) == "NAME SCHEDULE TIMEZONE SUSPEND ACTIVE LAST SCHEDULE AGE"
    assert row.split()[:5] == [name, "@hourly", "Europe/Berlin", "false", "1"]
    wide = control_plane.kubectl("get", "ats", name, "-o", "wide")
    assert "2126-01-01T00:00:00Z" in wide
    assert "Scheduled" in wide
    control_plane.request("DELETE", f"{SCHEDULES}/{name}")
