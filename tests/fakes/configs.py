"""AgentConfigs at an API server in memory, a leader that carries them out, and agents that answer.

`fault` is called before each request with the name of the method; it may raise, also a crash of
the caller that nothing in the program catches.
"""

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from outrider_operator.core.nodes import NodeFacts
from outrider_operator.core.ports import ConflictError, NotFoundError, Object
from outrider_operator.core.registry import Registry, Session
from outrider_operator.fleet.configs import Configs
from outrider_operator.metrics import ServerMetrics
from outrider_proto.effective import unpack
from outrider_proto.v1 import agent_pb2 as pb
from outrider_proto.v1.fleet_pb2 import NodeConfigReport
from prometheus_client import CollectorRegistry

#: Not a whole number: times that stand in a status have to come back as they are.
START = 1_763_000_000.123457
ROLLOUT: dict[str, Any] = {
    "maxUnavailable": "100%",
    "canary": {"nodes": 0, "soakSeconds": 0},
    "progressDeadlineSeconds": 120,
    "onFailure": "Rollback",
}


class MemoryConfigs:
    """What core.ports.ConfigStore asks for, in memory."""

    def __init__(self) -> None:
        self.configs: dict[str, Object] = {}
        self.revisions: dict[str, Object] = {}
        self.events: list[tuple[str, str, str]] = []
        self.requests: list[str] = []
        self.written: list[tuple[str, dict[str, Any]]] = []
        self.fault: Callable[[str], None] = lambda _name: None
        self._numbers = itertools.count(1)

    # What a user does.

    def apply(self, name: str, spec: Mapping[str, Any]) -> None:
        whole = {"selector": {}, "priority": 100, "rollout": ROLLOUT, **copy.deepcopy(dict(spec))}
        body = self.configs.get(name)
        if body is None:
            uid = f"uid-of-{name}-{next(self._numbers)}"
            body = {"metadata": {"name": name, "uid": uid, "generation": 0}, "spec": None}
            self.configs[name] = body
        if body["spec"] != whole:
            body["spec"] = whole
            body["metadata"]["generation"] += 1
            self._touch(body)

    def annotate(self, name: str, key: str, value: str) -> None:
        self.configs[name]["metadata"].setdefault("annotations", {})[key] = value
        self._touch(self.configs[name])

    def delete(self, name: str) -> None:
        del self.configs[name]

    def status(self, name: str) -> dict[str, Any]:
        return dict(copy.deepcopy(self.configs[name].get("status") or {}))

    # What the program does.

    async def list_configs(self) -> list[Object]:
        self._request("list_configs")
        return copy.deepcopy(list(self.configs.values()))

    async def get_config(self, name: str) -> Object:
        self._request("get_config")
        return copy.deepcopy(self._find(self.configs, name))

    async def write_config_status(
        self, config: Mapping[str, Any], status: Mapping[str, Any]
    ) -> Object:
        self._request("write_config_status")
        body = self._find(self.configs, config["metadata"]["name"])
        if body["metadata"]["resourceVersion"] != config["metadata"]["resourceVersion"]:
            raise ConflictError("the config was changed")
        body["status"] = copy.deepcopy(dict(status))
        self.written.append((config["metadata"]["name"], body["status"]))
        written = self._touch(body)
        self._request("written_config_status")
        return written

    async def list_revisions(self) -> list[Object]:
        self._request("list_revisions")
        return copy.deepcopy(list(self.revisions.values()))

    async def list_revision_names(self) -> list[str]:
        self._request("list_revision_names")
        return list(self.revisions)

    async def create_revision(self, revision: Mapping[str, Any]) -> Object:
        self._request("create_revision")
        name = revision["metadata"]["name"]
        if name in self.revisions:
            raise ConflictError("there is a revision of this name")
        self.revisions[name] = copy.deepcopy(dict(revision))
        return copy.deepcopy(self.revisions[name])

    async def get_revision(self, name: str) -> Object:
        self._request("get_revision")
        return copy.deepcopy(self._find(self.revisions, name))

    async def number_revision(self, name: str, number: int) -> Object:
        self._request("number_revision")
        self._find(self.revisions, name)["revision"] = number
        return copy.deepcopy(self.revisions[name])

    async def delete_revision(self, name: str) -> None:
        self._request("delete_revision")
        self._find(self.revisions, name)
        del self.revisions[name]

    async def tell(
        self, subject: Mapping[str, Any], kind: Literal["Normal", "Warning"], reason: str, text: str
    ) -> None:
        self.events.append((kind, reason, text))

    def _request(self, name: str) -> None:
        self.requests.append(name)
        self.fault(name)

    def _touch(self, body: Object) -> Object:
        body["metadata"]["resourceVersion"] = str(next(self._numbers))
        return copy.deepcopy(body)

    def _find(self, objects: Mapping[str, Object], key: str) -> Object:
        if key not in objects:
            raise NotFoundError(f"there is no {key}")
        return objects[key]


@dataclass
class FakeAgent:
    """An agent that takes what it is sent, unless `refuses` says why not."""

    node: str
    session: int
    refuses: Callable[[pb.EffectiveConfig], str] = lambda _config: ""
    connected: bool = True
    silent: bool = False
    report: pb.ConfigReport = field(
        default_factory=lambda: pb.ConfigReport(phase=pb.CONFIG_PHASE_NONE)
    )
    waiting: pb.EffectiveConfig | None = None
    content: bytes = b"{}"

    def answer(self) -> bool:
        """Try what came last. False where nothing did."""
        config = self.waiting
        if config is None or self.silent or not self.connected:
            return False
        self.waiting = None
        unpack(config)
        problem = self.refuses(config)
        self.report.tried_hash, self.report.message = config.hash, problem
        if problem:
            self.report.phase = pb.CONFIG_PHASE_FAILED
        else:
            self.report.phase, self.report.hash = pb.CONFIG_PHASE_APPLIED, config.hash
            self.content = config.content
        return True


class ConfigFleet:
    """A fleet, and leaders one after another."""

    def __init__(self, store: MemoryConfigs, nodes: int = 0) -> None:
        self.store = store
        self.now = START
        self.labels: dict[str, dict[str, str]] = {}
        self.facts: dict[str, NodeFacts] = {}
        self.agents: dict[str, FakeAgent] = {}
        self.sent: list[tuple[str, pb.EffectiveConfig]] = []
        self.on_send: Callable[[str, pb.EffectiveConfig], None] = lambda _node, _config: None
        self._sessions = itertools.count(1)
        self._leading: Configs | None = None
        for number in range(nodes):
            self.add(f"n{number}")

    def add(self, name: str, labels: Mapping[str, str] | None = None, agent: bool = True) -> None:
        self.labels[name] = dict(labels or {})
        self.facts[name] = NodeFacts(created=self.now)
        if agent:
            self.agents[name] = FakeAgent(name, next(self._sessions))
        if self._leading is not None:
            if agent:
                self._join(self.agents[name])
            self.configs.node_changed(name)

    @property
    def configs(self) -> Configs:
        assert self._leading is not None
        return self._leading

    def lead(self) -> None:
        """A leader that knows nothing but what is written, and who is there."""
        self.registry = Registry(self.now)
        self.metrics = CollectorRegistry()
        self.agents_written: list[str] = []
        self._leading = Configs(
            self.store,
            self.registry,
            self.labels,
            self.facts,
            self._send,
            self.agents_written.append,
            ServerMetrics(self.metrics),
            lambda: self.now,
        )
        for agent in self.agents.values():
            if agent.connected:
                self._join(agent)

    async def begin(self) -> None:
        self.lead()
        await self.configs.load()

    def _join(self, agent: FakeAgent) -> None:
        session = Session(agent.node, agent.node, agent.session, "g", "s", self.now)
        self.registry.joined(session)
        self.configs.node_changed(agent.node)
        self.tell(agent)

    def tell(self, agent: FakeAgent) -> None:
        """As a gateway passes its newest report on."""
        report = pb.ConfigReport()
        report.CopyFrom(agent.report)
        told = NodeConfigReport(node=agent.node, session=agent.session, report=report)
        self.configs.reported(told)

    def connect(self, node: str) -> None:
        agent = self.agents[node]
        agent.connected, agent.session = True, next(self._sessions)
        self._join(agent)

    def disconnect(self, node: str) -> None:
        agent = self.agents[node]
        agent.connected = False
        self.registry.left(node, agent.session, "Closed", self.now)
        self.configs.node_changed(node)

    def _send(self, commands: list[tuple[str, pb.Command]]) -> None:
        for node, command in commands:
            agent = self.agents[node]
            assert agent.connected
            self.on_send(node, command.config)
            self.sent.append((node, command.config))
            agent.waiting = command.config

    async def work(self) -> None:
        """One look of the leader at everything, with what the watches show it."""
        for body in copy.deepcopy(list(self.store.configs.values())):
            self.configs.seen(body, gone=False)
        await self.configs.work()

    def answers(self) -> int:
        """All agents answer. Returns how many had something to say."""
        spoke = [agent for agent in self.agents.values() if agent.answer()]
        for agent in spoke:
            self.tell(agent)
        return len(spoke)

    async def run(self, seconds: float = 600.0, tick: float = 2.0) -> None:
        """Let time go by, with agents that answer at once."""
        end = self.now + seconds
        while self.now < end:
            await self.work()
            self.answers()
            self.now += tick

    def status(self, name: str) -> dict[str, Any]:
        return self.store.status(name)

    def phase(self, name: str) -> str:
        return str(self.status(name)["rollout"]["phase"])

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        found = {item["type"]: item for item in self.status(name)["conditions"]}
        return dict(found[kind])

    def reasons(self) -> list[str]:
        return [reason for _, reason, _ in self.store.events]

    def runs(self, node: str) -> bytes:
        return self.agents[node].content

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.get_sample_value(f"outrider_server_{name}", labels) or 0.0
