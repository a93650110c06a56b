"""Rows as objects: slices, sizes, times, statuses, and what agents say put into them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core import merge, slices, status, times
from outrider_operator.core.model import (
    FINAL,
    TRANSITIONS,
    NodeRun,
    Phase,
    Task,
    TaskPhase,
    parse_spec,
)
from outrider_proto.v1.agent_pb2 import RunId, RunPhase, RunState

TASK = Task(
    uid="0123456789",
    namespace="default",
    name="t",
    generation=2,
    spec=parse_spec({"run": {"command": ["true"]}}),
    started=1000.0,
)


def stored_bytes(body: object) -> int:
    """The size of an object as Go writes it, which is how the API server stores it."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    # Python shortens these two; Go before 1.22, which older API servers are built with, does not.
    text = text.replace("\\b", "\\u0008").replace("\\f", "\\u000c")
    for character in "<>&\u2028\u2029":
        text = text.replace(character, "\\u0000")
    return len(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("preview_bytes", [0, 2048, 8192])
@pytest.mark.parametrize("character", ["<", "\x01", '"', "x", "\U0001f600"])
def test_no_report_nears_the_limit_whatever_was_printed(preview_bytes, character) -> None:
    count = slices.rows_per_slice(preview_bytes)
    spec = parse_spec(
        {"run": {"builtin": "Ping"}, "output": {"previewBytes": preview_bytes, "maxBytes": 9000}}
    )
    task = Task(uid="u" * 36, namespace="n" * 63, name="t" * 63, generation=1, spec=spec)
    rows = [
        NodeRun(
            node=f"{n:0253}",
            phase=Phase.FAILED,
            reason="R" * 128,
            message=character * 1024,
            attempt=1,
            exit_code=255,
            started_nanos=10**18,
            finished_nanos=10**18,
            preview=character * 8192,
            output_bytes=2**62,
            output_truncated=True,
            last_phase=Phase.INTERRUPTED,
            last_reason="R" * 128,
            retry_nanos=10**18,
            node_state="Cordoned,NotReady",
        )
        for n in range(count)
    ]
    assert count >= 70
    assert stored_bytes(slices.to_object(task, 1, rows)) < 1_048_576


@given(st.text(max_size=300), st.integers(0, 400))
def test_clip_keeps_a_beginning_that_fits(text, limit) -> None:
    kept = slices.clip(text, limit)
    assert text.startswith(kept)
    assert stored_bytes(kept) - 2 <= limit
    if kept != text:
        assert stored_bytes(text[: len(kept) + 1]) - 2 > limit


rows_strategy = st.builds(
    NodeRun,
    node=st.uuids().map(str),
    phase=st.sampled_from(Phase),
    reason=st.sampled_from(["", "NonZeroExit"]),
    attempt=st.integers(0, 3),
    exit_code=st.none() | st.integers(0, 255),
    signal=st.integers(0, 64),
    started_nanos=st.integers(0, 4 * 10**15).map(lambda n: n * 1000),
    finished_nanos=st.integers(0, 4 * 10**15).map(lambda n: n * 1000),
    preview=st.text(max_size=20),
    output_bytes=st.integers(0, 2**63 - 1),
    output_truncated=st.booleans(),
    last_phase=st.sampled_from([None, Phase.FAILED]),
    last_reason=st.sampled_from(["", "NonZeroExit"]),
    retry_nanos=st.integers(0, 4 * 10**15).map(lambda n: n * 1000),
    node_state=st.sampled_from(["", "Cordoned"]),
)


@given(st.lists(rows_strategy, max_size=8, unique_by=lambda row: row.node))
def test_rows_come_back_as_they_were_written(rows) -> None:
    one = slices.to_object(TASK, 0, rows[:4])
    two = slices.to_object(TASK, 1, rows[4:])
    found = slices.from_objects([two, one], TASK.uid)
    assert [list(part.values()) for part in found] == [rows[:4], rows[4:]]


def test_reports_of_an_earlier_task_of_the_name_are_passed_over() -> None:
    old = slices.to_object(TASK, 0, [NodeRun(node="a")])
    old["task"]["uid"] = "another"
    assert slices.from_objects([old], TASK.uid) == []


def test_a_missing_report_is_an_error() -> None:
    with pytest.raises(ValueError, match="between"):
        slices.from_objects([slices.to_object(TASK, 1, [])], TASK.uid)


def test_only_slices_that_differ_are_written() -> None:
    names = [f"n{i}" for i in range(6)]
    cut = [tuple(names[:2]), tuple(names[2:4]), tuple(names[4:])]
    before = {name: NodeRun(node=name) for name in names}
    after = {**before, "n3": before["n3"].to(Phase.DISPATCHED, attempt=1)}
    assert slices.changed(cut, before, after) == [1]
    assert slices.changed(cut, before, dict(before)) == []


@given(st.integers(0, 4 * 10**18))
def test_times_keep_their_microseconds(nanos) -> None:
    assert times.nanos_of(times.micros(nanos)) == nanos // 1000 * 1000


@pytest.mark.parametrize("nanos", [-1, 2**63 - 1, 2**64])
def test_times_of_a_mad_clock_are_still_times(nanos) -> None:
    times.nanos_of(times.micros(nanos))


def state(phase: RunPhase.ValueType, attempt: int = 1, **fields: object) -> RunState:
    return RunState(id=RunId(task_uid="u", attempt=attempt), phase=phase, **fields)  # type: ignore[arg-type] # fields of the message


phase_numbers = st.sampled_from(sorted(merge.PHASES))


@given(st.sampled_from(Phase), st.lists(st.tuples(phase_numbers, st.integers(0, 3)), max_size=12))
def test_rows_only_move_as_the_table_allows(start, said) -> None:
    row = NodeRun(node="a", phase=start, attempt=1)
    for number, attempt in said:
        merged = merge.merge({"a": row}, [merge.Report("a", [state(number, attempt)])])
        after = merged.rows["a"]
        assert after.phase is row.phase or after.phase in TRANSITIONS[row.phase]
        if ("a", attempt) in merged.ended:
            assert merge.is_final(state(number))
            assert attempt < after.attempt or after.phase in FINAL | {Phase.PENDING}
        row = after


def test_a_result_is_acknowledged_each_time_it_comes() -> None:
    rows = {"a": NodeRun(node="a", phase=Phase.DISPATCHED, attempt=1)}
    report = merge.Report("a", [state(RunPhase.RUN_PHASE_SUCCEEDED)])
    first = merge.merge(rows, [report, report])
    assert first.ended == (("a", 1),)
    assert merge.merge(first.rows, [report]).ended == (("a", 1),)


def test_a_result_told_twice_does_not_end_a_row_that_waits_for_its_next_attempt() -> None:
    rows = {"a": NodeRun(node="a", phase=Phase.PENDING, attempt=1, last_phase=Phase.FAILED)}
    merged = merge.merge(rows, [merge.Report("a", [state(RunPhase.RUN_PHASE_FAILED)])])
    assert merged.rows == rows
    assert merged.ended == (("a", 1),)


def test_slices_are_filled_before_new_ones_are_made(monkeypatch) -> None:
    monkeypatch.setattr(slices, "MAX_ROWS", 2)
    parts = slices.extend([("a", "b"), ("c",), ()], ["d", "e", "f", "g"], 0)
    assert parts == [("a", "b"), ("c", "d"), ("e", "f"), ("g",)]
    assert slices.extend(parts, [], 0) == parts


def test_a_node_that_is_not_in_the_task_may_forget_its_result() -> None:
    report = merge.Report("stranger", [state(RunPhase.RUN_PHASE_SUCCEEDED)])
    assert merge.merge({}, [report]).ended == (("stranger", 1),)


def rows_of(**phases: int) -> dict[str, NodeRun]:
    rows = {}
    for name, count in phases.items():
        for n in range(count):
            node = f"{name}-{n}"
            rows[node] = NodeRun(node=node, phase=Phase(name), attempt=int(name != "Pending"))
    return rows


def task_with(**spec: object) -> Task:
    full = {"run": {"builtin": "Ping"}, **spec}
    return Task(uid="u", namespace="n", name="t", generation=1, spec=parse_spec(full), started=1.0)


@pytest.mark.parametrize("why", ["TooManyFailures", "DeadlineExceeded"])
@pytest.mark.parametrize("failed", [0, 1, 5])
def test_the_verdict_is_why_nodes_were_skipped_whatever_is_learned_later(why, failed) -> None:
    rows = rows_of(Succeeded=5 - failed, Failed=failed)
    rows["late"] = NodeRun(node="late", phase=Phase.SKIPPED, reason=why)
    assert status.verdict(task_with(), rows).reason == why


@pytest.mark.parametrize(
    ("spec", "phases", "phase", "reason"),
    [
        ({}, {"Pending": 2}, "Pending", "WaitingForAgents"),
        ({}, {"Pending": 1, "Running": 1}, "Running", "InProgress"),
        ({"suspend": True}, {"Pending": 1, "Running": 1}, "Suspended", "Suspended"),
        ({"cancel": True}, {"Running": 1}, "Running", "Cancelling"),
        ({}, {"Succeeded": 3}, "Succeeded", "AllNodesSucceeded"),
        ({"cancel": True}, {"Succeeded": 3}, "Succeeded", "AllNodesSucceeded"),
        ({"cancel": True}, {"Succeeded": 3, "Cancelled": 1}, "Cancelled", "TaskCancelled"),
        ({}, {"Succeeded": 99, "Failed": 1}, "Failed", "NodesFailed"),
        ({}, {"Succeeded": 9, "Lost": 1}, "Failed", "NodesFailed"),
        ({}, {"Succeeded": 9, "Skipped": 1}, "Failed", "DeadlineExceeded"),
    ],
)
def test_verdicts(spec, phases, phase, reason) -> None:
    found = status.verdict(task_with(**spec), rows_of(**phases))
    assert (found.phase, found.reason) == (phase, reason)


def test_counts_add_up_and_have_the_names_of_the_definition() -> None:
    counted = status.counts(rows_of(Succeeded=2, TimedOut=1, Pending=3))
    assert counted["targeted"] == 6
    assert (counted["succeeded"], counted["timedOut"], counted["pending"]) == (2, 1, 3)
    assert sum(counted.values()) == 12


def test_outcomes_are_few_and_the_largest_first() -> None:
    rows = {
        f"n{i}": NodeRun(
            node=f"n{i}", phase=Phase.FAILED, exit_code=i % 20, attempt=1, preview="x" * 1000
        )
        for i in range(100)
    }
    rows |= {f"s{i}": NodeRun(node=f"s{i}", phase=Phase.SUCCEEDED, attempt=1) for i in range(50)}
    found = status.outcomes(rows)
    assert len(found) == 10
    assert found[0] == {"nodes": 50, "phase": "Succeeded", "example": "s0"}
    assert all(len(outcome.get("preview", "")) <= 256 for outcome in found)


def test_times_of_conditions_change_with_their_status_only() -> None:
    task = task_with()
    first = status.status(task, {}, status.Verdict(TaskPhase.RUNNING, "A", ""), {}, 100.0)
    second = status.status(task, {}, status.Verdict(TaskPhase.FAILED, "B", ""), first, 200.0)
    by_type = {c["type"]: c for c in second["conditions"]}
    assert by_type["Failed"]["lastTransitionTime"] == times.seconds(200.0)
    assert by_type["Complete"]["lastTransitionTime"] == times.seconds(100.0)
    assert second["completionTime"] == times.seconds(200.0)
    third = status.status(task, {}, status.Verdict(TaskPhase.FAILED, "B", ""), second, 300.0)
    assert third == second
