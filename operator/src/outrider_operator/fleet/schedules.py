"""Makes the tasks of AgentTaskSchedules: has core decide at each due time, and acts on it.

A leader may die at any await in here: the next one finds the tasks that were made by their names,
and what was not written is decided again. Nothing is kept in memory that matters after a change of
leader. What a task does is none of its business.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from outrider_runtime.backoff import Backoff
from outrider_runtime.logs import get_logger

from outrider_operator.core.model import TASK_FINAL
from outrider_operator.core.ports import (
    Change,
    ClusterError,
    ClusterUnavailableError,
    ConflictError,
    NotFoundError,
    Object,
    ScheduleStore,
    version_of,
)
from outrider_operator.core.schedule import Plan, decide
from outrider_operator.core.schedule_model import (
    KIND,
    Child,
    Schedule,
    owner_of,
    parse_child,
    parse_schedule,
    task_body,
    task_name,
)
from outrider_operator.fleet.queue import WorkQueue
from outrider_operator.metrics import ServerMetrics

#: Schedules that are looked at at the same time.
WORKERS: Final = 4
#: What is due is compared with the wall clock at least so often, for clocks are set; seconds.
RECHECK_SECONDS: Final = 30.0
#: Longest wait before a task that was refused is tried again, seconds.
RETRY_CAP_SECONDS: Final = 300.0


@dataclass
class _Entry:
    """A schedule, and what this leader remembers of it."""

    body: Object
    #: Something has changed, so that it must be looked at even if nothing is due.
    dirty: bool = True
    #: When it was looked at last, and when something is due next, seconds since the Unix epoch.
    looked: float = 0.0
    wake: float | None = None
    #: Why the last try to make a task was refused.
    trouble: str | None = None
    #: The last text told for each reason: the same is not told twice in a row.
    told: dict[str, str] = field(default_factory=dict)
    #: Whether each of its tasks, by UID, is under way: a change of that is worth a look.
    tasks: dict[str, bool] = field(default_factory=dict)
    backoff: Backoff = field(default_factory=lambda: Backoff(1.0, RETRY_CAP_SECONDS))


class Schedules:
    """All schedules. Make it on the event loop it is to live on.

    Args:
        store: the API server.
        metrics: the server's.
        now: seconds since the Unix epoch.
        recheck: longest time between two looks at the clock, seconds.
    """

    def __init__(
        self,
        store: ScheduleStore,
        metrics: ServerMetrics,
        now: Callable[[], float],
        recheck: float = RECHECK_SECONDS,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._now = now
        self._recheck = recheck
        self._entries: dict[str, _Entry] = {}
        self._queue = WorkQueue(asyncio.get_running_loop().time)
        self._log = get_logger("outrider.schedules")

    async def resync(self) -> list[Object]:
        """Read all schedules, and look at all that wait for tasks. Raises ClusterError."""
        known = set(self._entries)
        found = await self._store.list_schedules()
        # One made after the list was begun is not gone.
        for uid in known - {body["metadata"]["uid"] for body in found}:
            self._forget(uid)
        for body in found:
            self._see(body)
        for uid, entry in self._entries.items():
            if (entry.body.get("status") or {}).get("active"):
                entry.dirty = True  # the watch may have missed the end of a task
                self._queue.add(uid)
        return found

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(WORKERS):
                group.create_task(self._work(), name=f"schedules {number}")

    def changed(self, change: Change) -> None:
        """A watched object was seen; other kinds are passed over."""
        if change.kind == KIND:
            if change.gone:
                self._forget(change.body["metadata"]["uid"])
            else:
                self._see(change.body)
        elif change.kind == "AgentTask":
            self._see_task(change.body, change.gone)

    def _see(self, body: Mapping[str, Any]) -> None:
        uid = body["metadata"]["uid"]
        entry = self._entries.get(uid)
        if entry is None:
            self._entries[uid] = _Entry(dict(body))
            self._metrics.schedules.set(len(self._entries))
        elif version_of(body) <= version_of(entry.body):
            return
        else:
            # What changed may be no more than the status that was written here.
            entry.dirty = entry.dirty or _asked(body) != _asked(entry.body)
            entry.body = dict(body)
        self._queue.add(uid)

    def _see_task(self, body: Mapping[str, Any], gone: bool) -> None:
        owner = owner_of(body)
        entry = self._entries.get(owner) if owner is not None else None
        if owner is None or entry is None:
            return
        uid, ended = body["metadata"]["uid"], (body.get("status") or {}).get("phase") in TASK_FINAL
        before = entry.tasks.get(uid)
        if gone:
            entry.tasks.pop(uid, None)
        else:
            entry.tasks[uid] = not ended
        if gone or before != (not ended):
            entry.dirty = True
            self._queue.add(owner)

    def _forget(self, uid: str) -> None:
        self._entries.pop(uid, None)
        self._queue.discard(uid)
        self._metrics.schedules.set(len(self._entries))

    # Work.

    async def _work(self) -> None:
        while True:
            uid = await self._queue.get()
            try:
                await self._look_at(uid)
            finally:
                self._queue.done(uid)

    async def _look_at(self, uid: str) -> None:
        entry = self._entries.get(uid)
        if entry is None:
            return
        result = "done"
        try:
            wait = await self._advance(entry)
        except NotFoundError:
            result, wait = "gone", self._failed(entry)
            await self._refresh(uid, entry)
        except ConflictError:
            result, wait = "conflict", self._failed(entry)
            await self._refresh(uid, entry)
        except ClusterUnavailableError as error:
            result, wait = "unavailable", self._failed(entry)
            self._complain(entry, error)
        except (ClusterError, ValueError) as error:
            result, wait = "failed", self._failed(entry)
            self._complain(entry, error)
        except Exception as error:  # noqa: BLE001 - one schedule must not end the work on all others
            result, wait = "error", self._failed(entry)
            self._log.exception("schedule not kept: a defect of this program", error=str(error))
        self._metrics.schedule_reconciles.labels(result).inc()
        if uid in self._entries:
            self._queue.add(uid, wait)

    def _failed(self, entry: _Entry) -> float:
        entry.dirty = True
        return entry.backoff.next()

    def _complain(self, entry: _Entry, error: Exception) -> None:
        meta = entry.body["metadata"]
        name = f"{meta['namespace']}/{meta['name']}"
        self._log.warning("schedule not kept, trying again", schedule=name, error=str(error))

    async def _refresh(self, uid: str, entry: _Entry) -> None:
        """Somebody else wrote, or took it away: read it again."""
        meta = entry.body["metadata"]
        try:
            body = await self._store.get_schedule(meta["namespace"], meta["name"])
        except NotFoundError:
            self._forget(uid)
        except ClusterError as error:
            self._complain(entry, error)
        else:
            if body["metadata"]["uid"] == uid:
                self._see(body)
            else:
                self._forget(uid)

    async def _advance(self, entry: _Entry) -> float:
        """Do what is to be done now. Returns in how many seconds to look again."""
        now = self._now()
        due = entry.wake is not None and now >= entry.wake
        if not (entry.dirty or due or now < entry.looked):
            entry.looked = now
            return self._wait(entry)
        entry.dirty = False
        body = entry.body  # the status is written at this version only
        schedule = parse_schedule(body)
        tasks = await self._store.list_tasks_of(body)
        children = [parse_child(task, schedule.name) for task in tasks]
        plan = first = decide(schedule, children, now)
        for child in plan.replace:
            await self._delete(entry, schedule, child)
        if plan.create is None:
            entry.trouble = None
        else:
            made = await self._make(entry, schedule, plan.create)
            replaced = {child.uid for child in plan.replace}
            after = [replace(c, deleting=c.deleting or c.uid in replaced) for c in children]
            after += [made] if made is not None else []
            schedule = replace(schedule, last_missed=plan.last_missed)
            plan = decide(schedule, after, now, entry.trouble)
        await self._write(entry, body, plan)
        self._metrics.schedule_missed.inc(first.missed)
        for child in plan.prune:
            await self._delete(entry, schedule, child)
        for notice in {**dict.fromkeys(first.notices), **dict.fromkeys(plan.notices)}:
            await self._tell(entry, notice.kind, notice.reason, notice.text)
        entry.looked, entry.wake = now, plan.wake
        if entry.trouble is not None:
            return self._failed(entry)
        entry.backoff.reset()
        return self._wait(entry)

    def _wait(self, entry: _Entry) -> float:
        if entry.dirty:
            return 0.0
        if entry.wake is None:
            return self._recheck
        return min(max(entry.wake - self._now(), 0.0), self._recheck)

    async def _make(self, entry: _Entry, schedule: Schedule, due: float) -> Child | None:
        """Make the task for a due time; None, and `entry.trouble`, where it is refused."""
        name = task_name(schedule, due)
        try:
            body = await self._create(schedule, due)
        except (ClusterUnavailableError, NotFoundError):
            raise
        except ClusterError as error:
            entry.trouble = f"{name} was not made: {error}"
            self._metrics.schedule_tasks.labels("refused").inc()
            await self._tell(entry, "Warning", "FailedCreate", entry.trouble)
            return None
        entry.trouble = None
        self._metrics.schedule_delay_seconds.observe(max(0.0, self._now() - due))
        self._metrics.schedule_tasks.labels("created").inc()
        await self._tell(entry, "Normal", "SuccessfulCreate", f"created task {name}")
        return parse_child(body, schedule.name)

    async def _create(self, schedule: Schedule, due: float) -> Object:
        try:
            return await self._store.create_task(task_body(schedule, due))
        except ConflictError:
            found = await self._store.get_task(schedule.namespace, task_name(schedule, due))
            if owner_of(found) == schedule.uid:
                return found  # made by a leader before, or by a try whose answer was lost
            raise ClusterError(
                "there is a task of this name that this schedule did not make: delete that"
            ) from None

    async def _delete(self, entry: _Entry, schedule: Schedule, child: Child) -> None:
        meta = {"namespace": schedule.namespace, "name": child.name, "uid": child.uid}
        try:
            await self._store.delete_task({"metadata": meta})
        except (ConflictError, NotFoundError):
            return  # it is gone already
        self._metrics.schedule_tasks.labels("deleted").inc()
        await self._tell(entry, "Normal", "SuccessfulDelete", f"deleted task {child.name}")

    async def _write(self, entry: _Entry, body: Object, plan: Plan) -> None:
        if plan.status != (body.get("status") or {}):
            written = await self._store.write_schedule_status(body, plan.status)
            if version_of(written) > version_of(entry.body):
                entry.body = written

    async def _tell(self, entry: _Entry, kind: Any, reason: str, text: str) -> None:
        if entry.told.get(reason) != text:
            entry.told[reason] = text
            await self._store.tell(entry.body, kind, reason, text)


def _asked(body: Mapping[str, Any]) -> tuple[Any, Any]:
    """What people ask for: the generation counts changes of spec."""
    meta = body["metadata"]
    return meta.get("generation"), meta.get("deletionTimestamp")
