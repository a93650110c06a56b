"""The cluster's cgroups: how its processes are found again, whatever became of their parents.

Every process of the cluster is born in the cgroup /<NAME> of all version 1 hierarchies. So `down`
needs no pid files and no process names, and does not depend on the `up` having finished. Nothing
here starts processes; killing is for `processes` and `lifecycle`.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import cache
from pathlib import Path

from cluster.errors import MissingError
from cluster.layout import NAME, PREFIX

ROOT = Path("/sys/fs/cgroup")


@cache
def hierarchies() -> tuple[tuple[str, str], ...]:
    """The version 1 mounts as (folder, mount option), for example ("memory", "memory")."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        mountpoint = Path(left.split()[4])
        kind, _, options = right.split()[:3]
        if kind == "cgroup" and mountpoint.parent == ROOT:
            own = [o for o in options.split(",") if o not in ("rw", "ro", "relatime", "xattr")]
            found.append((mountpoint.name, ",".join(own)))
    return tuple(found)


def require() -> None:
    """See that the machine has what the cluster needs.

    Raises:
        MissingError: it has no cgroup version 1, or a hierarchy less than is needed.
    """
    absent = {"pids", "freezer", "memory", "cpu", "devices"} - {name for name, _ in hierarchies()}
    if absent:
        raise MissingError(
            f"no cgroup version 1 hierarchy for {', '.join(sorted(absent))} under {ROOT}: the "
            "three-node cluster needs them (boot with systemd.unified_cgroup_hierarchy=0 "
            "systemd.legacy_systemd_cgroup_controller=1, or use a container of such a machine)"
        )


def folder(hierarchy: str, path: str = ".") -> Path:
    """Folder of <NAME>/<path> in one hierarchy."""
    return ROOT / hierarchy / NAME / path


def make(path: str) -> None:
    """Create <NAME>/<path> in all hierarchies."""
    for hierarchy, _ in hierarchies():
        current = ROOT / hierarchy
        for part in (NAME, *Path(path).parts):
            current = current / part
            current.mkdir(exist_ok=True)
            if hierarchy == "cpuset":  # it takes no process before these are set
                for name in ("cpuset.cpus", "cpuset.mems"):
                    (current / name).write_text((current.parent / name).read_text())
                (current / "cgroup.clone_children").write_text("1")


def remove(path: str = ".") -> None:
    """Remove <NAME>/<path> and all below it; no process may be left in it."""
    for hierarchy, _ in hierarchies():
        top = folder(hierarchy, path)
        for _ in range(100):
            for child in sorted(top.glob("**/"), key=lambda p: -len(p.parts)):
                with contextlib.suppress(OSError):  # not empty yet: the kernel is still at it
                    child.rmdir()
            if not top.exists():
                break
            time.sleep(0.02)


def existing() -> list[Path]:
    """Folders of this cluster that are there now, at most one a hierarchy."""
    return [top for name, _ in hierarchies() if (top := folder(name)).exists()]


def others() -> list[str]:
    """Names of other clusters with live processes on this machine."""
    return sorted(
        top.name
        for top in (ROOT / "pids").glob(f"{PREFIX}*/")
        if top.name != NAME and any(f.read_text().strip() for f in top.glob("**/cgroup.procs"))
    )


def thaw(path: str = ".") -> None:
    """Unfreeze: a process in a frozen cgroup does not even die of SIGKILL."""
    for state in sorted(folder("freezer", path).glob("**/freezer.state")):
        with contextlib.suppress(OSError):
            state.write_text("THAWED")


def track(path: str = "ctl") -> None:
    """Move this process into the cluster's cgroup: from here on no child can get lost."""
    make(path)
    (folder("pids", path) / "cgroup.procs").write_text(str(os.getpid()))


def processes(path: str = ".") -> set[int]:
    """Ids of all processes below <NAME>/<path>, those of pods too, but this one."""
    found: set[int] = set()
    for hierarchy, _ in hierarchies():
        for procs in folder(hierarchy, path).glob("**/cgroup.procs"):
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in procs.read_text().split())
    return found - {os.getpid(), 0}


def enter_command(machine: str, sub: str = "system") -> list[str]:
    """A command prefix that moves into a machine's cgroups and then runs the rest."""
    procs = " ".join(str(folder(h, f"{machine}/{sub}") / "cgroup.procs") for h, _ in hierarchies())
    script = f'for f in {procs}; do echo $$ > "$f" || exit 97; done; exec "$@"'
    return ["/bin/sh", "-c", script, "enter"]
