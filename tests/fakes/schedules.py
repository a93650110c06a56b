"""Schedules in memory: what core.ports.ScheduleStore asks for, on top of the API server in memory.

Each task that is made is noted with what was so at that moment, for a test to judge.
"""

import copy
from collections.abc import Mapping
from typing import Any

from fakes.cluster import MemoryCluster
from outrider_operator.core.ports import ConflictError, Object
from outrider_operator.core.schedule_model import KIND, SCHEDULE_LABEL, owner_of
from outrider_operator.core.times import seconds


class MemorySchedules(MemoryCluster):
    def __init__(self) -> None:
        super().__init__()
        self.schedules: dict[tuple[str, str], Object] = {}
        #: Names of all tasks that were ever made, in order.
        self.made: list[str] = []
        #: Why each task that is to be made is refused, where it is.
        self.refuse: Exception | None = None

    def add_schedule(self, name: str, created: float, **spec: Any) -> Object:
        body = {
            "apiVersion": "outrider.dev/v1alpha1",
            "kind": KIND,
            "metadata": {
                "name": name,
                "namespace": "default",
                "uid": f"uid-of-{name}",
                "generation": 1,
                "creationTimestamp": seconds(created),
            },
            "spec": {"taskTemplate": {"spec": {"run": {"builtin": "Ping"}}}, **spec},
        }
        self.schedules["default", name] = body
        return self._touch(body)

    def change_schedule(self, name: str, **fields: Any) -> Object:
        body = self.schedules["default", name]
        body["spec"].update(fields)
        body["metadata"]["generation"] += 1
        return self._touch(body)

    def end_task(self, name: str, phase: str, at: float) -> Object:
        body = self.tasks["default", name]
        body["status"] = {"phase": phase, "completionTime": seconds(at)}
        return self._touch(body)

    async def list_schedules(self) -> list[Object]:
        self._request("list_schedules")
        return copy.deepcopy(list(self.schedules.values()))

    async def get_schedule(self, namespace: str, name: str) -> Object:
        self._request("get_schedule")
        return copy.deepcopy(self._find(self.schedules, (namespace, name)))

    async def write_schedule_status(
        self, schedule: Mapping[str, Any], status: Mapping[str, Any]
    ) -> Object:
        self._request("write_schedule_status")
        meta = schedule["metadata"]
        body = self._find(self.schedules, (meta["namespace"], meta["name"]))
        if body["metadata"]["resourceVersion"] != meta["resourceVersion"]:
            raise ConflictError("the schedule was changed")
        body["status"] = copy.deepcopy(dict(status))
        return self._touch(body)

    async def list_tasks_of(self, schedule: Mapping[str, Any]) -> list[Object]:
        self._request("list_tasks_of")
        meta = schedule["metadata"]
        return [
            copy.deepcopy(task)
            for task in self.tasks.values()
            if task["metadata"].get("labels", {}).get(SCHEDULE_LABEL) == meta["name"]
            and owner_of(task) == meta["uid"]
        ]

    async def create_task(self, task: Mapping[str, Any]) -> Object:
        self._request("create_task")
        if self.refuse is not None:
            raise self.refuse
        meta = task["metadata"]
        key = (meta["namespace"], meta["name"])
        if key in self.tasks:
            raise ConflictError("there is a task of this name")
        self.tasks[key] = copy.deepcopy(dict(task))
        self.tasks[key]["metadata"].update(uid=f"uid-{len(self.made)}", generation=1)
        self.made.append(meta["name"])
        made = self._touch(self.tasks[key])
        self._request("created_task")  # the answer may be lost
        return made
