"""Makes the Nodes, the agents' Pods and their tokens by the thousand.

Why it exists: `cluster.administrator` makes the same objects one connection at a time, which is
right for a test and takes minutes for thousands. It must make the same objects.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from cluster.administrator import AUDIENCE
from cluster.controlplane import ControlPlane
from cluster.programs import AGENT_ACCOUNT, NAMESPACE, TOKEN_SECONDS

#: Requests under way at once.
AT_ONCE = 16
READY = {"type": "Ready", "status": "True", "reason": "Benchmark", "message": "no kubelet"}


def names(count: int) -> list[str]:
    """Names of the nodes."""
    return [f"swarm-{number:05}" for number in range(count)]


def make(
    plane: ControlPlane, nodes: Sequence[str], folder: Path, progress: Callable[[int], None]
) -> dict[str, Path]:
    """Make a Node, an agent's Pod on it and a token bound to that, for each name.

    Args:
        plane: a control plane that runs, with the agents' ServiceAccount.
        nodes: names.
        folder: for the tokens' files.
        progress: told how many are made.

    Returns:
        The token's file of each node.

    Raises:
        RuntimeError: the API server refused one.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return asyncio.run(_make(plane, nodes, folder, progress))


async def _make(
    plane: ControlPlane, nodes: Sequence[str], folder: Path, progress: Callable[[int], None]
) -> dict[str, Path]:
    user = yaml.safe_load(plane.kubeconfig.read_text())["users"][0]["user"]
    trust = ssl.create_default_context(cafile=str(plane.authority))
    files: dict[str, Path] = {}
    waiting = iter(nodes)
    async with aiohttp.ClientSession(
        plane.server,
        headers={"Authorization": f"Bearer {user['token']}"},
        connector=aiohttp.TCPConnector(limit=AT_ONCE, ssl=trust),
    ) as session:

        async def work() -> None:
            for node in waiting:
                files[node] = await _one(session, node, folder)
                progress(len(files))

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(work())
    return files


async def _one(session: aiohttp.ClientSession, node: str, folder: Path) -> Path:
    labels = {
        "kubernetes.io/hostname": node,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
    }
    await _post(
        session,
        "/api/v1/nodes",
        {
            "metadata": {"name": node, "labels": labels},
            "status": {
                "conditions": [READY],
                "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            },
        },
    )
    name = f"outrider-agent-{node}"
    pod = await _post(
        session,
        f"/api/v1/namespaces/{NAMESPACE}/pods",
        {
            "metadata": {"name": name},
            "spec": {
                "nodeName": node,
                "serviceAccountName": AGENT_ACCOUNT,
                "automountServiceAccountToken": False,
                "containers": [{"name": "agent", "image": "outrider-agent"}],
            },
        },
    )
    bound = {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod["metadata"]["uid"]}
    token = await _post(
        session,
        f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{AGENT_ACCOUNT}/token",
        {
            "spec": {
                "audiences": [AUDIENCE],
                "expirationSeconds": TOKEN_SECONDS,
                "boundObjectRef": bound,
            }
        },
    )
    file = folder / node
    file.touch(mode=0o600)
    file.write_text(token["status"]["token"])
    return file


async def _post(
    session: aiohttp.ClientSession, path: str, body: Mapping[str, Any]
) -> dict[str, Any]:
    async with session.post(path, json=body) as answer:
        if answer.status >= 300:
            raise RuntimeError(f"POST {path}: {answer.status}: {(await answer.text())[:500]}")
        found: dict[str, Any] = await answer.json()
        return found
