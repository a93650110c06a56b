"""Metrics of the host's devices, under node_exporter's names: disks, networks, file systems, heat.

Each function reads one kind of device and returns its metrics and how many devices were left out
by a bound. Sensors and file systems can hang: whoever calls puts a time limit on these.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from prometheus_client import Metric

from outrider_agent.collectors.filesystems import MAX_ASKED, FileSystem, FileSystems
from outrider_agent.collectors.hostinfo import HostPaths, read, read_of_network
from outrider_agent.collectors.nodekernel import family, needed
from outrider_agent.core import procfs
from outrider_agent.core.procfs import Mount

MAX_DISKS = 256
MAX_NETWORKS = 256
#: These take many files each.
MAX_NETWORK_CLASSES = 64
MAX_SENSORS = 256
#: Most characters of a name in a label.
_NAME_CHARACTERS = 512
_TEMPERATURE = re.compile(r"temp([0-9]{1,4})_([a-z_]{1,32})")
_NO_NAME = re.compile(r"[^a-z0-9:_]")
_SECTOR = 512.0
_MILLI = 0.001

#: In the order of /proc/diskstats: name, kind, factor, help.
_DISK = (
    ("reads_completed_total", "counter", 1, "Reads completed."),
    ("reads_merged_total", "counter", 1, "Reads merged."),
    ("read_bytes_total", "counter", _SECTOR, "Bytes read."),
    ("read_time_seconds_total", "counter", _MILLI, "Seconds spent by all reads."),
    ("writes_completed_total", "counter", 1, "Writes completed."),
    ("writes_merged_total", "counter", 1, "Writes merged."),
    ("written_bytes_total", "counter", _SECTOR, "Bytes written."),
    ("write_time_seconds_total", "counter", _MILLI, "Seconds spent by all writes."),
    ("io_now", "gauge", 1, "Requests in progress."),
    ("io_time_seconds_total", "counter", _MILLI, "Seconds in which requests were in progress."),
    ("io_time_weighted_seconds_total", "counter", _MILLI, "Seconds of requests in progress."),
    ("discards_completed_total", "counter", 1, "Discards completed."),
    ("discards_merged_total", "counter", 1, "Discards merged."),
    ("discarded_sectors_total", "counter", 1, "Sectors discarded."),
    ("discard_time_seconds_total", "counter", _MILLI, "Seconds spent by all discards."),
    ("flush_requests_total", "counter", 1, "Flushes completed."),
    ("flush_requests_time_seconds_total", "counter", _MILLI, "Seconds spent by all flushes."),
)
#: Files of /sys/class/net/DEVICE: name of the metric, kind.
_CLASS = {
    "addr_assign_type": ("address_assign_type", "gauge"),
    "carrier": ("carrier", "gauge"),
    "carrier_changes": ("carrier_changes_total", "counter"),
    "carrier_up_count": ("carrier_up_changes_total", "counter"),
    "carrier_down_count": ("carrier_down_changes_total", "counter"),
    "dev_id": ("device_id", "gauge"),
    "dormant": ("dormant", "gauge"),
    "flags": ("flags", "gauge"),
    "ifindex": ("iface_id", "gauge"),
    "iflink": ("iface_link", "gauge"),
    "link_mode": ("iface_link_mode", "gauge"),
    "mtu": ("mtu_bytes", "gauge"),
    "name_assign_type": ("name_assign_type", "gauge"),
    "netdev_group": ("net_dev_group", "gauge"),
    "speed": ("speed_bytes", "gauge"),
    "tx_queue_len": ("transmit_queue_length", "gauge"),
    "type": ("protocol_type", "gauge"),
}
T = TypeVar("T")


class Found(NamedTuple):
    """Metrics of one kind of device, and how many devices are not in them."""

    metrics: list[Metric]
    left_out: int = 0


def _bounded(devices: Iterable[T], most: int) -> tuple[list[T], int]:
    """The first ones, and how many more there are."""
    rest = iter(devices)
    return list(islice(rest, most)), sum(1 for _ in rest)


def label(text: str) -> str:
    """A name that fits into a label."""
    return text[:_NAME_CHARACTERS]


def diskstats(paths: HostPaths, excluded: re.Pattern[str]) -> Found:
    """Disks, but for the excluded."""
    text = needed(paths.proc / "diskstats")
    wanted = (disk for disk in procfs.disks(text) if not excluded.search(disk[0]))
    disks, left_out = _bounded(wanted, MAX_DISKS)
    made = []
    for column, (name, kind, factor, about) in enumerate(_DISK):
        samples = [
            ({"device": label(device)}, values[column] * factor)
            for device, values in disks
            if column < len(values)
        ]
        if samples:
            made.append(family(kind, f"node_disk_{name}", about, samples))
    return Found(made, left_out)


def netdev(paths: HostPaths, excluded: re.Pattern[str]) -> Found:
    """Traffic of the network devices, but for the excluded."""
    text = read_of_network(paths.proc, "dev")
    wanted = (d for d in procfs.networks(text) if not excluded.search(d[0]))
    devices, left_out = _bounded(wanted, MAX_NETWORKS)
    made = [
        family(
            "counter",
            f"node_network_{name}_total",
            f"Counter {name} of network devices.",
            [({"device": label(device)}, values[column]) for device, values in devices],
        )
        for column, name in enumerate(procfs.NETWORK_COLUMNS)
    ]
    return Found(made, left_out)


def netclass(paths: HostPaths, excluded: re.Pattern[str]) -> Found:
    """What the network devices are: state, speed, queue."""
    base = paths.sys / "class/net"
    names = sorted(path.name for path in base.iterdir() if (path / "ifindex").exists())
    devices, left_out = _bounded(
        (name for name in names if not excluded.search(name)), MAX_NETWORK_CLASSES
    )
    up, about, columns = [], [], {name: [] for name in _CLASS}  # type: ignore[var-annotated]
    for device in devices:
        texts = {file: read(base / device / file) for file in (*_CLASS, *_CLASS_TEXTS)}
        up.append(({"device": device}, float(texts["operstate"] == "up")))
        about.append((_about(device, texts), 1.0))
        for file, samples in columns.items():
            value = _integer(texts[file])
            if value is not None:
                if file == "speed":
                    value = int(value * 1_000_000 / 8)  # megabits
                samples.append(({"device": device}, value))
    made = [
        family("gauge", "node_network_up", "1 if the device's state is up.", up),
        family("gauge", "node_network_info", "Always 1; texts about the device.", about),
    ]
    for file, samples in columns.items():
        name, kind = _CLASS[file]
        if samples:
            made.append(family(kind, f"node_network_{name}", f"File {file} of devices.", samples))
    return Found(made, left_out)


_CLASS_TEXTS = ("operstate", "address", "broadcast", "duplex", "ifalias")


def _about(device: str, texts: Mapping[str, str]) -> dict[str, str]:
    flags = _integer(texts["flags"])
    admin = "unknown" if flags is None else ("up" if flags & 1 else "down")
    rest = {name: label(texts[name]) for name in _CLASS_TEXTS}
    return {"device": device, "adminstate": admin, **rest}


def _integer(text: str) -> int | None:
    if text.startswith("0x"):
        try:
            return int(text[:20], 16)
        except ValueError:
            return None
    return procfs.number(text)


@dataclass(frozen=True)
class FileSystemMetrics:
    """What file systems are told, but for excluded mount points and kinds."""

    file_systems: FileSystems
    points_excluded: re.Pattern[str]
    kinds_excluded: re.Pattern[str]

    def __call__(self) -> Found:
        """The metrics; blocks for a bounded time."""
        wanted = [m for m in self.file_systems.mounts() if self._wanted(m)]
        found = self.file_systems.ask(wanted)
        return Found(_file_system_metrics(found), max(0, len(wanted) - MAX_ASKED))

    def _wanted(self, mount: Mount) -> bool:
        return not (
            self.points_excluded.search(mount.point) or self.kinds_excluded.search(mount.kind)
        )


def _file_system_metrics(found: list[FileSystem]) -> list[Metric]:
    def samples(
        chosen: list[FileSystem], value: Callable[[FileSystem], float]
    ) -> list[tuple[dict[str, str], float]]:
        return [(_file_system_labels(f), value(f)) for f in chosen]

    known = [f for f in found if not f.error]
    made = [
        ("size_bytes", "Size.", samples(known, lambda f: f.total_bytes)),
        ("free_bytes", "Free space.", samples(known, lambda f: f.free_bytes)),
        ("avail_bytes", "Free space for users.", samples(known, lambda f: f.available_bytes)),
        ("files", "Room for files, in number.", samples(known, lambda f: f.files)),
        ("files_free", "Files that may be made yet.", samples(known, lambda f: f.files_free)),
        ("readonly", "1 if it cannot be written.", samples(found, lambda f: f.mount.read_only)),
        ("device_error", "1 if it could not be asked.", samples(found, lambda f: bool(f.error))),
        ("mount_info", "Always 1.", [(_mount_labels(f.mount), 1.0) for f in known]),
    ]
    return [
        family("gauge", f"node_filesystem_{n}", f"Of file systems: {about}", s)
        for n, about, s in made
    ]


def _file_system_labels(found: FileSystem) -> dict[str, str]:
    mount = found.mount
    return {
        "device": label(mount.device),
        "mountpoint": label(mount.point),
        "fstype": label(mount.kind),
        "device_error": found.error,
    }


def _mount_labels(mount: Mount) -> dict[str, str]:
    major, _, minor = mount.number.partition(":")
    numbers = {"major": major, "minor": minor}
    return {"device": label(mount.device), **numbers, "mountpoint": label(mount.point)}


def _clean(text: str) -> str:
    return _NO_NAME.sub("_", text.strip().lower()).strip("_")


def _chip(folder: Path) -> str:
    """A name that stays: where the device is, else what the driver calls it."""
    device = folder / "device"
    if device.exists():
        path = device.resolve()
        name, kind = _clean(path.name), _clean(path.parent.name)
        if name:
            return f"{kind}_{name}" if kind else name
    return _clean(read(folder / "name")) or _clean(folder.resolve().name)


def temperatures(paths: HostPaths) -> list[tuple[str, str, dict[str, float]]]:
    """Chip, sensor and its values in degrees Celsius: input, max, crit ...; alarms as they are."""
    found = []
    base = paths.sys / "class/hwmon"
    for folder in sorted(base.iterdir()) if base.is_dir() else []:
        sensors: dict[str, dict[str, float]] = {}
        for place in (folder, folder / "device"):
            for file in sorted(place.glob("temp[0-9]*_*")) if place.is_dir() else []:
                match = _TEMPERATURE.fullmatch(file.name)
                value = procfs.number(read(file, 128)) if match else None
                if match and value is not None and match[2] != "type":
                    scale = 1.0 if match[2] in ("alarm", "fault", "beep") else _MILLI
                    sensors.setdefault(f"temp{match[1]}", {})[match[2]] = value * scale
        if sensors:
            chip = _chip(folder)
            found += [(chip, sensor, values) for sensor, values in sensors.items()]
    return found


def hwmon(paths: HostPaths) -> Found:
    """Temperatures of the sensors."""
    sensors, left_out = _bounded(temperatures(paths), MAX_SENSORS)
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for chip, sensor, values in sensors:
        for element, value in values.items():
            if element in ("alarm", "fault"):
                name = f"temp_{element}"
            elif element == "beep":
                name = "temp_beep_enabled"
            else:
                name = "temp_celsius" if element == "input" else f"temp_{element}_celsius"
            samples.setdefault(name, []).append(({"chip": chip, "sensor": sensor}, value))
    made = [
        family("gauge", f"node_hwmon_{name}", "Of sensors.", found)
        for name, found in samples.items()
    ]
    names = _chip_names(paths) if sensors else []
    if names:
        made.append(family("gauge", "node_hwmon_chip_names", "Names that drivers give.", names))
    return Found(made, left_out)


def _chip_names(paths: HostPaths) -> list[tuple[dict[str, str], float]]:
    folders = islice(sorted((paths.sys / "class/hwmon").iterdir()), MAX_SENSORS)
    pairs = {_chip(folder): _clean(read(folder / "name")) for folder in folders}
    return [({"chip": chip, "chip_name": name}, 1.0) for chip, name in pairs.items() if name]


def zones(paths: HostPaths) -> list[tuple[str, str, float]]:
    """Thermal zones: number, type, degrees Celsius."""
    found = []
    for folder in sorted((paths.sys / "class/thermal").glob("thermal_zone*")):
        value = procfs.number(read(folder / "temp", 128))
        if value is not None:
            number = folder.name.removeprefix("thermal_zone")
            found.append((number, label(read(folder / "type", 128)), value * _MILLI))
    return found


def thermal_zone(paths: HostPaths) -> Found:
    """Temperatures of the thermal zones, and what cools them."""
    found, left_out = _bounded(zones(paths), MAX_SENSORS)
    made = []
    if found:
        samples = [({"zone": zone, "type": kind}, value) for zone, kind, value in found]
        made.append(family("gauge", "node_thermal_zone_temp", "Degrees Celsius.", samples))
    folders = sorted((paths.sys / "class/thermal").glob("cooling_device*"))[:MAX_SENSORS]
    for what in ("cur_state", "max_state"):
        states = []
        for folder in folders:
            value = procfs.number(read(folder / what, 128))
            name = folder.name.removeprefix("cooling_device")
            if value is not None:
                states.append(({"name": name, "type": label(read(folder / "type", 128))}, value))
        if states:
            about = f"File {what} of cooling devices."
            made.append(family("gauge", f"node_cooling_device_{what}", about, states))
    return Found(made, left_out)
