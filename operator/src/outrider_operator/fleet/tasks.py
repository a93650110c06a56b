"""Carries one AgentTask out: reads its rows, has core decide, writes, and sends, in this order.

One object per task, worked on by one worker at a time. What is in memory is what was written, plus
reports that have not been written yet: a leader may die at any await in here and the next one goes
on from the objects.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
from outrider_proto.v1.agent_pb2 import Command, RunState
from outrider_runtime.logs import get_logger

from outrider_operator.core import commands, merge, planner, slices, targeting
from outrider_operator.core.model import (
    TASK_FINAL,
    NodeRun,
    Phase,
    Rows,
    Task,
    TaskPhase,
    parse_spec,
    unsupported,
)
from outrider_operator.core.nodes import NodeFacts
from outrider_operator.core.plans import Memory, Plan, Policy
from outrider_operator.core.ports import Cluster, NotFoundError, Object, version_of
from outrider_operator.core.registry import Registry
from outrider_operator.core.status import Verdict, status, verdict
from outrider_operator.core.times import seconds_of
from outrider_operator.settings import TaskSettings

FINALIZER: Final = "outrider.dev/end-runs"


@dataclass(frozen=True)
class World:
    """What all tasks share: the cluster, the fleet, and the clock.

    Attributes:
        cluster: the API server.
        registry: who is connected.
        nodes: labels of all Nodes, by name.
        send: hands commands for nodes to their gateways.
        now: seconds since the Unix epoch.
        ended: told the phase of each task that reaches its end.
        facts: state and age of Nodes, by name.
        retried: told how many nodes are to try again.
    """

    cluster: Cluster
    registry: Registry
    nodes: Mapping[str, Mapping[str, str]]
    send: Callable[[Iterable[tuple[str, Command]]], None]
    now: Callable[[], float]
    settings: TaskSettings
    ended: Callable[[str], None]
    facts: Mapping[str, NodeFacts] = field(default_factory=dict)
    retried: Callable[[int], None] = lambda _: None


def parse_task(body: Mapping[str, Any]) -> Task:
    """The typed form of an AgentTask object. Raises ValueError where it has another form."""
    meta, found = body["metadata"], body.get("status") or {}
    return Task(
        uid=meta["uid"],
        namespace=meta["namespace"],
        name=meta["name"],
        generation=meta.get("generation", 0),
        spec=parse_spec(body["spec"]),
        started=seconds_of(found.get("startTime")),
        completed=seconds_of(found.get("completionTime")),
        phase=TaskPhase(found.get("phase", TaskPhase.PENDING)),
        deleting=bool(meta.get("deletionTimestamp")),
    )


def _retries(before: Rows, after: Rows) -> int:
    return sum(
        row.phase is Phase.PENDING and row.attempt > 0 and before[name].phase is not Phase.PENDING
        for name, row in after.items()
    )


class TaskRunner:
    """One task. Raises what core.ports raises; the caller tries again."""

    def __init__(self, body: Mapping[str, Any], world: World) -> None:
        self.body: Object = dict(body)
        self._world = world
        self._slices: list[tuple[str, ...]] = []
        self._rows: dict[str, NodeRun] = {}
        self._versions: list[str] = []
        self._loaded = False
        #: What is missing of the reports, in words.
        self._missing = ""
        self._memory = Memory()
        self._pending: dict[str, merge.Pending] = {}
        self._taken: dict[str, merge.Pending] = {}
        self._deleting_since: float | None = None
        meta = body["metadata"]
        self._log = get_logger("outrider.task", task=f"{meta['namespace']}/{meta['name']}")

    @property
    def phase(self) -> str:
        """The task's phase as it is written."""
        return str((self.body.get("status") or {}).get("phase", TaskPhase.PENDING))

    @property
    def final(self) -> bool:
        """Whether the task has reached its end."""
        return self.phase in TASK_FINAL

    @property
    def started(self) -> bool:
        """Whether its nodes were fixed."""
        return bool((self.body.get("status") or {}).get("startTime"))

    def update(self, body: Mapping[str, Any]) -> bool:
        """Take a newer state of the object; False for an older one."""
        if version_of(body) < version_of(self.body):
            return False
        self.body = dict(body)
        return True

    def report(self, node: str, states: Iterable[RunState], complete: bool) -> None:
        """Keep what an agent said until the next `advance`. Bounded: one state per attempt."""
        self._pending.setdefault(node, merge.Pending()).add(states, complete)

    def concerns(self, node: str) -> bool:
        """Whether a change of this node, or of its agent, could matter."""
        if self.final:
            return False
        return not self._loaded or node in self._rows or self.body["spec"].get("lateNodes") == "Run"

    async def advance(self) -> float | None:
        """Do what is to be done now. Returns in how many seconds to come back, if at all."""
        try:
            task = parse_task(self.body)
        except ValueError as error:
            await self._refuse_form(str(error))
            return None
        if self.final:
            return await self._after_the_end(task)
        if not self._loaded:
            await self._load(task)
        if self._missing:
            # Nobody knows what has run any more: to go on might run it again, to wait has no end.
            await self._finish(task, Verdict(TaskPhase.FAILED, "ReportsLost", self._missing))
            return 0.0
        if task.started is None:
            if task.deleting:
                await self._set_finalizer(False)
                return None
            if not await self._start(task):
                return None
            task = parse_task(self.body)
        if self.phase == TaskPhase.SUSPENDED and not task.spec.suspend:
            # As for a Job, the time a task may take begins anew when it is taken up again.
            task = await self._restart_clock(task)
        return await self._carry_out(task)

    async def _load(self, task: Task) -> None:
        found = await self._world.cluster.list_reports(task.namespace, task.name)
        mine = [item for item in found if item.get("task", {}).get("uid") == task.uid]
        mine.sort(key=lambda item: int(item["slice"]))
        parts: list[dict[str, NodeRun]] = []
        self._missing = ""
        try:
            parts = slices.from_objects(mine, task.uid)
        except slices.MissingSliceError as error:
            self._missing = str(error)
        targeted = (self.body.get("status") or {}).get("counts", {}).get("targeted", 0)
        if task.started is not None and sum(map(len, parts)) < targeted:
            self._missing = self._missing or f"not all {targeted} nodes are in the task's reports"
        self._slices = [tuple(part) for part in parts]
        self._rows = {name: row for part in parts for name, row in part.items()}
        self._versions = [item["metadata"]["resourceVersion"] for item in mine]
        self._loaded = True

    async def _start(self, task: Task) -> bool:
        """Fix the nodes and write their rows; False when the task ended by that."""
        reason = unsupported(task.spec)
        if reason is not None:
            await self._finish(task, Verdict(TaskPhase.FAILED, "NotSupported", reason))
            return False
        nodes = self._world.nodes
        names = targeting.targets(task.spec.target, task.uid, nodes, self._agents())
        if not names:
            text = "spec.target selects no node: check its labels and that agents are running"
            await self._finish(task, Verdict(TaskPhase.FAILED, "NoMatchingNodes", text))
            return False
        begun = msgspec.structs.replace(task, started=self._world.now())
        # Before its time begins, nothing was sent: what an earlier try left is written over.
        rows = targeting.first_rows(names, nodes.keys(), self._world.registry.sessions.keys())
        # What each waits for is written at once, not at the next step to every report again; but
        # nothing that is final, for a try that fails before the start is done over.
        planned = self._plan(begun, rows).rows
        rows.update((n, row) for n, row in planned.items() if row.phase is Phase.PENDING)
        self._slices = slices.cut(names, task.spec.output.preview_bytes)
        # Reports that an earlier try made and this one does not need become empty.
        self._slices += [()] * (len(self._versions) - len(self._slices))
        self._rows = {}
        await self._set_finalizer(True)
        await self._write(task, rows, range(len(self._slices)))
        begun = msgspec.structs.replace(task, started=self._world.now())
        await self._write_status(begun, verdict(begun, self._rows))
        text = f"runs on {len(rows)} nodes"
        await self._world.cluster.tell(self.body, "Normal", "Started", text)
        self._log.info("task started", nodes=len(rows))
        return True

    async def _restart_clock(self, task: Task) -> Task:
        begun = msgspec.structs.replace(task, started=self._world.now())
        await self._write_status(begun, verdict(begun, self._rows))
        return begun

    def _agents(self) -> set[str]:
        """Nodes that have, or had, an agent."""
        registry = self._world.registry
        # An Agent outlives its Node for a while: such a one is no node to wait for.
        return registry.sessions.keys() | (registry.departures.keys() & self._world.nodes.keys())

    def _plan(self, task: Task, rows: Rows) -> Plan:
        world, settings = self._world, self._world.settings
        policy = Policy(
            settings.lost_after_seconds,
            settings.retry_backoff_seconds,
            settings.retry_backoff_cap_seconds,
        )
        roster = world.registry.roster(world.nodes.keys(), world.facts)
        return planner.plan(task, rows, roster, self._memory, policy, world.now())

    async def _carry_out(self, task: Task) -> float | None:
        merged = self._merge()
        rows = self._with_late_nodes(task, merged.rows)
        heard = {**self._memory.heard, **dict.fromkeys(merged.heard, self._world.now())}
        self._memory = Memory(heard, self._memory.cancelled, self._memory.wave)
        plan = self._plan(task, rows)
        touched = slices.changed(self._slices, self._rows, plan.rows)
        if len(touched) > 1:
            first = planner.without_intents(rows, plan.rows)
            await self._write(task, first, slices.changed(self._slices, self._rows, first))
            touched = slices.changed(self._slices, self._rows, plan.rows)
        await self._write(task, plan.rows, touched)
        self._memory = plan.memory
        self._taken = {}
        self._world.retried(_retries(rows, plan.rows))
        self._world.send(self._commands(task, plan, merged.ended))
        found = verdict(task, self._rows)
        ended = found.phase in TASK_FINAL
        if ended:
            await self._finish(task, found)
            return 0.0
        await self._write_status(task, found)
        return await self._come_back(task, plan.wakeup)

    def _with_late_nodes(self, task: Task, rows: dict[str, NodeRun]) -> dict[str, NodeRun]:
        """The rows, with those of nodes that joined since, where the task wants them."""
        if task.spec.late_nodes != "Run" or task.spec.cancel or task.deleting:
            return rows
        nodes, sessions = self._world.nodes, self._world.registry.sessions
        target = task.spec.target
        late = targeting.late(target, task.uid, nodes, self._agents(), rows.keys())
        if not late:
            return rows
        self._slices = slices.extend(self._slices, late, task.spec.output.preview_bytes)
        self._log.info("nodes joined the task", nodes=len(late))
        return {**rows, **targeting.first_rows(late, nodes.keys(), sessions.keys())}

    def _merge(self) -> merge.Merged:
        """Put reports into the rows; they are kept until `_taken` is cleared after the write."""
        for node, item in self._pending.items():
            self._taken.setdefault(node, merge.Pending()).add(item.states.values(), item.complete)
        self._pending = {}
        reports = [
            merge.Report(node, list(item.states.values()), item.complete)
            for node, item in self._taken.items()
        ]
        return merge.merge(self._rows, reports)

    def _commands(
        self, task: Task, plan: Plan, ended: Iterable[tuple[str, int]]
    ) -> list[tuple[str, Command]]:
        found = [(node, Command(run_acks=[commands.run_id(task.uid, n)])) for node, n in ended]
        for node in plan.sends:
            run = commands.run_command(task, plan.rows[node].attempt)
            found.append((node, Command(runs=[run])))
        for node in plan.cancels:
            run_id = commands.run_id(task.uid, plan.rows[node].attempt)
            # An agent that the run never came to can only say what it does know.
            found.append((node, Command(cancels=[run_id], report_runs=True)))
        return found

    async def _write(self, task: Task, rows: Mapping[str, NodeRun], indexes: Iterable[int]) -> None:
        """Write slices; `_rows` follows slice by slice, so that it is always what is written."""
        for index in indexes:
            names = self._slices[index]
            report = slices.to_object(task, index, [rows[name] for name in names])
            if index < len(self._versions):
                report["metadata"]["resourceVersion"] = self._versions[index]
                answer = await self._world.cluster.replace_report(report)
                self._versions[index] = answer["metadata"]["resourceVersion"]
            else:
                answer = await self._world.cluster.create_report(report)
                self._versions.append(answer["metadata"]["resourceVersion"])
            self._rows.update((name, rows[name]) for name in names)

    def reload(self) -> None:
        """Somebody else wrote a report: read all of them again before the next step."""
        self._loaded = False

    async def _write_status(self, task: Task, found: Verdict) -> None:
        previous = self.body.get("status") or {}
        made = status(task, self._rows, found, previous, self._world.now())
        if made != previous:
            self.update(await self._world.cluster.write_status(self.body, made))

    async def _finish(self, task: Task, found: Verdict) -> None:
        await self._write_status(task, found)
        await self._set_finalizer(False)
        good = found.phase is TaskPhase.SUCCEEDED
        kind: Literal["Normal", "Warning"] = "Normal" if good else "Warning"
        reason = "Completed" if good else found.phase.value
        text = f"{found.reason}: {found.message}"
        await self._world.cluster.tell(self.body, kind, reason, text)
        self._world.ended(found.phase.value)
        self._log.info("task ended", phase=found.phase.value, reason=found.reason)

    async def _refuse_form(self, text: str) -> None:
        """An object the definition should have refused: say so, and leave it alone."""
        self._log.error("task cannot be read", error=text)
        await self._world.cluster.tell(self.body, "Warning", "Unreadable", text)

    async def _set_finalizer(self, present: bool) -> None:
        names = self.body["metadata"].get("finalizers", [])
        if (FINALIZER in names) != present:
            try:
                self.update(await self._world.cluster.set_finalizer(self.body, present))
            except NotFoundError:
                if present:
                    raise

    async def _come_back(self, task: Task, wakeup: float | None) -> float | None:
        now = self._world.now()
        if task.deleting:
            if self._deleting_since is None:
                self._deleting_since = now
            left = self._deleting_since + self._world.settings.end_runs_seconds - now
            if left <= 0:
                self._log.warning("deleted task goes before all its runs have ended")
                await self._set_finalizer(False)
                return None
            wakeup = min(now + left, wakeup or now + left)
        return None if wakeup is None else max(0.0, wakeup - now)

    async def _after_the_end(self, task: Task) -> float | None:
        """Late results, and the time to live."""
        await self._set_finalizer(False)
        if self._pending or self._taken:
            if not self._loaded:
                await self._load(task)
            merged = self._merge()
            if not self._missing:
                touched = slices.changed(self._slices, self._rows, merged.rows)
                await self._write(task, merged.rows, touched)
                # Before the agents may forget: nobody counts these rows again otherwise.
                await self._write_status(task, Verdict(task.phase, *self._last_words()))
            self._taken = {}
            self._world.send(
                (node, Command(run_acks=[commands.run_id(task.uid, n)])) for node, n in merged.ended
            )
        else:
            # Nothing but a late result needs the rows of a task that has ended.
            self._rows, self._slices, self._versions, self._loaded = {}, [], [], False
        ttl = task.spec.ttl_seconds_after_finished
        if ttl is None or task.completed is None or task.deleting:
            return None
        left = task.completed + ttl - self._world.now()
        if left > 0:
            return left
        await self._world.cluster.delete_task(self.body)
        self._log.info("task deleted, its time to live is over", seconds=ttl)
        return None

    def _last_words(self) -> tuple[str, str]:
        found = self.body.get("status") or {}
        texts = [c.get("message", "") for c in found.get("conditions", [])]
        return found.get("reason", ""), texts[0] if texts else ""
