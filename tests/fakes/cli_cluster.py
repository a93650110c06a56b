"""The API server as kubectl outrider uses it for AgentConfigs, in memory, with trouble on order.

`before` is called with the name of each request; it may raise, and may change what is there.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from outrider_cli.errors import ConflictError, NotFoundError

Object = dict[str, Any]


class ConfigCluster:
    """Takes the place of outrider_cli.cluster.Cluster."""

    namespace = "default"

    def __init__(self) -> None:
        self.agent_objects: dict[str, Object] = {}
        self.configs: dict[str, Object] = {}
        self.revisions: dict[str, Object] = {}
        self.requests: list[str] = []
        self.before: Callable[[str], None] = lambda _name: None

    # What the operator does.

    def keep(self, config: str, revision: str, spec: Mapping[str, Any]) -> None:
        """Keep a revision of an AgentConfig that is there."""
        owner = {"kind": "AgentConfig", "uid": self.configs[config]["metadata"]["uid"]}
        name = f"{config}-{revision}"
        self.revisions[name] = {
            "metadata": {
                "name": name,
                "labels": {"outrider.dev/agentconfig": config},
                "ownerReferences": [owner],
            },
            "revision": len(self.revisions) + 1,
            "data": dict(spec),
        }

    def set_status(self, config: str, **status: Any) -> None:
        """Write some of the status, and so another resourceVersion."""
        body = self.configs[config]
        body.setdefault("status", {}).update(status)
        self._written(body)

    def add_config(self, name: str, spec: Mapping[str, Any]) -> None:
        """As `kubectl create`."""
        metadata = {"name": name, "uid": f"uid-{name}", "generation": 1, "resourceVersion": "1"}
        self.configs[name] = {"metadata": metadata, "spec": dict(spec)}

    def change(self, name: str, spec: Mapping[str, Any]) -> None:
        """As `kubectl apply` of another spec."""
        body = self.configs[name]
        body["spec"] = dict(spec)
        body["metadata"]["generation"] += 1
        self._written(body)

    def _written(self, body: Object) -> None:
        metadata = body["metadata"]
        metadata["resourceVersion"] = str(int(metadata["resourceVersion"]) + 1)

    # What the commands ask for.

    def agent(self, name: str) -> Object:
        self._asked("agent")
        return self._one(self.agent_objects, name, f"there is no Agent {name}")

    def agents(self) -> list[Object]:
        self._asked("agents")
        return copy.deepcopy(list(self.agent_objects.values()))

    def agent_config(self, name: str) -> Object:
        self._asked("agent_config")
        return self._one(self.configs, name, f"there is no AgentConfig {name}")

    def agent_configs(self) -> list[Object]:
        self._asked("agent_configs")
        return copy.deepcopy(list(self.configs.values()))

    def replace_agent_config(self, body: Object, *, dry_run: bool) -> Object:
        self._asked("replace_agent_config")
        there = self.configs[body["metadata"]["name"]]
        if body["metadata"]["resourceVersion"] != there["metadata"]["resourceVersion"]:
            raise ConflictError("the object has been modified")
        if not dry_run:
            self.change(body["metadata"]["name"], body["spec"])
        return there

    def annotate_agent_config(self, name: str, key: str, value: str, *, dry_run: bool) -> Object:
        self._asked("annotate_agent_config")
        body = self.configs[name]
        if not dry_run:
            body["metadata"].setdefault("annotations", {})[key] = value
            self._written(body)
        return body

    def controller_revisions(self, namespace: str, config: str) -> list[Object]:
        self._asked("controller_revisions")
        found = [
            body
            for body in self.revisions.values()
            if body["metadata"]["labels"]["outrider.dev/agentconfig"] == config
        ]
        return copy.deepcopy(found)

    def controller_revision(self, namespace: str, name: str) -> Object:
        self._asked("controller_revision")
        return self._one(self.revisions, name, f"controllerrevisions {name} not found")

    def _asked(self, name: str) -> None:
        self.requests.append(name)
        self.before(name)

    def _one(self, objects: Mapping[str, Object], name: str, text: str) -> Object:
        if name not in objects:
            raise NotFoundError(text)
        return copy.deepcopy(objects[name])
