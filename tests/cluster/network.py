"""The cluster's network: a switch in a namespace of its own, cables to the machines, partitions.

Nothing of it may appear in this machine's own network namespace, but for the forwarders' listeners
on 127.0.0.1.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping, Sequence

from cluster import cgroups
from cluster.errors import ClusterError
from cluster.layout import (
    HERE,
    NAME,
    ROUTER,
    STATE,
    TOOLS,
    machine_address,
    node_address,
    pod_cidr,
)
from cluster.processes import (
    log_tail,
    only_child,
    read_pid,
    run,
    start,
    wait_for,
    write_pid,
)

_PARTITIONS = STATE / "partitions.json"


def namespace_command(machine: str, *flags: str) -> list[str]:
    """A command prefix that enters a machine's namespaces: the named ones, or all.

    Raises:
        ClusterError: the machine is not running.
    """
    pid = read_pid(f"{machine}.init")
    if not pid:
        raise ClusterError(f"{machine} is not running; `node start` or `up` brings it back")
    return ["nsenter", "-t", str(pid), *(flags or ("-m", "-u", "-i", "-n", "-p", "-C"))]


def boot_fabric(nodes: int) -> None:
    """Make the switch: a namespace with a bridge, and a router that knows no way out."""
    routes = "".join(
        f"route add {pod_cidr(i)} via {node_address(i)}\n" for i in range(1, nodes + 1)
    )
    cgroups.make("fabric")
    command = [*cgroups.enter_command("fabric", "."), "unshare", "--net", "--fork", TOOLS / "pause"]
    process = start("fabric.init", command)
    write_pid("fabric.init", only_child(process, "fabric.init"))
    inside = namespace_command("fabric", "-n")
    run(
        *inside,
        *("ip", "-batch", "-"),
        stdin=f"""\
link set lo up
link add br0 type bridge forward_delay 0 stp_state 0
link set br0 alias {NAME}
addr add {ROUTER}/24 dev br0
link set br0 up
route add unreachable default
{routes}""",
    )
    # Without icmp_ratelimit=0 "host unreachable" comes late, and callers wait for a timeout.
    run(
        *inside,
        *("sysctl", "-qw", "net.ipv4.ip_forward=1"),
        *("net.ipv4.icmp_ratelimit=0", "net.bridge.bridge-nf-call-iptables=0"),
    )


def connect(machine: str, init: int, nodes: int) -> None:
    """Plug a booted machine into the switch.

    Args:
        machine: its name.
        init: pid of its first process.
        nodes: how many nodes the cluster has, for the routes to their pods.
    """
    address = machine_address(machine)
    # A fixed MAC: after a reboot the neighbours' ARP entries are still right.
    mac = "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))
    run(
        *namespace_command("fabric", "-n"),
        *("ip", "-batch", "-"),
        stdin=f"""\
link add v-{machine} type veth peer name eth0 address {mac} netns {init}
link set v-{machine} master br0 up
""",
    )
    # Without a default route, connect() to a Service's address fails with ENETUNREACH before its
    # address is even translated. The router answers "host unreachable" for all that is not ours.
    batch = f"""\
link set lo up
link set eth0 alias {NAME}
addr add {address}/24 dev eth0
link set eth0 up
route add default via {ROUTER}
"""
    for other in range(1, nodes + 1):
        if node_address(other) != address:
            batch += f"route add {pod_cidr(other)} via {node_address(other)}\n"
    inside = namespace_command(machine, "-n")
    run(*inside, "ip", "-batch", "-", stdin=batch)
    # /proc/sys/net is that of the namespace of the process that opens it.
    run(
        *inside,
        *("sysctl", "-qw", "net.ipv4.ip_forward=1"),
        *("net.bridge.bridge-nf-call-iptables=1", "net.ipv4.conf.all.rp_filter=0"),
    )


def unplug(machine: str) -> None:
    """Take a stopped machine's cable away.

    A network namespace lives as long as any process holds it (a forwarder does), and the next boot
    would find that the cable exists.
    """
    run(*namespace_command("fabric", "-n"), "ip", "link", "delete", f"v-{machine}", check=False)


def partitions() -> dict[str, list[str]]:
    """The machines that are cut off, each with the peers it is cut off from (none: from all)."""
    try:
        found = json.loads(_PARTITIONS.read_text())
    except OSError:
        return {}
    return {str(machine): [str(peer) for peer in peers] for machine, peers in found.items()}


def partition_rules(cut: Mapping[str, Sequence[str]]) -> str:
    """The nftables rules for a set of partitions.

    Frames are dropped at the bridge's ports: the cable keeps its carrier and the peers see plain
    silence, as with a broken switch. (`fwd` and `out` are keywords and no names for chains.)
    """
    ingress, forward, output = [], [], []
    for machine, peers in cut.items():
        if not peers:
            ingress.append(f'iifname "v-{machine}" drop;')
            forward.append(f'oifname "v-{machine}" drop;')
            output.append(f'oifname "v-{machine}" drop;')
        for peer in peers:
            forward.append(f'iifname "v-{machine}" oifname "v-{peer}" drop;')
            forward.append(f'iifname "v-{peer}" oifname "v-{machine}" drop;')
    return f"""\
table bridge faults
delete table bridge faults
table bridge faults {{
  chain faults_in {{ type filter hook prerouting priority -300; {" ".join(ingress)} }}
  chain faults_forward {{ type filter hook forward priority 0; {" ".join(forward)} }}
  chain faults_out {{ type filter hook output priority 0; {" ".join(output)} }}
}}
"""


def apply_partitions(cut: Mapping[str, Sequence[str]]) -> None:
    """Make exactly these partitions hold."""
    _PARTITIONS.write_text(json.dumps({machine: list(peers) for machine, peers in cut.items()}))
    run(*namespace_command("fabric", "-n"), "nft", "-f", "-", stdin=partition_rules(cut))


def forward(port: int, machine: str, target: str, name: str | None = None) -> None:
    """Listen on 127.0.0.1:port here and hand connections to an address seen from a machine.

    Args:
        port: port on this machine's loopback.
        machine: from whose network namespace to connect.
        target: "address:port".
        name: of the record and the log; by default after the port.

    Raises:
        ClusterError: the port is taken, or the machine is not running.
    """
    name = name or f"forward-{port}"
    pid = read_pid(f"{machine}.init")
    if not pid:
        raise ClusterError(f"cannot forward port {port}: {machine} is not running")
    host, _, target_port = target.rpartition(":")
    cgroups.make("host")
    script = [sys.executable, "-S", HERE / "forwarder.py"]
    process = start(
        name,
        [
            *(*cgroups.enter_command("host", "."), *script, port),
            *(f"/proc/{pid}/ns/net", host, target_port),
        ],
    )

    def listening() -> bool:
        # The forwarder's own listener, not somebody else's: it ends if the port is taken.
        if process.poll() is not None:
            raise ClusterError(f"no forwarder on 127.0.0.1:{port}:\n{log_tail(name)}")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(f"listener of {name}", listening, 10, 0.02)
    write_pid(name, process.pid)
