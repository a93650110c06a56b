"""Heart-beats, host metrics, and the schedule they run on."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from fakes.agent_parts import ListSink, value
from outrider_agent.collectors import hostinfo, schedule
from outrider_agent.collectors.heartbeat import AgentStatus, Heartbeat
from outrider_agent.collectors.host import HostMetrics, _network_devices
from outrider_agent.collectors.hostinfo import HostPaths
from outrider_agent.collectors.schedule import collect_forever
from outrider_agent.core.traffic import Traffic
from outrider_agent.metrics import AgentMetrics
from prometheus_client import CollectorRegistry

# fmt: off
FIELDS = [
    "kernel_version", "arch", "platform", "platform_family", "platform_version", "state",
    "state_detail", "idc", "region", "net_mode", "rx_speed", "tx_speed", "cpu", "rss",
    "read_speed", "write_speed", "pid", "nfd", "start_time", "tx_tps", "rx_tps", "du", "nproc",
    "total_mem", "load_1", "load_5", "load_15", "running_procs", "total_procs", "host_serial",
    "host_id", "host_model", "host_vendor", "dns", "gateway", "cpu_name", "boot_time",
    "cpu_usage", "mem_usage",
]
# fmt: on


def heartbeat(directory: Path, traffic: Traffic) -> Heartbeat:
    return Heartbeat(
        paths=HostPaths(),
        state_directory=directory,
        region="eu",
        traffic=traffic,
        status=lambda: AgentStatus("running", "", "sd"),
        started=1234.5,
    )


def test_a_heartbeat_has_exactly_the_known_fields(tmp_path: Path) -> None:
    found = heartbeat(tmp_path, Traffic()).collect()
    assert sorted(found) == sorted(FIELDS)
    assert all(isinstance(v, str) for v in found.values())


def test_a_heartbeat_tells_the_truth(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(100_000))
    traffic = Traffic()
    made = heartbeat(tmp_path, traffic)
    made.collect()
    traffic.sent_bytes += 10**6
    began = time.process_time()
    while time.process_time() - began < 0.05:
        pass
    found = made.collect()
    assert found["pid"] == str(os.getpid())
    assert found["kernel_version"] == os.uname().release
    assert found["start_time"] == "1234"
    assert (found["state"], found["region"], found["net_mode"]) == ("running", "eu", "sd")
    assert int(found["du"]) >= 100_000
    assert int(found["rss"]) > 10**6
    assert int(found["nfd"]) > 2
    assert float(found["tx_speed"]) > 0 == float(found["rx_speed"])
    assert float(found["cpu"]) > 1
    assert int(found["total_procs"]) > 1
    assert int(found["boot_time"]) < time.time()


def test_host_metrics_have_every_kind_and_only_numbers() -> None:
    found = HostMetrics(HostPaths()).collect()
    for name in ("cpu.user_seconds", "mem.total_bytes", "load.1", "swap.total_bytes"):
        assert name in found
    assert {name.split(".")[0] for name in found} >= {"cpu", "mem", "swap", "load"}
    for name, text in found.items():
        assert float(text) >= 0, name


def test_network_devices_are_read_as_the_kernel_prints_them() -> None:
    text = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs\n"
        "    lo:  1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n"
        "eth0.1:100 2 3 4 5 6 7 8 900 10 11 12 13 14 15 16\n"
        "broken: 1 2\n"
    )
    (device,) = _network_devices(text)
    assert device.name == "eth0.1"
    assert device.values["received_bytes"] == 100
    assert device.values["receive_drops"] == 4
    assert device.values["sent_bytes"] == 900
    assert device.values["send_drops"] == 12


def test_the_host_is_read_where_it_is_mounted(tmp_path: Path) -> None:
    for name, text in {
        "etc/os-release": 'ID=fancy\nVERSION_ID="7"\n# a comment\n',
        "etc/resolv.conf": "search x\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n",
        "etc/machine-id": "abc\n",
        "proc/1/net/route": "Iface Destination Gateway Flags\neth0 00000000 0102A8C0 0003 0\n",
        "proc/cpuinfo": "processor : 0\nmodel name : Fast One\n",
        "sys/class/dmi/id/product_name": "Box 9\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    paths = HostPaths(tmp_path / "proc", tmp_path / "sys", tmp_path)
    found = {**hostinfo.static_fields(paths), **hostinfo.changing_fields(paths)}
    assert (found["platform"], found["platform_version"]) == ("fancy", "7")
    assert found["dns"] == "192.0.2.1,192.0.2.2"
    assert found["gateway"] == "192.168.2.1"
    assert (found["cpu_name"], found["host_model"], found["host_id"]) == (
        "Fast One",
        "Box 9",
        "abc",
    )
    empty = HostPaths(tmp_path / "no", tmp_path / "no", tmp_path / "no")
    assert hostinfo.changing_fields(empty) == {"dns": "", "gateway": ""}


async def test_a_collector_starts_at_once_repeats_and_survives_failures() -> None:
    sink, registry = ListSink(), CollectorRegistry()
    calls = 0

    def collect() -> dict[str, str]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("bad reading")
        return {"n": str(calls)}

    running = asyncio.create_task(
        collect_forever("host", 20000, 0.02, collect, sink, AgentMetrics(registry))
    )
    async with asyncio.timeout(10):
        while len(sink.records) < 2:
            await asyncio.sleep(0.01)
    running.cancel()
    assert [f["n"] for f in sink.fields(20000)][:2] == ["1", "3"]
    name = "outrider_agent_collection_failures_total"
    assert value(registry, name, collector="host") == 1


async def test_a_collector_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "SLOW_SECONDS", 0.02)
    release = threading.Event()
    calls = 0

    def hang() -> dict[str, str]:
        nonlocal calls
        calls += 1
        release.wait(30)
        return {}

    metrics = AgentMetrics(registry := CollectorRegistry())
    running = asyncio.create_task(collect_forever("host", 1, 0.01, hang, ListSink(), metrics))
    began = time.monotonic()
    await asyncio.sleep(0.2)
    assert time.monotonic() - began < 5
    assert calls == 1, "it overlaps itself"
    name = "outrider_agent_collection_failures_total"
    assert value(registry, name, collector="host") == 0, "it is tried anew meanwhile"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert time.monotonic() - began < 5
    release.set()


HANGING = """
import asyncio, time
from outrider_agent.collectors.schedule import collect_forever
from outrider_agent.metrics import AgentMetrics
from prometheus_client import CollectorRegistry

async def main():
    metrics = AgentMetrics(CollectorRegistry())
    hang = lambda: time.sleep(60)
    running = asyncio.create_task(collect_forever("host", 1, 0.01, hang, None, metrics))
    await asyncio.sleep(0.1)
    running.cancel()
    await asyncio.wait([running])

asyncio.run(main())
"""


def test_a_collector_that_hangs_does_not_keep_the_program_alive() -> None:
    subprocess.run([sys.executable, "-c", HANGING], check=True, timeout=30)


def test_addresses_are_those_of_the_kernel() -> None:
    def known(family: socket.AddressFamily) -> set[str]:
        return {
            entry.address.partition("%")[0]
            for entries in psutil.net_if_addrs().values()
            for entry in entries
            if entry.family == family
            and not entry.address.startswith(("127.", "::1", "fe80", "169."))
        }

    found = hostinfo.addresses()
    assert set(found.intranet_ipv4 + found.extranet_ipv4) == known(socket.AF_INET)
    assert set(found.intranet_ipv6 + found.extranet_ipv6) == known(socket.AF_INET6)


def test_cpu_usage_is_of_the_time_since_the_last_beat(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    beat = Heartbeat(
        paths=HostPaths(proc=tmp_path),
        state_directory=tmp_path,
        region="",
        traffic=Traffic(),
        status=lambda: AgentStatus("running", "", "sd"),
        started=0,
    )
    stat.write_text("cpu 100 0 0 900 0 0 0 0 0 0\n")
    assert beat.collect()["cpu_usage"] == "0.00"
    stat.write_text("cpu 125 0 0 950 25 0 0 0 0 0\n")
    assert beat.collect()["cpu_usage"] == "25.00"
