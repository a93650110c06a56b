"""AgentTasks in the cluster as the end-to-end tests see them: by kubectl, as their users do.

Reads objects and nothing else; what the server and the agents think is not asked.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cluster import api
from cluster.errors import ClusterError

T = TypeVar("T")
FINAL = ("Succeeded", "Failed", "Cancelled")
KIND = "agenttasks.outrider.dev"


def eventually(what: str, look: Callable[[], T], timeout: float = 60.0, every: float = 0.25) -> T:
    """Look until what is seen is true, and return it. What cannot be looked at is not true yet.

    Raises:
        AssertionError: the time is over; with the last thing seen.
    """
    end = time.monotonic() + timeout
    while True:
        seen: object = None
        try:
            seen = value = look()
            if value:
                return value
        except ClusterError as error:
            seen = error
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout:.0f} s: {what}; last seen: {seen!r}")
        time.sleep(every)


def create(run: Mapping[str, object], **spec: object) -> str:
    """Create an AgentTask with a name of its own in the namespace "default"; returns the name.

    Args:
        run: its spec.run.
        spec: further fields of its spec.
    """
    name = f"e2e-{uuid.uuid4().hex[:8]}"
    manifest = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"run": run, **spec},
    }
    api.kubectl("create", "-f", "-", stdin=json.dumps(manifest))
    return name


def create_script(source: str, *, at_once: bool = True, **spec: object) -> str:
    """Create an AgentTask that runs a script in /bin/sh on all nodes; returns its name.

    Args:
        source: the script.
        at_once: on all nodes at the same time, instead of the usual waves.
        spec: further fields of its spec.
    """
    script = {"script": {"interpreter": ["/bin/sh", "-eu"], "source": source}}
    rollout = {"maxConcurrent": "100%", "waves": ["100%"]} if at_once else {}
    return create(script, **{"timeoutSeconds": 120, "rollout": rollout, **spec})


def get(name: str) -> dict[str, Any]:
    """The AgentTask."""
    found: dict[str, Any] = api.kubectl_json("get", KIND, name)
    return found


def status(name: str) -> dict[str, Any]:
    """Its status; empty before the operator has written one."""
    found: dict[str, Any] = get(name).get("status", {})
    return found


def rows(name: str) -> dict[str, dict[str, Any]]:
    """What its reports say of each node.

    Raises:
        AssertionError: a node stands in two rows.
    """
    uid = get(name)["metadata"]["uid"]
    reports = api.kubectl_json("get", "agenttaskreports.outrider.dev")["items"]
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        if report["task"]["uid"] == uid:
            for row in report["nodes"]:
                assert row["node"] not in found, f"{row['node']} stands in two rows"
                found[row["node"]] = row
    return found


def await_final(name: str, timeout: float = 90.0) -> dict[str, Any]:
    """Wait until the task has ended; returns its status.

    Raises:
        AssertionError: it has not in time; with its status and rows.
    """
    try:
        return eventually(
            f"end of the task {name}",
            lambda: found if (found := status(name)).get("phase") in FINAL else {},
            timeout,
        )
    except AssertionError as error:
        raise AssertionError(f"{error}; status {status(name)}; rows {rows(name)}") from None


def await_rows(name: str, phase: str, nodes: Sequence[str], timeout: float = 60.0) -> None:
    """Wait until the task stands in a phase on all of the named nodes."""

    def reached() -> bool:
        found = rows(name)
        return all(found.get(node, {}).get("phase") == phase for node in nodes)

    eventually(f"{name} {phase} on {', '.join(nodes)}", reached, timeout)


def agents() -> dict[str, dict[str, Any]]:
    """Of each Agent object its condition Ready."""
    found = {}
    for agent in api.kubectl_json("get", "agents.outrider.dev")["items"]:
        conditions = agent.get("status", {}).get("conditions", [])
        ready = [condition for condition in conditions if condition["type"] == "Ready"]
        found[agent["metadata"]["name"]] = ready[0] if ready else {}
    return found


def ready_agents() -> list[str]:
    """Names of the agents that are Ready."""
    return sorted(name for name, ready in agents().items() if ready.get("status") == "True")


def lines_on_node(state: Path, node: str, file: str) -> list[str]:
    """Lines of a file in the agents' folder on a node; none without the file.

    Args:
        state: the cluster's folder.
        node: the node's name.
        file: the file's name.
    """
    path = _on_node(state, node, file)
    return path.read_text().splitlines() if path.exists() else []


def make_on_node(state: Path, node: str, file: str) -> None:
    """Make an empty file in the agents' folder on a node, for a script that waits for it."""
    _on_node(state, node, file).touch()


def _on_node(state: Path, node: str, file: str) -> Path:
    return state / node / "var-lib" / "outrider" / file
