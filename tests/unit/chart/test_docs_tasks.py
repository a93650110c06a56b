"""The pages on tasks: fields, phases and reasons are in tables, and tests they name are there."""

from __future__ import annotations

import re

import pytest
import yaml
from cluster.paths import ROOT
from outrider_operator.core import planner, targeting
from outrider_operator.core.model import Phase, TaskPhase

TASKS = (ROOT / "docs" / "tasks.md").read_text()
FAULTS = (ROOT / "docs" / "faults.md").read_text()
#: Names in the first column of any table.
FIRST = {
    name
    for line in TASKS.splitlines()
    if line.startswith("|")
    for name in re.findall(r"`([^`]+)`", line.split("|")[1])
}


def fields() -> list[str]:
    crd = yaml.safe_load((ROOT / "crds" / "outrider.dev_agenttasks.yaml").read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    found = []
    for name, field in schema["properties"]["spec"]["properties"].items():
        nested = name in ("target", "run", "rollout", "output")
        found += [f"{name}.{inner}" for inner in field["properties"]] if nested else [name]
    return found


@pytest.mark.parametrize("name", [*fields(), *Phase, *TaskPhase])
def test_fields_and_phases_are_described(name) -> None:
    assert str(name) in FIRST


@pytest.mark.parametrize(
    "reason",
    [
        *(planner.FOR_WAVE, planner.FOR_TURN, planner.FOR_RETRY, planner.SUSPENDED),
        *(targeting.NODE_NOT_FOUND, targeting.NOT_CONNECTED),
    ],
)
def test_what_a_node_waits_for_is_described(reason) -> None:
    assert reason in FIRST


@pytest.mark.parametrize("package", ["operator", "agent"])
def test_every_reason_in_the_code_is_described(package) -> None:
    """A reason is a CamelCase text that is given with a phase."""
    found = set()
    for file in (ROOT / package / "src").rglob("*.py"):
        text = file.read_text()
        found |= set(re.findall(r'RUN_PHASE_[A-Z_]+,\s*"([A-Za-z]+)"', text))
        found |= set(re.findall(r'TaskPhase\.[A-Z]+,\s*"([A-Za-z]+)"', text))
        found |= set(re.findall(r'_rejected\("([A-Za-z]+)"', text))
    assert found
    assert found - FIRST == set()


def test_the_tests_that_the_page_on_faults_names_are_there() -> None:
    there = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"`(test_\w+)`", FAULTS))
    assert named
    assert named - there == set()
