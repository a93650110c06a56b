"""A leader with one task, an API server in memory, and the commands it sent."""

from typing import Any

from fakes.cluster import MemoryCluster
from outrider_operator.core.nodes import NodeFacts
from outrider_operator.core.registry import Registry, Session
from outrider_operator.fleet.tasks import TaskRunner, World
from outrider_operator.settings import TaskSettings
from outrider_proto.v1.agent_pb2 import Command, RunId, RunState

START = 1_000_000.0


class Leader:
    """A leader with one task and the commands it sent."""

    def __init__(self, cluster: MemoryCluster, nodes: list[str], spec: Any = None) -> None:
        self.cluster = cluster
        self.now = START
        self.sent: list[tuple[str, Command]] = []
        self.ended: list[str] = []
        self.retried: list[int] = []
        self.facts: dict[str, NodeFacts] = {}
        self.nodes = nodes
        if spec is not None:
            cluster.add_task("t", spec)
        self.lead()

    def lead(self) -> None:
        """A leader that knows nothing but what is written, and who is there."""
        self.labels: dict[str, dict[str, str]] = {node: {} for node in self.nodes}
        self.registry = Registry(self.now)
        for number, node in enumerate(self.nodes, 1):
            self.registry.joined(Session(node, node, number, "gateway", "server", self.now))
        world = World(
            cluster=self.cluster,
            registry=self.registry,
            nodes=self.labels,
            send=self.sent.extend,
            now=lambda: self.now,
            settings=TaskSettings(),
            ended=self.ended.append,
            facts=self.facts,
            retried=self.retried.append,
        )
        self.runner = TaskRunner(self.cluster.task("t"), world)

    async def advance(self) -> float | None:
        if ("default", "t") in self.cluster.tasks:
            self.runner.update(self.cluster.task("t"))
        return await self.runner.advance()

    def says(self, node: str, phase: Any, attempt: int = 1, **fields: Any) -> None:
        state = RunState(id=RunId(task_uid="uid-of-t", attempt=attempt), phase=phase, **fields)
        self.runner.report(node, [state], complete=False)

    @property
    def status(self) -> dict[str, Any]:
        return dict(self.cluster.task("t").get("status", {}))

    def runs(self) -> list[str]:
        return [node for node, command in self.sent if command.runs]

    def attempts(self) -> list[tuple[str, int]]:
        return [(node, run.id.attempt) for node, command in self.sent for run in command.runs]

    def acks(self) -> list[str]:
        return [node for node, command in self.sent if command.run_acks]
