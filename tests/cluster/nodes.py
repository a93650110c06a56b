"""A worker node: containerd, kubelet and kube-proxy inside a machine, and their settings.

Copies no images: a node starts from the image cache by links, see `clone_images`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from cluster import pki
from cluster.daemons import API_URL
from cluster.layout import (
    DNS_SERVICE,
    IMAGES,
    INSIDE_BIN,
    INSIDE_IMAGES,
    INSIDE_STATE,
    NODE_LEASE,
    NODE_STATUS_UPDATE,
    PAUSE_IMAGE,
    POD_CIDR,
    STATE,
    node_address,
    node_index,
    pod_cidr,
)
from cluster.machines import boot, spawn
from cluster.processes import read_pid, wait_for

LAYERS = Path("io.containerd.snapshotter.v1.overlayfs")
BLOBS = Path("io.containerd.content.v1.content/blobs/sha256")
METADATA = Path("io.containerd.metadata.v1.bolt")

CONTAINERD_SETTINGS = f"""\
version = 2
# /var/lib/containerd and /run/containerd are private to this machine
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # Without CAP_SYS_RESOURCE nobody may lower oom_score_adj, and runc would fail the container.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{INSIDE_STATE}/cni"
"""


def clone_images(store: Path) -> None:
    """Give a node the images of the cache without copying or unpacking anything.

    The two databases are copied, the blobs are hard links, and the unpacked layers are symbolic
    links to where the machine sees the cache read-only: overlayfs only reads them.
    """
    golden = IMAGES / "containerd"
    for sub in (LAYERS / "snapshots", BLOBS, METADATA):
        (store / sub).mkdir(parents=True, exist_ok=True)
    for database in (LAYERS / "metadata.db", METADATA / "meta.db"):
        shutil.copy2(golden / database, store / database)
    for blob in (golden / BLOBS).iterdir():
        os.link(blob, store / BLOBS / blob.name)
    for layer in (golden / LAYERS / "snapshots").iterdir():
        seen = f"{INSIDE_IMAGES}/{LAYERS}/snapshots/{layer.name}"
        (store / LAYERS / "snapshots" / layer.name).symlink_to(seen)


def _network_settings(index: int) -> str:
    """Pods' network. ipMasq stays off: it would hide pods behind their node's address."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": pod_cidr(index)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    return json.dumps({"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, ports]})


def _kubelet_settings() -> str:
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": f"{INSIDE_STATE}/pki/ca.crt"},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": f"{INSIDE_STATE}/pki/kubelet.crt",
            "tlsPrivateKeyFile": f"{INSIDE_STATE}/pki/kubelet.key",
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "cgroupRoot": "/",
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "clusterDNS": [DNS_SERVICE],
            "clusterDomain": "cluster.local",
            "resolvConf": "/etc/resolv.conf",
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "volumePluginDir": "/var/lib/kubelet/volumeplugins",
            "nodeStatusUpdateFrequency": f"{NODE_STATUS_UPDATE}s",
            "nodeLeaseDurationSeconds": NODE_LEASE,
            # How late a Pod sees that a Secret it has mounted was changed; usually 60 s.
            "syncFrequency": "10s",
            # All nodes share one disk and one memory: never evict or drop images because of it.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {
                "memory.available": "100Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
                "nodefs.inodesFree": "1%",
                "imagefs.inodesFree": "1%",
            },
            "featureGates": {"KubeletCrashLoopBackOffMax": True},
            "crashLoopBackOff": {"maxContainerRestartPeriod": "10s"},
        },
        indent=1,
    )


def prepare(index: int) -> None:
    """Write a node's files, once in its life: images, certificates and settings."""
    name = f"node{index}"
    folder = STATE / name
    clone_images(folder / "var-lib" / "containerd")
    (folder / "pki").mkdir(parents=True, exist_ok=True)
    (folder / "cni").mkdir(exist_ok=True)
    shutil.copy2(pki.FOLDER / "ca.crt", folder / "pki" / "ca.crt")
    for ending in ("crt", "key"):
        shutil.copy2(pki.FOLDER / f"{name}.{ending}", folder / "pki" / f"kubelet.{ending}")
    (folder / "kubelet.kubeconfig").write_text(pki.kubeconfig(name, API_URL))
    (folder / "proxy.kubeconfig").write_text(pki.kubeconfig("proxy", API_URL))
    (folder / "containerd.toml").write_text(CONTAINERD_SETTINGS)
    (folder / "cni" / "10-pods.conflist").write_text(_network_settings(index))
    (folder / "kubelet.json").write_text(_kubelet_settings())


def start_containerd(index: int) -> None:
    """Start a node's containerd; see `await_containerd`."""
    settings = f"{INSIDE_STATE}/containerd.toml"
    spawn(f"node{index}", "containerd", ["containerd", "--config", settings])


def await_containerd(index: int) -> None:
    """Wait until a node's containerd listens.

    Raises:
        ClusterError: it died, or took longer than 60 s.
    """
    name = f"node{index}"
    socket = Path(f"/proc/{read_pid(f'{name}.init')}/root/run/containerd/containerd.sock")
    wait_for(f"containerd of {name}", socket.exists, 60, alive=[f"{name}.containerd"])


def start_kubelet(index: int) -> None:
    """Start a node's kubelet and kube-proxy; containerd must listen."""
    name = f"node{index}"
    labels = {
        "topology.kubernetes.io/region": "test",
        "topology.kubernetes.io/zone": f"zone-{'abcdefgh'[(index - 1) % 8]}",
    }
    # After a partition the old connection to the API server would stay dead for up to 45 s;
    # idle HTTP/2 connections are probed sooner.
    environment = {"HTTP2_READ_IDLE_TIMEOUT_SECONDS": "5", "HTTP2_PING_TIMEOUT_SECONDS": "5"}
    spawn(
        name,
        "kubelet",
        [
            *(f"{INSIDE_BIN}/kubelet", f"--config={INSIDE_STATE}/kubelet.json"),
            f"--kubeconfig={INSIDE_STATE}/kubelet.kubeconfig",
            *(f"--hostname-override={name}", f"--node-ip={node_address(index)}", "--v=2"),
            "--node-labels=" + ",".join(f"{key}={value}" for key, value in labels.items()),
        ],
        environment,
    )
    spawn(
        name,
        "proxy",
        [
            *(f"{INSIDE_BIN}/kube-proxy", f"--kubeconfig={INSIDE_STATE}/proxy.kubeconfig"),
            *(f"--hostname-override={name}", "--proxy-mode=iptables", f"--cluster-cidr={POD_CIDR}"),
            # These settings belong to the host's network namespace: leave them alone.
            *("--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0"),
            *("--conntrack-tcp-timeout-close-wait=0", "--oom-score-adj=0"),
        ],
        environment,
    )


def power_on(machine: str) -> None:
    """Boot a node that was stopped, with the disk it had."""
    index = node_index(machine)
    boot(machine)
    start_containerd(index)
    await_containerd(index)
    start_kubelet(index)
