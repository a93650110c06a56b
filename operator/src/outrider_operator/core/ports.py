"""What the fleet controller needs of the outside, so that it knows neither Kubernetes nor gRPC.

Contracts and their errors only; the implementations are in kube/ and fleet/, and main.py ties them
together. Objects are plain mappings, as the API server gives them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from outrider_proto.v1.agent_pb2 import Command

Object = dict[str, Any]


class ClusterError(Exception):
    """The API server did not do what it was asked; the text says what and why. Final."""


class ClusterUnavailableError(ClusterError):
    """It could not be reached, or is overloaded: the same request may work later."""


class ConflictError(ClusterError):
    """Somebody else has changed or made the object: read it again first."""


class NotFoundError(ClusterError):
    """There is no such object."""


@dataclass(frozen=True)
class Change:
    """A watched object was seen, changed, or is gone.

    Attributes:
        kind: which of the watched kinds.
        gone: it was deleted.
        body: the object as it is, or last was.
    """

    kind: Literal["AgentTask", "AgentTaskSchedule", "AgentConfig", "Node", "Agent"]
    gone: bool
    body: Mapping[str, Any]


def version_of(body: Mapping[str, Any]) -> int:
    """The version of an object, for telling the older of two; 0 where it has none.

    The API server's versions are numbers that grow: clients may compare them since Kubernetes
    1.35, and with etcd it was so before.
    """
    text = body["metadata"].get("resourceVersion") or "0"
    return int(text) if text.isdigit() else 0


class TaskStore(Protocol):
    """AgentTasks and their reports."""

    async def list_tasks(self) -> list[Object]:
        """All AgentTasks of the cluster."""

    async def get_task(self, namespace: str, name: str) -> Object:
        """One AgentTask. Raises NotFoundError."""

    async def write_status(self, task: Mapping[str, Any], status: Mapping[str, Any]) -> Object:
        """Replace the status of the task with this UID. Raises ConflictError, NotFoundError."""

    async def set_finalizer(self, task: Mapping[str, Any], present: bool) -> Object:
        """Add or take away our finalizer. Raises ConflictError, NotFoundError."""

    async def delete_task(self, task: Mapping[str, Any]) -> None:
        """Delete the task with this UID. Raises ConflictError, NotFoundError."""

    async def list_reports(self, namespace: str, name: str) -> list[Object]:
        """The reports of tasks of this name."""

    async def create_report(self, report: Mapping[str, Any]) -> Object:
        """Make a report. Raises ConflictError where there is one of its name."""

    async def replace_report(self, report: Mapping[str, Any]) -> Object:
        """Replace the report of this resourceVersion. Raises ConflictError, NotFoundError."""

    async def tell(
        self, subject: Mapping[str, Any], kind: Literal["Normal", "Warning"], reason: str, text: str
    ) -> None:
        """Post a Kubernetes Event about an object; never fails, is only worth trying."""


class ScheduleStore(Protocol):
    """AgentTaskSchedules and the tasks they make."""

    async def list_schedules(self) -> list[Object]:
        """All AgentTaskSchedules of the cluster."""

    async def get_schedule(self, namespace: str, name: str) -> Object:
        """One AgentTaskSchedule. Raises NotFoundError."""

    async def write_schedule_status(
        self, schedule: Mapping[str, Any], status: Mapping[str, Any]
    ) -> Object:
        """Replace the status at this resourceVersion. Raises ConflictError, NotFoundError."""

    async def list_tasks_of(self, schedule: Mapping[str, Any]) -> list[Object]:
        """The AgentTasks a schedule has made."""

    async def create_task(self, task: Mapping[str, Any]) -> Object:
        """Make an AgentTask. Raises ConflictError where there is one of its name."""

    async def get_task(self, namespace: str, name: str) -> Object:
        """One AgentTask. Raises NotFoundError."""

    async def delete_task(self, task: Mapping[str, Any]) -> None:
        """Delete the task with this UID. Raises ConflictError, NotFoundError."""

    async def tell(
        self, subject: Mapping[str, Any], kind: Literal["Normal", "Warning"], reason: str, text: str
    ) -> None:
        """Post a Kubernetes Event about an object; never fails, is only worth trying."""


class AgentStore(Protocol):
    """Agent objects, one per node."""

    async def list_agents(self) -> list[Object]:
        """All Agents."""

    async def create_agent(self, node: str) -> Object:
        """Make the Agent of a node. Raises ConflictError where there is one."""

    async def write_agent_status(self, node: str, status: Mapping[str, Any]) -> Object:
        """Replace the status of a node's Agent. Raises NotFoundError."""

    async def delete_agent(self, node: str) -> None:
        """Delete the Agent of a node. Raises NotFoundError."""


class NodeStore(Protocol):
    """Nodes."""

    async def list_nodes(self) -> list[Object]:
        """All Nodes, as core.nodes.slim gives them."""


class ConfigStore(Protocol):
    """AgentConfigs and their revisions."""

    async def list_configs(self) -> list[Object]:
        """All AgentConfigs."""

    async def get_config(self, name: str) -> Object:
        """One AgentConfig. Raises NotFoundError."""

    async def write_config_status(
        self, config: Mapping[str, Any], status: Mapping[str, Any]
    ) -> Object:
        """Replace the status at this resourceVersion. Raises ConflictError, NotFoundError."""

    async def list_revisions(self) -> list[Object]:
        """The ControllerRevisions of all AgentConfigs."""

    async def list_revision_names(self) -> list[str]:
        """The names of those, which is much less to read."""

    async def create_revision(self, revision: Mapping[str, Any]) -> Object:
        """Make a ControllerRevision. Raises ConflictError where there is one of its name."""

    async def get_revision(self, name: str) -> Object:
        """One ControllerRevision. Raises NotFoundError."""

    async def number_revision(self, name: str, number: int) -> Object:
        """Give a ControllerRevision another number. Raises NotFoundError."""

    async def delete_revision(self, name: str) -> None:
        """Delete a ControllerRevision. Raises NotFoundError."""

    async def tell(
        self, subject: Mapping[str, Any], kind: Literal["Normal", "Warning"], reason: str, text: str
    ) -> None:
        """Post a Kubernetes Event about an object; never fails, is only worth trying."""


class Cluster(TaskStore, AgentStore, NodeStore, Protocol):
    """What the controller needs of the API server for tasks and agents."""


class Outbox(Protocol):
    """The way to the agents."""

    def send(self, gateway: str, commands: Sequence[tuple[str, Command]]) -> None:
        """Hand commands for nodes to a gateway; what cannot be delivered is dropped.

        The controller notices by the agents' silence and sends again.
        """
