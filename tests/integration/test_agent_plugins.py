"""The agent as a process with a plug-in in C: configured, asked, upgraded, killed, offline."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from fakes.agent_process import agent_in, start_agent
from fakes.certificates import Authority
from fakes.gateway_server import FakeGateway, serving
from fakes.package_server import PackageServer, package_server
from fakes.plugin_bench import NUMBERED, numbered, wire_plugin
from outrider_agent.tasks import processes
from outrider_proto import records
from outrider_proto.effective import Effective, Plugin, Source
from outrider_proto.v1 import agent_pb2 as pb

#: What plug-ins may cost an agent besides its records; the libraries that fetch and check their
#: packages alone are twice that.
GROWTH_BYTES = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def server_of_packages(tmp_path: Path) -> Iterator[PackageServer]:
    with package_server(tmp_path) as found:
        found.files["/wire"] = wire_plugin()
        yield found


def wanted(server: PackageServer, detail: str, version: str = "1", **source: str) -> Effective:
    sha256 = hashlib.sha256(wire_plugin()).hexdigest()
    made = Source(urls=(server.url("/wire"),), **{"sha256": sha256, **source})  # type: ignore[arg-type] # of the test
    return Effective(plugins=(Plugin(name="wire", version=version, source=made, detail=detail),))


def ask(uid: str, name: str = "wire", data_type: int = 5100) -> pb.Command:
    run = pb.RunCommand(
        id=pb.RunId(task_uid=uid, attempt=1),
        plugin=pb.PluginTask(name=name, data_type=data_type, data="what?"),
        timeout_seconds=60,
        preview_bytes=1000,
        max_output_bytes=1 << 20,
    )
    return pb.Command(runs=[run])


def plugins_of(pid: int) -> list[int]:
    """Living processes of plug-ins of an agent, direct or not."""
    found = []
    for process in processes.descendants(processes.scan(), pid):
        mark = processes.mark_of(process)
        if mark is not None and mark.startswith("plugin/"):
            found.append(process)
    return found


def numbers(gateway: FakeGateway) -> list[int]:
    return numbered(gateway.records(NUMBERED))


def reached(gateway: FakeGateway, number: int) -> bool:
    return max(numbers(gateway)) > number


def flags(server: PackageServer) -> tuple[str, ...]:
    return (f"--plugins.ca-file={server.ca_file}", "--plugins.healthy-seconds=0.5")


async def test_a_plugin_is_configured_asked_upgraded_and_removed(
    tmp_path: Path, authority: Authority, server_of_packages: PackageServer
) -> None:
    packages = server_of_packages
    async with (
        serving(authority) as server,
        agent_in(tmp_path, server.address, authority, *flags(packages)) as agent,
    ):
        gateway = server.gateway
        stream = await gateway.stream()
        stream.send(ask("unknown"))
        state = await gateway.final("unknown")
        before = psutil.Process(agent.process.pid).memory_info().rss
        assert (state.phase, state.reason) == (pb.RUN_PHASE_FAILED, "UnknownPlugin")

        wanted_hash = stream.configure(wanted(packages, "emit 3000"))
        await gateway.configured(stream, wanted_hash)
        reports = stream.config_reports
        await gateway.until(lambda: reports[-1].plugins and reports[-1].plugins[0].healthy)
        assert reports[-1].plugins[0].phase == pb.PLUGIN_PHASE_RUNNING
        await gateway.until(lambda: len(numbers(gateway)) >= 3000)
        assert numbers(gateway) == list(range(3000))
        stream.send(ask("asked"))
        state = await gateway.final("asked")
        assert (state.phase, json.loads(state.preview)) == (
            pb.RUN_PHASE_SUCCEEDED,
            {"data": "what?"},
        )
        await gateway.until(lambda: gateway.records(records.TASK_OUTPUT))
        _, body = await agent.get("/metrics")
        assert 'outrider_agent_plugin_healthy{plugin="wire"} 1.0' in body
        grown = psutil.Process(agent.process.pid).memory_info().rss - before
        assert grown < GROWTH_BYTES

        # A bad one changes nothing.
        bad = stream.configure(wanted(packages, "emit 0", sha256="0" * 64))
        report = await gateway.configured(stream, bad, pb.CONFIG_PHASE_FAILED)
        assert "plug-in wire" in report.message
        assert "sha256" in report.message
        assert report.hash == wanted_hash
        pid = plugins_of(agent.process.pid)[0]
        assert psutil.pid_exists(pid)

        # From one version to the next while it writes without end.
        for version in (1, 2, 3):
            first = version * 10_000_000
            upgraded = stream.configure(wanted(packages, f"stream {first}", str(version)))
            await gateway.configured(stream, upgraded)
            await gateway.until(partial(reached, gateway, first + 1000))
        await gateway.configured(stream, stream.configure(Effective()))
        assert plugins_of(agent.process.pid) == []
        await gateway.until(lambda: not stream.config_reports[-1].plugins)
        assert await agent.terminate() == 0
        found = numbers(gateway)
        for version in (1, 2, 3):
            first = version * 10_000_000
            mine = sorted(n for n in found if first <= n < first + 10_000_000)
            assert mine == list(range(first, first + len(mine)))


async def test_a_killed_agent_starts_anew_from_its_disk_and_interrupts_the_task(
    tmp_path: Path, authority: Authority, server_of_packages: PackageServer
) -> None:
    packages = server_of_packages
    async with serving(authority) as server:
        gateway = server.gateway
        agent = await start_agent(tmp_path, server.address, authority, *flags(packages))
        stream = await gateway.stream()
        wanted_hash = stream.configure(wanted(packages, "emit 10"))
        await gateway.configured(stream, wanted_hash)
        await gateway.until(lambda: len(numbers(gateway)) == 10)
        stream.send(ask("open", data_type=14))  # it takes it, and never answers
        key = ("open", 1)
        await gateway.until(
            lambda: key in gateway.states and gateway.states[key].phase == pb.RUN_PHASE_RUNNING
        )
        left = plugins_of(agent.process.pid)
        assert len(left) == 1
        await agent.kill()
        packages.files.clear()  # nor is the package to be had any more
    async with (
        serving(authority) as server,
        agent_in(tmp_path, server.address, authority, *flags(packages)) as agent,
    ):
        gateway = server.gateway
        state = await gateway.final("open")
        assert (state.phase, state.reason) == (pb.RUN_PHASE_INTERRUPTED, "AgentRestarted")
        stream = await gateway.stream()
        reports = stream.config_reports
        await gateway.until(
            lambda: reports and reports[-1].plugins and reports[-1].plugins[0].healthy
        )
        now = plugins_of(agent.process.pid)
        assert len(now) == 1
        assert not set(left) & {p.pid for p in processes.scan() if not p.zombie}
        assert await agent.terminate() == 0
        assert not set(now) & {p.pid for p in processes.scan() if not p.zombie}
