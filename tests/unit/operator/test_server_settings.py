"""Settings of the server that cannot be right: told before anything is begun."""

import asyncio
import time

import pytest
from outrider_operator.main import Server, lease_namespace, main
from outrider_operator.settings import LeaderSettings, ServerSettings, check_lease_times
from outrider_runtime.life import Stop
from outrider_runtime.settings import SettingsError, load


def settings(*argv: str) -> ServerSettings:
    return load(ServerSettings, program="server", version="0", argv=argv, environ={})


@pytest.mark.parametrize(
    ("duration", "deadline", "retry", "names"),
    [
        (10, 10, 2, "leader.leaseDurationSeconds"),
        (5, 10, 2, "leader.leaseDurationSeconds"),
        (15, 2, 2, "leader.renewDeadlineSeconds"),
    ],
)
def test_contradicting_times_are_refused(duration, deadline, retry, names) -> None:
    wrong = LeaderSettings(
        lease_duration_seconds=duration,
        renew_deadline_seconds=deadline,
        retry_period_seconds=retry,
    )
    with pytest.raises(SettingsError, match=names):
        check_lease_times(wrong)


def test_the_defaults_are_right() -> None:
    check_lease_times(LeaderSettings())


def test_the_namespace_of_the_lease(monkeypatch) -> None:
    monkeypatch.delenv("POD_NAMESPACE", raising=False)
    with pytest.raises(SettingsError, match=r"leader\.leaseNamespace"):
        lease_namespace(settings())
    monkeypatch.setenv("POD_NAMESPACE", "from-pod")
    assert lease_namespace(settings()) == "from-pod"
    assert lease_namespace(settings("--leader.lease-namespace", "told")) == "told"


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (("--fleet.ca-file", "/no/such/file"), "fleet.caFile"),
        (("--fleet.token-file", "/no/such/file"), "fleet.tokenFile"),
        (("--fleet.gateways", "nonsense"), "fleet.gateways"),
        (("--leader.renew-deadline-seconds", "20"), "leader.leaseDurationSeconds"),
        (("--gateway.tls.cert-file", "/no/such/file"), "gateway.tls.certFile"),
        (("--ops.address", "nowhere"), "ops.address"),
    ],
)
async def test_a_wrong_setting_ends_the_start_at_once(tmp_path, argv, names) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    good = ["--fleet.ca-file", str(file), "--fleet.token-file", str(file)]
    good += ["--leader.lease-namespace", "n", "--ops.address", "127.0.0.1:0"]
    began = time.monotonic()
    with pytest.raises((SettingsError, ExceptionGroup)) as caught:
        async with asyncio.timeout(10):
            await Server(settings(*good, *argv), "0").run(Stop())
    assert names in repr(caught.value)
    assert time.monotonic() - began < 8  # with the first import of grpc


def test_an_unknown_setting_is_exit_code_2(capsys) -> None:
    assert main(["--sink.kind", "stone-tablets"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "sink.kind" in line
