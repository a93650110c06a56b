"""AgentTaskSchedules and the tasks they make, at the API server.

A schedule's status is only written at the version of the schedule it was decided on, so that a
leader whose time is over cannot set it back. Keeps no state.
"""

from collections.abc import Mapping
from typing import Any

from outrider_operator.core.ports import NotFoundError, Object
from outrider_operator.core.schedule_model import KIND, SCHEDULE_LABEL, owner_of
from outrider_operator.core.slices import API_VERSION
from outrider_operator.kube.client import KubeClient, path
from outrider_operator.kube.objects import GROUP, ClusterStore


class ScheduleObjects:
    """What core.ports.ScheduleStore asks for, by the API server.

    Args:
        kube: the connection.
        store: the tasks and Events.
    """

    def __init__(self, kube: KubeClient, store: ClusterStore) -> None:
        self._kube = kube
        self.get_task = store.get_task
        self.delete_task = store.delete_task
        self.tell = store.tell

    async def list_schedules(self) -> list[Object]:
        """All AgentTaskSchedules of the cluster."""
        try:
            found = await self._kube.read_all(path(*GROUP, "agenttaskschedules"))
        except NotFoundError:
            return []  # resource definitions of an earlier version: tasks go on all the same
        return [{"apiVersion": API_VERSION, "kind": KIND, **body} for body in found]

    async def get_schedule(self, namespace: str, name: str) -> Object:
        """One AgentTaskSchedule."""
        return await self._kube.request("GET", _path(namespace, name))

    async def write_schedule_status(
        self, schedule: Mapping[str, Any], status: Mapping[str, Any]
    ) -> Object:
        """Replace the status of the schedule of this UID and resourceVersion."""
        meta = schedule["metadata"]
        operations = [
            {
                "op": "replace",
                "path": "/metadata/resourceVersion",
                "value": meta["resourceVersion"],
            },
            {"op": "add", "path": "/status", "value": dict(status)},
        ]
        target = _path(meta["namespace"], meta["name"])
        return await self._kube.json_patch(target + "/status", operations)

    async def list_tasks_of(self, schedule: Mapping[str, Any]) -> list[Object]:
        """The tasks a schedule has made."""
        meta = schedule["metadata"]
        target = path(
            *GROUP,
            "namespaces",
            meta["namespace"],
            "agenttasks",
            labelSelector=f"{SCHEDULE_LABEL}={meta['name']}",
        )
        found = await self._kube.read_all(target)
        return [task for task in found if owner_of(task) == meta["uid"]]

    async def create_task(self, task: Mapping[str, Any]) -> Object:
        """Make an AgentTask."""
        target = path(*GROUP, "namespaces", task["metadata"]["namespace"], "agenttasks")
        return await self._kube.request("POST", target, task)


def _path(namespace: str, name: str) -> str:
    return path(*GROUP, "namespaces", namespace, "agenttaskschedules", name)
