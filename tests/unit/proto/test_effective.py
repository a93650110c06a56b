"""The shape and the hash of an agent's configuration."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_proto import effective as eff
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import EffectiveConfig

SOURCE = eff.Source(urls=("https://example.org/fim",), sha256="0" * 64)
PLUGIN = eff.Plugin(name="fim", version="1", source=SOURCE)

collectors = st.builds(
    eff.Collector,
    enabled=st.none() | st.booleans(),
    interval_seconds=st.none() | st.integers(1, 86_400),
)
plugins = st.lists(
    st.builds(
        eff.Plugin,
        name=st.from_regex(r"[a-z]{1,8}", fullmatch=True),
        version=st.sampled_from(["1", "2"]),
        source=st.just(SOURCE),
        env=st.dictionaries(
            st.from_regex(r"[A-Z_]{1,5}", fullmatch=True), st.just("x"), max_size=4
        ),
        detail=st.text(
            st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20
        ),
    ),
    max_size=4,
    unique_by=lambda plugin: plugin.name,
)
effectives = st.builds(
    eff.Effective,
    collectors=st.builds(eff.Collectors, host=collectors, inventory=collectors),
    plugins=plugins.map(tuple),
    agent=st.builds(eff.Agent, log_level=st.sampled_from([None, "debug", "error"])),
)


def packed(content: bytes) -> EffectiveConfig:
    return EffectiveConfig(hash=hashlib.sha256(content).hexdigest(), content=content)


@given(effectives)
def test_what_is_packed_comes_out_again(config: eff.Effective) -> None:
    assert eff.unpack(eff.pack(config)) == config


@given(effectives, effectives)
def test_hashes_are_equal_only_for_equals(one: eff.Effective, other: eff.Effective) -> None:
    assert (eff.pack(one).hash == eff.pack(other).hash) == (one == other)


def test_order_of_names_does_not_count() -> None:
    one = eff.Plugin(name="a", version="1", source=SOURCE, env={"A": "1", "B": "2"})
    other = eff.Plugin(name="a", version="1", source=SOURCE, env={"B": "2", "A": "1"})
    first, second = (eff.pack(eff.Effective(plugins=(plugin,))) for plugin in (one, other))
    assert first == second


def test_nothing_asked_for_is_an_empty_object() -> None:
    assert eff.pack(eff.Effective()).content == b"{}"
    assert b"resources" not in eff.pack(eff.Effective(plugins=(PLUGIN,))).content


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EffectiveConfig(hash="0" * 64, content=b"{}"), "hash does not match"),
        (packed(b"[]"), "Expected `object`"),
        (packed(b"\xff"), "JSON is malformed"),
        (packed(b'{"surprise":1}'), "surprise"),
        (packed(b'{"collectors":{"host":{"intervalSeconds":0}}}'), "collectors.host"),
        (packed(b'{"plugins":[{"name":"../x","version":"1"}]}'), "plugins"),
        (packed(b" " * (limits.CONFIG_BYTES + 1)), "at most"),
    ],
)
def test_what_is_no_configuration_is_refused(config: EffectiveConfig, words: str) -> None:
    with pytest.raises(eff.EffectiveError, match=words):
        eff.unpack(config)


def test_what_no_environment_takes_is_refused() -> None:
    plugin = eff.Plugin(name="fim", version="1", source=SOURCE, detail="a\0b")
    with pytest.raises(eff.EffectiveError, match="detail"):
        eff.unpack(eff.pack(eff.Effective(plugins=(plugin,))))


def test_a_name_twice_is_refused() -> None:
    both = eff.Effective(plugins=(PLUGIN, PLUGIN))
    with pytest.raises(eff.EffectiveError, match="'fim' is named twice"):
        eff.unpack(eff.pack(both))


def test_too_much_is_not_packed() -> None:
    env = {f"V{n}": "x" * 32_768 for n in range(80)}
    big = eff.Effective(plugins=(eff.Plugin(name="a", version="1", source=SOURCE, env=env),))
    with pytest.raises(eff.EffectiveError, match="at most"):
        eff.pack(big)
