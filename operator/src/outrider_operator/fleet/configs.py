"""Carries out AgentConfigs: steps their changes, writes how they stand, and has agents told.

One piece of work at a time: look at everything, write the new states, and only then send what
follows from them, so that another leader can go on from what is written. What comes in is only
noted. Which node gets what, and how a change moves on, is decided in core/.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from outrider_proto.merging import Conflict, Path
from outrider_proto.v1.fleet_pb2 import NodeConfigReport
from outrider_runtime.backoff import Backoff
from outrider_runtime.logs import get_logger

from outrider_operator.core.config_count import Counts, count, count_settled
from outrider_operator.core.config_plan import (
    Config,
    Merger,
    Picture,
    conflicts,
    picture,
    views,
)
from outrider_operator.core.config_rollout import Rollout, RolloutPhase, step
from outrider_operator.core.config_status import (
    UNDER_WAY,
    Told,
    essence,
    events,
    not_kept,
    noted,
    status_of,
)
from outrider_operator.core.nodes import NodeFacts
from outrider_operator.core.ports import (
    ClusterError,
    ClusterUnavailableError,
    ConfigStore,
    ConflictError,
    NotFoundError,
)
from outrider_operator.core.registry import Registry
from outrider_operator.fleet.config_agents import ConfigAgents
from outrider_operator.fleet.config_book import ConfigBook, Known
from outrider_operator.fleet.config_nodes import ConfigNodes
from outrider_operator.fleet.config_revisions import Revisions
from outrider_operator.fleet.config_sender import ConfigSender, Send
from outrider_operator.metrics import ServerMetrics

#: What comes within this becomes one piece of work, seconds; more where the work takes longer.
GATHER_SECONDS: Final = 0.2
GATHER_FACTOR: Final = 1.0
#: Time between two looks while a change waits for something, and while none does, seconds.
TICK_SECONDS: Final = 1.0
IDLE_SECONDS: Final = 5.0
#: An AgentConfig is written at most so often, and for numbers alone when nothing is under way.
WRITE_SECONDS: Final = 1.0
NUMBERS_SECONDS: Final = 10.0
WRITES_AT_ONCE: Final = 8
#: A new leader waits so long for agents and their reports before it takes them for gone, seconds.
SETTLE_SECONDS: Final = 15.0


@dataclass(frozen=True)
class _Step:
    """A status to be written.

    Attributes:
        body: the AgentConfig that it was decided on: of another version it is not written.
        before: the AgentConfig as it is.
        after: as it is then.
        told: what is told of it.
    """

    known: Known
    body: Mapping[str, Any]
    before: Config
    after: Config
    status: dict[str, Any]
    told: list[Told]


class Configs:
    """All AgentConfigs. Make it on the event loop it is to live on.

    Args:
        store: the API server.
        registry: who is connected.
        labels: of all Nodes, by name.
        facts: more of them.
        send: takes commands by node.
        write_agent: has the Agent object of a node written.
        now: seconds since the Unix epoch.
    """

    def __init__(
        self,
        store: ConfigStore,
        registry: Registry,
        labels: Mapping[str, Mapping[str, str]],
        facts: Mapping[str, NodeFacts],
        send: Send,
        write_agent: Callable[[str], None],
        metrics: ServerMetrics,
        now: Callable[[], float],
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._now = now
        self._began = now()
        self._agents = ConfigAgents(write_agent, asyncio.get_running_loop().time)
        self._nodes = ConfigNodes(registry, labels, facts, self._agents.changed, metrics, now)
        self._revisions = Revisions(store)
        self._book = ConfigBook(store, self._revisions)
        self._sender = ConfigSender(registry.sessions, send, metrics, now)
        self._merger = Merger()
        self._wake = asyncio.Event()
        self._loaded = False
        self._log = get_logger("outrider.configs")
        #: What an Agent object is to say of its node's configuration.
        self.agent_config = self._nodes.agent_config

    # What comes in.

    async def load(self) -> None:
        """Read AgentConfigs and revisions, before any work. Raises ClusterError."""
        await self._revisions.load()
        await self._book.read_all()
        self._loaded = True

    async def resync(self) -> None:
        """Read all AgentConfigs anew, and see after their revisions. Raises ClusterError."""
        if not self._loaded:
            return
        await self._book.read_all()
        self._wake.set()
        known = list(self._book.known.values())
        await self._revisions.restore((one.body, _in_use(one.rollout)) for one in known)

    def seen(self, body: Mapping[str, Any], gone: bool) -> None:
        """An AgentConfig was seen, or is gone: it stops counting at once."""
        if self._book.seen(body, gone):
            self._wake.set()

    def node_changed(self, node: str) -> None:
        """A Node came, went or has other labels, or its agent came or went."""
        self._nodes.changed(node)
        self._wake.set()

    def reported(self, told: NodeConfigReport) -> None:
        """An agent told how it stands to its configuration."""
        self._nodes.reported(told)
        self._wake.set()

    # Work.

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._agents.run(), name="configs of agents")
            group.create_task(self._work_on(), name="configs")

    async def _work_on(self) -> None:
        loop = asyncio.get_running_loop()
        await self._until_loaded()
        pause = GATHER_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience()):
                    await self._wake.wait()
            await asyncio.sleep(pause)
            self._wake.clear()
            began = loop.time()
            try:
                await self.work()
            except Exception:  # noqa: BLE001 - tasks must go on all the same
                self._log.exception("configs not carried on: a defect of this program")
                await asyncio.sleep(IDLE_SECONDS)
            pause = max(GATHER_SECONDS, GATHER_FACTOR * (loop.time() - began))

    async def _until_loaded(self) -> None:
        """Nothing is done before all is known; tasks do not wait for it."""
        backoff = Backoff(1.0, 30.0)
        while not self._loaded:
            try:
                await self.load()
            except ClusterError as error:
                self._log.warning("AgentConfigs cannot be read, trying again", error=str(error))
                await asyncio.sleep(backoff.next())
        self._began = self._now()

    def _patience(self) -> float:
        """How long nothing needs to be looked at if nothing comes in, seconds."""
        now, known = self._now(), self._book.known.values()
        waits = self._settling() or any(one.phase in UNDER_WAY for one in known)
        dues = [one.due - now for one in known if one.due > now]
        return min(TICK_SECONDS if waits else IDLE_SECONDS, *dues, IDLE_SECONDS)

    async def work(self) -> None:
        """Look at everything once: step, write, send."""
        now = self._look()
        if not self._settling():
            steps = await self._steps(now)
            if steps:
                limit = asyncio.Semaphore(WRITES_AT_ONCE)
                async with asyncio.TaskGroup() as group:
                    for one in steps:
                        group.create_task(self._write(one, limit))
                now = self._look()
        self._count()
        if await self._sender.deliver(now.desired, self._nodes.states):
            self._wake.set()

    def _look(self) -> Picture:
        """What every agent is to have, by what is written."""
        for node in self._nodes.refresh():
            self._sender.forget(node)
        made = picture(self._book.configs(), self._nodes.states, self._merger)
        self._nodes.want(made.desired)
        return made

    def _settling(self) -> bool:
        """A new leader does not know yet who is there."""
        return self._now() - self._began <= SETTLE_SECONDS and not self._nodes.all_told()

    async def _steps(self, now: Picture) -> list[_Step]:
        """What is to be written of the AgentConfigs that may be written now."""
        at, clashes = self._now(), conflicts(now)
        due = [
            (known, known.config)
            for known in list(self._book.known.values())
            if known.due <= at and known.config is not None and known.config.name in now.selected
        ]
        still = [config for known, config in due if _rests(config)]
        counts = count_settled(still, self._nodes.states, now)
        found = []
        for known, config in due:
            counted = counts.get(config.name)
            made = self._step(known, config, counted, now, clashes.get(config.name, {}))
            if made is not None:
                found.append(made)
            if counted is None:
                await asyncio.sleep(0)  # looking at all nodes of one takes a while
        return found

    def _step(
        self,
        known: Known,
        before: Config,
        counts: Counts | None,
        now: Picture,
        clashes: Mapping[Path, Conflict],
    ) -> _Step | None:
        at, after = self._now(), before
        if known.attempt not in (None, before.attempt):
            for node in now.selected[before.name]:
                self._nodes.again(node)
                now.stood.pop(node, None)
        known.attempt = before.attempt
        if counts is None:
            seen = list(views(before, self._nodes.states, now))
            state = step(before.rollout, before.target, before.plan, seen, at, before.attempt)
            after = replace(before, rollout=state)
            counts = count(after, seen, before.rollout)
        generation = known.body["metadata"].get("generation", 0)
        status = status_of(after, counts, clashes, known.status, generation, at, known.problem)
        same = essence(status) == essence(known.status)
        # Agents come and go: numbers alone can wait.
        numbers_due = known.due - WRITE_SECONDS + NUMBERS_SECONDS
        waits = same and after.rollout.phase not in UNDER_WAY and at < numbers_due
        if waits or status == known.status:
            return None
        told = [*events(before.rollout, after.rollout), *noted(known.status, status)]
        return _Step(known, known.body, before, after, status, told)

    async def _write(self, one: _Step, limit: asyncio.Semaphore) -> None:
        known, name = one.known, one.after.name
        async with limit:
            try:
                one = await self._kept(one)
                written = await self._store.write_config_status(one.body, one.status)
            except NotFoundError:
                self._book.forget(name)
            except ConflictError:
                await self._refresh(known, name)
            except ClusterError as error:
                self._later(known, name, error)
            else:
                known.backoff.reset()
                known.due = self._now() + WRITE_SECONDS
                self._book.seen(written, gone=False)
                await self._after(one)

    async def _kept(self, one: _Step) -> _Step:
        """See that a revision is kept before it is tried; what cannot be kept is not tried."""
        state, body = one.after.rollout, one.body
        begun = state.trial != one.before.rollout.trial
        try:
            for name in _in_use(state):
                if self._revisions.kept(body, name) and not (begun and name == state.trial):
                    continue
                if not one.after.revisions[name].lost:
                    await self._revisions.keep(body, name)
        except (ClusterUnavailableError, ConflictError):
            raise
        except ClusterError as error:
            if not begun:
                raise
            self._log.warning("revision not kept", name=one.after.name, error=str(error))
            status = not_kept(one.known.status, one.status, str(error), self._now())
            if status == one.known.status:
                raise
            return replace(one, after=one.before, status=status, told=[])
        return one

    def _later(self, known: Known, name: str, error: ClusterError) -> None:
        known.due = self._now() + known.backoff.next()
        if known.backoff.failures == 2 or not isinstance(error, ClusterUnavailableError):
            self._log.warning("config not written, trying again", name=name, error=str(error))

    async def _refresh(self, known: Known, name: str) -> None:
        """Somebody else wrote: read it, and decide anew."""
        try:
            await self._book.read(name)
            self._wake.set()
        except ClusterError as error:
            self._later(known, name, error)

    async def _after(self, one: _Step) -> None:
        before, after, body = one.before.rollout, one.after.rollout, one.body
        for told in one.told:
            await self._store.tell(body, told.kind, told.reason, told.text)
        if after.phase is RolloutPhase.SETTLED and before.trial and before.trial == after.settled:
            self._metrics.config_settle_seconds.observe(self._now() - before.started)
        if (after.trial, after.settled) != (before.trial, before.settled):
            await self._revisions.tidy(body, {*_in_use(after), one.after.target})

    def _count(self) -> None:
        phases = [known.phase for known in self._book.known.values()]
        self._metrics.configs.set(len(phases))
        for phase in RolloutPhase:
            self._metrics.rollouts.labels(phase.value).set(phases.count(phase))


def _in_use(state: Rollout) -> set[str]:
    return {name for name in (state.settled, state.trial) if name}


def _rests(config: Config) -> bool:
    """Nothing changes for it, whatever its nodes do."""
    state = config.rollout
    if config.target == state.settled:
        return not state.trial
    same = (config.target, config.attempt) == (state.trial, state.attempt)
    return same and state.phase not in UNDER_WAY and state.phase is not RolloutPhase.PAUSED
