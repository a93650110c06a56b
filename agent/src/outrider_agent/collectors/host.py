"""Metrics of the host as one record: CPU, memory, load, disks, file systems, network.

Counters are totals since boot, so that a lost record costs no precision; units are in the names.
Devices are bounded in number. `collect` blocks: use a thread.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import psutil

from outrider_agent.collectors.hostinfo import HostPaths, read

#: Most disks, file systems and network devices each.
MAX_DEVICES = 32
_IGNORED_DISKS = ("loop", "ram", "zram", "sr", "fd")
_IGNORED_NETWORKS = ("lo",)


class _Device(NamedTuple):
    name: str
    values: dict[str, int | float]


class HostMetrics:
    """Makes the fields of host metrics."""

    def __init__(self, paths: HostPaths) -> None:
        self._paths = paths

    def collect(self) -> dict[str, str]:
        """The fields of one record; those of devices are named KIND.DEVICE.WHAT."""
        fields = {**_cpu(), **_memory(), **_load()}
        kinds = (
            ("disk", _disks()),
            ("fs", self._file_systems()),
            ("net", self._networks()),
        )
        for kind, devices in kinds:
            for device in islice(devices, MAX_DEVICES):
                for what, value in device.values.items():
                    fields[f"{kind}.{device.name}.{what}"] = str(value)
        return fields

    def _file_systems(self) -> Iterator[_Device]:
        seen: set[str] = set()
        for partition in psutil.disk_partitions(all=False):
            if partition.device in seen:
                continue  # bind mounts of one device
            seen.add(partition.device)
            path = self._paths.root / partition.mountpoint.lstrip("/")
            try:
                usage = psutil.disk_usage(str(path))
            except OSError:
                continue  # not ours to see
            yield _Device(
                partition.mountpoint,
                {"total_bytes": usage.total, "used_bytes": usage.used, "free_bytes": usage.free},
            )

    def _networks(self) -> Iterable[_Device]:
        """Process 1 has the host's network; without the right to look there, ours must do."""
        text = read(self._paths.proc / "1/net/dev") or read(Path("/proc/net/dev"))
        return _network_devices(text)


def _cpu() -> dict[str, str]:
    times = psutil.cpu_times()
    fields = {
        f"cpu.{name}_seconds": f"{value:.2f}"
        for name, value in times._asdict().items()
        if name not in ("guest", "guest_nice")  # counted in user and nice already
    }
    return {**fields, "cpu.count": str(psutil.cpu_count() or 0)}


def _memory() -> dict[str, str]:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "mem.total_bytes": str(memory.total),
        "mem.available_bytes": str(memory.available),
        "mem.used_bytes": str(memory.used),
        "mem.free_bytes": str(memory.free),
        "mem.cached_bytes": str(memory.cached),
        "mem.buffers_bytes": str(memory.buffers),
        "swap.total_bytes": str(swap.total),
        "swap.used_bytes": str(swap.used),
    }


def _load() -> dict[str, str]:
    one, five, fifteen = psutil.getloadavg()
    return {"load.1": f"{one:.2f}", "load.5": f"{five:.2f}", "load.15": f"{fifteen:.2f}"}


def _disks() -> Iterator[_Device]:
    for name, io in sorted((psutil.disk_io_counters(perdisk=True) or {}).items()):
        if not name.startswith(_IGNORED_DISKS):
            yield _Device(
                name,
                {
                    "read_bytes": io.read_bytes,
                    "written_bytes": io.write_bytes,
                    "reads": io.read_count,
                    "writes": io.write_count,
                    "busy_millis": getattr(io, "busy_time", 0),
                },
            )


def _network_devices(text: str) -> Iterator[_Device]:
    """What /proc/net/dev says."""
    for line in text.splitlines()[2:]:
        name, _, rest = line.strip().rpartition(":")
        numbers = [int(word) for word in rest.split()]
        if name in _IGNORED_NETWORKS or len(numbers) < 12:
            continue
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
