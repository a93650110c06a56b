"""What the API server accepts of AgentConfigs the server can read, and bad ones both refuse."""

import uuid
from typing import Any

import pytest
from cluster.controlplane import ControlPlane, RequestError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outrider_proto.effective import EffectiveError, pack, unpack
from outrider_proto.merging import merge, read

CONFIGS = "/apis/outrider.dev/v1alpha1/agentconfigs"
DRY = "?fieldValidation=Strict&dryRun=All"
SOURCE: dict[str, Any] = {"urls": ["https://example.org/fim"], "sha256": "0" * 64}


def plugin(**more: Any) -> dict[str, Any]:
    return {"name": "fim", "version": "1.2.0", "source": SOURCE, **more}


def body(spec: dict[str, Any], name: str = "") -> dict[str, Any]:
    return {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentConfig",
        "metadata": {"name": name or f"config-{uuid.uuid4().hex[:12]}"},
        "spec": spec,
    }


words = st.text(max_size=6)
names = st.from_regex(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,5}[A-Za-z0-9])?", fullmatch=True)
numbers = st.sampled_from(
    [
        *(0, 1, 2, 1000, 1001, "0", "1m", "0.5m", "999u", "10m", "100m", "1", "1000", "1001"),
        *("1Ki", "1Mi", "1048575", "32Mi", "33554431", "64Mi", "1E", "16Ti", "17Ti", "-1", "+1"),
        *(".5", "5.", "1e3", "1E3", "1e3m", " 1", "1_0", "", "x", "NaN", "1n", "1K", 2**40),
    ]
)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


collectors = some(enabled=st.booleans(), intervalSeconds=st.sampled_from([0, 1, 86400, 86401]))
sources = st.builds(
    lambda more: {**SOURCE, **more},
    some(
        format=st.sampled_from(["plain", "tar.gz", "zip"]),
        executable=words,
        signature=words,
        urls=st.sampled_from([["https://a/b"], ["http://a/b"], [], ["https://a b/c"]]),
        sha256=st.sampled_from(["0" * 64, "0" * 63, "G" * 64]),
    ),
)
plugins = st.builds(
    lambda source, more: {**plugin(source=source), **more},
    sources,
    some(
        name=names,
        version=words,
        args=st.lists(words, max_size=2),
        env=st.dictionaries(words, words, max_size=2),
        detail=words,
        user=words,
        resources=some(cpu=numbers, memory=numbers),
    ),
)
specs = some(
    collectors=some(host=collectors, inventory=collectors, heartbeat=collectors),
    plugins=st.lists(plugins, max_size=2, unique_by=lambda item: item["name"]),
    listeners=some(framedTcp=st.just({"address": "127.0.0.1:9876"})),
    datasets=st.lists(
        st.fixed_dictionaries({"name": names}), max_size=2, unique_by=lambda item: item["name"]
    ),
    agent=some(
        logLevel=st.sampled_from(["debug", "loud"]),
        cpu=numbers,
        memory=numbers,
        maxBytesPerSecond=numbers,
    ),
    priority=st.sampled_from([0, 1_000_000]),
)


def accepted(plane: ControlPlane, spec: dict[str, Any]) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = plane.request("POST", CONFIGS + DRY, body(spec))["spec"]
    except RequestError:
        return None
    return found


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(spec=specs)
def test_what_the_api_server_accepts_can_be_read_merged_and_opened(
    control_plane: ControlPlane, spec: dict[str, Any]
) -> None:
    found = accepted(control_plane, spec)
    if found is not None:
        unpack(pack(merge([read("a", found)]).effective))


EVERYTHING: dict[str, Any] = {
    "collectors": {
        "host": {"enabled": True, "intervalSeconds": 15},
        "inventory": {"enabled": False},
        "heartbeat": {"intervalSeconds": 60},
    },
    "plugins": [
        plugin(
            source={**SOURCE, "signature": "AA==", "format": "tar.gz", "executable": "bin/fim"},
            args=["-v"],
            env={"A": "b"},
            detail="{}",
            user="nobody",
            resources={"cpu": "100m", "memory": "64Mi"},
        )
    ],
    "listeners": {"framedTcp": {"address": "[::1]:9876"}},
    "datasets": [{"name": "blocklist"}],
    "agent": {"logLevel": "debug", "maxBytesPerSecond": "1Mi", "cpu": 1, "memory": "128Mi"},
}


def test_all_there_is_can_be_asked_for(control_plane: ControlPlane) -> None:
    found = accepted(control_plane, EVERYTHING)
    assert found is not None
    values = read("a", found).values
    assert values["agent", "cpuMillis"] == 1000
    assert values["collectors", "heartbeat", "intervalSeconds"] == 60
    assert values["plugins", "fim"]["source"]["executable"] == "bin/fim"


@pytest.mark.parametrize(
    "spec",
    [
        {"collectors": {"hosts": {}}},
        {"collectors": {"inventory": {"intervalSeconds": 0}}},
        {"collectors": {"heartbeat": {"intervalSeconds": 86401}}},
        {"collectors": {"host": {"enabled": "yes"}}},
        {"plugins": [{"name": "a"}]},
        {"plugins": [plugin(name="../x")]},
        {"plugins": [plugin(name="n" * 64)]},
        {"plugins": [plugin(version="")]},
        {"plugins": [plugin(version="a\x00b")]},
        {"plugins": [plugin(source={**SOURCE, "urls": ["http://x/y"]})]},
        {"plugins": [plugin(source={**SOURCE, "urls": []})]},
        {"plugins": [plugin(source={**SOURCE, "sha256": "A" * 64})]},
        {"plugins": [plugin(source={**SOURCE, "format": "zip"})]},
        {"plugins": [plugin(source={**SOURCE, "executable": "x" * 1025})]},
        {"plugins": [plugin(args=["\x00"])]},
        {"plugins": [plugin(env={"A-B": ""})]},
        {"plugins": [plugin(detail="x" * 65537)]},
        {"plugins": [plugin(user="u" * 65)]},
        {"plugins": [plugin(resources={"cpu": "much"})]},
        {"plugins": [plugin(resources={"cpu": "0.5m"})]},
        {"plugins": [plugin(resources={"cpu": 1001})]},
        {"plugins": [plugin(resources={"memory": "1023Ki"})]},
        {"plugins": [plugin(resources={"gpu": 1})]},
        {"listeners": {"framedTcp": {}}},
        {"datasets": [{"name": "a/b"}]},
        {"agent": {"logLevel": "loud"}},
        {"agent": {"cpu": "9m"}},
        {"agent": {"memory": "31Mi"}},
        {"agent": {"memory": "17Ti"}},
        {"agent": {"maxBytesPerSecond": -1}},
        {"agent": {"maxBytesPerSecond": "2Ti"}},
        {"agent": {"cpuMillis": 100}},
    ],
)
def test_what_no_agent_could_use_both_refuse(
    control_plane: ControlPlane, spec: dict[str, Any]
) -> None:
    assert accepted(control_plane, spec) is None
    with pytest.raises(EffectiveError):
        read("a", spec)


def test_a_name_that_no_label_can_carry_is_refused(control_plane: ControlPlane) -> None:
    with pytest.raises(RequestError, match="at most 63 characters"):
        control_plane.request("POST", CONFIGS + DRY, body({}, "n" * 64))
