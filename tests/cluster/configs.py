"""AgentConfigs in the cluster as the end-to-end tests see them: by kubectl, as their users do.

Reads objects and nothing else; what the server and the agents think is not asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster import api
from cluster.tasks import eventually

KIND = "agentconfigs.outrider.dev"


def apply(name: str, spec: Mapping[str, object]) -> None:
    """Create an AgentConfig, or have it ask for something else."""
    manifest = {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentConfig",
        "metadata": {"name": name},
        "spec": spec,
    }
    api.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))


def delete(name: str) -> None:
    """Delete an AgentConfig, if it is there."""
    api.kubectl("delete", KIND, name, "--ignore-not-found")


def status(name: str) -> dict[str, Any]:
    """Its status; empty before the operator has written one."""
    found: dict[str, Any] = api.kubectl_json("get", KIND, name).get("status", {})
    return found


def generation(name: str) -> int:
    """Counts the changes of its spec."""
    found: int = api.kubectl_json("get", KIND, name)["metadata"]["generation"]
    return found


def await_phase(name: str, phase: str, timeout: float = 60.0) -> list[dict[str, Any]]:
    """Wait until what the spec asks for now has come to a phase of its rollout.

    Returns:
        Every other status that was seen on the way, oldest first, and last the one waited for.

    Raises:
        AssertionError: it has not in time; with its status.
    """
    wanted = generation(name)
    seen: list[dict[str, Any]] = []

    def reached() -> bool:
        found = status(name)
        if found.get("observedGeneration") != wanted:
            return False
        if not seen or found != seen[-1]:
            seen.append(found)
        return bool(found.get("rollout", {}).get("phase") == phase)

    try:
        eventually(f"{name} {phase}", reached, timeout, 0.2)
    except AssertionError as error:
        raise AssertionError(f"{error}; status {json.dumps(status(name))}") from None
    return seen


def of_agent(node: str) -> dict[str, Any]:
    """What the Agent object of a node says of its configuration."""
    agent = api.kubectl_json("get", "agents.outrider.dev", node)
    found: dict[str, Any] = agent.get("status", {}).get("config", {})
    return found


def events(name: str) -> dict[str, list[str]]:
    """The notes of the events of an AgentConfig, by their reason."""
    found: dict[str, list[str]] = {}
    chosen = f"involvedObject.kind=AgentConfig,involvedObject.name={name}"
    for event in api.kubectl_json("get", "events", "-A", "--field-selector", chosen)["items"]:
        found.setdefault(event["reason"], []).append(event["message"])
    return found
