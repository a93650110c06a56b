"""The real parts that a configuration changes: only what is concerned changes, and goes back."""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes.agent_parts import ListSink, value
from outrider_agent.collectors.ownuse import PARTS, OwnUse, part_of
from outrider_agent.collectors.schedule import Pace
from outrider_agent.config.limits import LEAF, OwnLimits
from outrider_agent.configuring import AgentPart, LimitsPart, ListenersPart, PluginsPart
from outrider_agent.core.config import ConfigError
from outrider_agent.core.frames import HEARTBEAT, Packet, frame
from outrider_agent.core.plugins import PluginError
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings import AgentSettings
from outrider_agent.settings_config import FramedTcpSettings, ListenersSettings
from outrider_proto import effective
from outrider_proto.effective import Agent, Effective, FramedTcp, Listeners, Plugin, Source
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime import logs
from prometheus_client import CollectorRegistry

MIB = 1024 * 1024


def listening_on(address: str) -> Effective:
    return Effective(listeners=Listeners(framed_tcp=FramedTcp(address=address)))


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


async def talk(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(frame(Packet(HEARTBEAT, b"")))
    assert await reader.readline() == b"heartBeat\n"
    return reader, writer


def listens(port: int) -> bool:
    with socket.socket() as made:
        return made.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def part() -> ListenersPart:
    settings = AgentSettings()
    return ListenersPart(settings, ListSink(), AgentMetrics(CollectorRegistry()))


async def test_a_listener_moves_once_all_is_in_force(part: ListenersPart) -> None:
    first, second = free_port(), free_port()
    change = await part.prepare(listening_on(f"127.0.0.1:{first}"))
    await change.switch()
    await change.finish()
    _, writer = await talk(first)
    change = await part.prepare(listening_on(f"127.0.0.1:{second}"))
    await change.switch()
    for port in (first, second):  # it could still go back
        (await talk(port))[1].close()
    await change.finish()
    assert (listens(first), listens(second)) == (False, True)
    writer.close()
    change = await part.prepare(Effective())
    await change.switch()
    await change.finish()
    assert not listens(second)
    assert await part.check() == []


async def test_a_listener_that_cannot_stay_goes_back(part: ListenersPart) -> None:
    first, second = free_port(), free_port()
    change = await part.prepare(listening_on(f"127.0.0.1:{first}"))
    await change.switch()
    await change.finish()
    reader, writer = await talk(first)
    for step in ("undo", "drop"):
        change = await part.prepare(listening_on(f"127.0.0.1:{second}"))
        if step == "undo":
            await change.switch()
        await getattr(change, step)()
        assert (listens(first), listens(second)) == (True, False)
        assert part.address == f"127.0.0.1:{first}"
    # Its connection was not touched by any of that, and one that stays is not begun anew.
    change = await part.prepare(listening_on(f"127.0.0.1:{first}"))
    await change.switch()
    await change.finish()
    writer.write(frame(Packet(HEARTBEAT, b"")))
    assert await reader.readline() == b"heartBeat\n"
    writer.close()
    await part.close()
    assert not listens(first)


async def test_the_same_port_may_be_had_on_more_addresses() -> None:
    settings = AgentSettings(
        listeners=ListenersSettings(framed_tcp=FramedTcpSettings(allow_remote=True))
    )
    part = ListenersPart(settings, ListSink(), AgentMetrics(CollectorRegistry()))
    port = free_port()
    for address in (f"127.0.0.1:{port}", f"0.0.0.0:{port}", f"127.0.0.1:{port}"):
        change = await part.prepare(listening_on(address))
        await change.switch()
        await change.finish()
        (await talk(port))[1].close()
    await part.close()


async def test_an_address_in_use_or_not_allowed_touches_nothing(part: ListenersPart) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for address in (f"127.0.0.1:{taken.getsockname()[1]}", "0.0.0.0:0"):
            with pytest.raises(ConfigError):
                await part.prepare(listening_on(address))
    assert part.listener is None


async def test_a_listener_that_stopped_is_told_and_put_right(part: ListenersPart) -> None:
    port = free_port()
    change = await part.prepare(listening_on(f"127.0.0.1:{port}"))
    await change.switch()
    await change.finish()
    assert part.listener is not None
    await part.listener.close()
    [text] = await part.check()
    assert "was put right" in text
    (await talk(port))[1].close()
    await part.listener.close()
    with socket.create_server(("127.0.0.1", port)):
        [text] = await part.check()
        assert "in use" in text
    assert "put right" in (await part.check())[0]
    await part.close()


class FakeUplink:
    def __init__(self) -> None:
        self.rates: list[int] = []

    def set_max_bytes_per_second(self, rate: int) -> None:
        self.rates.append(rate)


@pytest.fixture
def root_level() -> Iterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


async def test_level_and_bandwidth_fall_back_to_the_settings(root_level: None) -> None:
    uplink = FakeUplink()
    part = AgentPart(AgentSettings(), uplink)  # type: ignore[arg-type] # what it uses of it
    wanted = Effective(agent=Agent(log_level="error", max_bytes_per_second=0))
    change = await part.prepare(wanted)
    assert uplink.rates == []
    await change.switch()
    assert (uplink.rates, logging.getLogger().level) == ([0], logging.ERROR)
    await change.undo()
    assert (uplink.rates, logging.getLogger().level) == ([0, 0], logging.INFO)
    logs.set_level("debug")
    assert logging.getLogger().level == logging.DEBUG


class FakePlugins:
    def __init__(self) -> None:
        self.runs: tuple[str, ...] = ()

    async def prepare(self, wanted: Sequence[Plugin]) -> Any:
        for plugin in wanted:
            if plugin.version == "bad":
                raise PluginError(plugin.name, "FetchFailed", "cannot be fetched")
        return tuple(plugin.name for plugin in wanted)

    async def switch(self, prepared: Any) -> None:
        self.runs = prepared

    def states(self) -> list[pb.PluginState]:
        return []

    def drift(self) -> list[str]:
        return ["a file was changed"]


async def test_plugins_are_prepared_switched_and_taken_back() -> None:
    manager = FakePlugins()
    part = PluginsPart(manager)
    source = Source(urls=("https://a/b",), sha256="0" * 64)

    def with_plugins(*names: str, version: str = "1") -> Effective:
        return Effective(
            plugins=tuple(Plugin(name=name, version=version, source=source) for name in names)
        )

    change = await part.prepare(with_plugins("a"))
    assert not manager.runs
    await change.switch()
    change = await part.prepare(with_plugins("a", "b"))
    await change.switch()
    assert list(manager.runs) == ["a", "b"]
    await change.undo()
    assert list(manager.runs) == ["a"]
    with pytest.raises(ConfigError, match="plug-in c: cannot be fetched"):
        await part.prepare(with_plugins("c", version="bad"))
    assert await part.check() == ["a file was changed"]


# How often something is collected.


async def test_a_pace_changes_while_it_is_waited_for() -> None:
    pace = Pace(3600)
    await pace.due(None)  # at once
    waiting = asyncio.create_task(pace.due(time.monotonic()))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    pace.set(0.01, enabled=False)
    await asyncio.sleep(0.05)
    assert not waiting.done(), "it is off"
    pace.set(3600, enabled=True)
    await asyncio.sleep(0.02)
    assert not waiting.done()
    pace.set(0.01, enabled=True)
    await asyncio.wait_for(waiting, 5)
    pace.set(3600, enabled=False)
    waiting = asyncio.create_task(pace.due(None))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    pace.set(3600, enabled=True)
    await asyncio.wait_for(waiting, 5)  # what was off begins at once


# Limits of the agent itself.


def version_1(root: Path) -> OwnLimits:
    for name in ("cpu", "memory"):
        (root / name).mkdir()
    return OwnLimits(root, pid=4711)


def version_2(root: Path) -> OwnLimits:
    (root / "cgroup.controllers").write_text("cpu memory")
    return OwnLimits(root, pid=4711)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    from outrider_agent.config import limits

    proc = tmp_path / "proc/4711"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text("9:name=systemd:/\n4:memory:/elsewhere\n1:cpu,cpuacct:/\n0::/\n")
    monkeypatch.setattr(limits, "_PROC", tmp_path / "proc")
    root = tmp_path / "cgroup"
    root.mkdir()
    return root


def test_limits_of_version_1(groups: Path) -> None:
    limits = version_1(groups)
    limits.set(None, None)
    assert list(groups.glob("*/*")) == []  # nobody asked for anything
    limits.set(250, 64 * MIB)
    assert limits.problems() == []
    cpu, memory = (groups / name / f"{LEAF}-4711" for name in ("cpu", "memory"))
    assert (cpu / "cpu.cfs_quota_us").read_text() == "25000"
    assert (cpu / "cpu.cfs_period_us").read_text() == "100000"
    assert (memory / "memory.limit_in_bytes").read_text() == str(64 * MIB)
    assert (cpu / "cgroup.procs").read_text() == "4711"
    limits.release(99)
    assert (groups / "cpu/cgroup.procs").read_text() == "99"
    assert (groups / "memory/cgroup.procs").read_text() == "99"
    limits.set(None, None)
    assert (cpu / "cpu.cfs_quota_us").read_text() == "-1"
    assert (memory / "memory.limit_in_bytes").read_text() == "-1"


def test_limits_of_version_2(groups: Path) -> None:
    limits = version_2(groups)
    limits.set(2500, None)
    assert limits.problems() == []
    assert (groups / LEAF / "cpu.max").read_text() == "250000 100000"
    assert (groups / "cgroup.subtree_control").read_text() == "+cpu"
    limits.set(1, 64 * MIB)
    assert (groups / LEAF / "cpu.max").read_text() == "1000 100000"  # the least there is
    assert (groups / LEAF / "memory.max").read_text() == str(64 * MIB)
    limits.release(99)
    assert (groups / "outrider-others/cgroup.procs").read_text() == "99"
    limits.set(None, None)
    assert (groups / LEAF / "cpu.max").read_text() == "max 100000"


async def test_limits_that_nothing_enforces_are_told_and_tried_again(groups: Path) -> None:
    registry = CollectorRegistry()
    limits = OwnLimits(groups / "none", pid=4711)
    part = LimitsPart(limits, AgentMetrics(registry))
    name = "outrider_agent_limit_enforced"
    assert value(registry, name, resource="cpu") == -1
    change = await part.prepare(Effective(agent=Agent(cpu_millis=100)))
    await change.switch()
    assert value(registry, name, resource="cpu") == 0
    [text] = await part.check()
    assert "agent.cpuMillis is not enforced" in text
    assert "agent.resources" in text
    (groups / "none/cpu").mkdir(parents=True)
    assert await part.check() == []
    assert value(registry, name, resource="cpu") == 1


# What the agent itself uses.


def test_what_parts_use_is_told_and_never_goes_down() -> None:
    registry = CollectorRegistry()
    use = OwnUse(registry)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            sum(range(1000))

    before = use.totals()
    worker = threading.Thread(target=work, name="store")
    worker.start()
    end = time.monotonic() + 20
    while use.totals()["store"] < before["store"] + 0.1:
        assert time.monotonic() < end
        time.sleep(0.01)
    seen = use.totals()
    stop.set()
    worker.join()
    assert use.totals()["store"] >= seen["store"]
    for part in PARTS:
        name = "outrider_agent_part_cpu_seconds_total"
        assert registry.get_sample_value(name, {"part": part}) is not None


def test_parts_by_the_names_of_their_threads() -> None:
    found = {name: part_of(name) for name in ("MainThread", "run_0", "store", "host", "runt")}
    assert found == {
        "MainThread": "loop",
        "run_0": "runs",
        "store": "store",
        "host": "collectors",
        "runt": "other",
    }
    assert part_of(None) == "network"


def test_everything_that_can_be_asked_for_is_known_here() -> None:
    """A field that a later version of the schema has must not be passed over in silence."""
    parts = {"collectors", "plugins", "listeners", "datasets", "agent"}
    assert set(Effective.__struct_fields__) == parts
    assert set(Agent.__struct_fields__) == {
        "log_level",
        "max_bytes_per_second",
        "cpu_millis",
        "memory_bytes",
    }
    assert set(effective.Collectors.__struct_fields__) == {"host", "inventory", "heartbeat"}
    assert set(Listeners.__struct_fields__) == {"framed_tcp"}
