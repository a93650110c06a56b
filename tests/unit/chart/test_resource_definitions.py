"""The resource definitions as files: bounds, descriptions, and agreement with the code.

What the API server makes of them is tested against a real one, in tests/integration.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml
from outrider_operator.core.model import Phase, TaskPhase, TaskSpec, parse_spec
from outrider_proto import limits

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "crds").glob("*.yaml"))
COPIES = ROOT / "charts" / "outrider" / "files" / "crds"
#: A task that says nothing but what to run has these fields from the definition.
KINDS = {"AgentTask", "AgentTaskSchedule", "AgentTaskReport", "Agent", "AgentConfig"}


class Field(NamedTuple):
    path: str
    schema: dict[str, Any]


def definition(kind: str) -> dict[str, Any]:
    for source in SOURCES:
        loaded: dict[str, Any] = yaml.safe_load(source.read_text())
        if loaded["spec"]["names"]["kind"] == kind:
            return loaded
    raise AssertionError(f"no definition of {kind}")


def root(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = definition(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def walk(schema: dict[str, Any], path: str) -> Iterator[Field]:
    yield Field(path, schema)
    for name, child in schema.get("properties", {}).items():
        if path or name not in ("apiVersion", "kind", "metadata"):
            yield from walk(child, f"{path}.{name}".lstrip("."))
    if "items" in schema:
        yield from walk(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from walk(schema["additionalProperties"], f"{path}{{}}")


def all_fields() -> list[Any]:
    fields = [(kind, field) for kind in sorted(KINDS) for field in walk(root(kind), "")]
    return [pytest.param(kind, field, id=f"{kind}:{field.path}") for kind, field in fields]


def at(kind: str, path: str) -> dict[str, Any]:
    for field in walk(root(kind), ""):
        if field.path == path:
            return field.schema
    raise AssertionError(f"{kind} has no field {path}")


def defaults(schema: dict[str, Any]) -> Any:
    """What the API server fills in where an object says nothing."""
    if schema.get("type") != "object" or "properties" not in schema:
        return schema.get("default")
    made = dict(schema.get("default") or {})
    for name, child in schema["properties"].items():
        if name not in made and "default" in child:
            made[name] = defaults(child)
    return made


def test_the_charts_copies_are_equal() -> None:
    assert [copy.name for copy in sorted(COPIES.glob("*"))] == [source.name for source in SOURCES]
    for source in SOURCES:
        text = (COPIES / source.name).read_text()
        assert text == source.read_text(), "run: make crds"


def test_every_kind_is_defined_and_kept_when_the_chart_goes() -> None:
    found = {}
    for source in SOURCES:
        loaded = yaml.safe_load(source.read_text())
        names = loaded["spec"]["names"]
        found[names["kind"]] = loaded
        assert source.name == f"outrider.dev_{names['plural']}.yaml"
        assert loaded["metadata"]["name"] == f"{names['plural']}.outrider.dev"
        assert names["categories"] == ["outrider"]
        assert loaded["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert set(found) == KINDS
    short = [name for loaded in found.values() for name in loaded["spec"]["names"]["shortNames"]]
    assert len(short) == len(set(short))


@pytest.mark.parametrize(("kind", "field"), all_fields())
def test_every_field_is_bounded(kind: str, field: Field) -> None:
    schema = field.schema
    match schema.get("type"):
        case "string":
            assert "maxLength" in schema or "enum" in schema or schema.get("format") == "date-time"
        case "array":
            assert "maxItems" in schema
            assert "x-kubernetes-list-type" in schema, "server-side apply must know how to merge"
        case "object" if "additionalProperties" in schema:
            assert "maxProperties" in schema
        case "integer":
            # Numbers are harmless, but what people write must make sense.
            given = not field.path.startswith("status") and kind != "AgentTaskReport"
            assert not given or {"minimum", "maximum"} <= schema.keys()


@pytest.mark.parametrize(("kind", "field"), all_fields())
def test_every_field_is_described_with_its_default(kind: str, field: Field) -> None:
    named = not field.path.endswith(("[]", "{}"))
    if not named:
        return
    description = field.schema.get("description", "")
    assert description.endswith("."), f"kubectl explain has nothing to say about {field.path}"
    default = field.schema.get("default")
    # Empty is what everybody takes for the default of a list, a map or a group.
    if default not in (None, {}, [], "") and not isinstance(default, dict):
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        shown = shown.replace("'", '"')
        assert f"Default {shown}." in description


def test_bounds_are_the_limits_of_the_wire() -> None:
    run = "spec.run"
    assert at("AgentTask", f"{run}.command")["maxItems"] == limits.ARGUMENTS
    assert at("AgentTask", f"{run}.command[]")["maxLength"] == limits.ARGUMENT_BYTES
    assert at("AgentTask", f"{run}.script.source")["maxLength"] == limits.SCRIPT_BYTES
    assert at("AgentTask", "spec.user")["maxLength"] == limits.USER_BYTES
    assert at("AgentTask", "spec.env")["maxProperties"] == limits.ENVIRONMENT
    assert at("AgentTask", "spec.timeoutSeconds")["maximum"] == limits.TIMEOUT_SECONDS
    assert at("AgentTask", "spec.output.previewBytes")["maximum"] == limits.PREVIEW_BYTES
    assert at("AgentTask", "spec.output.maxBytes")["maximum"] == limits.OUTPUT_BYTES
    assert at("AgentTaskReport", "nodes[].preview")["maxLength"] == limits.PREVIEW_BYTES
    assert at("AgentTaskReport", "nodes[].message")["maxLength"] == limits.RUN_MESSAGE_BYTES
    assert at("AgentTaskReport", "nodes[].node")["maxLength"] == limits.NODE_NAME_BYTES


def test_phases_are_those_of_the_code() -> None:
    assert at("AgentTask", "status.phase")["enum"] == [phase.value for phase in TaskPhase]
    phases = {phase.value for phase in Phase}
    assert set(at("AgentTask", "status.outcomes[].phase")["enum"]) == phases
    assert set(at("AgentTaskReport", "nodes[].phase")["enum"]) == phases
    counted = {value[0].lower() + value[1:] for value in phases}
    assert at("AgentTask", "status.counts")["properties"].keys() == counted | {"targeted"}


def test_defaults_are_those_of_the_code() -> None:
    filled = defaults(at("AgentTask", "spec"))
    filled["run"] = {"command": ["true"]}
    from_definition = parse_spec(filled)
    from_code = parse_spec({"run": {"command": ["true"]}})
    # Without a definition a task is never deleted; with one it is, after a day.
    assert from_definition.ttl_seconds_after_finished == 86400
    assert msgspec.structs.replace(from_definition, ttl_seconds_after_finished=None) == from_code
    unread = filled.keys() - msgspec.to_builtins(from_definition).keys()
    assert not unread, "the code does not know these fields"
    assert msgspec.json.schema(TaskSpec)  # the model can be described, so it has no open types


def test_every_field_of_an_immutable_spec_has_a_default() -> None:
    spec = at("AgentTask", "spec")
    for name, schema in spec["properties"].items():
        rules = [rule["rule"] for rule in schema.get("x-kubernetes-validations", [])]
        assert name in ("suspend", "cancel") or "self == oldSelf" in rules, name
        # A rule on a field is not asked when the field comes or goes.
        assert name in spec["required"] or "default" in schema, name


def test_mergeable_fields_of_a_config_have_no_default() -> None:
    spec = at("AgentConfig", "spec")
    for name in spec["properties"].keys() - {"selector", "priority", "rollout"}:
        for field in walk(spec["properties"][name], name):
            assert "default" not in field.schema, field.path


def test_rules_say_what_to_change() -> None:
    seen = 0
    for kind in KINDS:
        for field in walk(root(kind), ""):
            for rule in field.schema.get("x-kubernetes-validations", []):
                assert len(rule["message"].split()) >= 4, (kind, field.path, rule)
                seen += 1
    assert seen > 20
