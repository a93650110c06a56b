"""The rows of a task as AgentTaskReport objects, and back.

A task's rows are cut into slices once, in the order of their turns, and a node stays in its
slice: what begins and ends together stands together, so that a step of the rollout writes few
objects. Bounds are kept by construction: at most 200 rows, and each row's texts are cut to an
allowance, so that no object nears etcd's 1.5 MiB whatever was printed. Writes nothing itself.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from outrider_operator.core.model import NodeRun, Phase, Rows, Task
from outrider_operator.core.times import micros, nanos_of

API_VERSION: Final = "outrider.dev/v1alpha1"
TASK_LABEL: Final = "outrider.dev/task"
#: Most rows of one report.
MAX_ROWS: Final = 200
#: Largest report as the API server stores it, bytes.
MAX_BYTES: Final = 900_000
#: A row without its preview: name, times, reason, and 1 KiB of message.
ROW_BYTES: Final = 1_800
MESSAGE_BYTES: Final = 1_024

#: Objects are stored as Go writes JSON: these characters become six bytes.
_SIX: Final = "<>&\u2028\u2029"
_ESCAPED: Final = re.compile('[<>&\u2028\u2029"\\\\\x00-\x1f]')
_TWO: Final = '"\\\n\r\t'


class MissingReportsError(ValueError):
    """Reports of a task were deleted: some of its nodes stand in none."""


def _stored_bytes(character: str) -> int:
    if character in _SIX:
        return 6
    if character in _TWO:
        return 2
    return 6 if character < " " else len(character.encode("utf-8", "replace"))


def clip(text: str, limit: int) -> str:
    """The beginning of a text that takes at most `limit` bytes in a stored object."""
    # The usual text needs no look at each character.
    if len(text.encode("utf-8", "replace")) + 5 * len(_ESCAPED.findall(text)) <= limit:
        return text
    used = 0
    for index, character in enumerate(text):
        used += _stored_bytes(character)
        if used > limit:
            return text[:index]
    return text


def allowance(preview_bytes: int) -> int:
    """How many bytes a preview may take in a stored object: some room for escapes."""
    return preview_bytes + preview_bytes // 4 + 64


def rows_per_slice(preview_bytes: int) -> int:
    """How many rows stand in one report of a task."""
    return min(MAX_ROWS, MAX_BYTES // (ROW_BYTES + allowance(preview_bytes)))


def cut(names: Sequence[str], preview_bytes: int) -> list[tuple[str, ...]]:
    """Node names in slices."""
    size = rows_per_slice(preview_bytes)
    return [tuple(names[i : i + size]) for i in range(0, len(names), size)]


def slice_name(task: Task, index: int) -> str:
    """Name of a report. The UID tells it from those of an earlier task of the same name."""
    return f"{task.name}-{task.uid[:8]}-{index}"


def to_object(task: Task, index: int, rows: Iterable[NodeRun]) -> dict[str, Any]:
    """An AgentTaskReport."""
    owner = {
        "apiVersion": API_VERSION,
        "kind": "AgentTask",
        "name": task.name,
        "uid": task.uid,
        "controller": True,
    }
    entries = [_to_entry(row, allowance(task.spec.output.preview_bytes)) for row in rows]
    return {
        "apiVersion": API_VERSION,
        "kind": "AgentTaskReport",
        "metadata": {
            "name": slice_name(task, index),
            "namespace": task.namespace,
            "labels": {TASK_LABEL: task.name},
            "ownerReferences": [owner],
        },
        "task": {"name": task.name, "uid": task.uid},
        "slice": index,
        "count": len(entries),
        "nodes": entries,
    }


def from_objects(objects: Iterable[Mapping[str, Any]], uid: str) -> list[dict[str, NodeRun]]:
    """The rows of a task, slice by slice. Objects of other tasks are passed over.

    Raises:
        MissingReportsError: Slices are missing between others.
        ValueError: An object does not have the form the resource definition demands.
    """
    found: dict[int, dict[str, NodeRun]] = {}
    for item in objects:
        if item.get("task", {}).get("uid") == uid:
            rows = [_from_entry(entry) for entry in item.get("nodes", [])]
            found[int(item["slice"])] = {row.node: row for row in rows}
    if sorted(found) != list(range(len(found))):
        raise MissingReportsError(
            f"the task has reports {sorted(found)}, but not those between them"
        )
    return [found[index] for index in sorted(found)]


def changed(slices: Sequence[Sequence[str]], before: Rows, after: Rows) -> list[int]:
    """Which slices hold a row that differs."""
    return [
        index
        for index, names in enumerate(slices)
        if any(before.get(name) is not after[name] and before.get(name) != after[name]
               for name in names)
    ]  # fmt: skip


def _to_entry(row: NodeRun, preview_limit: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"node": row.node, "phase": row.phase.value, "attempt": row.attempt}
    optional = {
        "reason": row.reason,
        "message": clip(row.message, MESSAGE_BYTES),
        "signal": row.signal,
        "startTime": micros(row.started_nanos) if row.started_nanos else "",
        "finishTime": micros(row.finished_nanos) if row.finished_nanos else "",
        "preview": clip(row.preview, preview_limit),
        "outputBytes": row.output_bytes,
        "outputTruncated": row.output_truncated,
    }
    entry.update((key, value) for key, value in optional.items() if value)
    if row.exit_code is not None:
        entry["exitCode"] = row.exit_code
    return entry


class _Entry(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    node: str
    phase: str
    reason: str = ""
    message: str = ""
    attempt: int = 0
    exit_code: int | None = None
    signal: int = 0
    start_time: str = ""
    finish_time: str = ""
    preview: str = ""
    output_bytes: int = 0
    output_truncated: bool = False


def _from_entry(raw: Mapping[str, Any]) -> NodeRun:
    try:
        entry = msgspec.convert(raw, _Entry)
    except msgspec.ValidationError as error:
        raise ValueError(f"a report's entry cannot be read: {error}") from error
    return NodeRun(
        node=entry.node,
        phase=Phase(entry.phase),
        reason=entry.reason,
        message=entry.message,
        attempt=entry.attempt,
        exit_code=entry.exit_code,
        signal=entry.signal,
        started_nanos=nanos_of(entry.start_time) if entry.start_time else 0,
        finished_nanos=nanos_of(entry.finish_time) if entry.finish_time else 0,
        preview=entry.preview,
        output_bytes=entry.output_bytes,
        output_truncated=entry.output_truncated,
    )
