"""Merging AgentConfigs: total, independent of order, and honest about conflicts."""

from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_proto import effective as eff
from outrider_proto import limits
from outrider_proto.merging import Asked, Conflict, merge, quantity, read

SOURCE = {"urls": ["https://example.org/x"], "sha256": "0" * 64}


def plugin(name: str, version: str = "1", **more: Any) -> dict[str, Any]:
    return {"name": name, "version": version, "source": SOURCE, **more}


specs = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(0, 3),
        "collectors": st.fixed_dictionaries(
            {},
            optional={
                "host": st.fixed_dictionaries(
                    {},
                    optional={
                        "enabled": st.booleans(),
                        "intervalSeconds": st.integers(1, 3),
                    },
                )
            },
        ),
        "plugins": st.lists(
            st.builds(plugin, st.sampled_from("abc"), st.sampled_from("12")),
            max_size=3,
            unique_by=lambda item: item["name"],
        ),
        "listeners": st.just({"framedTcp": {"address": "127.0.0.1:1"}}),
        "datasets": st.lists(st.sampled_from("xy"), unique=True).map(
            lambda names: [{"name": name} for name in names]
        ),
        "agent": st.fixed_dictionaries(
            {}, optional={"logLevel": st.sampled_from(["debug", "error"])}
        ),
    },
)
sets = st.lists(specs, max_size=6).map(
    lambda found: [read(f"config-{number}", spec) for number, spec in enumerate(found)]
)


@given(sets, st.randoms(use_true_random=False))
def test_order_does_not_count(asked: list[Asked], random: Any) -> None:
    other = list(asked)
    random.shuffle(other)
    assert merge(asked) == merge(other)


@given(sets)
def test_every_value_comes_from_the_first_that_asks(asked: list[Asked]) -> None:
    merged = merge(asked)
    ordered = sorted(asked, key=lambda one: (-one.priority, one.name))
    assert set(merged.origins) == {path for one in asked for path in one.values}
    again = read("merged", msgspec.to_builtins(merged.effective)).values
    for path, origin in merged.origins.items():
        first = next(one for one in ordered if path in one.values)
        assert origin == first.name
        assert again[path] == first.values[path]
    assert set(again) == set(merged.origins)


@given(sets)
def test_conflicts_are_those_of_equal_priority(asked: list[Asked]) -> None:
    merged = merge(asked)
    expected = []
    for path, origin in merged.origins.items():
        heard = next(one for one in asked if one.name == origin)
        unheard = sorted(
            one.name
            for one in asked
            if one.priority == heard.priority
            and path in one.values
            and one.values[path] != heard.values[path]
        )
        if unheard:
            expected.append(Conflict(path, origin, tuple(unheard)))
    assert list(merged.conflicts) == sorted(expected, key=lambda c: c.path)


@given(sets)
def test_what_is_merged_can_be_packed(asked: list[Asked]) -> None:
    effective = merge(asked).effective
    assert eff.unpack(eff.pack(effective)) == effective


def test_a_field_is_merged_alone() -> None:
    low = read("low", {"priority": 1, "collectors": {"host": {"enabled": True}}})
    high = read("high", {"priority": 2, "collectors": {"host": {"intervalSeconds": 5}}})
    host = merge([low, high]).effective.collectors.host
    assert (host.enabled, host.interval_seconds) == (True, 5)


def test_a_plugin_is_replaced_whole() -> None:
    low = read("low", {"priority": 1, "plugins": [plugin("fim", args=["-v"])]})
    high = read("high", {"priority": 2, "plugins": [plugin("fim", "2")]})
    (only,) = merge([low, high]).effective.plugins
    assert (only.version, only.args) == ("2", ())


def test_no_priority_is_a_hundred() -> None:
    assert read("a", {}).priority == 100
    assert read("a", {"priority": 0}).priority == 0


def test_items_beyond_the_bound_are_left_out_and_named() -> None:
    many = [plugin(f"p{number:03}") for number in range(limits.PLUGINS)]
    first = read("first", {"priority": 2, "plugins": many})
    second = read("second", {"priority": 1, "plugins": [plugin("a"), plugin("b")]})
    merged = merge([first, second])
    assert len(merged.effective.plugins) == limits.PLUGINS
    assert list(merged.left_out) == [("plugins", "a"), ("plugins", "b")]
    assert not {("plugins", "a"), ("plugins", "b")} & set(merged.origins)


def test_quantities_become_numbers() -> None:
    body = plugin("fim", resources={"cpu": "100m", "memory": "64Mi"})
    (only,) = merge([read("a", {"plugins": [body]})]).effective.plugins
    assert only.resources == eff.Resources(cpu_millis=100, memory_bytes=64 * 2**20)


def test_quantities_of_the_agent_become_numbers() -> None:
    asked = {"cpu": "200m", "memory": "128Mi", "maxBytesPerSecond": "1Mi"}
    made = merge([read("a", {"agent": asked})]).effective.agent
    assert made == eff.Agent(cpu_millis=200, memory_bytes=128 * 2**20, max_bytes_per_second=2**20)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        (1, 1),
        ("1.5", "1.5"),
        ("250m", "0.25"),
        ("1k", 1000),
        ("1Ki", 1024),
        ("1e3", 1000),
    ],
)
def test_quantity(text: object, value: Any) -> None:
    assert quantity(text, "x") == Decimal(str(value))


@pytest.mark.parametrize(
    "text",
    ["", "m", "1x", "1e", "--1", "1e999999", "9" * 33, "NaN", "Infinity", " 1", "1_0", "1e3m", 0.5],
)
def test_what_is_no_quantity(text: object) -> None:
    with pytest.raises(eff.EffectiveError, match="is no quantity"):
        quantity(text, "x")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"plugins": [plugin("../x")]}, "plugins"),
        ({"plugins": [{"name": "a"}]}, "version"),
        ({"plugins": [plugin("a", resources={"cpu": "x"})]}, "resources.cpu"),
        ({"plugins": [plugin("a", resources={"gpu": "1"})]}, "gpu"),
        ({"plugins": [plugin("a", resources={"memory": "1"})]}, "memoryBytes"),
        ({"agent": {"cpu": "9m"}}, "cpuMillis"),
        ({"agent": {"cpuMillis": 100}}, "no field 'cpuMillis'"),
        ({"agent": {"memory": "x"}}, "spec.agent.memory"),
        ({"collectors": {"host": {"intervalSeconds": 0}}}, "intervalSeconds"),
        ({"collectors": {"nobody": {}}}, "nobody"),
    ],
)
def test_what_no_agent_could_use_is_refused(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(eff.EffectiveError, match=words):
        read("a", spec)
