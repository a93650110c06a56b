"""AgentConfigs and their revisions at the API server.

A status is only written at the version of the AgentConfig it was decided on, so that a leader whose
time is over cannot set a change back. Revisions are ControllerRevisions in the operator's own
namespace. Keeps no state.
"""

from collections.abc import Mapping
from typing import Any, Final

from outrider_operator.core.config_objects import CONFIG_LABEL, KIND
from outrider_operator.core.ports import Object
from outrider_operator.core.slices import API_VERSION
from outrider_operator.kube.client import KubeClient, path
from outrider_operator.kube.objects import GROUP, ClusterStore

#: A list without the objects' content.
METADATA: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


class ConfigObjects:
    """What core.ports.ConfigStore asks for, by the API server.

    Args:
        kube: the connection.
        store: for Events.
        namespace: where the revisions are.
    """

    def __init__(self, kube: KubeClient, store: ClusterStore, namespace: str) -> None:
        self._kube = kube
        self._revisions = ("apis", "apps", "v1", "namespaces", namespace, "controllerrevisions")
        self._namespace = namespace
        self.tell = store.tell

    async def list_configs(self) -> list[Object]:
        """All AgentConfigs."""
        found = await self._kube.read_all(path(*GROUP, "agentconfigs"))
        return [{"apiVersion": API_VERSION, "kind": KIND, **body} for body in found]

    async def get_config(self, name: str) -> Object:
        """One AgentConfig."""
        return await self._kube.request("GET", path(*GROUP, "agentconfigs", name))

    async def write_config_status(
        self, config: Mapping[str, Any], status: Mapping[str, Any]
    ) -> Object:
        """Replace the status of the AgentConfig of this UID and resourceVersion."""
        meta = config["metadata"]
        operations = [
            {
                "op": "replace",
                "path": "/metadata/resourceVersion",
                "value": meta["resourceVersion"],
            },
            {"op": "add", "path": "/status", "value": dict(status)},
        ]
        target = path(*GROUP, "agentconfigs", meta["name"]) + "/status"
        return await self._kube.json_patch(target, operations)

    async def list_revisions(self) -> list[Object]:
        """The revisions of all AgentConfigs."""
        return await self._kube.read_all(path(*self._revisions, labelSelector=CONFIG_LABEL))

    async def list_revision_names(self) -> list[str]:
        """The names of the revisions of all AgentConfigs."""
        pages = self._kube.pages(
            path(*self._revisions, labelSelector=CONFIG_LABEL), accept=METADATA
        )
        return [
            item["metadata"]["name"] async for page in pages for item in page.get("items") or []
        ]

    async def create_revision(self, revision: Mapping[str, Any]) -> Object:
        """Make a revision."""
        meta = {**revision["metadata"], "namespace": self._namespace}
        return await self._kube.request(
            "POST", path(*self._revisions), {**revision, "metadata": meta}
        )

    async def get_revision(self, name: str) -> Object:
        """One revision."""
        return await self._kube.request("GET", path(*self._revisions, name))

    async def number_revision(self, name: str, number: int) -> Object:
        """Give a revision another number, by making its object anew.

        The API server refuses it as a change of `data` as soon as the bytes of that differ: after a
        patch they are without the blanks they were stored with. Who fails between the two requests
        finds it gone, and makes it.
        """
        target = path(*self._revisions, name)
        found = await self._kube.request("GET", target)
        meta = found["metadata"]
        await self._kube.request("DELETE", target, {"preconditions": {"uid": meta["uid"]}})
        kept = {key: meta[key] for key in ("name", "labels", "ownerReferences") if key in meta}
        return await self.create_revision({**found, "metadata": kept, "revision": number})

    async def delete_revision(self, name: str) -> None:
        """Delete a revision."""
        await self._kube.request("DELETE", path(*self._revisions, name))
