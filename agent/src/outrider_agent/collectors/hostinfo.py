"""What a host is: kernel, distribution, hardware, addresses. Read from its files, all optional.

Calls block: use a thread. Reads of the host what is mounted for us and invents nothing: what
cannot be read is empty.
"""

import array
import fcntl
import ipaddress
import os
import platform
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

from outrider_agent.core import procfs

#: Most addresses of one kind that are told.
MAX_ADDRESSES = 64
_FILE_BYTES = 256 * 1024
_PART_BYTES = 64 * 1024
_SIOCGIFCONF = 0x8912
#: Most bytes of a table of the kernel that grows with the host.
TABLE_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True)
class HostPaths:
    """Where the host's file systems are mounted."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    root: Path = Path("/")


@dataclass
class Addresses:
    """The host's addresses, textual."""

    intranet_ipv4: list[str] = field(default_factory=list)
    extranet_ipv4: list[str] = field(default_factory=list)
    intranet_ipv6: list[str] = field(default_factory=list)
    extranet_ipv6: list[str] = field(default_factory=list)


def read(path: Path, most: int = _FILE_BYTES) -> str:
    """A file's text without white space around it, cut at `most` bytes; empty if unreadable.

    Not by `open`, for many small files are read often; and never waits, even if it is a pipe.
    """
    parts: list[bytes] = []
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            while most > 0 and (part := os.read(descriptor, min(most, _PART_BYTES))):
                parts.append(part)
                most -= len(part)
        finally:
            os.close(descriptor)
    except OSError:
        return ""
    return b"".join(parts).decode("utf-8", "replace").strip("\0 \t\r\n")


def read_of_network(proc: Path, name: str, most: int = TABLE_BYTES) -> str:
    """A file below /proc/net of the host's network, which process 1 has; else of our own."""
    return read(proc / "1/net" / name, most) or read(proc / "net" / name, most)


def static_fields(paths: HostPaths) -> dict[str, str]:
    """What does not change while the host runs; names as in the heart-beat."""
    release = _os_release(paths.root)
    dmi = paths.sys / "class/dmi/id"
    return {
        "kernel_version": platform.release(),
        "arch": platform.machine(),
        "platform": release.get("ID", "linux"),
        "platform_family": release.get("ID_LIKE", release.get("ID", "")),
        "platform_version": release.get("VERSION_ID", ""),
        "host_serial": read(dmi / "product_serial"),
        "host_id": read(dmi / "product_uuid") or read(paths.root / "etc/machine-id"),
        "host_model": read(dmi / "product_name"),
        "host_vendor": read(dmi / "sys_vendor"),
        "cpu_name": _cpu_name(paths.proc),
        "nproc": str(os.cpu_count() or 0),
        "total_mem": str(memory(paths.proc)[0]),
        "boot_time": str(boot_time(paths.proc)),
    }


def changing_fields(paths: HostPaths) -> dict[str, str]:
    """What an administrator may change while the host runs."""
    return {"dns": ",".join(_nameservers(paths.root)), "gateway": _gateway(paths.proc)}


def _os_release(root: Path) -> dict[str, str]:
    text = read(root / "etc/os-release") or read(root / "usr/lib/os-release")
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}


def _cpu_name(proc: Path) -> str:
    for line in read(proc / "cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Hardware", "Processor"):
            return value.strip()
    return platform.processor()


def _nameservers(root: Path) -> list[str]:
    lines = (line.split() for line in read(root / "etc/resolv.conf").splitlines())
    return [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"][:8]


def _gateway(proc: Path) -> str:
    """The IPv4 gateway of the default route. Process 1 has the host's network."""
    text = read(proc / "1/net/route") or read(proc / "net/route")
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) > 3 and words[1] == "00000000" and int(words[3], 16) & 2:
            return str(ipaddress.IPv4Address(int.from_bytes(bytes.fromhex(words[2])[::-1])))
    return ""


def count_processes(proc: Path) -> int:
    """How many processes there are."""
    try:
        return sum(1 for name in os.listdir(proc) if name.isdigit())  # noqa: PTH208 - a count
    except OSError:
        return 0


def addresses() -> Addresses:
    """The addresses of this network namespace, but for loopback and link-local ones."""
    found = Addresses()
    all_of_them: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = [
        *_ipv4(),
        *procfs.ipv6(read(Path("/proc/net/if_inet6"))),
    ]
    for address in all_of_them:
        if address.is_loopback or address.is_link_local:
            continue
        kind = "intranet" if address.is_private else "extranet"
        listed: list[str] = getattr(found, f"{kind}_ipv{address.version}")
        if len(listed) < MAX_ADDRESSES and str(address) not in listed:
            listed.append(str(address))
    return found


def _ipv4() -> list[ipaddress.IPv4Address]:
    """All IPv4 addresses, as the kernel lists them: SIOCGIFCONF, see netdevice(7)."""
    size = 16 + max(16, 3 * struct.calcsize("P"))  # a name, and a union that has pointers in it
    buffer = array.array("B", bytes(size * 1024))
    place, room = buffer.buffer_info()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
            got = fcntl.ioctl(asking, _SIOCGIFCONF, struct.pack("iP", room, place))
    except OSError:
        return []  # there is no IPv4
    used = struct.unpack("iP", got)[0]
    starts = range(20, used, size)
    return [ipaddress.IPv4Address(buffer[start : start + 4].tobytes()) for start in starts]


def memory(proc: Path) -> tuple[int, int]:
    """The host's memory: all, and what may be had without swapping; bytes."""
    found = procfs.memory(read(proc / "meminfo"))
    return found.get("MemTotal_bytes", 0), found.get("MemAvailable_bytes", 0)


def boot_time(proc: Path) -> int:
    """When the host started, seconds since the Unix epoch; 0 if it cannot be read."""
    return procfs.stat_totals(read(proc / "stat", TABLE_BYTES)).get("btime", 0)


def self_counters() -> dict[str, float]:
    """Counters of this process: CPU seconds, and bytes it read and wrote."""
    times = os.times()
    io = dict(
        line.split(": ", 1) for line in read(Path("/proc/self/io")).splitlines() if ": " in line
    )
    return {
        "cpu": times.user + times.system,
        "read": float(io.get("read_bytes", 0)),
        "write": float(io.get("write_bytes", 0)),
    }


def self_rss() -> int:
    """Resident memory of this process, bytes."""
    words = read(Path("/proc/self/statm")).split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if len(words) > 1 else 0


def self_descriptors() -> int:
    """Open file descriptors of this process."""
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only their number counts
    except OSError:
        return 0


def disk_use(directory: Path) -> int:
    """Bytes that the files in a directory take on disk; it has few and no deep ones."""
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except OSError:
            continue  # gone meanwhile
    return total
