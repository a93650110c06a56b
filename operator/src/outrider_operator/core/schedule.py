"""What an AgentTaskSchedule is, and what is to be done about one now: a pure function.

The conventions are those of CronJob, also where they surprise: of several due times that were
missed only the latest is made up for, and a due time passed over while a task runs, or while the
schedule is suspended, counts as missed. Where CronJob says nothing about a due time it lets go by,
this does. Of the outside it knows the objects it is handed and the time zone database.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from outrider_operator.core.cron import CronError, DueTimes, ZoneError, due_times
from outrider_operator.core.model import TaskPhase
from outrider_operator.core.schedule_model import (
    Child,
    ConcurrencyPolicy,
    Schedule,
    ScheduleSpec,
    task_name,
)
from outrider_operator.core.slices import API_VERSION
from outrider_operator.core.status import condition
from outrider_operator.core.times import seconds

#: Most tasks named in the status.
MAX_ACTIVE: Final = 100
#: Missed due times are counted up to here, as by a CronJob.
MAX_MISSED: Final = 100
#: A clock this much behind lastScheduleTime was set back, seconds.
CLOCK_SLACK: Final = 60.0


@dataclass(frozen=True)
class Notice:
    """What is told in an Event."""

    kind: Literal["Normal", "Warning"]
    reason: str
    text: str


@dataclass(frozen=True)
class Plan:
    """What is to be done, in this order.

    Attributes:
        replace: tasks to be deleted before a new one is made.
        create: the due time to make a task for, if any.
        prune: ended tasks beyond the history limits.
        status: to be written where it differs from what stands.
        notices: to be told.
        missed: how many due times went by without a task and were not told of before.
        last_missed: the latest of them, or of those told before, if any.
        wake: when something is due next, if ever.
    """

    replace: tuple[Child, ...]
    create: float | None
    prune: tuple[Child, ...]
    status: Mapping[str, Any]
    notices: tuple[Notice, ...]
    missed: int
    last_missed: float | None
    wake: float | None


def decide(
    schedule: Schedule, children: Sequence[Child], now: float, trouble: str | None = None
) -> Plan:
    """What is to be done about a schedule.

    Args:
        schedule: as it is.
        children: all its tasks that are there.
        now: seconds since the Unix epoch.
        trouble: why the last try to make a task was refused, if it was and is not over.
    """
    spec = schedule.spec
    last = _last_made(schedule, children)
    begin = schedule.created if last is None else last
    times, reason, message = _due_times(spec)
    running = not (schedule.deleting or spec.suspend or times is None)
    turn = _turn(schedule, children, times, begin, now) if running and times else _Turn()
    upcoming = times.after(max(now, begin)) if running and times else None
    if times is not None:
        reason, message = _readiness(schedule, last, upcoming, now, trouble)
    last_missed = turn.last_missed or schedule.last_missed
    status = _status(schedule, children, last, last_missed, upcoming)
    found = {item.get("type"): item for item in schedule.status.get("conditions", [])}
    ready = condition(
        "Ready",
        reason == "Scheduled",
        reason,
        message,
        schedule.generation,
        found.get("Ready"),
        now,
    )
    notices = [*_endings(schedule, children), *turn.notices]
    if ready["status"] == "False" and reason not in ("Suspended", "FailedCreate"):
        notices.append(Notice("Warning", reason, message))
    return Plan(
        replace=turn.replace,
        create=turn.create,
        prune=tuple(_beyond_limits(spec, children)),
        status={**status, "conditions": [ready]},
        notices=tuple(notices),
        missed=turn.missed,
        last_missed=last_missed,
        wake=upcoming,
    )


def _due_times(spec: ScheduleSpec) -> tuple[DueTimes | None, str, str]:
    """Its due times, or None, why there are none, and a sentence about it."""
    try:
        return due_times(spec.schedule, spec.time_zone), "", ""
    except CronError as error:
        return None, "UnparseableSchedule", f"spec.schedule: {error}: no task is made"
    except ZoneError as error:
        return None, "UnknownTimeZone", f"spec.timeZone: {error}: no task is made"


def _last_made(schedule: Schedule, children: Iterable[Child]) -> float | None:
    """The latest due time that has a task: a leader may have died before it wrote it down."""
    known = [child.due for child in children if child.due is not None]
    if schedule.last is not None:
        known.append(schedule.last)
    return max(known, default=None)


@dataclass(frozen=True)
class _Turn:
    """What the due time that is reached, if one is, asks for."""

    create: float | None = None
    replace: tuple[Child, ...] = ()
    last_missed: float | None = None
    missed: int = 0
    notices: tuple[Notice, ...] = ()


def _turn(
    schedule: Schedule, children: Sequence[Child], times: DueTimes, begin: float, now: float
) -> _Turn:
    spec = schedule.spec
    due = times.latest(now)
    if due is None or due <= begin:
        return _Turn()
    # Those that were told before are not told again.
    told = max(begin, schedule.last_missed or begin)
    deadline = spec.starting_deadline_seconds
    if deadline is not None and now > due + deadline:
        if due <= told:
            return _Turn()
        missed = len(times.between(told, due, MAX_MISSED)) + 1
        text = f"spec.startingDeadlineSeconds, {deadline}, had passed"
        return _Turn(last_missed=due, missed=missed, notices=(_missed(missed, due, text),))
    active = [child for child in children if not child.ended]
    if active and spec.concurrency_policy is ConcurrencyPolicy.FORBID:
        names = ", ".join(child.name for child in active[:3])
        text = (
            f"{task_name(schedule, due)} waits: {names} has not ended, and "
            "spec.concurrencyPolicy is Forbid"
        )
        return _Turn(notices=(Notice("Normal", "TaskAlreadyActive", text),))
    earlier = times.between(told, due, MAX_MISSED)
    text = f"only the latest due time, {seconds(due)}, is made up for"
    replaced = spec.concurrency_policy is ConcurrencyPolicy.REPLACE
    return _Turn(
        create=due,
        replace=tuple(child for child in active if not child.deleting) if replaced else (),
        last_missed=earlier[-1] if earlier else None,
        missed=len(earlier),
        notices=(_missed(len(earlier), earlier[-1], text),) if earlier else (),
    )


def _missed(count: int, latest: float, why: str) -> Notice:
    many = count >= MAX_MISSED
    told = f"{MAX_MISSED} due times or more" if many else f"{count} due times"
    what = f"the due time {seconds(latest)}" if count == 1 else f"{told} up to {seconds(latest)}"
    reason = "TooManyMissedTimes" if many else "MissSchedule"
    return Notice("Warning", reason, f"missed {what}: {why}")


def _readiness(
    schedule: Schedule, last: float | None, upcoming: float | None, now: float, trouble: str | None
) -> tuple[str, str]:
    """A CamelCase word for how the schedule is doing, and a sentence; "Scheduled" is well."""
    if schedule.spec.suspend:
        return "Suspended", "spec.suspend is set: no task is made"
    if trouble is not None:
        return "FailedCreate", trouble
    if last is not None and last > now + CLOCK_SLACK:
        return "ClockBehind", (
            f"status.lastScheduleTime, {seconds(last)}, is later than the server's clock: no task "
            "is made until then; if that clock was wrong, make the schedule anew"
        )
    if upcoming is None and not schedule.deleting:
        return "NeverDue", "spec.schedule: there is no such time in the next 50 years"
    return "Scheduled", "a task is made at each due time"


def _endings(schedule: Schedule, children: Sequence[Child]) -> Iterable[Notice]:
    """What became of the tasks that were active when the status was written."""
    by_uid = {child.uid: child for child in children}
    for known in schedule.status.get("active", []):
        child = by_uid.get(known.get("uid"))
        if child is None:
            yield Notice("Normal", "MissingTask", f"active task went missing: {known.get('name')}")
        elif child.ended:
            text = f"saw completed task: {child.name}, phase: {child.phase}"
            yield Notice("Normal", "SawCompletedTask", text)


def _beyond_limits(spec: ScheduleSpec, children: Sequence[Child]) -> Iterable[Child]:
    """The oldest of the ended tasks, where there are more than the history limits."""
    ended = [child for child in children if child.ended and not child.deleting]
    ended.sort(key=lambda child: (child.due or 0.0, child.name))
    good = [child for child in ended if child.phase is TaskPhase.SUCCEEDED]
    bad = [child for child in ended if child.phase is not TaskPhase.SUCCEEDED]
    yield from good[: max(0, len(good) - spec.successful_tasks_history_limit)]
    yield from bad[: max(0, len(bad) - spec.failed_tasks_history_limit)]


def _status(
    schedule: Schedule,
    children: Sequence[Child],
    last: float | None,
    missed: float | None,
    upcoming: float | None,
) -> dict[str, Any]:
    """The whole status but its conditions."""
    active = [child for child in children if not child.ended and not child.deleting]
    active.sort(key=lambda child: (child.due or 0.0, child.name))
    good = [child.completed for child in children if child.phase is TaskPhase.SUCCEEDED]
    ends = [at for at in (*good, schedule.last_successful) if at is not None]
    times = {
        "lastScheduleTime": last,
        "lastSuccessfulTime": max(ends, default=None),
        "lastMissedTime": missed,
        "nextScheduleTime": upcoming,
    }
    return {
        "observedGeneration": schedule.generation,
        "active": [_reference(schedule, child) for child in active[-MAX_ACTIVE:]],
        "activeCount": len(active),
        **{name: seconds(at) for name, at in times.items() if at is not None},
    }


def _reference(schedule: Schedule, child: Child) -> dict[str, str]:
    return {
        "apiVersion": API_VERSION,
        "kind": "AgentTask",
        "namespace": schedule.namespace,
        "name": child.name,
        "uid": child.uid,
    }
