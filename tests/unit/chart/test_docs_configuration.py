"""The page on configuration: every field, phase and result is in its tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from cluster.paths import ROOT
from outrider_cli.core.config_words import ACTIONS
from outrider_operator.core.config_rollout import RolloutPhase

PAGE = (ROOT / "docs" / "configuration.md").read_text()
COMMANDS = (ROOT / "docs" / "cli.md").read_text()
#: Names in the first column of any table, with ".x" after another name as its neighbour's.
FIRST: set[str] = set()
for line in PAGE.splitlines():
    if line.startswith("|"):
        whole = ""
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
            whole = whole.rpartition(".")[0] + name if name.startswith(".") else name
            FIRST.add(whole)


def schema(*path: str) -> dict[str, Any]:
    crd = yaml.safe_load((ROOT / "crds" / "outrider.dev_agentconfigs.yaml").read_text())
    found = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for name in path:
        found = found["properties"][name]
    return dict(found)


def leaves(found: dict[str, Any], path: str) -> Iterator[str]:
    """Fields as the page names them: those of lists with [], objects by their own fields."""
    if found.get("type") == "array" and "properties" in found["items"]:
        path, found = f"{path}[]", found["items"]
    if not found.get("properties") or path == "selector":  # as Kubernetes has them everywhere
        yield path
        return
    for name, inner in (found.get("properties") or {}).items():
        yield from leaves(inner, f"{path}.{name}" if path else name)


@pytest.mark.parametrize("name", list(leaves(schema("spec"), "")))
def test_every_field_is_described(name: str) -> None:
    """By itself, or with the others of its object."""
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    (row,) = [p for p in prefixes if p in FIRST or p.removesuffix("[]") in FIRST][-1:]
    # Where a row is for an object, it has to name the rest of the path.
    rest = name.removeprefix(row).strip(".").removeprefix("[]").strip(".")
    for word in filter(None, rest.split(".")):
        lines = [text for text in PAGE.splitlines() if text.startswith("|") and f"`{word}`" in text]
        assert lines, f"{name}: {word} is in no table"


@pytest.mark.parametrize("phase", RolloutPhase)
def test_every_phase_is_described(phase: RolloutPhase) -> None:
    assert phase.value in FIRST


def test_every_result_of_a_change_is_named() -> None:
    results = schema("status", "history")["items"]["properties"]["result"]["enum"]
    assert [result for result in results if f"`{result}`" not in PAGE] == []


def test_every_part_of_the_status_is_described() -> None:
    shown = set(re.findall(r"`([a-zA-Z]+)`", PAGE))
    parts = set(schema("status")["properties"]) - {"observedGeneration", "conditions"}
    assert parts - shown == set()
    assert set(schema("status", "counts")["properties"]) - shown == set()


@pytest.mark.parametrize("action", [action for action in ACTIONS if action != "node"])
def test_every_command_is_described(action: str) -> None:
    assert f"`config {action} NAME`" in COMMANDS


def test_the_first_example_is_the_file_it_names() -> None:
    file = yaml.safe_load((ROOT / "examples" / "agentconfig-host-metrics.yaml").read_text())
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    shown = yaml.safe_load(blocks[0])
    assert shown["metadata"] == file["metadata"]
    assert shown["spec"]["selector"] == file["spec"]["selector"]
    assert shown["spec"]["collectors"] == file["spec"]["collectors"]


def test_links_lead_to_headings_and_files() -> None:
    for page in (PAGE, COMMANDS):
        for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page):
            if target and "://" not in target:
                assert (ROOT / "docs" / target).exists(), target
    for page, anchor in re.findall(r"\]\(([\w.]+)#([\w-]+)\)", PAGE):
        text = (ROOT / "docs" / page).read_text()
        headings = {
            re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        assert anchor in headings, (page, anchor)
