"""The cluster's beginning and end: `up`, `down`, and the search for what `down` may have left.

`down` trusts nothing that `up` may not have finished writing: it goes by cgroups. The search for
left-overs goes by other signs, so that it does not inherit an error of `down`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from cluster import (
    api,
    cgroups,
    daemons,
    imagestore,
    machines,
    network,
    nodes,
    packages,
    paths,
    pki,
    sysctls,
    toolchain,
)
from cluster.errors import ClusterError, MissingError
from cluster.layout import (
    DEBIAN_PACKAGES,
    DNS_SERVICE,
    KUBECONFIG,
    KUBERNETES_PROGRAMS,
    MAX_NODES,
    NAME,
    PAUSE_IMAGE,
    PORT,
    STATE,
)
from cluster.processes import (
    MARK,
    is_zombie,
    program,
    read_pid,
    run,
    say,
    start_time,
    wait_for,
)

_LOCK = paths.cache() / f"cluster-{NAME}.lock"


# ------------------------------------------------------------------ up
def require() -> None:
    """See that this machine can have such a cluster at all.

    Raises:
        MissingError: it cannot; the text says what it lacks.
    """
    if os.geteuid() != 0:
        raise MissingError("the three-node cluster needs root (namespaces, mounts): run as root")
    cgroups.require()


def up(node_count: int) -> None:
    """Start a control plane and worker nodes; whatever ran under this name before is ended.

    Raises:
        MissingError: this machine lacks something, see the text.
        ClusterError: something did not come up, see the text.
    """
    if not 1 <= node_count <= MAX_NODES:
        raise ClusterError(f"cannot make {node_count} nodes: expected 1 to {MAX_NODES}")
    require()
    packages.ensure(DEBIAN_PACKAGES)
    programs = toolchain.ensure([*KUBERNETES_PROGRAMS])
    kill_processes()  # a running `up` of the same name holds the lock
    with paths.locked(_LOCK):
        _take_down()
        cgroups.track()
        machines.build_init()
        if PAUSE_IMAGE not in imagestore.current():
            raise ClusterError(f"{PAUSE_IMAGE} is not in the image cache: `image build` makes it")
        imagestore.prune()
        STATE.mkdir(parents=True)
        sysctls.save_and_set()
        machines.record(node_count)
        _link_programs(programs)
        _start(node_count)


def _link_programs(programs: dict[str, Path]) -> None:
    """One folder with all programs, for the machines to mount."""
    folder = STATE / "bin"
    folder.mkdir()
    for name, path in programs.items():
        os.link(path, folder / name)


def _start(node_count: int) -> None:
    indices = range(1, node_count + 1)
    network.boot_fabric(node_count)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        certificates = pool.submit(pki.make, node_count)
        boots = [pool.submit(machines.boot, machine) for machine in machines.names()]
        certificates.result()
        boots[0].result()
        KUBECONFIG.touch(0o600)
        KUBECONFIG.write_text(pki.kubeconfig("admin", f"https://127.0.0.1:{PORT}"))
        daemons.start_api()
        network.forward(PORT, "cp", "127.0.0.1:6443", "apiserver-forward")
        for boot in boots:
            boot.result()
        say("machines are up")
        list(pool.map(nodes.prepare, indices))
        list(pool.map(nodes.start_containerd, indices))
    say("containerd started")
    wait_for(
        "API server",
        lambda: api.get("/readyz"),
        alive=["cp.etcd", "cp.apiserver", "apiserver-forward"],
    )
    say("the API server is ready")
    daemons.start_controllers()
    for index in indices:
        nodes.await_containerd(index)
        nodes.start_kubelet(index)
    api.kubectl("create", "-f", "-", stdin=daemons.ADDONS)
    _await_nodes(node_count)


def _await_nodes(node_count: int) -> None:
    """Wait until every node is Ready and Services work on it."""
    indices = range(1, node_count + 1)
    parts = ("kubelet", "proxy", "containerd")
    wait_for(
        "all nodes Ready",
        lambda: sum(api.ready_nodes().values()) == node_count,
        every=0.1,
        alive=[f"node{i}.{part}" for i in indices for part in parts] + ["cp.controller-manager"],
    )
    say("all nodes are Ready")
    wait_for(
        "the default service account",
        lambda: api.get("/api/v1/namespaces/default/serviceaccounts/default"),
    )
    for index in indices:
        inside = network.namespace_command(f"node{index}", "-n")

        def synced(inside: list[str] = inside) -> bool:
            return DNS_SERVICE in run(*inside, "iptables", "-t", "nat", "-S").stdout

        wait_for(f"Services on node{index}", synced, every=0.2)


# ------------------------------------------------------------------ down
def down() -> int:
    """Remove the cluster, whatever state it is in; returns how many processes were killed.

    Raises:
        ClusterError: a process survives SIGKILL.
    """
    killed = kill_processes()  # a running `up` holds the lock, but it is one of these
    with paths.locked(_LOCK):
        return killed + _take_down()


def _take_down() -> int:
    killed = kill_processes()
    cgroups.remove()
    # Mounts were in namespaces that are gone by now; this is for what should not be.
    for mountpoint in _own_mounts():
        run("umount", "-l", mountpoint, check=False)
    sysctls.restore()
    if STATE.exists():
        shutil.rmtree(STATE)
    return killed


def _own_mounts() -> list[str]:
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    points = (line.split()[4] for line in table)
    return sorted((p for p in points if p.startswith(f"{STATE}/")), reverse=True)


def kill_processes() -> int:
    """SIGKILL to everything in the cluster's cgroup until nothing is left; returns how many.

    Raises:
        ClusterError: a process survives it.
    """
    cgroups.thaw()
    count = len(cgroups.processes())
    killed: dict[int, str | None] = {}

    def sigkill(pids: Iterable[int]) -> None:
        for pid in pids:
            killed.setdefault(pid, start_time(pid))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # First a running `up`, then every machine's init: the kernel kills the rest of the machine, and
    # the nsenter and unshare outside collect what they started and end by themselves. Killed all
    # at once, the daemons would be orphaned zombies until the host's init gets round to them, which
    # can take seconds.
    sigkill(cgroups.processes("ctl"))
    inits = [pid for f in (STATE / "run").glob("*.init") if (pid := read_pid(f.name))]
    sigkill(inits)
    end = time.monotonic() + 1
    wrappers = ("nsenter", "unshare")
    while inits and any(program(pid) in wrappers for pid in cgroups.processes()):
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    # Whatever is left: half-started machines, forwarders.
    end = time.monotonic() + 30
    while pids := cgroups.processes():
        sigkill(pids)
        if time.monotonic() > end:
            raise ClusterError(f"processes survive SIGKILL: {sorted(pids)}")
        time.sleep(0.02)

    def gone() -> bool:
        # A dying process leaves its cgroup first and its namespaces a little later.
        return not any(
            began and start_time(pid) == began and not is_zombie(pid)
            for pid, began in killed.items()
        )

    wait_for("end of the killed processes", gone, 30, 0.02)
    return count


# ------------------------------------------------------------------ what is left
def left_overs() -> list[str]:
    """What there is of this cluster on the machine, one line each; empty after a good `down`.

    Looks at every process's environment, mounts and network, not only at the cluster's own records.
    """
    found = [f"process {pid} in the cgroup" for pid in sorted(cgroups.processes())]
    found += [f"cgroup {folder}" for folder in cgroups.existing()]
    found += [f"mount {mountpoint}" for mountpoint in _own_mounts()]
    found += [f"folder {STATE}"] if STATE.exists() else []
    if sysctls.RECORD.exists() and not cgroups.others():
        found.append(f"kernel settings not put back, see {sysctls.RECORD}")
    seen: set[tuple[str, str]] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found += _left_in(entry, seen)
    return found


def _left_in(process: Path, seen: set[tuple[str, str]]) -> list[str]:
    """Signs of the cluster in one process; each namespace is looked at once."""
    if process.name == str(os.getpid()) or is_zombie(int(process.name)):
        return []
    found = []
    if f"{MARK}={NAME}".encode() in (process / "environ").read_bytes().split(b"\0"):
        found.append(f"process {process.name} ({program(int(process.name))})")
    mounts = ("mnt", str((process / "ns" / "mnt").readlink()))
    if mounts not in seen:
        seen.add(mounts)
        if f"{STATE}/" in (process / "mountinfo").read_text():
            found.append(f"mounts of {STATE} in the namespace of process {process.name}")
    net = ("net", str((process / "ns" / "net").readlink()))
    if net not in seen:
        seen.add(net)
        links = run("nsenter", f"--net={process}/ns/net", "ip", "-o", "link", check=False).stdout
        if f"alias {NAME}\n" in links or links.rstrip().endswith(f"alias {NAME}"):
            found.append(f"network namespace of process {process.name}")
    return found
