"""Settings: three sources, one schema, one line of complaint."""

from typing import Annotated

import msgspec
import pytest
import yaml
from msgspec import Meta
from outrider_runtime.settings import Section, SettingsError, address, leaves, load, readable


class Kafka(Section, frozen=True):
    bootstrap_servers: Annotated[list[str], Meta(description="Brokers.")] = []
    acks_timeout_seconds: Annotated[float, Meta(gt=0, description="Seconds.")] = 5.0


class Root(Section, frozen=True):
    kafka: Kafka = msgspec.field(default_factory=Kafka)
    addresses: Annotated[dict[str, str], Meta(description="By region.")] = {}
    verbose: Annotated[bool, Meta(description="Talk.")] = False
    retries: Annotated[int, Meta(ge=0, le=10, description="Tries at 100% load.")] = 3


def read(*argv: str, **environ: str) -> Root:
    return load(Root, program="thing", version="1.2.3", argv=argv, environ=environ)


def test_defaults_without_any_source() -> None:
    assert read() == Root()


def test_flag_beats_environment_beats_file(tmp_path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("retries: 1\nkafka: {acksTimeoutSeconds: 1}\nverbose: true\n")
    environ = {
        "OUTRIDER_CONFIG": str(file),
        "OUTRIDER_RETRIES": "2",
        "OUTRIDER_KAFKA_ACKS_TIMEOUT_SECONDS": "2.5",
    }
    got = read("--retries=4", **environ)
    assert (got.retries, got.kafka.acks_timeout_seconds, got.verbose) == (4, 2.5, True)


def test_lists_and_maps_from_text() -> None:
    got = read("--kafka.bootstrap-servers=a:1, b:2", OUTRIDER_ADDRESSES='{"eu": "x:1"}')
    assert got.kafka.bootstrap_servers == ["a:1", "b:2"]
    assert got.addresses == {"eu": "x:1"}


@pytest.mark.parametrize(
    ("argv", "environ", "text", "says"),
    [
        (["--retries=11"], {}, "", 'setting "retries": expected int <= 10'),
        (["--retries=x"], {}, "", 'setting "retries": expected int, got str'),
        ([], {"OUTRIDER_VERBOSE": "maybe"}, "", 'setting "verbose": expected bool'),
        ([], {"OUTRIDER_ADDRESSES": "{"}, "", 'setting "addresses": expected a JSON object'),
        (["--no-such=1"], {}, "", "unrecognized arguments: --no-such=1; see thing --help"),
        ([], {}, "kafka: {bootstrapServer: []}", 'setting "kafka.bootstrapServer": unknown'),
        (
            [],
            {},
            "kafka: {acksTimeoutSeconds: 0}",
            'setting "kafka.acksTimeoutSeconds": expected float > 0',
        ),
        ([], {}, "[1, 2]", "expected a mapping"),
        ([], {}, "a: [", "is not YAML"),
        (["--kafka.acks-timeout-seconds=1"], {}, "kafka: 3", '"kafka" is not a group'),
    ],
)
def test_wrong_settings_are_one_line_that_names_them(tmp_path, argv, environ, text, says) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read("--config", str(file), *argv, **environ)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match="/no/such.yaml: cannot be read: No such file"):
        read("--config=/no/such.yaml")


def test_print_config_prints_what_it_would_read_again(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--print-config", "--retries=7")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["retries"] == 7
    file = tmp_path / "again.yaml"
    file.write_text(text)
    assert read("--config", str(file)).retries == 7


def test_help_names_every_setting(capsys) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    for leaf in leaves(Root):
        assert f"--{leaf.flag}" in text
        assert leaf.description in text
        assert leaf.variable in text.replace(" ", "")


def test_names_of_variables_do_not_collide() -> None:
    variables = [leaf.variable for leaf in leaves(Root)]
    assert len(variables) == len(set(variables))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":80", ("", 80)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("[::1]:443", ("::1", 443)),
        ("host.example:65535", ("host.example", 65535)),
    ],
)
def test_address(text, expected) -> None:
    assert address(text, setting="x") == expected


@pytest.mark.parametrize("text", ["", "80", "host", "host:", "host:99999", "::1:80", "a b:1"])
def test_bad_address_names_the_setting(text) -> None:
    with pytest.raises(SettingsError, match='setting "ops.address": expected an address'):
        address(text, setting="ops.address")


def test_readable_bounds_and_names(tmp_path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"12345")
    assert readable(str(file), setting="x") == b"12345"
    with pytest.raises(SettingsError, match='setting "x".*larger than 4'):
        readable(str(file), setting="x", limit=4)
    with pytest.raises(SettingsError, match='setting "x".*No such file'):
        readable(str(tmp_path / "none"), setting="x")
