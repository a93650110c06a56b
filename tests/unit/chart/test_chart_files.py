"""The chart's files as files: values and their schema, the examples, the images' definitions."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts" / "outrider"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
#: Values that helm passes down by itself.
OF_HELM = {"global"}


def errors(values: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft7Validator(SCHEMA)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(values)]


def changed(path: str, value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(VALUES))
    *groups, name = path.split(".")
    group = copy
    for part in groups:
        group = group[part]
    group[name] = value
    return copy


def assert_alike(values: dict[str, Any], schema: dict[str, Any], path: str) -> None:
    properties = schema["properties"]
    assert schema["additionalProperties"] is False, path
    assert properties.keys() - OF_HELM == values.keys(), path
    for name, child in properties.items():
        if "properties" in child and values.get(name) is not None:
            inner = values[name]
            # A part of what Kubernetes allows is given by default, such as of resources.
            if name != "resources":
                assert_alike(inner, child, f"{path}.{name}")


def test_the_schema_is_one_and_knows_exactly_the_values() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert_alike(VALUES, SCHEMA, "values")
    assert errors(VALUES) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("server.replica", 2),
        ("replicas", 2),
        ("server.replicas", 0),
        ("server.replicas", "2"),
        ("image.pullPolicy", "Sometimes"),
        ("server.image.digest", "sha256:short"),
        ("server.log.level", "loud"),
        ("agent.hostAccess", "some"),
        ("agent.stateDir", "relative"),
        ("agent.allowedUsers", "nobody"),
        ("agent.allowedUsers", ["a b"]),
        ("agent.allowedUsers", [1000]),
        ("agent.tmpSizeLimit", "much"),
        ("sink.kind", "redis"),
        ("sink.kafka.bootstrapServers", "kafka:9092"),
        ("sink.kafka.bootstrapServers", ["kafka"]),
        ("sink.kafka.format", "json"),
        ("sink.kafka.routes", [{"topic": "x"}]),
        ("sink.kafka.routes", [{"topic": "x", "dataTypes": []}]),
        ("sink.kafka.security.protocol", "SASL_SSL"),
        ("sink.kafka.security.mechanism", "GSSAPI"),
        ("sink.kafka.security.userSecret", "A B"),
        ("sink.file.maxTotalBytes", 1024),
        ("tls.generated.certificateDays", 0),
        ("tls.extraDnsNames", ["https://x"]),
        ("metrics.podMonitor.interval", "often"),
    ],
)
def test_the_schema_refuses(path: str, value: Any) -> None:
    assert errors(changed(path, value)) != []


def test_every_value_is_used() -> None:
    templates = "".join(
        file.read_text() for file in CHART.rglob("templates/**/*") if file.is_file()
    )

    def leaves(group: dict[str, Any], path: str) -> list[str]:
        found = []
        for name, value in group.items():
            inner = f"{path}.{name}"
            if f".Values{inner}" in templates:
                continue
            if isinstance(value, dict) and value:
                found += leaves(value, inner)
            else:
                found.append(inner)
        return found

    # Those of the images are read by a helper that is handed the whole group.
    assert leaves(VALUES, "") == []


def test_chart_and_members_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    versions = {str(chart["version"]), str(chart["appVersion"])}
    for member in ("proto", "runtime", "operator", "agent", "cli"):
        match = re.search(
            r'^version = "(.+)"$', (ROOT / member / "pyproject.toml").read_text(), re.MULTILINE
        )
        assert match is not None
        versions.add(match[1])
    assert len(versions) == 1


def test_examples_are_there_and_say_what_they_do() -> None:
    names = [example.stem for example in EXAMPLES]
    assert {"kernel-version", "ping", "facts", "disk-usage", "canary"} <= set(names)
    for example in EXAMPLES:
        text = example.read_text()
        assert text.startswith("# "), example
        loaded = yaml.safe_load(text)
        assert loaded["apiVersion"] == "outrider.dev/v1alpha1", example
        assert loaded["metadata"]["name"] in example.stem, example


@pytest.mark.parametrize(
    ("image", "member"), [("Dockerfile.server", "operator"), ("Dockerfile.agent", "agent")]
)
def test_an_image_holds_its_members_and_the_locked_libraries(image: str, member: str) -> None:
    text = (ROOT / image).read_text()
    assert text.startswith("# ")
    assert re.search(r"^ARG BASE=python:3\.\d+-slim-bookworm$", text, re.MULTILINE)
    assert f"--require-hashes -r /opt/outrider/{member}/requirements.lock" in text
    for part in ("proto", "runtime", member):
        assert f"COPY {part}/src /opt/outrider/{part}/src" in text
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE)
    for source in copied:
        assert f"!{source}" in ignored, f"{source} is kept out of the build by .dockerignore"
        assert (ROOT / source).exists()
