"""Names, addresses, folders and times of the three-node test cluster.

One place, so that no two modules disagree about an address. Reads the environment once, at
import; must not touch the file system.

Two clusters run side by side when OUTRIDER_CLUSTER_NAME and OUTRIDER_CLUSTER_PORT differ: their
addresses are the same, but each lives in network namespaces of its own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cluster import paths

PREFIX = "outrider"
"""Every cluster's name begins with this: it is how one cluster finds that others are there."""

NAME = os.environ.get("OUTRIDER_CLUSTER_NAME", PREFIX)
"""Name of this cluster and of its cgroup. Short: it is part of every cgroup path."""

PORT = int(os.environ.get("OUTRIDER_CLUSTER_PORT", "16443"))
"""Port of the API server on 127.0.0.1 of this machine."""

HERE = Path(__file__).resolve().parent
MACHINE_FILES = HERE / "machine"

STATE = paths.state(NAME)
"""All files of a running cluster. `down` removes it."""

LOGS = STATE / "log"
TOOLS = paths.cache() / "machine"
"""Small programs built here (the init of the machines). Outlives `down`."""

IMAGES = paths.cache() / "images"
"""The image cache that new nodes start from. Outlives `down`, shared by all clusters."""

KUBECONFIG = STATE / "admin.kubeconfig"
PAUSE_IMAGE = "localhost/outrider-pause:1"

# --- as a machine sees it
INSIDE = "/run/machine"
INSIDE_BIN = f"{INSIDE}/bin"
INSIDE_STATE = f"{INSIDE}/state"
INSIDE_IMAGES = f"{INSIDE}/images"

# --- addresses: they exist only inside namespaces that the cluster makes
ROUTER = "172.30.0.1"
CONTROL_PLANE = "172.30.0.10"
SERVICE_CIDR = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"
POD_CIDR = "10.244.0.0/16"
ISSUER = "https://kubernetes.default.svc.cluster.local"
MAX_NODES = 8

# --- how soon a failure is noticed, seconds; the usual 40 to 50 and 300 would make tests slow
NODE_STATUS_UPDATE = 3
NODE_LEASE = 12
NODE_GRACE = 16
EVICT_AFTER = 10

KUBERNETES_PROGRAMS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "coredns",
)

DEBIAN_PACKAGES = (
    "etcd-server",
    "containerd",
    "runc",
    "containernetworking-plugins",
    "iptables",
    "nftables",
    "conntrack",
    "ipset",
    "socat",
    "iproute2",
    "openssl",
    "gcc",  # the init of the machines is twenty lines of C
    "libc6-dev",
    "buildah",
    "debootstrap",
)


def node_address(index: int) -> str:
    """Address of a node on the bridge; nodes count from 1."""
    return f"172.30.0.{10 + index}"


def pod_cidr(index: int) -> str:
    """The pod addresses of a node."""
    return f"10.244.{index}.0/24"


def machine_name(text: str) -> str:
    """Accept "2" for "node2", and names of machines as they are.

    Raises:
        ValueError: the text is neither a number, nor "cp", nor "nodeN".
    """
    if text.isdigit():
        return f"node{text}"
    if re.fullmatch(r"cp|node\d+", text):
        return text
    raise ValueError(f"no machine is called {text!r}: expected cp, a node's number, or nodeN")


def node_index(machine: str) -> int:
    """The number in a node's name."""
    return int(machine.removeprefix("node"))


def machine_address(machine: str) -> str:
    """Address of any machine on the bridge."""
    return CONTROL_PLANE if machine == "cp" else node_address(node_index(machine))
