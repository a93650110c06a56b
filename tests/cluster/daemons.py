"""The control plane's daemons inside the machine "cp", and DNS for the whole cluster.

Only what to start and with which settings; the API is spoken by `api`. CoreDNS is a process on cp
and no pod, so that faults of nodes do not take DNS with them.
"""

from __future__ import annotations

import shutil

from cluster import pki
from cluster.layout import (
    CONTROL_PLANE,
    DNS_SERVICE,
    EVICT_AFTER,
    INSIDE_BIN,
    INSIDE_STATE,
    ISSUER,
    NODE_GRACE,
    SERVICE_CIDR,
    STATE,
)
from cluster.machines import spawn

API_URL = f"https://{CONTROL_PLANE}:6443"
_PKI = f"{INSIDE_STATE}/pki"

# Two server blocks: in one, `template` would run before `kubernetes` (the order of plug-ins is
# compiled in) and answer everything. Without the second CoreDNS says REFUSED for names outside,
# which resolvers take for a broken server and not for an answer.
COREFILE = f"""\
cluster.local in-addr.arpa ip6.arpa {{
    bind {CONTROL_PLANE}
    errors
    ready {CONTROL_PLANE}:8181
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {INSIDE_STATE}/coredns.kubeconfig {pki.CONTEXT}
        pods insecure
        ttl 5
    }}
    prometheus {CONTROL_PLANE}:9153
    loadbalance
}}
. {{
    bind {CONTROL_PLANE}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""

ADDONS = f"""\
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: "test:coredns"}}
rules:
- {{apiGroups: [""], resources: [services, pods, namespaces], verbs: [list, watch]}}
- {{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: "test:coredns"}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "test:coredns"}}
subjects: [{{kind: User, name: coredns, apiGroup: rbac.authorization.k8s.io}}]
---
apiVersion: v1
kind: Service
metadata:
  name: kube-dns
  namespace: kube-system
  labels: {{k8s-app: kube-dns, kubernetes.io/name: CoreDNS}}
spec:
  clusterIP: {DNS_SERVICE}
  ports:
  - {{name: dns, port: 53, protocol: UDP}}
  - {{name: dns-tcp, port: 53, protocol: TCP}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: kube-dns-cp
  namespace: kube-system
  labels: {{kubernetes.io/service-name: kube-dns}}
addressType: IPv4
endpoints: [{{addresses: ["{CONTROL_PLANE}"], conditions: {{ready: true}}}}]
ports:
- {{name: dns, port: 53, protocol: UDP}}
- {{name: dns-tcp, port: 53, protocol: TCP}}
"""


def start_api() -> None:
    """Start etcd and the API server."""
    folder = STATE / "cp"
    shutil.copytree(pki.FOLDER, folder / "pki", dirs_exist_ok=True)
    for component in ("controller-manager", "scheduler", "coredns"):
        text = pki.kubeconfig(component, API_URL)
        (folder / f"{component}.kubeconfig").write_text(text)
    spawn(
        "cp",
        "etcd",
        [
            *("etcd", "--data-dir=/var/lib/etcd", "--logger=zap", "--log-level=warn"),
            "--unsafe-no-fsync",  # a test's data need not survive a power failure
            "--listen-client-urls=http://127.0.0.1:2379",
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
        ],
    )
    spawn(
        "cp",
        "apiserver",
        [
            *(f"{INSIDE_BIN}/kube-apiserver", "--etcd-servers=http://127.0.0.1:2379"),
            *("--bind-address=0.0.0.0", "--secure-port=6443"),
            f"--advertise-address={CONTROL_PLANE}",
            *(f"--tls-cert-file={_PKI}/apiserver.crt", f"--client-ca-file={_PKI}/ca.crt"),
            f"--tls-private-key-file={_PKI}/apiserver.key",
            *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"),
            *("--allow-privileged=true", f"--service-cluster-ip-range={SERVICE_CIDR}"),
            # The audience of agents' tokens is not among these on purpose: a TokenReview that
            # names it passes all the same, and such a token is of no use with the API itself.
            *(f"--service-account-issuer={ISSUER}", f"--api-audiences={ISSUER}"),
            f"--service-account-key-file={_PKI}/sa.pub",
            f"--service-account-signing-key-file={_PKI}/sa.key",
            f"--kubelet-client-certificate={_PKI}/kubelet-client.crt",
            f"--kubelet-client-key={_PKI}/kubelet-client.key",
            f"--kubelet-certificate-authority={_PKI}/ca.crt",
            # Names of nodes do not resolve on cp; the default prefers them.
            "--kubelet-preferred-address-types=InternalIP",
            # No kube-proxy on cp: webhooks go to pods' addresses, not to those of Services.
            "--enable-aggregator-routing=true",
            f"--default-not-ready-toleration-seconds={EVICT_AFTER}",
            f"--default-unreachable-toleration-seconds={EVICT_AFTER}",
        ],
    )


def start_controllers() -> None:
    """Start controller manager, scheduler and CoreDNS; the API server must be ready."""
    spawn(
        "cp",
        "controller-manager",
        [
            f"{INSIDE_BIN}/kube-controller-manager",
            f"--kubeconfig={INSIDE_STATE}/controller-manager.kubeconfig",
            *(f"--service-account-private-key-file={_PKI}/sa.key", f"--root-ca-file={_PKI}/ca.crt"),
            f"--cluster-signing-cert-file={_PKI}/ca.crt",
            f"--cluster-signing-key-file={_PKI}/ca.key",
            *("--use-service-account-credentials=true", "--leader-elect=false"),
            *("--allocate-node-cidrs=false", "--bind-address=127.0.0.1"),
            # The default of 20 requests a second alone delays the controllers' start by 5 s.
            *("--kube-api-qps=300", "--kube-api-burst=500"),
            *("--node-monitor-period=2s", f"--node-monitor-grace-period={NODE_GRACE}s"),
        ],
    )
    spawn(
        "cp",
        "scheduler",
        [
            f"{INSIDE_BIN}/kube-scheduler",
            f"--kubeconfig={INSIDE_STATE}/scheduler.kubeconfig",
            *("--leader-elect=false", "--bind-address=127.0.0.1"),
        ],
    )
    (STATE / "cp" / "Corefile").write_text(COREFILE)
    spawn("cp", "coredns", [f"{INSIDE_BIN}/coredns", "-conf", f"{INSIDE_STATE}/Corefile"])
