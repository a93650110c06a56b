"""Holds the agent itself to a limit of processor time and memory, by a control group of its own.

A control group (version 2, or 1) below the one that the agent was started in, where the system
lets us make one. Where it does not, nothing holds the agent to the limit, and that is said: a limit
of address space would end a program with many threads long before it used its memory, and one of
processor time counts for ever. What the agent starts for others is moved out by `release`. All of
it blocks, for moments.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from outrider_runtime.logs import get_logger

log = get_logger("outrider.config")

#: Begin of the names of our groups. Plug-ins' groups are made beside them, never below.
LEAF: Final = "outrider-agent"
#: For what the agent starts, in version 2, where a group with groups below has no processes.
OTHERS: Final = "outrider-others"
PERIOD_MICROS: Final = 100_000
_LEAST_QUOTA_MICROS: Final = 1000
_ROOT: Final = Path("/sys/fs/cgroup")
_PROC: Final = Path("/proc")
_INSTEAD: Final = "the Pod's own limits (chart value agent.resources) hold in any case"


class LimitError(Exception):
    """The kernel cannot be made to hold the agent to a limit; the text says why."""


class OwnLimits:
    """The agent's limits. Not for several threads at once.

    Args:
        root: Where control groups are mounted.
        pid: The process to be held.
    """

    def __init__(self, root: Path = _ROOT, pid: int | None = None) -> None:
        self._root = root
        self._pid = os.getpid() if pid is None else pid
        self._leaves: dict[str, Path] = {}
        self._others: Path | None = None
        self._asked: dict[str, int | None] = {"cpu": None, "memory": None}
        #: Why a limit that is asked for does not hold, by resource.
        self.unheld: dict[str, str] = {}

    @property
    def asked(self) -> Mapping[str, int | None]:
        """The limits asked for: "cpu" in thousandths of a core, "memory" in bytes."""
        return self._asked

    def set(self, cpu_millis: int | None, memory_bytes: int | None) -> None:
        """Hold the agent to these limits from now on; None: to none. See `unheld`."""
        self._asked = {"cpu": cpu_millis, "memory": memory_bytes}
        self.unheld = {}
        for resource, value in self._asked.items():
            if value is None and resource not in self._leaves:
                continue
            try:
                self._write(resource, value)
            except (OSError, LimitError) as error:
                if value is not None:
                    why = getattr(error, "strerror", None) or str(error)
                    self.unheld[resource] = f"no control group can be used: {why}; {_INSTEAD}"

    def again(self) -> None:
        """Try once more what does not hold."""
        if self.unheld:
            self.set(self._asked["cpu"], self._asked["memory"])

    def problems(self) -> list[str]:
        """The limits that do not hold, as sentences."""
        names = {"cpu": "agent.cpuMillis", "memory": "agent.memoryBytes"}
        return [f"{names[what]} is not enforced: {why}" for what, why in self.unheld.items()]

    def release(self, pid: int) -> None:
        """Move a process that the agent just started out of its limits; it may have ended."""
        for resource, leaf in self._leaves.items():
            place = leaf.parent if self._others is None else self._others
            try:
                (place / "cgroup.procs").write_text(str(pid))
            except ProcessLookupError:
                return
            except OSError as error:
                log.debug("a process stays in the agent's limits", what=resource, error=str(error))

    def _write(self, resource: str, value: int | None) -> None:
        leaf = self._leaf(resource)
        if self._unified:
            if resource == "cpu":
                quota = "max" if value is None else str(_quota(value))
                (leaf / "cpu.max").write_text(f"{quota} {PERIOD_MICROS}")
            else:
                (leaf / "memory.max").write_text("max" if value is None else str(value))
        elif resource == "cpu":
            (leaf / "cpu.cfs_period_us").write_text(str(PERIOD_MICROS))
            (leaf / "cpu.cfs_quota_us").write_text("-1" if value is None else str(_quota(value)))
        else:
            (leaf / "memory.limit_in_bytes").write_text("-1" if value is None else str(value))

    @property
    def _unified(self) -> bool:
        return (self._root / "cgroup.controllers").exists()

    def _leaf(self, resource: str) -> Path:
        """Our group for a resource, with us in it."""
        if resource in self._leaves:
            return self._leaves[resource]
        base = self._base("" if self._unified else resource)
        # In version 1 several agents may have been started in one group: the system's own.
        leaf = base / (LEAF if self._unified else f"{LEAF}-{self._pid}")
        _clear(base)
        leaf.mkdir(exist_ok=True)
        (leaf / "cgroup.procs").write_text(str(self._pid))
        if self._unified:
            try:
                (base / "cgroup.subtree_control").write_text(f"+{resource}")
                others = base / OTHERS
                others.mkdir(exist_ok=True)
            except OSError:
                self._return(base, leaf)
                raise
            self._others = others
        self._leaves[resource] = leaf
        return leaf

    def _return(self, base: Path, leaf: Path) -> None:
        """Be where we were, since the group is of no use."""
        with contextlib.suppress(OSError):
            (base / "cgroup.procs").write_text(str(self._pid))
            leaf.rmdir()

    def _base(self, controller: str) -> Path:
        """The group that we are in; without a controller that of version 2."""
        text = (_PROC / str(self._pid) / "cgroup").read_text()
        for line in text.splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(","):
                top = self._root / controller
                # A container sees its own group as the top, and may still be told its whole path.
                found = top / path.lstrip("/")
                found = found if found.is_dir() else top
                return found.parent if found.name.startswith(LEAF) else found
        raise LimitError(f"the system has no controller {controller or 'of version 2'}")


def _quota(cpu_millis: int) -> int:
    return max(_LEAST_QUOTA_MICROS, cpu_millis * PERIOD_MICROS // 1000)


def _clear(base: Path) -> None:
    """Remove the groups of agents that are gone: those with a process in them cannot be."""
    for left in base.glob(f"{LEAF}*"):
        with contextlib.suppress(OSError):
            left.rmdir()
