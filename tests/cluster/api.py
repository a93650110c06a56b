"""The cluster's API as seen from this machine: kubectl, and plain GETs through the forwarder."""

from __future__ import annotations

import json
import ssl
import urllib.request
from typing import Any

from cluster import pki
from cluster.layout import KUBECONFIG, PORT, STATE
from cluster.processes import run


def kubectl(*arguments: object, stdin: str | None = None, timeout: float = 120) -> str:
    """Run kubectl as the cluster's administrator and return what it prints.

    Raises:
        ClusterError: it failed; with what it said.
    """
    program = STATE / "bin" / "kubectl"
    return run(program, "--kubeconfig", KUBECONFIG, *arguments, stdin=stdin, timeout=timeout).stdout


def kubectl_json(*arguments: object, timeout: float = 120) -> Any:
    """Run kubectl with `-o json` and return what it prints, decoded.

    Raises:
        ClusterError: it failed.
    """
    return json.loads(kubectl(*arguments, "-o", "json", timeout=timeout))


def get(path: str, timeout: float = 3) -> str | None:
    """GET a path from the API server as administrator; None if it does not answer well."""
    context = ssl.create_default_context(cafile=str(pki.FOLDER / "ca.crt"))
    context.load_cert_chain(pki.FOLDER / "admin.crt", pki.FOLDER / "admin.key")
    try:
        with urllib.request.urlopen(
            f"https://127.0.0.1:{PORT}{path}", context=context, timeout=timeout
        ) as response:
            return str(response.read().decode())
    except OSError:
        return None


def ready_nodes() -> dict[str, bool]:
    """Each node's name with whether Kubernetes calls it ready; empty if the API is away."""
    body = get("/api/v1/nodes")
    if not body:
        return {}
    return {
        node["metadata"]["name"]: any(
            condition["type"] == "Ready" and condition["status"] == "True"
            for condition in node["status"].get("conditions", [])
        )
        for node in json.loads(body)["items"]
    }
