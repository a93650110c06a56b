"""The leader's centre: takes what the watches and the gateways say, and has tasks carried out.

Lives on the server's event loop as long as this replica leads. All calls that bring news are short
and only note it; the work is done by a few workers, one task at a time each.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import Command
from outrider_proto.v1.fleet_pb2 import AgentSession, LinkResponse, NodeRunReport
from outrider_runtime.backoff import Backoff
from outrider_runtime.logs import get_logger

from outrider_operator.core.nodes import NodeFacts, facts
from outrider_operator.core.ports import (
    Change,
    Cluster,
    ClusterError,
    ClusterUnavailableError,
    ConfigStore,
    ConflictError,
    NotFoundError,
    Object,
    Outbox,
)
from outrider_operator.core.registry import Registry, session_of
from outrider_operator.fleet.agents import AgentKeeper
from outrider_operator.fleet.configs import Configs
from outrider_operator.fleet.orphans import Orphans
from outrider_operator.fleet.queue import WorkQueue
from outrider_operator.fleet.tasks import TaskRunner, World
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import ServerSettings

#: Tasks that are looked at at the same time.
WORKERS: Final = 8
#: A gateway whose link broke has this long to come back before its agents count as gone, seconds.
LINK_GRACE_SECONDS: Final = 10.0
#: Time between two full reads of the tasks and nodes, should a watch have missed something.
RESYNC_SECONDS: Final = 60.0
#: A task that could not be started because too many are under way is looked at again, seconds.
WAIT_SECONDS: Final = 5.0


class Controller:
    """Carries out all tasks. Make it on the event loop it is to live on.

    Args:
        cluster: the API server, for tasks and agents.
        configs: the same, for AgentConfigs.
        settings: all of the server's.
        metrics: the server's.
    """

    def __init__(
        self,
        cluster: Cluster,
        configs: ConfigStore,
        settings: ServerSettings,
        metrics: ServerMetrics,
    ) -> None:
        self._cluster = cluster
        self._settings = settings.tasks
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._nodes: dict[str, Mapping[str, str]] = {}
        self._facts: dict[str, NodeFacts] = {}
        self.registry = Registry(time.time())
        self._configs = Configs(
            configs,
            self.registry,
            self._nodes,
            self._facts,
            self._send,
            self._write_agent,
            metrics,
            time.time,
        )
        self._agents = AgentKeeper(
            cluster,
            self.registry,
            self._nodes,
            settings.agents,
            metrics,
            time.time,
            self._configs.agent_config,
        )
        self._tasks: dict[str, TaskRunner] = {}
        #: Those that have not ended: what comes and goes concerns them only.
        self._open: dict[str, TaskRunner] = {}
        self._backoffs: dict[str, Backoff] = {}
        self._queue = WorkQueue(self._loop.time)
        self._orphans = Orphans(self._send, metrics, time.time)
        self._lost_links: dict[str, asyncio.TimerHandle] = {}
        self._servers: dict[str, str] = {}
        self._outbox: Outbox | None = None
        self._world = World(
            cluster=cluster,
            registry=self.registry,
            nodes=self._nodes,
            send=self._send,
            now=time.time,
            settings=settings.tasks,
            ended=lambda phase: metrics.tasks_ended.labels(phase).inc(),
            facts=self._facts,
            retried=metrics.retries.inc,
        )
        self._log = get_logger("outrider.controller")

    async def load(self) -> list[Object]:
        """Read the cluster as it is now; to be called before anything else. Returns the tasks.

        Raises:
            ClusterError: It could not be read.
        """
        self._take_nodes(await self._cluster.list_nodes())
        await self._agents.load()
        return await self.resync()

    async def resync(self) -> list[Object]:
        """Read all tasks and take away those that are gone. Returns them. Raises ClusterError."""
        found = await self._cluster.list_tasks()
        gone = self._tasks.keys() - {body["metadata"]["uid"] for body in found}
        for body in found:
            self._see_task(body, gone=False)
        for uid in gone:
            # A task made after the list was read is not gone.
            await self._confirm_gone(uid)
        return found

    async def run(self, outbox: Outbox) -> None:
        """Work until cancelled. `load` was called before."""
        self._outbox = outbox
        async with asyncio.TaskGroup() as group:
            for number in range(WORKERS):
                group.create_task(self._work(), name=f"tasks {number}")
            group.create_task(self._agents.run(), name="agents")
            group.create_task(self._orphans.run(), name="orphans")
            group.create_task(self._configs.run(), name="configs")

    # What the watches say.

    def changed(self, change: Change) -> None:
        """A watched object was seen."""
        match change.kind:
            case "AgentTask":
                self._see_task(change.body, change.gone)
            case "Node":
                self._see_node(change.body, change.gone)
            case "Agent":
                self._agents.seen(change.body, change.gone)
            case "AgentConfig":
                self._configs.seen(change.body, change.gone)

    def _see_task(self, body: Mapping[str, Any], gone: bool) -> None:
        uid = body["metadata"]["uid"]
        if gone:
            self._forget_task(uid)
            return
        runner = self._tasks.get(uid)
        if runner is None:
            self._tasks[uid] = self._open[uid] = TaskRunner(body, self._world)
            self._queue.add(uid)
        elif runner.update(body):
            self._queue.add(uid, self._settings.batch_millis / 1000)
        self._note_end(uid)

    def _forget_task(self, uid: str) -> None:
        self._tasks.pop(uid, None)
        self._open.pop(uid, None)
        self._backoffs.pop(uid, None)
        self._queue.discard(uid)
        self._count_tasks()

    async def _confirm_gone(self, uid: str) -> None:
        runner = self._tasks.get(uid)
        if runner is None:
            return
        meta = runner.body["metadata"]
        try:
            found = await self._cluster.get_task(meta["namespace"], meta["name"])
        except NotFoundError:
            self._forget_task(uid)
        else:
            if found["metadata"]["uid"] != uid:
                self._forget_task(uid)

    def _count_tasks(self) -> None:
        self._metrics.tasks.labels("ended").set(len(self._tasks) - len(self._open))
        self._metrics.tasks.labels("active").set(len(self._open))

    def _note_end(self, uid: str) -> None:
        runner = self._open.get(uid)
        if runner is not None and runner.final:
            del self._open[uid]
        self._count_tasks()

    def _see_node(self, body: Mapping[str, Any], gone: bool) -> None:
        name = body["metadata"]["name"]
        before = (self._nodes.get(name), self._facts.get(name))
        if gone:
            self._nodes.pop(name, None)
            self._facts.pop(name, None)
        else:
            self._nodes[name] = body["metadata"].get("labels") or {}
            self._facts[name] = facts(body)
        if before != (self._nodes.get(name), self._facts.get(name)):
            self._wake_concerned(name)
            self._configs.node_changed(name)

    def _take_nodes(self, bodies: Iterable[Mapping[str, Any]]) -> None:
        found = {body["metadata"]["name"]: body for body in bodies}
        for name in self._nodes.keys() - found.keys():
            self._see_node({"metadata": {"name": name}}, gone=True)
        for body in found.values():
            self._see_node(body, gone=False)

    def _wake_concerned(self, node: str) -> None:
        for uid, runner in self._open.items():
            if runner.concerns(node):
                self._queue.add(uid, self._settings.batch_millis / 1000)

    async def reread_nodes(self) -> None:
        """Read all Nodes anew. Raises ClusterError."""
        self._take_nodes(await self._cluster.list_nodes())

    async def reread_configs(self) -> None:
        """Read all AgentConfigs anew. Raises ClusterError."""
        await self._configs.resync()

    # What the gateways say.

    def linked(self, gateway: str, hello: LinkResponse) -> None:
        """A gateway told all its sessions."""
        timer = self._lost_links.pop(gateway, None)
        if timer is not None:
            timer.cancel()
        present = {joined.node for joined in hello.joined}
        for session in self.registry.at(gateway):
            if session.node not in present:
                self._left(session.node, session.session, "Closed")
        self._joined(gateway, hello.hello.replica, hello.joined)
        self._servers[gateway] = hello.hello.replica
        self._take_reports(hello)

    def received(self, gateway: str, message: LinkResponse) -> None:
        """A gateway told of streams and runs."""
        for left in message.left:
            self._left(left.node, left.session, left.reason)
        self._joined(gateway, self._servers.get(gateway, gateway), message.joined)
        self._take_reports(message)

    def unlinked(self, gateway: str) -> None:
        """A link ended: its agents are given a while to show up, there or elsewhere."""
        self._lost_links[gateway] = self._loop.call_later(
            LINK_GRACE_SECONDS, self._gateway_lost, gateway
        )

    def _gateway_lost(self, gateway: str) -> None:
        self._lost_links.pop(gateway, None)
        self._servers.pop(gateway, None)
        for node in self.registry.gateway_lost(gateway, time.time()):
            self._agent_changed(node)

    def _joined(self, gateway: str, server: str, sessions: Iterable[AgentSession]) -> None:
        for told in sessions:
            session = session_of(told, gateway, server, time.time())
            if self.registry.joined(session):
                self._agent_changed(told.node)

    def _left(self, node: str, session: int, reason: str) -> None:
        if self.registry.left(node, session, reason[:64], time.time()):
            self._agent_changed(node)

    def _write_agent(self, node: str) -> None:
        self._agents.changed(node)

    def _agent_changed(self, node: str) -> None:
        # A stream that is replaced ends and begins again within moments: one write for both.
        self._agents.changed(node, 0.2)
        self._wake_concerned(node)
        self._configs.node_changed(node)

    def _take_reports(self, message: LinkResponse) -> None:
        for report in message.run_reports:
            self._take_report(report)
        for told in message.config_reports:
            self._configs.reported(told)

    def _take_report(self, told: NodeRunReport) -> None:
        runs = told.report.runs[: limits.RUNS_PER_MESSAGE]
        # A report that is full may have a continuation, and what is old may lack what is new.
        complete = (
            told.report.complete
            and len(runs) < limits.RUNS_PER_MESSAGE
            and self.registry.complete_report(told.node, told.session, time.time())
        )
        by_task: dict[str, list[Any]] = {}
        for state in runs:
            by_task.setdefault(state.id.task_uid, []).append(state)
        for uid, states in by_task.items():
            if uid in self._tasks:
                self._tasks[uid].report(told.node, states, complete)
                self._queue.add(uid, self._settings.batch_millis / 1000)
            else:
                self._orphans.add(told.node, states)
        if complete:
            for uid, runner in self._open.items():
                if uid not in by_task and runner.concerns(told.node):
                    runner.report(told.node, [], complete=True)
                    self._queue.add(uid, self._settings.batch_millis / 1000)

    # Work.

    def _send(self, commands: Iterable[tuple[str, Command]]) -> None:
        if self._outbox is None:
            return
        by_gateway: dict[str, list[tuple[str, Command]]] = {}
        for node, command in commands:
            session = self.registry.sessions.get(node)
            if session is not None:
                by_gateway.setdefault(session.gateway, []).append((node, command))
        for gateway, batch in by_gateway.items():
            self._outbox.send(gateway, batch)

    async def _work(self) -> None:
        while True:
            uid = await self._queue.get()
            self._metrics.work_waiting.set(len(self._queue))
            try:
                await self._look_at(uid)
            finally:
                self._queue.done(uid)

    async def _look_at(self, uid: str) -> None:
        runner = self._tasks.get(uid)
        if runner is None:
            return
        if not (runner.started or runner.final) and self._active() >= self._settings.max_active:
            self._queue.add(uid, WAIT_SECONDS)
            return
        result = "done"
        try:
            with self._metrics.reconcile_seconds.time():
                again = await runner.advance()
            self._backoffs.pop(uid, None)
            if again is not None:
                self._queue.add(uid, max(again, self._settings.batch_millis / 1000))
        except NotFoundError as error:
            result = "gone"
            await self._after_not_found(uid, runner, error)
        except ConflictError as error:
            result = "conflict"
            await self._refresh(uid, runner, error)
        except ClusterUnavailableError as error:
            result = "unavailable"
            self._retry(uid, error)
        except (ClusterError, ValueError) as error:
            result = "failed"
            self._retry(uid, error)
        except Exception as error:  # noqa: BLE001 - one task must not end the work on all others
            result = "error"
            self._log.exception("task not carried on: a defect of this program", uid=uid)
            self._retry(uid, error)
        self._metrics.reconciles.labels(result).inc()
        self._note_end(uid)

    def _active(self) -> int:
        return sum(runner.started for runner in self._open.values())

    async def _after_not_found(self, uid: str, runner: TaskRunner, error: ClusterError) -> None:
        """The task, or one of its reports, is gone: somebody deleted it."""
        runner.reload()
        try:
            await self._confirm_gone(uid)
        except ClusterError as other:
            error = other
        if uid in self._tasks:
            self._retry(uid, error)

    async def _refresh(self, uid: str, runner: TaskRunner, error: ClusterError) -> None:
        """Somebody else wrote: read again, then go on."""
        runner.reload()
        meta = runner.body["metadata"]
        try:
            body = await self._cluster.get_task(meta["namespace"], meta["name"])
        except NotFoundError:
            self._forget_task(uid)
            return
        except ClusterError as other:
            error = other
        else:
            if body["metadata"]["uid"] != uid:
                self._forget_task(uid)
                return
            runner.update(body)
        self._retry(uid, error)

    def _retry(self, uid: str, error: Exception) -> None:
        backoff = self._backoffs.setdefault(uid, Backoff(1.0, 30.0))
        if backoff.failures == 1:  # the first conflict or broken connection is everyday life
            self._log.warning("task not carried on, trying again", uid=uid, error=str(error))
        runner = self._tasks.get(uid)
        if runner is not None:
            runner.reload()
        self._queue.add(uid, 0.1 + backoff.next())
