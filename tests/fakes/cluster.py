"""An API server in memory: what core.ports.Cluster asks for, with versions, conflicts and faults.

`fault` is called before each request with the name of the method; it may raise, also a crash of
the caller that nothing in the program catches.
"""

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from outrider_operator.core.ports import ConflictError, NotFoundError, Object

FINALIZER = "outrider.dev/end-runs"


class MemoryCluster:
    def __init__(self) -> None:
        self.tasks: dict[tuple[str, str], Object] = {}
        self.reports: dict[tuple[str, str], Object] = {}
        self.agents: dict[str, Object] = {}
        self.nodes: dict[str, Object] = {}
        self.events: list[tuple[str, str, str]] = []
        self.requests: list[str] = []
        self.fault: Callable[[str], None] = lambda _name: None
        self._numbers = itertools.count(1)

    # What a user does.

    def add_task(self, name: str, spec: Mapping[str, Any], uid: str = "") -> Object:
        body = {
            "apiVersion": "outrider.dev/v1alpha1",
            "kind": "AgentTask",
            "metadata": {
                "name": name,
                "namespace": "default",
                "uid": uid or f"uid-of-{name}",
                "generation": 1,
                "resourceVersion": str(next(self._numbers)),
            },
            "spec": dict(spec),
        }
        self.tasks["default", name] = body
        return copy.deepcopy(body)

    def change_spec(self, name: str, **fields: Any) -> None:
        body = self.tasks["default", name]
        body["spec"].update(fields)
        body["metadata"]["generation"] += 1
        self._touch(body)

    def delete(self, name: str) -> None:
        body = self.tasks["default", name]
        if body["metadata"].get("finalizers"):
            body["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            self._touch(body)
        else:
            self._remove(body)

    def task(self, name: str) -> Object:
        return copy.deepcopy(self.tasks["default", name])

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["node"]: row for report in self.reports.values() for row in report["nodes"]}

    def add_node(self, name: str, labels: Mapping[str, str] | None = None) -> None:
        self.nodes[name] = {"metadata": {"name": name, "uid": name, "labels": dict(labels or {})}}

    # What the program does.

    async def list_tasks(self) -> list[Object]:
        self._request("list_tasks")
        return copy.deepcopy(list(self.tasks.values()))

    async def get_task(self, namespace: str, name: str) -> Object:
        self._request("get_task")
        return copy.deepcopy(self._find(self.tasks, (namespace, name)))

    async def write_status(self, task: Mapping[str, Any], status: Mapping[str, Any]) -> Object:
        self._request("write_status")
        body = self._same(task)
        body["status"] = copy.deepcopy(dict(status))
        return self._touch(body)

    async def set_finalizer(self, task: Mapping[str, Any], present: bool) -> Object:
        self._request("set_finalizer")
        body = self._same(task)
        if body["metadata"]["resourceVersion"] != task["metadata"]["resourceVersion"]:
            raise ConflictError("the task was changed")
        body["metadata"]["finalizers"] = [FINALIZER] if present else []
        if not present and body["metadata"].get("deletionTimestamp"):
            self._remove(body)
        return self._touch(body)

    async def delete_task(self, task: Mapping[str, Any]) -> None:
        self._request("delete_task")
        self._remove(self._same(task))

    async def list_reports(self, namespace: str, name: str) -> list[Object]:
        self._request("list_reports")
        found = [r for (ns, _), r in self.reports.items() if ns == namespace]
        return copy.deepcopy([r for r in found if r["task"]["name"] == name])

    async def create_report(self, report: Mapping[str, Any]) -> Object:
        self._request("create_report")
        key = (report["metadata"]["namespace"], report["metadata"]["name"])
        if key in self.reports:
            raise ConflictError("there is a report of this name")
        self.reports[key] = copy.deepcopy(dict(report))
        return self._touch(self.reports[key])

    async def replace_report(self, report: Mapping[str, Any]) -> Object:
        self._request("replace_report")
        meta = report["metadata"]
        key = (meta["namespace"], meta["name"])
        known = self._find(self.reports, key)
        if known["metadata"]["resourceVersion"] != meta["resourceVersion"]:
            raise ConflictError("the report was changed")
        self.reports[key] = copy.deepcopy(dict(report))
        return self._touch(self.reports[key])

    async def tell(
        self, subject: Mapping[str, Any], kind: Literal["Normal", "Warning"], reason: str, text: str
    ) -> None:
        self.events.append((kind, reason, text))

    async def list_agents(self) -> list[Object]:
        self._request("list_agents")
        return copy.deepcopy(list(self.agents.values()))

    async def create_agent(self, node: str) -> Object:
        self._request("create_agent")
        if node in self.agents:
            raise ConflictError("there is an Agent of this name")
        self.agents[node] = {"metadata": {"name": node, "uid": node, "generation": 1}}
        return self._touch(self.agents[node])

    async def write_agent_status(self, node: str, status: Mapping[str, Any]) -> Object:
        self._request("write_agent_status")
        body = self._find(self.agents, node)
        body["status"] = copy.deepcopy(dict(status))
        return self._touch(body)

    async def delete_agent(self, node: str) -> None:
        self._request("delete_agent")
        self._find(self.agents, node)
        del self.agents[node]

    async def list_nodes(self) -> list[Object]:
        self._request("list_nodes")
        return copy.deepcopy(list(self.nodes.values()))

    def _request(self, name: str) -> None:
        self.requests.append(name)
        self.fault(name)

    def _touch(self, body: Object) -> Object:
        body["metadata"]["resourceVersion"] = str(next(self._numbers))
        return copy.deepcopy(body)

    def _find(self, objects: Mapping[Any, Object], key: Any) -> Object:
        if key not in objects:
            raise NotFoundError(f"there is no {key}")
        return objects[key]

    def _same(self, task: Mapping[str, Any]) -> Object:
        meta = task["metadata"]
        body = self._find(self.tasks, (meta["namespace"], meta["name"]))
        if body["metadata"]["uid"] != meta["uid"]:
            raise ConflictError("this is another task of the same name")
        return body

    def _remove(self, body: Object) -> None:
        meta = body["metadata"]
        self.tasks.pop((meta["namespace"], meta["name"]), None)
        uid = meta["uid"]
        self.reports = {k: r for k, r in self.reports.items() if r["task"]["uid"] != uid}
