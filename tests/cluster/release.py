"""This project's Helm release in the cluster: install, upgrade, wait, test.

What the end-to-end tests and the demo do with helm, as its users do it. Knows the chart's values,
and nothing of what the release then does.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import api, paths, toolchain
from cluster.addons import KAFKA_FOR_PODS
from cluster.layout import KUBECONFIG
from cluster.processes import run

CHART = paths.ROOT / "charts" / "outrider"
RELEASE = NAMESPACE = "outrider"
WORKLOADS = ("deployment/outrider-server", "daemonset/outrider-agent")
READY_SECONDS = 180


def values(images: Mapping[str, str], *, kafka: bool) -> dict[str, Any]:
    """The chart's values for this cluster.

    Args:
        images: each image's tag with its unique name, as `images.build` returns them.
        kafka: whether records go to the cluster's Kafka, instead of files.
    """
    chosen: dict[str, Any] = {"image": {"pullPolicy": "Never"}}
    for component in ("server", "agent"):
        unique = next(name for name in images.values() if f"outrider-{component}:" in name)
        repository, _, tag = unique.rpartition(":")
        chosen[component] = {"image": {"repository": repository, "tag": tag}}
    if kafka:
        chosen["sink"] = {"kind": "kafka", "kafka": {"bootstrapServers": [KAFKA_FOR_PODS]}}
    return chosen


def helm(*arguments: object, timeout: float = READY_SECONDS + 60) -> str:
    """Run helm on the cluster and return what it prints.

    Raises:
        ClusterError: it failed.
    """
    program = toolchain.ensure(["helm"])["helm"]
    return run(program, "--kubeconfig", KUBECONFIG, *arguments, timeout=timeout).stdout


def install(chosen: Mapping[str, object], settings: Sequence[str] = ()) -> None:
    """Install the chart, or upgrade the release, and wait until all of it is ready.

    Args:
        chosen: values.
        settings: further ones as "name=value".

    Raises:
        ClusterError: helm failed, or something did not become ready; see `kubectl get pods`.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json", prefix="outrider-values-") as file:
        json.dump(chosen, file)
        file.flush()
        more = [word for setting in settings for word in ("--set", setting)]
        helm(
            *("upgrade", "--install", RELEASE, CHART, "--namespace", NAMESPACE),
            *("--create-namespace", "--values", Path(file.name), *more),
            *("--wait", "--timeout", f"{READY_SECONDS}s"),
        )
    await_rollout()


def await_rollout() -> None:
    """Wait until every Pod of the release is the newest and ready.

    helm alone takes a DaemonSet for ready when all Pods but one are.

    Raises:
        ClusterError: it takes too long.
    """
    for workload in WORKLOADS:
        status = ("rollout", "status", workload, f"--timeout={READY_SECONDS}s")
        api.kubectl("-n", NAMESPACE, *status, timeout=READY_SECONDS + 10)
