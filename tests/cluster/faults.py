"""What can go wrong on purpose: nodes that lose power, freeze or are cut off, daemons that die."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence

from cluster import api, cgroups, machines, network, nodes
from cluster.errors import ClusterError
from cluster.processes import kill, read_pid, wait_for

# What keeps watches on the API server.
_WATCHING = ("kubelet", "proxy", "controller-manager", "scheduler")


def power_off(machine: str) -> None:
    """Kill everything of a machine at once; its disk stays.

    Raises:
        ClusterError: it was not running, or something of it does not die.
    """
    cgroups.thaw(machine)
    # The init first: the kernel kills everything in its pid namespace, all at once.
    if not kill(f"{machine}.init"):
        raise ClusterError(f"{machine} was not running")

    def empty() -> bool:
        left = cgroups.processes(machine)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_for(f"end of {machine}", empty, 20, 0.02)
    network.unplug(machine)
    # Else kubelet takes the cgroups of dead containers for live ones at the next boot, and spends
    # 3 s on each of them before the node is Ready.
    cgroups.remove(machine)


def power_on(machine: str) -> None:
    """Boot a node that was powered off."""
    nodes.power_on(machine)


def partition(machine: str, peers: Sequence[str] = ()) -> None:
    """Drop a machine's traffic: all of it, or to and from the named peers."""
    cut = network.partitions()
    cut[machine] = list(peers)
    network.apply_partitions(cut)


def heal(machine: str) -> None:
    """End a partition."""
    cut = network.partitions()
    cut.pop(machine, None)
    network.apply_partitions(cut)


def _set_freezer(machine: str, state: str) -> None:
    file = cgroups.folder("freezer", machine) / "freezer.state"
    file.write_text(state)
    wait_for(f"{machine} {state}", lambda: file.read_text().strip() == state, 20, 0.02)


def freeze(machine: str) -> None:
    """Stop all processes of a machine where they are."""
    _set_freezer(machine, "FROZEN")


def thaw(machine: str) -> None:
    """Let a frozen machine go on."""
    _set_freezer(machine, "THAWED")


def stop_daemon(machine: str, name: str) -> None:
    """SIGKILL one daemon of a machine."""
    kill(f"{machine}.{name}")


def start_daemon(machine: str, name: str) -> None:
    """Start a daemon that was stopped; after an API outage everything that watches as well."""
    machines.respawn(machine, name)
    if name in ("apiserver", "etcd") and read_pid("cp.apiserver") and read_pid("cp.etcd"):
        resync()


def restart_daemon(machine: str, name: str) -> None:
    """SIGKILL one daemon and start it again at once."""
    kill(f"{machine}.{name}")
    machines.respawn(machine, name)


def resync(only: Sequence[str] = ()) -> None:
    """Restart everything of Kubernetes that watches the API server; the workload goes on.

    After a longer outage (or a node's partition of more than a minute) client-go tries its watches
    again only every 30 to 60 s. Until then a controller manager does not see the nodes' leases, a
    kubelet compares its status with a stale copy of its Node and does not report that it is Ready,
    and with the short times of this cluster all pods would be evicted meanwhile.
    """
    alive = ["cp.etcd", "cp.apiserver"]
    wait_for("API server", lambda: api.get("/readyz"), alive=alive)
    for machine in only or machines.names():
        for name in _WATCHING:
            if kill(f"{machine}.{name}"):
                machines.respawn(machine, name)
