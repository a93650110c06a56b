"""The agent's settings: defaults, and what is refused with the name of the setting."""

from pathlib import Path

import pytest
from outrider_agent.settings import AgentSettings, check
from outrider_runtime.settings import SettingsError, leaves, load


def loaded(tmp_path: Path, *argv: str, environ: dict[str, str] | None = None) -> AgentSettings:
    (tmp_path / "ca.crt").write_text("-----BEGIN CERTIFICATE-----\n")
    (tmp_path / "token").write_text("t")
    given = [f"--server.ca-file={tmp_path}/ca.crt", f"--server.token-file={tmp_path}/token"]
    settings = load(
        AgentSettings,
        program="outrider-agent",
        version="1",
        argv=[*given, *argv],
        environ={"OUTRIDER_NODE_NAME": "node-a", **(environ or {})},
    )
    check(settings)
    return settings


def test_defaults(tmp_path: Path) -> None:
    found = loaded(tmp_path)
    assert found.node.name == "node-a"
    assert found.heartbeat.interval_seconds == 60
    assert found.collectors.host.interval_seconds == 15
    assert found.server.dial_timeout_seconds == 3
    assert found.state.directory == "/var/lib/outrider"
    assert found.state.max_outbox_bytes == 256 * 1024 * 1024
    assert found.tasks.max_concurrent == 16
    # Nothing that takes the agent away, no other user, not the host.
    kinds = ("command", "script", "plugin", "builtin/Ping", "builtin/Facts")
    assert found.tasks.allowed_kinds == kinds
    assert found.tasks.allowed_executables == ("/**",)
    assert found.tasks.allowed_users == ()
    assert found.tasks.allow_host is False
    assert found.ops.address == ":8081"


def test_every_setting_says_what_it_means() -> None:
    assert [leaf.name for leaf in leaves(AgentSettings) if not leaf.description.endswith(".")] == []


def test_lists_and_tables_from_flags(tmp_path: Path) -> None:
    found = loaded(
        tmp_path,
        "--tasks.allowed-kinds=command,builtin/Ping",
        '--server.private={"eu": "10.0.0.1:8443"}',
        "--server.region=eu",
        "--server.target=",
    )
    assert found.tasks.allowed_kinds == ("command", "builtin/Ping")
    assert found.server.private == {"eu": "10.0.0.1:8443"}


@pytest.mark.parametrize(
    ("argv", "setting"),
    [
        (["--node.name="], "node.name"),
        (["--server.target=nonsense"], "server.target"),
        (["--server.target=srv:outrider"], "server.target"),
        (["--server.target="], "server.target"),
        (['--server.public={"eu": ":1"}'], "server.public.eu"),
        (["--server.ca-file=/no/such/file"], "server.caFile"),
        (["--server.token-file=/no/such/file"], "server.tokenFile"),
        (["--tasks.allowed-kinds=plugins"], "tasks.allowedKinds"),
        (["--tasks.allowed-executables=/usr/bin/*,bin/ls"], "tasks.allowedExecutables"),
        (["--tasks.allowed-executables=/**/ls"], "tasks.allowedExecutables"),
        (["--tasks.allowed-users=nobody,-1"], "tasks.allowedUsers"),
        (["--tasks.allow-host=maybe"], "tasks.allowHost"),
        (["--tasks.max-concurrent=0"], "tasks.maxConcurrent"),
        (["--batch.codec=gzip"], "batch.codec"),
        (["--state.max-outbox-bytes=1"], "state.maxOutboxBytes"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, argv: list[str], setting: str) -> None:
    with pytest.raises(SettingsError) as caught:
        loaded(tmp_path, *argv)
    assert f'"{setting}"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ca_file_must_hold_certificates(tmp_path: Path) -> None:
    (tmp_path / "rubbish").write_text("rubbish")
    with pytest.raises(SettingsError, match=r"server\.caFile.*PEM"):
        loaded(tmp_path, f"--server.ca-file={tmp_path}/rubbish")


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "agent.yaml").write_text("tasks: {maxConcurent: 3}\n")
    with pytest.raises(SettingsError, match="maxConcurent"):
        loaded(tmp_path, f"--config={tmp_path}/agent.yaml")
