"""Writes what is derived in the definitions: the task spec of a schedule, and the chart's copies.

The spec of an AgentTask is written down once, in outrider.dev_agenttasks.yaml. A schedule's
template holds the same, without the rules about changes (a template may be changed: they are for
the tasks) and without the default of ttlSecondsAfterFinished (the history limits say how long a
schedule's tasks are kept).

`make crds` runs it. With --check it writes nothing and exits with 1 where something would change.
"""

import sys
from pathlib import Path
from typing import Any, Final

import yaml

HERE: Final = Path(__file__).resolve().parent
COPIES: Final = HERE.parent / "charts" / "outrider" / "files" / "crds"
TASKS: Final = HERE / "outrider.dev_agenttasks.yaml"
SCHEDULES: Final = HERE / "outrider.dev_agenttaskschedules.yaml"
MARK: Final = " of what `make crds` writes.\n"
RULES: Final = "x-kubernetes-validations"
DESCRIPTION: Final = (
    "The spec of the AgentTasks: the same fields, see kubectl explain agenttask.spec."
)
TTL: Final = (
    "How long a task and its reports are kept after its end, in seconds, at most ten years. "
    "Without it the history limits of the schedule alone say how many tasks are kept."
)


def without_transitions(schema: Any) -> Any:
    """A schema without the rules that compare it with what was before."""
    if isinstance(schema, list):
        return [without_transitions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {key: without_transitions(value) for key, value in schema.items()}
    if isinstance(copy.get(RULES), list):
        copy[RULES] = [rule for rule in copy[RULES] if "oldSelf" not in rule["rule"]]
        if not copy[RULES]:
            del copy[RULES]
    return copy


def template_spec() -> dict[str, Any]:
    """The schema of a template's spec."""
    definition = yaml.safe_load(TASKS.read_text())
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec: dict[str, Any] = without_transitions(schema["properties"]["spec"])
    spec["description"] = DESCRIPTION
    lifetime = spec["properties"]["ttlSecondsAfterFinished"]
    del lifetime["default"]
    lifetime["description"] = TTL
    return spec


def schedules() -> str:
    """The definition of schedules, with the part that is derived written anew."""
    before, rest = SCHEDULES.read_text().split("# BEGIN" + MARK)
    _, after = rest.split("# END" + MARK)
    indent = before[before.rindex("\n") + 1 :]
    text = yaml.safe_dump({"spec": template_spec()}, sort_keys=False, width=100 - len(indent))
    lines = [f"{indent}{line}\n" for line in text.splitlines()]
    return f"{before}# BEGIN{MARK}{''.join(lines)}{indent}# END{MARK}{after}"


def main() -> int:
    """Write, or check. Returns the exit code."""
    wanted = {SCHEDULES: schedules()}
    for source in sorted(HERE.glob("*.yaml")):
        wanted[COPIES / source.name] = wanted.get(source) or source.read_text()
    stale = [file for file in COPIES.glob("*") if file not in wanted]
    changed = [f for f, text in wanted.items() if not f.exists() or f.read_text() != text]
    if "--check" in sys.argv[1:]:
        for file in (*changed, *stale):
            sys.stderr.write(f"error: {file.relative_to(HERE.parent)} is stale: run make crds\n")
        return 1 if changed or stale else 0
    for file in stale:
        file.unlink()
    for file in changed:
        file.write_text(wanted[file])
    return 0


if __name__ == "__main__":
    sys.exit(main())
