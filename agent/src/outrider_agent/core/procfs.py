"""What the kernel's text files say, as numbers: pure functions over the text of /proc files.

Why our own and not a library's: psutil's root of proc is one global, it reads the mounts and
networks of this process instead of the host's, leaves out half of what dashboards ask for, and
takes 1.3 MiB of each node.
Kernels differ and the text is not trusted: what does not parse is left out, never an error; every
result is bounded by a number that the caller gives or that is stated here. Reads no file.
"""

import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple

#: Columns of a processor's line in /proc/stat.
CPU_MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
#: The columns behind them: parts of user and nice.
GUEST_MODES = ("user", "nice")
#: Columns of a device's line in /proc/net/dev.
NETWORK_COLUMNS = (
    "receive_bytes", "receive_packets", "receive_errs", "receive_drop",
    "receive_fifo", "receive_frame", "receive_compressed", "receive_multicast",
    "transmit_bytes", "transmit_packets", "transmit_errs", "transmit_drop",
    "transmit_fifo", "transmit_colls", "transmit_carrier", "transmit_compressed",
)  # fmt: skip
#: Most names of one file of names and numbers.
MAX_NAMES = 512
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ESCAPED = re.compile(r"\\(040|011|012|134)")


class Mount(NamedTuple):
    """A mounted file system; `point` is where, as the host sees it."""

    device: str
    point: str
    kind: str
    options: frozenset[str]
    #: major:minor, the same for all mounts of one file system.
    number: str

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written, by the mount or by the file system."""
        return bool(self.options & {"ro", "emergency_ro"})


def number(text: str) -> int | None:
    """A whole number of at most 20 digits, or None."""
    text = text.strip()
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
        return None
    return int(text)


def numbers(words: list[str]) -> list[int]:
    """The leading words that are numbers."""
    found: list[int] = []
    for word in words:
        value = number(word)
        if value is None:
            break
        found.append(value)
    return found


def cpu_ticks(stat: str, most: int) -> dict[str, list[int]]:
    """Ticks by processor ("0", "1"; "" is all of them), in the order of the modes, then guests."""
    found: dict[str, list[int]] = {}
    for line in stat.splitlines():
        if not line.startswith("cpu"):
            break  # they come first
        name, *words = line.split()
        ticks = numbers(words)
        if len(ticks) >= 4 and len(found) <= most:
            found[name.removeprefix("cpu")] = (ticks + [0] * 10)[:10]
    return found


def stat_totals(stat: str) -> dict[str, int]:
    """First number of the lines of /proc/stat that are not of processors: ctxt, btime, intr ..."""
    found: dict[str, int] = {}
    for line in stat.splitlines():
        name, _, rest = line.partition(" ")
        value = number(rest.partition(" ")[0])
        if value is not None and not name.startswith("cpu") and len(found) < MAX_NAMES:
            found[name] = value
    return found


def memory(text: str) -> dict[str, int]:
    """/proc/meminfo: NAME_bytes for sizes, NAME for numbers, "(" in names as "_"."""
    found: dict[str, int] = {}
    for line in text.splitlines()[:MAX_NAMES]:
        name, _, rest = line.partition(":")
        name = name.replace("(", "_").replace(")", "")
        words = rest.split()
        value = number(words[0]) if words else None
        if value is None or not _NAME.fullmatch(name):
            continue
        if words[1:] == ["kB"]:
            found[f"{name}_bytes"] = value * 1024
        else:
            found[name] = value
    return found


def loads(text: str) -> tuple[float, float, float] | None:
    """/proc/loadavg: of one, five and fifteen minutes."""
    try:
        one, five, fifteen = map(float, text.split()[:3])
    except ValueError:
        return None
    return one, five, fifteen


def disks(text: str) -> Iterator[tuple[str, list[int]]]:
    """/proc/diskstats: name and counters of each device; old kernels have fewer counters."""
    for line in text.splitlines():
        words = line.split()
        counters = numbers(words[3:20])
        if len(counters) >= 11:
            yield words[2], counters


def networks(text: str) -> Iterator[tuple[str, list[int]]]:
    """/proc/net/dev: name and counters of each device, in the order of NETWORK_COLUMNS."""
    for line in text.splitlines()[2:]:
        name, _, rest = line.strip().rpartition(":")
        counters = numbers(rest.split())
        if name and len(counters) >= len(NETWORK_COLUMNS):
            yield name, counters[: len(NETWORK_COLUMNS)]


def sockets(text: str, page_bytes: int) -> dict[str, int]:
    """/proc/net/sockstat and sockstat6: TCP_inuse, TCP_mem_bytes ...; sockets_used."""
    found: dict[str, int] = {}
    for line in text.splitlines()[:64]:
        protocol, _, rest = line.partition(":")
        words = rest.split()
        for name, word in zip(words[::2], words[1::2], strict=False):
            key, value = f"{protocol}_{name}", number(word)
            if value is None or not _NAME.fullmatch(key):
                continue
            found[key] = value
            if name == "mem":
                found[f"{key}_bytes"] = value * page_bytes
    return found


def named_numbers(text: str) -> Iterator[tuple[str, int]]:
    """Lines of a name and a number, as in /proc/vmstat and /proc/net/snmp6."""
    for line in text.splitlines()[:MAX_NAMES]:
        name, _, rest = line.partition(" ")
        value = number(rest.strip())
        if value is not None and _NAME.fullmatch(name):
            yield name, value


def statistics(text: str) -> Iterator[tuple[str, int]]:
    """/proc/net/netstat and snmp: pairs of lines, names above and numbers below."""
    lines = text.splitlines()[:64]
    for names, values in zip(lines[::2], lines[1::2], strict=False):
        protocol, _, columns = names.partition(":")
        again, _, words = values.partition(":")
        if protocol != again:
            return
        for name, word in zip(columns.split(), words.split(), strict=False):
            value = number(word)
            if value is not None and _NAME.fullmatch(f"{protocol}_{name}"):
                yield f"{protocol}_{name}", value


def ipv6(text: str) -> Iterator[ipaddress.IPv6Address]:
    """/proc/net/if_inet6: the addresses of all devices."""
    for line in text.splitlines()[:MAX_NAMES]:
        try:
            yield ipaddress.IPv6Address(int(line[:32], 16))
        except ValueError:
            continue


def busy(ticks: list[int]) -> tuple[int, int]:
    """Ticks in which a processor did something, and all, of one line of `cpu_ticks`."""
    modes = dict(zip(CPU_MODES, ticks, strict=False))
    return sum(modes.values()) - modes["idle"] - modes["iowait"], sum(modes.values())


def pressure(text: str) -> dict[str, int]:
    """/proc/pressure/*: microseconds waited by some, and by all (full)."""
    found: dict[str, int] = {}
    for line in text.splitlines()[:4]:
        kind, *words = line.split() or [""]
        for word in words:
            value = number(word.removeprefix("total="))
            if word.startswith("total=") and value is not None:
                found[kind] = value
    return found


def mounts(mountinfo: str, root: str, most: int) -> list[Mount]:
    """/proc/PID/mountinfo, without the hidden ones below another mount on the same point.

    Args:
        mountinfo: The text.
        root: Where the host's root is mounted for us; it is taken off the mount points if any of
            them is there, as it is where only our own mounts could be read.
        most: Most mounts that are looked at.
    """
    found: dict[str, Mount] = {}
    for line in mountinfo.splitlines()[:most]:
        left, _, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if len(before) < 6 or len(after) < 3:
            continue
        options = frozenset(before[5].split(",") + after[2].split(","))
        point = unescaped(before[4])
        found.pop(point, None)  # the later one hides it
        found[point] = Mount(unescaped(after[1]), point, after[0], options, before[2])
    if root != "/" and root in found:
        below = root + "/"
        inside = (m for m in found.values() if m.point == root or m.point.startswith(below))
        return [m._replace(point=m.point.removeprefix(root) or "/") for m in inside]
    return list(found.values())


def unescaped(text: str) -> str:
    """A name as it is, from a table where blanks and backslashes are written in octal."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)
