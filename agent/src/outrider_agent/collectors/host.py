"""Metrics of the host as one record: CPU, memory, load, disks, file systems, network, and more.

Counters are totals since boot, so that a lost record costs no precision; units are in the names.
Devices are bounded in number and their names in length. `collect` blocks for a bounded time: use
a thread.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from outrider_agent.collectors import nodedevices
from outrider_agent.collectors.filesystems import FileSystems
from outrider_agent.collectors.hostinfo import (
    TABLE_BYTES,
    HostPaths,
    count_processes,
    read,
    read_of_network,
)
from outrider_agent.collectors.limited import Limited
from outrider_agent.core import procfs

#: Most disks, file systems, network devices and sensors each.
MAX_DEVICES = 32
#: Most processors that are counted; the times are those of all.
MAX_CPUS = 8192
#: Longest wait for sensors, seconds.
SENSOR_SECONDS = 1.0
_NAME_CHARACTERS = 128
_IGNORED_DISKS = ("loop", "ram", "zram", "sr", "fd")
_IGNORED_NETWORKS = ("lo",)
#: In memory, read-only by their nature, or no room of their own.
IGNORED_KINDS = frozenset(
    {
        "autofs", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts",
        "devtmpfs", "erofs", "fusectl", "hugetlbfs", "iso9660", "mqueue", "nsfs", "overlay",
        "proc", "pstore", "ramfs", "rpc_pipefs", "securityfs", "selinuxfs", "squashfs", "sysfs",
        "tmpfs", "tracefs",
    }
)  # fmt: skip
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MEMORY = {
    "mem.total_bytes": "MemTotal_bytes",
    "mem.available_bytes": "MemAvailable_bytes",
    "mem.free_bytes": "MemFree_bytes",
    "mem.buffers_bytes": "Buffers_bytes",
    "swap.total_bytes": "SwapTotal_bytes",
}
_SOCKETS = {
    "sockets_used": "sockets.used",
    "TCP_inuse": "sockets.tcp",
    "TCP6_inuse": "sockets.tcp6",
    "TCP_orphan": "sockets.tcp_orphans",
    "TCP_tw": "sockets.tcp_time_wait",
    "TCP_mem_bytes": "sockets.tcp_bytes",
    "UDP_inuse": "sockets.udp",
    "UDP6_inuse": "sockets.udp6",
    "UDP_mem_bytes": "sockets.udp_bytes",
}
_STAT = {
    "ctxt": "cpu.context_switches",
    "intr": "cpu.interrupts",
    "processes": "procs.forks",
    "procs_running": "procs.running",
    "procs_blocked": "procs.blocked",
    "btime": "boot_time",
}


class _Device(NamedTuple):
    name: str
    values: dict[str, int | float]


class HostMetrics:
    """Makes the fields of host metrics."""

    def __init__(self, paths: HostPaths, file_systems: FileSystems | None = None) -> None:
        self._paths = paths
        self._file_systems = file_systems or FileSystems(paths)
        self._sensors = Limited("sensors", self._temperatures)

    def collect(self) -> dict[str, str]:
        """The fields of one record; those of devices are named KIND.DEVICE.WHAT."""
        proc = self._paths.proc
        stat = read(proc / "stat", TABLE_BYTES)
        fields = {
            **_cpu(stat),
            **_memory(read(proc / "meminfo")),
            **_load(read(proc / "loadavg")),
            **_named(procfs.stat_totals(stat), _STAT),
            "procs.total": str(count_processes(proc)),
            **self._sockets(),
            **_pressure(proc / "pressure"),
            **_files(read(proc / "sys/fs/file-nr")),
        }
        kinds = (
            ("disk", _disks(read(proc / "diskstats", TABLE_BYTES))),
            ("fs", self._usage()),
            ("net", _network_devices(read_of_network(proc, "dev"))),
            ("temp", self._sensor_values()),
        )
        for kind, devices in kinds:
            for device in islice(devices, MAX_DEVICES):
                for what, value in device.values.items():
                    fields[f"{kind}.{device.name[:_NAME_CHARACTERS]}.{what}"] = str(value)
        return fields

    def _usage(self) -> Iterator[_Device]:
        seen: set[str] = set()
        wanted = []
        for mount in self._file_systems.mounts():
            if mount.kind not in IGNORED_KINDS and mount.number not in seen:
                seen.add(mount.number)  # bind mounts of one file system
                wanted.append(mount)
        for found in self._file_systems.ask(wanted[:MAX_DEVICES]):
            values: dict[str, int | float] = {"read_only": int(found.mount.read_only)}
            if found.error:
                values["error"] = 1
            else:
                values |= {
                    "total_bytes": found.total_bytes,
                    "used_bytes": found.total_bytes - found.free_bytes,
                    "free_bytes": found.available_bytes,
                    "files": found.files,
                    "files_free": found.files_free,
                }
            yield _Device(found.mount.point, values)

    def _sockets(self) -> dict[str, str]:
        proc = self._paths.proc
        text = read_of_network(proc, "sockstat") + "\n" + read_of_network(proc, "sockstat6")
        return _named(procfs.sockets(text, _PAGE), _SOCKETS)

    def _sensor_values(self) -> list[_Device]:
        try:
            return self._sensors.call(SENSOR_SECONDS)
        except (TimeoutError, OSError):
            return []  # a sensor hangs; told by node_scrape_collector_success

    def _temperatures(self) -> list[_Device]:
        sensors = [
            _Device(f"{chip}_{sensor}", {"celsius": values["input"]})
            for chip, sensor, values in nodedevices.temperatures(self._paths)
            if "input" in values
        ]
        zones = nodedevices.zones(self._paths)
        return sensors + [_Device(f"zone{z}_{kind}", {"celsius": v}) for z, kind, v in zones]


def _named(values: dict[str, int], names: dict[str, str]) -> dict[str, str]:
    return {field: str(values[name]) for name, field in names.items() if name in values}


def _cpu(stat: str) -> dict[str, str]:
    ticks = procfs.cpu_ticks(stat, MAX_CPUS)
    if "" not in ticks:
        return {}
    times = zip(procfs.CPU_MODES, ticks[""], strict=False)
    fields = {f"cpu.{mode}_seconds": f"{value / _TICKS:.2f}" for mode, value in times}
    return {**fields, "cpu.count": str(len(ticks) - 1)}


def _memory(text: str) -> dict[str, str]:
    found = procfs.memory(text)
    values = {field: found.get(name, 0) for field, name in _MEMORY.items()}
    values["mem.used_bytes"] = values["mem.total_bytes"] - values["mem.available_bytes"]
    values["mem.cached_bytes"] = found.get("Cached_bytes", 0) + found.get("SReclaimable_bytes", 0)
    values["swap.used_bytes"] = values["swap.total_bytes"] - found.get("SwapFree_bytes", 0)
    return {field: str(value) for field, value in values.items()}


def _load(text: str) -> dict[str, str]:
    found = procfs.loads(text)
    if found is None:
        return {}
    return {f"load.{m}": f"{v:.2f}" for m, v in zip((1, 5, 15), found, strict=True)}


def _pressure(folder: Path) -> dict[str, str]:
    fields = {}
    for resource in ("cpu", "io", "memory", "irq"):
        for kind, micros in procfs.pressure(read(folder / resource)).items():
            if kind in ("some", "full"):
                fields[f"pressure.{resource}_{kind}_seconds"] = f"{micros / 1e6:.3f}"
    return fields


def _files(text: str) -> dict[str, str]:
    found = procfs.numbers(text.split())
    return {"files.open": str(found[0]), "files.max": str(found[2])} if len(found) > 2 else {}


def _disks(text: str) -> Iterator[_Device]:
    """What /proc/diskstats says."""
    for name, numbers in sorted(procfs.disks(text)):
        if not name.startswith(_IGNORED_DISKS):
            yield _Device(
                name,
                {
                    "read_bytes": numbers[2] * 512,
                    "written_bytes": numbers[6] * 512,
                    "reads": numbers[0],
                    "writes": numbers[4],
                    "read_millis": numbers[3],
                    "write_millis": numbers[7],
                    "busy_millis": numbers[9],
                    "queued_millis": numbers[10],
                },
            )


def _network_devices(text: str) -> Iterable[_Device]:
    """What /proc/net/dev says."""
    for name, numbers in procfs.networks(text):
        if name not in _IGNORED_NETWORKS:
            yield _Device(
                name,
                {
                    "received_bytes": numbers[0],
                    "received_packets": numbers[1],
                    "receive_errors": numbers[2],
                    "receive_drops": numbers[3],
                    "sent_bytes": numbers[8],
                    "sent_packets": numbers[9],
                    "send_errors": numbers[10],
                    "send_drops": numbers[11],
                },
            )
