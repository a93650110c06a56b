"""Machines: sets of namespaces, each held by one init process, and daemons inside them.

A machine ("cp", "node1", ...) has its own mounts, network, processes, names, IPC and cgroups.
Killing its init kills every process of it, and with the last one go its mounts, its network and
its firewall rules. What the daemons are is for `daemons` and `nodes`.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from cluster import cgroups
from cluster.errors import ClusterError
from cluster.layout import (
    DNS_SERVICE,
    IMAGES,
    MACHINE_FILES,
    STATE,
    TOOLS,
    machine_address,
)
from cluster.network import connect, namespace_command
from cluster.processes import (
    log_tail,
    only_child,
    read_pid,
    run,
    start,
    wait_for,
    write_pid,
)

_CLUSTER_FILE = STATE / "cluster.json"


def record(nodes: int) -> None:
    """Write down how many nodes this cluster has."""
    _CLUSTER_FILE.write_text(json.dumps({"nodes": nodes}))


def node_count() -> int:
    """How many nodes `up` made; 0 without a cluster."""
    try:
        return int(json.loads(_CLUSTER_FILE.read_text())["nodes"])
    except OSError:
        return 0


def names() -> list[str]:
    """All machines that `up` made, "cp" first; whether they run is another matter."""
    count = node_count()
    return ["cp", *(f"node{i}" for i in range(1, count + 1))] if count else []


def build_init() -> None:
    """Compile the machines' init once; it is static, because pods' sandboxes run it too."""
    program = TOOLS / "pause"
    source = MACHINE_FILES / "pause.c"
    if program.exists() and program.stat().st_mtime >= source.stat().st_mtime:
        return
    TOOLS.mkdir(parents=True, exist_ok=True)
    fresh = TOOLS / f"pause.{os.getpid()}"
    run("gcc", "-O2", "-static", "-o", fresh, source)
    fresh.rename(program)


def _write_files(machine: str) -> Path:
    """The private files that a machine has from its first moment on."""
    folder = STATE / machine
    for sub in ("etc", "var-lib/kubelet", "var-lib/containerd", "var-log/pods", "tmp", "cni"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    (folder / "tmp").chmod(0o1777)
    etc = folder / "etc"
    address = machine_address(machine)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{address} {machine}\n")
    (etc / "hostname").write_text(f"{machine}\n")
    # Names outside the cluster do not exist: that is told at once instead of after a timeout.
    (etc / "resolv.conf").write_text(f"nameserver {DNS_SERVICE}\n")
    if not (etc / "machine-id").exists():  # it outlives a reboot
        (etc / "machine-id").write_text(f"{uuid.uuid4().hex}\n")
    (etc / "boot_id").write_text(f"{uuid.uuid4()}\n")
    (folder / "booted").unlink(missing_ok=True)
    shutil.copy2(TOOLS / "pause", folder / "pause")
    return folder


def boot(machine: str) -> None:
    """Make a machine: namespaces, init, private folders, and a cable to the switch.

    Raises:
        ClusterError: it did not come up; with its log.
    """
    folder = _write_files(machine)
    cgroups.make(f"{machine}/system")
    mounts = ",".join(f"{name}:{option}" for name, option in cgroups.hierarchies())
    name = f"{machine}.init"
    process = start(
        name,
        [
            *cgroups.enter_command(machine, "."),
            *("unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--fork"),
            *("/bin/sh", MACHINE_FILES / "init.sh", machine, folder),
            *(STATE / "bin", IMAGES / "containerd", mounts),
        ],
    )
    init = only_child(process, name)

    def booted() -> bool:
        if process.poll() is not None:
            raise ClusterError(f"{machine} did not boot:\n{log_tail(name, 30)}")
        return (folder / "booted").exists()

    wait_for(f"boot of {machine}", booted, 20, 0.01)
    write_pid(name, init)
    connect(machine, init, node_count())


def spawn(
    machine: str, name: str, argv: Sequence[object], environment: dict[str, str] | None = None
) -> None:
    """Start a daemon inside a machine and remember how, for `respawn`.

    nsenter stays outside as its parent (to enter a pid namespace it has to fork); the daemon is
    nsenter's only child.

    Raises:
        ClusterError: it is running already, or could not be started.
    """
    key = f"{machine}.{name}"
    if read_pid(key):
        raise ClusterError(f"{key} is running already")
    words = [str(word) for word in argv]
    commands = STATE / "command"
    commands.mkdir(parents=True, exist_ok=True)
    (commands / key).write_text(json.dumps([words, environment or {}]))
    prefix = [*cgroups.enter_command(machine), *namespace_command(machine)]
    process = start(key, [*prefix, *words], environment)
    # The wrapper is a shell first; it has a child only once nsenter has forked.
    write_pid(key, only_child(process, key))


def respawn(machine: str, name: str) -> None:
    """Start a daemon again as it was started last.

    Raises:
        ClusterError: this machine never had such a daemon, or it is running.
    """
    key = f"{machine}.{name}"
    try:
        argv, environment = json.loads((STATE / "command" / key).read_text())
    except OSError:
        raise ClusterError(f"{machine} never had a daemon called {name}") from None
    spawn(machine, name, argv, environment)


def execute(machine: str, argv: Sequence[object], timeout: float = 60) -> str:
    """Run a command inside a machine and return what it prints.

    Raises:
        ClusterError: it failed.
    """
    prefix = [*cgroups.enter_command(machine), *namespace_command(machine)]
    return run(*prefix, *argv, timeout=timeout).stdout
