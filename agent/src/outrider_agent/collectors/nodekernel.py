"""Metrics of the host as a whole, under node_exporter's names: processors, memory, load, sockets.

Each function reads one thing and returns its metrics; none at all where the kernel has no such
thing, OSError where it should have but cannot be read. Nothing here can hang.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client import Metric

from outrider_agent.collectors.hostinfo import TABLE_BYTES, HostPaths, read, read_of_network
from outrider_agent.core import procfs

#: Most processors that have metrics of their own.
MAX_CPUS = 1024
#: A processor whose idle time falls by this much was taken out and put back, seconds.
_NEW_CPU_SECONDS = 3.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
#: Names of /proc/vmstat and of the networks' statistics that node_exporter tells by default.
_VMSTAT = ("oom_kill", "pgpg", "pswp")
_NETSTAT = {
    "Ip": ("Forwarding",),
    "Ip6": ("InOctets", "OutOctets"),
    "IpExt": ("InOctets", "OutOctets"),
    "Icmp": ("InMsgs", "OutMsgs"),
    "Icmp6": ("InMsgs", "OutMsgs"),
    "TcpExt": ("Listen", "Syncookies", "TCPSynRetrans", "TCPTimeouts", "TCPOFOQueue",
               "TCPRcvQDrop"),
    "Tcp": ("ActiveOpens", "InSegs", "OutSegs", "OutRsts", "PassiveOpens", "RetransSegs",
            "CurrEstab"),
    "Udp": ("InDatagrams", "OutDatagrams", "NoPorts", "RcvbufErrors", "SndbufErrors"),
    "Udp6": ("InDatagrams", "OutDatagrams", "NoPorts", "RcvbufErrors", "SndbufErrors"),
}  # fmt: skip
#: Those of the above that only begin so.
_BEGINNINGS = ("Listen", "Syncookies")
_NETSTAT_ERRORS = ("InErrors", "InErrs")
_PROTOCOLS_6 = ("Ip6", "Icmp6", "Udp6", "UdpLite6")

Samples = Iterable[tuple[Mapping[str, str], float]]


def family(kind: str, name: str, text: str, samples: Samples) -> Metric:
    """A metric with its samples; `kind` is counter, gauge or unknown."""
    made = Metric(name.removesuffix("_total") if kind == "counter" else name, text, kind)
    for labels, value in samples:
        made.add_sample(name, labels, value)  # type: ignore[arg-type]  # any mapping does
    return made


def single(kind: str, name: str, text: str, value: float) -> Metric:
    """A metric with one value and no labels."""
    return family(kind, name, text, [({}, value)])


def needed(path: Path, most: int = TABLE_BYTES) -> str:
    """A file's text.

    Raises:
        OSError: It cannot be read, or is empty.
    """
    text = read(path, most)
    if not text:
        raise OSError(f"{path} cannot be read")
    return text


class Processors:
    """Seconds of each processor by mode. Counters of some kernels fall at times: these do not."""

    def __init__(self, paths: HostPaths) -> None:
        self._stat = paths.proc / "stat"
        self._highest: dict[str, list[int]] = {}

    def __call__(self) -> list[Metric]:
        """The metrics."""
        found = procfs.cpu_ticks(needed(self._stat), MAX_CPUS)
        found.pop("", None)
        idle = procfs.CPU_MODES.index("idle")
        for cpu, ticks in found.items():
            before = self._highest.get(cpu)
            if before and before[idle] - ticks[idle] < _NEW_CPU_SECONDS * _TICKS:
                found[cpu] = [max(pair) for pair in zip(before, ticks, strict=True)]
        self._highest = found
        modes = len(procfs.CPU_MODES)
        return [
            family(
                "counter",
                "node_cpu_seconds_total",
                "Seconds that processors spent in each mode.",
                _cpu_samples(found, procfs.CPU_MODES, 0),
            ),
            family(
                "counter",
                "node_cpu_guest_seconds_total",
                "Seconds that processors spent in guests; counted in user and nice, too.",
                _cpu_samples(found, procfs.GUEST_MODES, modes),
            ),
        ]


def _cpu_samples(
    found: Mapping[str, list[int]], modes: tuple[str, ...], start: int
) -> Iterator[tuple[dict[str, str], float]]:
    for cpu, ticks in found.items():
        for mode, value in zip(modes, ticks[start:], strict=False):
            yield {"cpu": cpu, "mode": mode}, value / _TICKS


def stat(paths: HostPaths) -> list[Metric]:
    """Processes, forks, interrupts, context switches, and when the host started."""
    found = procfs.stat_totals(needed(paths.proc / "stat"))
    wanted = (
        ("intr", "counter", "node_intr_total", "Interrupts served."),
        ("ctxt", "counter", "node_context_switches_total", "Context switches."),
        ("processes", "counter", "node_forks_total", "Forks."),
        ("btime", "gauge", "node_boot_time_seconds", "When the host started, Unix time."),
        ("procs_running", "gauge", "node_procs_running", "Processes that run or could run."),
        ("procs_blocked", "gauge", "node_procs_blocked", "Processes that wait for a disk."),
    )
    return [single(kind, name, text, found[k]) for k, kind, name, text in wanted if k in found]


def meminfo(paths: HostPaths) -> list[Metric]:
    """Each line of /proc/meminfo."""
    found = procfs.memory(needed(paths.proc / "meminfo"))
    return [
        single("gauge", f"node_memory_{name}", f"Field {name} of /proc/meminfo.", value)
        for name, value in found.items()
    ]


def loadavg(paths: HostPaths) -> list[Metric]:
    """The load."""
    found = procfs.loads(needed(paths.proc / "loadavg"))
    if found is None:
        raise OSError(f"{paths.proc}/loadavg is not as expected")
    return [
        single("gauge", f"node_load{minutes}", f"Load of the last {minutes} min.", value)
        for minutes, value in zip((1, 5, 15), found, strict=True)
    ]


def sockstat(paths: HostPaths) -> list[Metric]:
    """Sockets in use by protocol."""
    found = procfs.sockets(read_of_network(paths.proc, "sockstat"), _PAGE)
    six = procfs.sockets(read_of_network(paths.proc, "sockstat6"), _PAGE)
    return [
        single("gauge", f"node_sockstat_{name}", f"Field {name} of sockstat.", value)
        for name, value in {**found, **six}.items()
    ]


def netstat(paths: HostPaths) -> list[Metric]:
    """Statistics of the network's protocols: those that node_exporter tells by default."""
    found: dict[str, int] = {}
    for name in ("netstat", "snmp"):
        found.update(procfs.statistics(read_of_network(paths.proc, name)))
    for name, value in procfs.named_numbers(read_of_network(paths.proc, "snmp6")):
        protocol = next((p for p in _PROTOCOLS_6 if name.startswith(p)), "")
        if protocol:
            found[f"{protocol}_{name.removeprefix(protocol)}"] = value
    return [
        single("unknown", f"node_netstat_{name}", f"Statistic {name}.", value)
        for name, value in found.items()
        if _told(name)
    ]


def _told(name: str) -> bool:
    protocol, _, field = name.partition("_")
    wanted = _NETSTAT.get(protocol, ())
    return (
        field.endswith(_NETSTAT_ERRORS)
        or field in wanted
        or any(field.startswith(w) for w in wanted if w in _BEGINNINGS)
    )


def vmstat(paths: HostPaths) -> list[Metric]:
    """Paging, swapping, page faults and processes ended for want of memory."""
    return [
        single("unknown", f"node_vmstat_{name}", f"Field {name} of /proc/vmstat.", value)
        for name, value in procfs.named_numbers(needed(paths.proc / "vmstat"))
        if name.startswith(_VMSTAT) or (name.startswith("pg") and "fault" in name)
    ]


def conntrack(paths: HostPaths) -> list[Metric]:
    """Tracked connections, where the kernel tracks any."""
    base = paths.proc / "sys/net/netfilter"
    wanted = (
        ("nf_conntrack_count", "node_nf_conntrack_entries", "Tracked connections."),
        ("nf_conntrack_max", "node_nf_conntrack_entries_limit", "Most tracked connections."),
    )
    values = [(procfs.number(read(base / file)), name, text) for file, name, text in wanted]
    return [single("gauge", name, text, value) for value, name, text in values if value is not None]


def pressure(paths: HostPaths) -> list[Metric]:
    """Seconds waited for processors, disks, memory and interrupts, where the kernel counts them."""
    made: list[Metric] = []
    for resource in ("cpu", "io", "memory", "irq"):
        found = procfs.pressure(read(paths.proc / "pressure" / resource))
        for kind, what in (("some", "waiting"), ("full", "stalled")):
            if kind in found and (resource, kind) != ("cpu", "full"):
                name = f"node_pressure_{resource}_{what}_seconds_total"
                who = "some process" if kind == "some" else "every process"
                text = f"Seconds in which {who} waited for {resource}."
                made.append(single("counter", name, text, found[kind] / 1e6))
    return made


def filefd(paths: HostPaths) -> list[Metric]:
    """Open files of the whole host."""
    words = needed(paths.proc / "sys/fs/file-nr").split()
    found = procfs.numbers(words)
    if len(found) < 3:
        raise OSError(f"{paths.proc}/sys/fs/file-nr is not as expected")
    return [
        single("gauge", "node_filefd_allocated", "Open files.", found[0]),
        single("gauge", "node_filefd_maximum", "Most open files.", found[2]),
    ]


def uname(paths: HostPaths, node: str) -> list[Metric]:
    """The kernel. A container has a host name of its own: the Node's name stands for it."""
    found = os.uname()
    labels = {
        "sysname": found.sysname,
        "release": found.release,
        "version": found.version,
        "machine": found.machine,
        "nodename": node,
        "domainname": read(paths.proc / "sys/kernel/domainname") or "(none)",
    }
    return [family("gauge", "node_uname_info", "Always 1; the kernel is in labels.", [(labels, 1)])]


def clock(now: Callable[[], float] = time.time) -> list[Metric]:
    """The host's clock."""
    zone = time.localtime()
    offset = family(
        "gauge",
        "node_time_zone_offset_seconds",
        "Offset of the time zone.",
        [({"time_zone": zone.tm_zone}, zone.tm_gmtoff)],
    )
    return [single("gauge", "node_time_seconds", "The clock, Unix time.", now()), offset]
