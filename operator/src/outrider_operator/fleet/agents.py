"""Keeps the Agent objects: one per node, saying who is there. Written on change only.

Takes what ought to stand there from the registry, never from the objects; decides nothing about
tasks.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from outrider_runtime.logs import get_logger

from outrider_operator.core.ports import (
    AgentStore,
    ClusterError,
    ConflictError,
    NotFoundError,
    version_of,
)
from outrider_operator.core.registry import Registry, agent_status
from outrider_operator.fleet.queue import WorkQueue
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import AgentSettings

#: A new leader does not call agents absent before they had time to show up, seconds.
SETTLE_SECONDS: Final = 30.0
RETRY_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Known:
    """What is looked at later of an Agent object; there are as many as nodes.

    Attributes:
        status: as JSON with sorted keys, so that equal ones are the same bytes: the decoded one
            is five times as large, and is needed only when its agent comes or goes.
    """

    generation: int
    version: int
    status: bytes


class AgentKeeper:
    """Writes the Agent objects.

    Args:
        store: the API server.
        registry: who is connected.
        nodes: all Nodes, by name.
        now: seconds since the Unix epoch.
        config_of: what the Agent of a node is to say of its configuration; None: what it says.
    """

    def __init__(
        self,
        store: AgentStore,
        registry: Registry,
        nodes: Mapping[str, Any],
        settings: AgentSettings,
        metrics: ServerMetrics,
        now: Callable[[], float],
        config_of: Callable[[str], dict[str, Any] | None] = lambda _: None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._nodes = nodes
        self._settings = settings
        self._metrics = metrics
        self._now = now
        self._config_of = config_of
        self._known: dict[str, _Known] = {}
        self._nodeless: dict[str, float] = {}
        self._queue = WorkQueue(asyncio.get_running_loop().time)
        self._log = get_logger("outrider.agents")

    async def load(self) -> None:
        """Read all Agents, for what was before this leader. Raises ClusterError."""
        for body in await self._store.list_agents():
            self.seen(body, gone=False)

    def seen(self, body: Mapping[str, Any], gone: bool) -> None:
        """An Agent object was seen, or is gone: one that somebody deleted is made again."""
        name = body["metadata"]["name"]
        if gone:
            if self._known.pop(name, None) is not None and name in self._registry.sessions:
                self._queue.add(name)
            return
        before, known = self._known.get(name), _known(body)
        if before is None:
            self._registry.remember(name, body.get("status") or {})
            self._queue.add(name, SETTLE_SECONDS)
        elif known.version < before.version:
            return
        elif known.status != before.status:
            self._queue.add(name, 1.0)  # somebody else wrote it: put it right
        self._known[name] = known

    def changed(self, node: str, delay: float = 0.0) -> None:
        """An agent came or went."""
        self._queue.add(node, delay)
        self._metrics.agents.labels("connected").set(len(self._registry.sessions))
        self._metrics.agents.labels("absent").set(len(self._registry.departures))

    async def run(self) -> None:
        """Write what changed, for ever."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._settings.writes_at_once):
                group.create_task(self._work(), name=f"agents {number}")
            while True:
                await asyncio.sleep(min(30.0, self._settings.remove_after_seconds / 2))
                self._look_for_nodeless()

    async def _work(self) -> None:
        while True:
            node = await self._queue.get()
            try:
                await self._write(node)
            except ClusterError as error:
                self._metrics.agent_writes.labels("failed").inc()
                self._log.warning("agent not written, trying again", node=node, error=str(error))
                self._queue.add(node, RETRY_SECONDS)
            finally:
                self._queue.done(node)

    async def _write(self, node: str) -> None:
        session = self._registry.sessions.get(node)
        departure = self._registry.departures.get(node)
        if session is None and self._due_for_removal(node):
            await self._remove(node)
            return
        known = self._known.get(node)
        if known is None:
            if session is None:
                return
            known = await self._create(node)
        previous: dict[str, Any] = msgspec.json.decode(known.status)
        made = agent_status(session, departure, previous, known.generation, self._now())
        config = self._config_of(node)
        if config is not None:
            made["config"] = config
        if made == previous:
            return
        try:
            self._known[node] = _known(await self._store.write_agent_status(node, made))
        except NotFoundError:
            self._known.pop(node, None)
            self._queue.add(node)
        else:
            self._metrics.agent_writes.labels("written").inc()

    async def _create(self, node: str) -> _Known:
        try:
            body: Mapping[str, Any] = await self._store.create_agent(node)
        except ConflictError:
            # It is there already; the status is all that counts, and is written whole.
            body = {"metadata": {"name": node, "generation": 1}, "status": {}}
        known = self._known[node] = _known(body)
        return known

    def _look_for_nodeless(self) -> None:
        now = self._now()
        nodeless = {name for name in self._known if name not in self._nodes}
        self._nodeless = {name: self._nodeless.get(name, now) for name in nodeless}
        for name in nodeless:
            if self._due_for_removal(name):
                self._queue.add(name)

    def _due_for_removal(self, node: str) -> bool:
        since = self._nodeless.get(node)
        return since is not None and self._now() >= since + self._settings.remove_after_seconds

    async def _remove(self, node: str) -> None:
        with contextlib.suppress(NotFoundError):  # somebody else was faster
            await self._store.delete_agent(node)
        self._known.pop(node, None)
        self._nodeless.pop(node, None)
        self._registry.forget(node)
        self._log.info("agent removed, its node is gone", node=node)


def _known(body: Mapping[str, Any]) -> _Known:
    status = body.get("status") or {}
    return _Known(
        generation=body["metadata"].get("generation", 1),
        version=version_of(body),
        status=msgspec.json.encode(status, order="sorted"),
    )
