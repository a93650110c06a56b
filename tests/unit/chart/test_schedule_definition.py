"""The definition of AgentTaskSchedule: its template is the spec of a task, its defaults ours."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import yaml
from outrider_operator.core.schedule import MAX_ACTIVE
from outrider_operator.core.schedule_model import KEEP_SECONDS, ScheduleSpec

ROOT = Path(__file__).resolve().parents[3]


def schema(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "crds" / f"outrider.dev_{name}.yaml").read_text())
    root = loaded["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    found: dict[str, Any] = root["properties"]
    return found


def plain(value: Any) -> Any:
    """A schema without rules that compare with what was before."""
    if isinstance(value, list):
        kept = [item for item in value if not (isinstance(item, dict) and "rule" in item
                                               and "oldSelf" in item["rule"])]  # fmt: skip
        return [plain(item) for item in kept]
    if not isinstance(value, dict):
        return value
    found = {key: plain(item) for key, item in value.items()}
    return {k: v for k, v in found.items() if not (k == "x-kubernetes-validations" and v == [])}


def test_what_is_derived_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "crds" / "generate.py", "--check"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_template_is_the_spec_of_a_task() -> None:
    task = plain(schema("agenttasks")["spec"])
    template = schema("agenttaskschedules")["spec"]["properties"]["taskTemplate"]["properties"]
    spec = template["spec"]
    assert "oldSelf" not in str(template), "a schedule can be changed"
    # The one field with another default: the history limits say how long tasks are kept.
    assert "default" not in spec["properties"]["ttlSecondsAfterFinished"]
    for one in (task, spec):
        one.pop("description")
        one["properties"]["ttlSecondsAfterFinished"].pop("default", None)
        one["properties"]["ttlSecondsAfterFinished"].pop("description")
    assert spec == task
    assert task["properties"]["ttlSecondsAfterFinished"]["maximum"] == KEEP_SECONDS


def test_defaults_and_bounds_are_those_of_the_code() -> None:
    fields = schema("agenttaskschedules")["spec"]["properties"]
    given = {name: field["default"] for name, field in fields.items() if "default" in field}
    template: dict[str, Any] = {"spec": {}}
    from_definition = {"schedule": "@daily", "taskTemplate": template, **given}
    from_code = {"schedule": "@daily", "taskTemplate": template}
    assert msgspec.convert(from_definition, ScheduleSpec) == msgspec.convert(
        from_code, ScheduleSpec
    )
    assert set(msgspec.to_builtins(msgspec.convert(from_code, ScheduleSpec))) == set(fields)
    status = schema("agenttaskschedules")["status"]["properties"]
    assert status["active"]["maxItems"] == MAX_ACTIVE
