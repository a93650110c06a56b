"""What an AgentTaskSchedule and its tasks are: types, and objects read into them and made of them.

Decides nothing: that is in core.schedule. Names of tasks are made of the due time, so that no due
time can have two, whoever makes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import msgspec

from outrider_operator.core.model import TASK_FINAL, TaskPhase
from outrider_operator.core.slices import API_VERSION
from outrider_operator.core.times import seconds, seconds_of

KIND: Final = "AgentTaskSchedule"
#: On every task of a schedule: the schedule's name.
SCHEDULE_LABEL: Final = "outrider.dev/schedule"
#: On every task of a schedule: the due time it was made for.
DUE_ANNOTATION: Final = "outrider.dev/scheduled-timestamp"
#: Where a template does not say how long its tasks are kept, the history limits alone do, seconds.
KEEP_SECONDS: Final = 315_360_000


class ConcurrencyPolicy(StrEnum):
    """What to do at a due time while an earlier task has not ended."""

    ALLOW = "Allow"
    FORBID = "Forbid"
    REPLACE = "Replace"


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of the parts of a spec. Fields this version does not know are passed over."""


class TemplateMetadata(_Part, frozen=True, kw_only=True):
    """Labels and annotations of the tasks."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class TaskTemplate(_Part, frozen=True, kw_only=True):
    """The tasks a schedule makes; their spec is passed on as it is."""

    spec: dict[str, Any]
    metadata: TemplateMetadata = TemplateMetadata()


class ScheduleSpec(_Part, frozen=True, kw_only=True):
    """spec of an AgentTaskSchedule; the resource's definition has the meaning of each field."""

    schedule: str
    task_template: TaskTemplate
    time_zone: str = ""
    starting_deadline_seconds: int | None = None
    concurrency_policy: ConcurrencyPolicy = ConcurrencyPolicy.ALLOW
    suspend: bool = False
    successful_tasks_history_limit: int = 3
    failed_tasks_history_limit: int = 1


@dataclass(frozen=True)
class Schedule:
    """An AgentTaskSchedule with its status. Times are seconds since the Unix epoch."""

    uid: str
    namespace: str
    name: str
    generation: int
    spec: ScheduleSpec
    created: float
    deleting: bool
    status: Mapping[str, Any]
    last: float | None
    last_successful: float | None
    last_missed: float | None


@dataclass(frozen=True)
class Child:
    """A task of a schedule. Times are seconds since the Unix epoch.

    Attributes:
        due: the due time it was made for; None for one that was made otherwise.
        deleting: its deletion was asked for, and what it runs is being ended.
    """

    uid: str
    name: str
    due: float | None
    phase: TaskPhase
    deleting: bool
    completed: float | None

    @property
    def ended(self) -> bool:
        """Whether it has reached its end."""
        return self.phase in TASK_FINAL


def parse_schedule(body: Mapping[str, Any]) -> Schedule:
    """The typed form of an AgentTaskSchedule object. Raises ValueError where it has another."""
    meta, status = body["metadata"], body.get("status") or {}
    try:
        spec = msgspec.convert(body["spec"], ScheduleSpec)
    except msgspec.ValidationError as error:
        raise ValueError(f"spec: {error}") from error
    created = seconds_of(meta["creationTimestamp"])
    assert created is not None
    return Schedule(
        uid=meta["uid"],
        namespace=meta["namespace"],
        name=meta["name"],
        generation=meta.get("generation", 0),
        spec=spec,
        created=created,
        deleting=bool(meta.get("deletionTimestamp")),
        status=status,
        last=seconds_of(status.get("lastScheduleTime")),
        last_successful=seconds_of(status.get("lastSuccessfulTime")),
        last_missed=seconds_of(status.get("lastMissedTime")),
    )


def owner_of(task: Mapping[str, Any]) -> str | None:
    """UID of the schedule that made a task; None for a task that no schedule made."""
    for owner in task["metadata"].get("ownerReferences") or ():
        if owner.get("controller") and owner.get("kind") == KIND:
            return str(owner["uid"])
    return None


def parse_child(task: Mapping[str, Any], schedule: str) -> Child:
    """A task of the schedule of this name. Raises ValueError where it has another form."""
    meta, status = task["metadata"], task.get("status") or {}
    prefix, _, minutes = meta["name"].rpartition("-")
    made = prefix == schedule and minutes.isdecimal() and len(minutes) <= 10
    return Child(
        uid=meta["uid"],
        name=meta["name"],
        due=float(minutes) * 60 if made else None,
        phase=TaskPhase(status.get("phase", TaskPhase.PENDING)),
        deleting=bool(meta.get("deletionTimestamp")),
        completed=seconds_of(status.get("completionTime")),
    )


def task_name(schedule: Schedule, due: float) -> str:
    """Name of the task for a due time: the same whoever makes it."""
    return f"{schedule.name}-{int(due) // 60}"


def task_body(schedule: Schedule, due: float) -> dict[str, Any]:
    """The task for a due time."""
    template = schedule.spec.task_template
    owner = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": schedule.name,
        "uid": schedule.uid,
        "controller": True,
    }
    return {
        "apiVersion": API_VERSION,
        "kind": "AgentTask",
        "metadata": {
            "name": task_name(schedule, due),
            "namespace": schedule.namespace,
            "labels": {**template.metadata.labels, SCHEDULE_LABEL: schedule.name},
            "annotations": {**template.metadata.annotations, DUE_ANNOTATION: seconds(due)},
            "ownerReferences": [owner],
        },
        "spec": {"ttlSecondsAfterFinished": KEEP_SECONDS, **template.spec},
    }
