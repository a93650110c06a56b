"""Groups of processes with limits of memory and processor time: cgroup v2, or v1, where writable.

A plug-in's group lies below the agent's own, so that the agent's Pod bounds both. Where no group
can be made, the caller falls back to what processes can be told themselves. Blocks, for moments.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from outrider_runtime.logs import get_logger

log = get_logger("outrider.plugins")

ROOT: Final = Path("/sys/fs/cgroup")
PREFIX: Final = "outrider-plugin-"
#: Where the agent itself goes in v2: a group with children may hold no processes.
OWN: Final = "outrider-agent"
#: Period of limits of processor time, microseconds.
PERIOD: Final = 100_000
#: How long an empty group may refuse to go away, seconds.
REMOVE_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Group:
    """The groups of one plug-in; in v1 one for each controller.

    Attributes:
        version: "v2" or "v1".
        memory: The one that bounds memory, None if there is none.
        cpu: The one that bounds processor time.
        beside: In v1, where it goes instead of the agent's own groups, whose limits are not its.
    """

    version: str
    memory: Path | None
    cpu: Path | None
    beside: tuple[Path, ...] = ()

    @property
    def folders(self) -> list[Path]:
        """All of them, once each."""
        return list(dict.fromkeys(p for p in (self.memory, self.cpu) if p is not None))

    @property
    def procs(self) -> list[str]:
        """The files that a process enters itself in."""
        return [str(folder / "cgroup.procs") for folder in [*self.beside, *self.folders]]

    def members(self) -> set[int]:
        """Ids of its processes."""
        found: set[int] = set()
        for folder in self.folders:
            with contextlib.suppress(OSError):
                found.update(int(word) for word in (folder / "cgroup.procs").read_text().split())
        return found

    def out_of_memory(self) -> int:
        """How many of its processes the kernel ended because of its bound."""
        if self.memory is None:
            return 0
        name = "memory.events" if self.version == "v2" else "memory.oom_control"
        with contextlib.suppress(OSError, ValueError):
            for line in (self.memory / name).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
        return 0

    def remove(self) -> None:
        """Take it away; it must be empty. The kernel may need a moment."""
        end = time.monotonic() + REMOVE_SECONDS
        for folder in self.folders:
            while True:
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError as error:
                    if time.monotonic() > end:
                        log.warning("a group stays", group=str(folder), error=str(error))
                        break
                    time.sleep(0.02)


def make(name: str, cpu_millis: int | None, memory_bytes: int | None, root: Path = ROOT) -> Group:
    """A group for a plug-in, with its limits; what cannot be had is None in it.

    Args:
        name: The plug-in's.
        cpu_millis: Thousandths of a core; None: no limit.
        memory_bytes: None: no limit.
        root: Where the groups are mounted.
    """
    if (root / "cgroup.controllers").exists():
        return _make_v2(root, name, cpu_millis, memory_bytes)
    memory = cpu = None
    if memory_bytes is not None:
        values = {"memory.limit_in_bytes": str(memory_bytes), "memory.swappiness": "0"}
        memory = _made(_own(root, "memory"), name, values, ("memory.limit_in_bytes",))
    if cpu_millis is not None:
        # The period first: the kernel refuses shares that make no sense with the one before.
        quota = max(1000, PERIOD * cpu_millis // 1000)
        values = {"cpu.cfs_period_us": str(PERIOD), "cpu.cfs_quota_us": str(quota)}
        cpu = _made(_own(root, "cpu"), name, values, ("cpu.cfs_quota_us",))
    if memory is None and cpu is None:
        return Group("v1", None, None)  # the caller moves it where others of the agent's go
    beside = [_own(root, n) for n, p in (("memory", memory), ("cpu", cpu)) if p is None]
    return Group("v1", memory, cpu, tuple(path for path in beside if path is not None))


def _make_v2(root: Path, name: str, cpu_millis: int | None, memory_bytes: int | None) -> Group:
    own = _own(root, "")
    if own is None or (cpu_millis is None and memory_bytes is None):
        return Group("v2", None, None)
    wanted = [n for n, v in (("cpu", cpu_millis), ("memory", memory_bytes)) if v is not None]
    have = _controllers(own, wanted)
    values: dict[str, str] = {}
    if "memory" in have:
        values |= {"memory.max": str(memory_bytes), "memory.swap.max": "0", "memory.oom.group": "1"}
    if "cpu" in have:
        values["cpu.max"] = f"{max(1000, PERIOD * (cpu_millis or 0) // 1000)} {PERIOD}"
    if not values:
        return Group("v2", None, None)
    needed = [n for n in ("memory.max", "cpu.max") if n in values]
    folder = _made(own, name, values, needed)
    return Group(
        "v2", folder if "memory" in have else None, folder if folder and "cpu" in have else None
    )


def _controllers(own: Path, wanted: Sequence[str]) -> set[str]:
    """Which of the controllers groups below ours have, turned on where that can be done."""
    control = own / "cgroup.subtree_control"
    found: set[str] = set()
    for name in wanted:
        try:
            if name not in control.read_text().split():
                _turn_on(own, control, name)
            found.add(name)
        except OSError:
            continue  # the caller falls back, and says so
    return found


def _turn_on(own: Path, control: Path, name: str) -> None:
    try:
        control.write_text(f"+{name}")
    except OSError:
        # A group with processes can have no such children; ours can go one deeper, if it is ours.
        pids = [int(word) for word in (own / "cgroup.procs").read_text().split()]
        if not pids or set(pids) != set(_family(pids)):
            raise
        leaf = own / OWN
        leaf.mkdir(exist_ok=True)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(str(pid))
        control.write_text(f"+{name}")


def _family(pids: Sequence[int]) -> Iterator[int]:
    """Those of the processes that are ours, or children of ours, or what started us."""
    from outrider_agent.tasks import processes

    everything = processes.scan()
    ours = processes.descendants(everything, os.getpid()) | {os.getpid(), os.getppid(), 1}
    return (pid for pid in pids if pid in ours)


def _own(root: Path, controller: str) -> Path | None:
    """The folder of the group that the agent was started in; "" is v2's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(",") and (controller or not names):
                mounted = root / controller if controller else root
                found = mounted / path.lstrip("/")
                # A path from outside our namespace leads nowhere: the mount itself is ours then.
                found = found if found.is_dir() else mounted
                # The agent's own limits are a group beside those of plug-ins.
                return found.parent if found.name.startswith(OWN) else found
    return None


def _made(
    own: Path | None, name: str, values: dict[str, str], needed: Sequence[str]
) -> Path | None:
    if own is None:
        return None
    folder = own / f"{PREFIX}{name}"
    try:
        folder.mkdir(exist_ok=True)
        for key, value in values.items():
            try:
                (folder / key).write_text(value)
            except OSError:
                if key in needed:
                    raise
    except OSError as error:
        log.info("no group for a plug-in", plugin=name, group=str(folder), error=str(error))
        with contextlib.suppress(OSError):
            folder.rmdir()
        return None
    return folder


def remove_left(root: Path = ROOT) -> None:
    """Remove empty groups that an earlier agent left."""
    folders = {_own(root, name) for name in ("memory", "cpu", "")}
    for own in folders - {None}:
        assert own is not None
        for left in own.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                left.rmdir()
