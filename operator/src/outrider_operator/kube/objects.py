"""AgentTasks, their reports, Agents, Nodes and Events at the API server.

Reports and tasks are only replaced at the version or UID the caller knows, so that a leader whose
time is over, or one that took a new task for an old one, is refused. Keeps no state but the rate of
Events.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from outrider_operator.core import nodes
from outrider_operator.core.ports import (
    ClusterError,
    ClusterUnavailableError,
    ConflictError,
    NotFoundError,
    Object,
)
from outrider_operator.core.slices import API_VERSION, TASK_LABEL
from outrider_operator.core.times import seconds
from outrider_operator.kube.client import TABLE, KubeClient, path

GROUP: Final = ("apis", "outrider.dev", "v1alpha1")
#: Keeps a task that runs until its runs have been ended.
FINALIZER: Final = "outrider.dev/end-runs"
#: Name of this program in Events.
COMPONENT: Final = "outrider-server"
#: Events at once, and afterwards per second: no task floods the API server.
EVENT_BURST: Final = 50
EVENTS_PER_SECOND: Final = 5.0


class ClusterStore:
    """What core.ports.Cluster asks for, by the API server.

    Args:
        kube: the connection.
        instance: name of this replica, for Events.
        on_event: told the result of each Event: "posted", "dropped" or "failed".
    """

    def __init__(
        self, kube: KubeClient, instance: str, on_event: Callable[[str], None] = lambda _: None
    ) -> None:
        self._kube = kube
        self._instance = instance
        self._on_event = on_event
        self._allowed = float(EVENT_BURST)
        self._refilled = time.monotonic()

    async def list_tasks(self) -> list[Object]:
        """All AgentTasks of the cluster."""
        return await self._kube.read_all(path(*GROUP, "agenttasks"))

    async def get_task(self, namespace: str, name: str) -> Object:
        """One AgentTask."""
        return await self._kube.request("GET", _task_path(namespace, name))

    async def write_status(self, task: Mapping[str, Any], status: Mapping[str, Any]) -> Object:
        """Replace the status of the task with this UID."""
        meta = task["metadata"]
        # A patch of the status passes over the UID it names; only a test of it is heeded.
        operations = [
            {"op": "test", "path": "/metadata/uid", "value": meta["uid"]},
            {"op": "add", "path": "/status", "value": dict(status)},
        ]
        target = _task_path(meta["namespace"], meta["name"])
        try:
            return await self._kube.json_patch(target + "/status", operations)
        except (ClusterUnavailableError, ConflictError, NotFoundError):
            raise
        except ClusterError:
            # A failed test and a wrong status are refused with the same code.
            found = await self._kube.request("GET", target)
            if found["metadata"]["uid"] != meta["uid"]:
                raise ConflictError(f"{target} is another task of the same name") from None
            raise

    async def set_finalizer(self, task: Mapping[str, Any], present: bool) -> Object:
        """Add or take away our finalizer, at the version of `task`."""
        meta = task["metadata"]
        names = [name for name in meta.get("finalizers", []) if name != FINALIZER]
        # The version makes sure that nobody else's finalizer is lost.
        fields = {
            "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"],
            "finalizers": [*names, FINALIZER] if present else names,
        }
        target = _task_path(meta["namespace"], meta["name"])
        return await self._kube.merge_patch(target, {"metadata": fields})

    async def delete_task(self, task: Mapping[str, Any]) -> None:
        """Delete the task with this UID, and its reports with it."""
        meta = task["metadata"]
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": meta["uid"]},
        }
        await self._kube.request("DELETE", _task_path(meta["namespace"], meta["name"]), options)

    async def list_reports(self, namespace: str, name: str) -> list[Object]:
        """The reports of tasks of this name."""
        target = path(
            *GROUP,
            "namespaces",
            namespace,
            "agenttaskreports",
            labelSelector=f"{TASK_LABEL}={name}",
        )
        # An object can be near 1 MB: the page is bounded by their number times their size.
        return await self._kube.read_all(target)

    async def create_report(self, report: Mapping[str, Any]) -> Object:
        """Make a report."""
        target = path(*GROUP, "namespaces", report["metadata"]["namespace"], "agenttaskreports")
        return await self._kube.request("POST", target, report)

    async def replace_report(self, report: Mapping[str, Any]) -> Object:
        """Replace the report of this resourceVersion."""
        meta = report["metadata"]
        target = path(*GROUP, "namespaces", meta["namespace"], "agenttaskreports", meta["name"])
        return await self._kube.request("PUT", target, report)

    async def list_agents(self) -> list[Object]:
        """All Agents."""
        return await self._kube.read_all(path(*GROUP, "agents"))

    async def create_agent(self, node: str) -> Object:
        """Make the Agent of a node."""
        body = {"apiVersion": API_VERSION, "kind": "Agent", "metadata": {"name": node}}
        return await self._kube.request("POST", path(*GROUP, "agents"), body)

    async def write_agent_status(self, node: str, status: Mapping[str, Any]) -> Object:
        """Replace the status of a node's Agent."""
        return await self._kube.merge_patch(
            path(*GROUP, "agents", node) + "/status", {"status": dict(status)}
        )

    async def delete_agent(self, node: str) -> None:
        """Delete the Agent of a node."""
        await self._kube.request("DELETE", path(*GROUP, "agents", node))

    async def list_nodes(self) -> list[Object]:
        """What is looked at of all Nodes: the whole objects would be 20 KB each.

        The table that kubectl prints has it all: metadata, and in one word or two the state.
        """
        pages = self._kube.pages(path("api", "v1", "nodes"), accept=TABLE)
        try:
            return [node async for page in pages for node in nodes.from_table(page)]
        except ValueError as error:
            raise ClusterError(f"GET /api/v1/nodes: {error}") from error

    async def tell(
        self, subject: Mapping[str, Any], kind: Literal["Normal", "Warning"], reason: str, text: str
    ) -> None:
        """Post a Kubernetes Event about an object, once for the same reason and text.

        Too many are dropped.
        """
        if not self._may_tell():
            self._on_event("dropped")
            return
        meta = subject["metadata"]
        namespace = meta.get("namespace") or "default"
        try:
            target = path("api", "v1", "namespaces", namespace, "events")
            body = self._event(subject, namespace, kind, reason, text[:1024])
            await self._kube.request("POST", target, body)
        except NotFoundError:
            self._on_event("dropped")  # the namespace is gone: nobody will look
        except ClusterError:
            self._on_event("failed")
        else:
            self._on_event("posted")

    def _may_tell(self) -> bool:
        now = time.monotonic()
        self._allowed += (now - self._refilled) * EVENTS_PER_SECOND
        self._allowed, self._refilled = min(self._allowed, float(EVENT_BURST)), now
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True

    def _event(
        self, subject: Mapping[str, Any], namespace: str, kind: str, reason: str, text: str
    ) -> Object:
        meta, now = subject["metadata"], time.time()
        # The name is made of the content: telling the same twice is refused by the API server.
        digest = hashlib.sha256(f"{meta['uid']}/{reason}/{text}".encode()).hexdigest()[:16]
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{meta['name'][:200]}.{digest}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": subject.get("apiVersion", API_VERSION),
                "kind": subject.get("kind", "AgentTask"),
                "name": meta["name"],
                "uid": meta["uid"],
                **({"namespace": meta["namespace"]} if meta.get("namespace") else {}),
            },
            "type": kind,
            "reason": reason,
            "message": text,
            "action": reason,
            "source": {"component": COMPONENT, "host": self._instance},
            "reportingComponent": COMPONENT,
            "reportingInstance": self._instance[:128],
            "firstTimestamp": seconds(now),
            "lastTimestamp": seconds(now),
            "count": 1,
        }


def _task_path(namespace: str, name: str) -> str:
    return path(*GROUP, "namespaces", namespace, "agenttasks", name)
