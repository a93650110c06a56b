"""What a cluster may have beside Kubernetes: a Kafka broker and a Prometheus, both on cp.

Processes and no pods, so that faults of nodes do not take them with them. Pods reach Kafka as
kafka.kafka.svc:9092; from this machine both are on 127.0.0.1, at ports next to the API server's.
"""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from pathlib import Path
from typing import Any

from cluster import api, kafka, kafka_jars, network, pki, toolchain
from cluster.daemons import API_URL
from cluster.errors import ClusterError
from cluster.layout import CONTROL_PLANE, INSIDE_BIN, INSIDE_STATE, PORT, STATE
from cluster.machines import execute, spawn
from cluster.processes import wait_for

KAFKA_PORT = PORT + 1
"""Of Kafka on 127.0.0.1 of this machine."""

PROMETHEUS_PORT = PORT + 2
"""Of Prometheus on 127.0.0.1 of this machine."""

KAFKA_FOR_PODS = "kafka.kafka.svc.cluster.local:9092"
KAFKA_HERE = f"127.0.0.1:{KAFKA_PORT}"
_INNER_PORT = 9094

# Without selector, and headless: names lead straight to cp, on nodes and on cp itself, where no
# kube-proxy runs.
KAFKA_SERVICE = f"""\
apiVersion: v1
kind: Namespace
metadata: {{name: kafka}}
---
apiVersion: v1
kind: Service
metadata: {{name: kafka, namespace: kafka}}
spec:
  clusterIP: None
  ports: [{{name: kafka, port: 9092}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: kafka-cp
  namespace: kafka
  labels: {{kubernetes.io/service-name: kafka}}
addressType: IPv4
endpoints: [{{addresses: ["{CONTROL_PLANE}"], conditions: {{ready: true}}}}]
ports: [{{name: kafka, port: 9092}}]
"""

PROMETHEUS_RIGHTS = """\
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: "test:prometheus"}
rules:
- {apiGroups: [""], resources: [pods], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: "test:prometheus"}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "test:prometheus"}
subjects: [{kind: User, name: prometheus, apiGroup: rbac.authorization.k8s.io}]
"""

# The usual annotations, as most charts document them.
PROMETHEUS_SETTINGS = f"""\
global: {{scrape_interval: 2s, scrape_timeout: 2s}}
scrape_configs:
- job_name: pods
  kubernetes_sd_configs:
  - {{role: pod, kubeconfig_file: {INSIDE_STATE}/prometheus.kubeconfig}}
  relabel_configs:
  - source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_scrape]
    regex: "true"
    action: keep
  - source_labels: [__meta_kubernetes_pod_phase]
    regex: Running
    action: keep
  - source_labels: [__meta_kubernetes_pod_ip, __meta_kubernetes_pod_annotation_prometheus_io_port]
    separator: ":"
    target_label: __address__
  - source_labels: [__meta_kubernetes_pod_annotation_prometheus_io_path]
    regex: (.+)
    target_label: __metrics_path__
  - {{source_labels: [__meta_kubernetes_namespace], target_label: namespace}}
  - {{source_labels: [__meta_kubernetes_pod_name], target_label: pod}}
  - {{source_labels: [__meta_kubernetes_pod_node_name], target_label: node}}
  - {{source_labels: [__meta_kubernetes_pod_label_app_kubernetes_io_component],
      target_label: component}}
"""


# ------------------------------------------------------------------ Kafka
def _kafka_settings() -> str:
    """One broker with a listener for pods and one that is told to clients on this machine."""
    pods = f"{CONTROL_PLANE}:9092"
    text = kafka.properties(Path("/var/lib/kafka"), pods, KAFKA_FOR_PODS, 9093)
    # The last line of a name wins.
    return text + (
        f"listeners=PODS://{pods},HERE://127.0.0.1:{_INNER_PORT},CONTROLLER://127.0.0.1:9093\n"
        f"advertised.listeners=PODS://{KAFKA_FOR_PODS},HERE://{KAFKA_HERE}\n"
        "listener.security.protocol.map=PODS:PLAINTEXT,HERE:PLAINTEXT,CONTROLLER:PLAINTEXT\n"
        "inter.broker.listener.name=PODS\n"
    )


def start_kafka() -> None:
    """Start a Kafka broker on cp and make it known to pods; wait until it takes requests.

    Raises:
        ClusterError: it did not start.
    """
    jars = kafka_jars.ensure()
    folder = STATE / "cp" / "kafka"
    # Hard links: the cache may be where a machine has a folder of its own.
    shutil.copytree(jars, folder, copy_function=os.link)
    (STATE / "cp" / "kafka.properties").write_text(_kafka_settings())
    inside, settings = Path(INSIDE_STATE, "kafka"), Path(INSIDE_STATE, "kafka.properties")
    execute("cp", kafka.format_command(inside, settings))
    spawn("cp", "kafka", kafka.broker_command(inside, settings))
    network.forward(KAFKA_PORT, "cp", f"127.0.0.1:{_INNER_PORT}", "kafka-forward")
    api.kubectl("apply", "-f", "-", stdin=KAFKA_SERVICE)
    await_kafka()


def await_kafka() -> None:
    """Wait until the broker takes requests, after its start or restart.

    Raises:
        ClusterError: it died, or does not within 60 s.
    """
    log = STATE / "log" / "cp.kafka.log"
    wait_for("Kafka", lambda: kafka.STARTED in log.read_text(), 60, 0.1, ["cp.kafka"])


# ------------------------------------------------------------------ Prometheus
def start_prometheus() -> None:
    """Start a Prometheus on cp that scrapes every pod with the usual annotations.

    Raises:
        ClusterError: it did not start.
    """
    program = toolchain.ensure(["prometheus"])["prometheus"]
    os.link(program, STATE / "bin" / "prometheus")
    folder = STATE / "cp"
    (folder / "prometheus.kubeconfig").write_text(pki.kubeconfig("prometheus", API_URL))
    (folder / "prometheus.yaml").write_text(PROMETHEUS_SETTINGS)
    api.kubectl("apply", "-f", "-", stdin=PROMETHEUS_RIGHTS)
    spawn(
        "cp",
        "prometheus",
        [
            f"{INSIDE_BIN}/prometheus",
            f"--config.file={INSIDE_STATE}/prometheus.yaml",
            *("--storage.tsdb.path=/var/lib/prometheus", "--storage.tsdb.retention.time=2h"),
            *("--storage.tsdb.retention.size=512MB", "--web.listen-address=127.0.0.1:9090"),
        ],
    )
    network.forward(PROMETHEUS_PORT, "cp", "127.0.0.1:9090", "prometheus-forward")

    def ready() -> bool:
        try:
            prometheus("/api/v1/status/runtimeinfo")
        except ClusterError:
            return False
        return True

    wait_for("Prometheus", ready, 60, 0.1, ["cp.prometheus"])


def prometheus(path: str) -> Any:
    """GET from Prometheus' API; returns the answer's data.

    Raises:
        ClusterError: it does not answer, or refuses.
    """
    url = f"http://127.0.0.1:{PROMETHEUS_PORT}{path}"
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            answer = json.load(response)
    except (OSError, ValueError) as error:
        raise ClusterError(f"Prometheus does not answer at {url}: {error}") from error
    return answer["data"]


def targets() -> list[dict[str, str]]:
    """What Prometheus scrapes: of each target component, pod, node, health and last error."""
    return [
        {
            **{name: target["labels"].get(name, "") for name in ("component", "pod", "node")},
            "health": target["health"],
            "error": target["lastError"],
        }
        for target in prometheus("/api/v1/targets?state=active")["activeTargets"]
    ]
