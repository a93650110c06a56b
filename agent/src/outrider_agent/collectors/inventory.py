"""What there is on the host: packages, accounts, listening ports, mounts, kernel modules.

Told whole at the start and once a day, else as differences: cheap signs (times of files, small
tables) are looked at often, all is read when they change or an hour has gone. What was told last is
kept in memory only: a new process tells all again, so that no consumer depends on a file of ours.
Blocks: use a thread.
"""

import asyncio
import os
import random
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from outrider_proto import records
from outrider_runtime.logs import get_logger

from outrider_agent.collectors.filesystems import MAX_MOUNTS, FileSystems
from outrider_agent.collectors.host import IGNORED_KINDS
from outrider_agent.collectors.hostinfo import HostPaths, read
from outrider_agent.collectors.schedule import Pace, repeat_forever
from outrider_agent.core import inventory, procfs
from outrider_agent.core.inventory import Changes, Entries, Listener
from outrider_agent.core.records import RecordClass, RecordSink
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings_collectors import InventorySettings

log = get_logger("outrider.collectors")

#: Most bytes of a file or of a program's output that are read, and of one line.
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_LINE_BYTES = 4096
#: Longest run of rpm, seconds.
RPM_SECONDS = 60.0
#: Bounds of the search for the processes that listen: processes, descriptors, seconds.
MAX_PROCESSES = 8192
MAX_DESCRIPTORS = 200_000
SEARCH_SECONDS = 2.0
MAX_LISTENERS = 4096
#: Most lines of a table of sockets.
MAX_TABLE_LINES = 20_000
_RPM_FOLDERS = ("var/lib/rpm", "usr/lib/sysimage/rpm")
_RPM_FILES = ("rpmdb.sqlite", "rpmdb.sqlite-wal", "Packages.db", "Packages")
_DPKG = "var/lib/dpkg/status"
_APK = "lib/apk/db/installed"
#: Where a table of the network may be; process 1 has the host's.
_NETWORKS = ("1/net", "net")

Reading = tuple[Entries, int]


@dataclass(frozen=True)
class Kind:
    """One kind of inventory.

    Attributes:
        name: As in the settings.
        data_type: Of its records.
        sign: Something cheap that is another one when the entries may be.
        read: The entries, and how many were left out.
    """

    name: str
    data_type: int
    sign: Callable[[], object]
    read: Callable[[], Reading]


@dataclass
class _Told:
    """What was told last of one kind, and when."""

    entries: Entries | None = None
    identity: str = ""
    sign: object = None
    read_at: float = 0.0
    full_at: float = 0.0
    failing: bool = False


class Inventory:
    """Makes the records of all kinds.

    Args:
        kinds: What is looked at.
        settings: How often.
        failed: Is told the name of a kind that could not be read.
        left_out: Is told the name of a kind and how many entries are beyond its bound.
        clock: Seconds of a steady clock.
    """

    def __init__(
        self,
        kinds: Iterable[Kind],
        settings: InventorySettings,
        failed: Callable[[str], None],
        left_out: Callable[[str, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kinds = list(kinds)
        self.settings = settings
        #: Longest time until all is read again, seconds; may be changed at any time.
        self.interval_seconds = settings.interval_seconds
        self._failed = failed
        self._left_out = left_out
        self._clock = clock
        self._told = {kind.name: _Told() for kind in self._kinds}

    def collect(self) -> list[tuple[int, dict[str, str]]]:
        """Type and fields of the records that are due: often none."""
        made: list[tuple[int, dict[str, str]]] = []
        for kind in self._kinds:
            told = self._told[kind.name]
            try:
                made += [(kind.data_type, fields) for fields in self._look(kind, told)]
                told.failing = False
            except Exception as error:  # noqa: BLE001 - hosts differ: told once, the others go on
                self._failed(kind.name)
                if not told.failing:
                    log.warning("inventory cannot be read", kind=kind.name, error=str(error))
                told.failing = True
        return made

    def _look(self, kind: Kind, told: _Told) -> list[dict[str, str]]:
        now, sign = self._clock(), kind.sign()
        due = now - told.read_at >= self.interval_seconds
        full = told.entries is None or now - told.full_at >= self.settings.full_seconds
        if not (full or due or sign != told.sign):
            return []
        entries, left_out = kind.read()
        told.sign, told.read_at = sign, now
        self._left_out(kind.name, left_out)
        changes = inventory.difference({} if full else told.entries or {}, entries)
        if not (changes or full):
            return []
        base, told.identity = "" if full else told.identity, inventory.identity(entries)
        told.entries = entries
        if full:
            told.full_at = now
        common = {
            "report": "full" if full else "changes",
            "snapshot": told.identity,
            "base": base,
            "entries": str(len(entries)),
            "left_out": str(left_out),
        }
        return list(_fields(common, changes))


def _fields(common: dict[str, str], changes: Changes) -> Iterator[dict[str, str]]:
    parts = inventory.pieces(changes)
    for number, part in enumerate(parts, 1):
        yield {**common, "part": str(number), "parts": str(len(parts)), **part.fields()}


def kinds(settings: InventorySettings, paths: HostPaths, file_systems: FileSystems) -> list[Kind]:
    """The kinds that the settings want."""
    packages, accounts = _Packages(paths.root), _Accounts(paths.root)
    ports, mounts = _Ports(paths.proc), _Mounts(file_systems)
    modules = _Modules(paths.proc)
    known = (
        Kind("packages", records.INVENTORY_PACKAGES, packages.sign, packages.read),
        Kind("accounts", records.INVENTORY_ACCOUNTS, accounts.sign, accounts.read),
        Kind("ports", records.INVENTORY_PORTS, ports.sign, ports.read),
        Kind("mounts", records.INVENTORY_MOUNTS, mounts.sign, mounts.read),
        Kind("modules", records.INVENTORY_MODULES, modules.sign, modules.read),
    )
    return [kind for kind in known if kind.name in settings.kinds]


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a regular file, cut; none if there is no such file. Never waits."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            yield from _bounded_lines(file.readline)


def _bounded_lines(readline: Callable[[int], bytes]) -> Iterator[str]:
    room, rest_of_long = MAX_FILE_BYTES, False
    while room > 0 and (line := readline(MAX_LINE_BYTES)):
        room -= len(line)
        if not rest_of_long:
            yield line.decode("utf-8", "replace")
        rest_of_long = not line.endswith(b"\n")


def _file_signs(root: Path, names: Iterable[str]) -> tuple[object, ...]:
    """What of files is another one when they were written."""
    found: list[object] = []
    for name in names:
        try:
            status = (root / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


@dataclass(frozen=True)
class _Packages:
    root: Path

    def sign(self) -> object:
        rpm = (f"{folder}/{file}" for folder in _RPM_FOLDERS for file in _RPM_FILES)
        return _file_signs(self.root, (_DPKG, _APK, *rpm))

    def read(self) -> Reading:
        return inventory.bounded(self._all())

    def _all(self) -> Iterator[tuple[str, str]]:
        yield from inventory.dpkg(lines_of(self.root / _DPKG))
        yield from inventory.apk(lines_of(self.root / _APK))
        folders = (self.root / folder for folder in _RPM_FOLDERS)
        if any((folder / file).is_file() for folder in folders for file in _RPM_FILES):
            yield from inventory.rpm(_rpm_lines(self.root))


def _rpm_lines(root: Path) -> list[str]:
    """What rpm prints of its database.

    Raises:
        OSError: There is no rpm, or it fails or takes too long.
    """
    program = shutil.which("rpm")
    if program is None:
        raise OSError("there is an rpm database, but no program rpm that could read it")
    where = [] if root == Path("/") else ["--root", str(root)]
    with subprocess.Popen(
        [program, *where, "-qa", "--queryformat", inventory.RPM_FORMAT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PATH": os.defpath, "LC_ALL": "C"},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        alarm = threading.Timer(RPM_SECONDS, process.kill)
        alarm.daemon = True
        alarm.start()
        try:
            found = list(_bounded_lines(process.stdout.readline))
        finally:
            alarm.cancel()
            if process.poll() is None and process.stdout.read(1):
                process.kill()  # it printed more than the bound
    if process.returncode != 0:
        raise OSError(f"rpm -qa ended with {process.returncode}")
    return found


@dataclass(frozen=True)
class _Accounts:
    root: Path

    def sign(self) -> object:
        return _file_signs(self.root, ("etc/passwd", "etc/group"))

    def read(self) -> Reading:
        return inventory.bounded(self._all())

    def _all(self) -> Iterator[tuple[str, str]]:
        yield from inventory.users(lines_of(self.root / "etc/passwd"))
        yield from inventory.groups(lines_of(self.root / "etc/group"))


@dataclass(frozen=True)
class _Modules:
    proc: Path

    def sign(self) -> object:
        return hash(frozenset(inventory.modules(lines_of(self.proc / "modules"))))

    def read(self) -> Reading:
        return inventory.bounded(inventory.modules(lines_of(self.proc / "modules")))


@dataclass(frozen=True)
class _Mounts:
    file_systems: FileSystems

    def sign(self) -> object:
        return hash(frozenset(self._all()))

    def read(self) -> Reading:
        return inventory.bounded(self._all(), MAX_MOUNTS)

    def _all(self) -> Iterator[tuple[str, str]]:
        for mount in self.file_systems.mounts():
            # Those of containers come and go all the time, and hold nothing of their own.
            if mount.kind not in IGNORED_KINDS:
                access = "ro" if mount.read_only else "rw"
                text = inventory.entry(device=mount.device, type=mount.kind, access=access)
                yield mount.point, text


@dataclass(frozen=True)
class _Ports:
    proc: Path

    def sign(self) -> object:
        return hash(frozenset((one.name, one.uid) for one in self._listeners()))

    def read(self) -> Reading:
        found = list(self._listeners())
        wanted = {one.inode for one in found}
        entries = inventory.port_entries(found, self._processes(wanted) if wanted else {})
        return inventory.bounded(entries.items(), MAX_LISTENERS)

    def _listeners(self) -> Iterator[Listener]:
        words = read(self.proc / "sys/net/ipv4/ip_local_port_range").split()
        ports = procfs.numbers(words)
        ephemeral = (ports[0], ports[1]) if len(ports) == 2 else (32768, 60999)
        folder = next((n for n in _NETWORKS if (self.proc / n / "tcp").exists()), _NETWORKS[-1])
        for protocol in ("tcp", "tcp6", "udp", "udp6"):
            lines = islice(lines_of(self.proc / folder / protocol), MAX_TABLE_LINES)
            for count, one in enumerate(inventory.listeners(protocol, lines, ephemeral)):
                if count > MAX_LISTENERS:
                    break
                yield one

    def _processes(self, inodes: set[str]) -> dict[str, str]:
        """Names of processes by the inode of a socket that they have; what may be seen of them."""
        found: dict[str, str] = {}
        deadline, seen = time.monotonic() + SEARCH_SECONDS, 0
        numbers = (name for name in os.listdir(self.proc) if name.isdigit())  # noqa: PTH208
        for count, number in enumerate(numbers):
            if count > MAX_PROCESSES or seen > MAX_DESCRIPTORS or time.monotonic() > deadline:
                break
            folder = f"{self.proc}/{number}/fd"
            try:
                descriptors = os.listdir(folder)  # noqa: PTH208 - many
            except OSError:
                continue  # ended, or not ours to see
            seen += len(descriptors)
            for descriptor in descriptors:
                try:
                    target = os.readlink(f"{folder}/{descriptor}")  # noqa: PTH115 - many
                except OSError:
                    continue
                inode = target.removeprefix("socket:[").removesuffix("]")
                if inode in inodes and inode not in found:
                    found[inode] = read(self.proc / number / "comm")
        return found


async def report_forever(
    found: Inventory, pace: Pace, sink: RecordSink, metrics: AgentMetrics
) -> None:
    """Have the records made and taken, after a random part of the first wait.

    Not at once: when all agents start together, they would all tell everything together.
    """

    async def deliver(made: list[tuple[int, dict[str, str]]]) -> None:
        for data_type, fields in made:
            record = records.payload(data_type, int(time.time()), fields)
            await sink.put(record, RecordClass.LOG)

    await asyncio.sleep(random.uniform(0, pace.interval))
    await repeat_forever("inventory", pace, found.collect, deliver, metrics)
