"""The pure parts of kubectl outrider: groups, percentiles, tables, selectors, requests."""

import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_cli.core import render, request, selector, text, timing, waiting
from outrider_cli.core.groups import group, show
from outrider_cli.core.rows import Row, names, row_of, rows_of

ROWS = st.lists(
    st.builds(
        Row,
        node=st.text(string.ascii_lowercase, min_size=1, max_size=3),
        phase=st.sampled_from(["Succeeded", "Failed", "Lost", "Running"]),
        exit_code=st.sampled_from([None, 0, 1]),
        preview=st.sampled_from(["", "a\n", "b"]),
    ),
    unique_by=lambda row: row.node,
)


# ---------------------------------------------------------------- groups


@given(ROWS)
def test_every_node_is_in_one_group_with_its_like(rows: list[Row]) -> None:
    groups = group(rows)
    assert sorted(row.node for g in groups for row in g.rows) == sorted(row.node for row in rows)
    kinds = [
        {(row.phase, row.reason, row.exit_code, row.preview) for row in g.rows} for g in groups
    ]
    assert all(len(kind) == 1 for kind in kinds)
    assert len(set.union(set(), *kinds)) == len(groups)
    sizes = [len(g.rows) for g in groups]
    assert sizes == sorted(sizes, reverse=True)


@given(ROWS, st.randoms())
def test_the_order_of_rows_does_not_matter(rows: list[Row], random: Any) -> None:
    mixed = list(rows)
    random.shuffle(mixed)
    assert group(mixed) == group(rows)


def test_a_group_as_it_is_shown() -> None:
    many = [Row(f"n{i:02}", "Succeeded", exit_code=0, preview="ok\n") for i in range(1204)]
    bad = Row("z", "Failed", "NonZeroExit", "exit code 7", exit_code=7, output_bytes=900)
    shown = show(group([*many, bad]), "t")
    first = ", ".join(sorted(row.node for row in many)[:10])
    assert shown == (
        f"--- 1,204 nodes · Succeeded · exit code 0 --- {first} and 1,194 more\nok\n\n"
        "--- 1 node · Failed · exit code 7 · NonZeroExit --- z\n(exit code 7)\n"
        "(the output goes on: kubectl outrider output t z)\n"
    )


def test_messages_that_differ_are_not_put_into_one_mouth() -> None:
    (found,) = group([Row("a", "Lost", message="x"), Row("b", "Lost", message="y")])
    assert found.message == ""


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("phase", "reason", "final", "failed", "absent"),
    [
        ("Pending", "", False, False, False),
        ("Pending", "WaitingForRetry", False, False, False),
        ("Pending", "AgentNotConnected", False, False, True),
        ("Pending", "NodeNotFound", False, False, True),
        ("Dispatched", "AgentNotConnected", False, False, False),
        ("Running", "", False, False, False),
        ("Succeeded", "", True, False, False),
        ("Failed", "NonZeroExit", True, True, False),
        ("TimedOut", "", True, True, False),
        ("Interrupted", "", True, True, False),
        ("Rejected", "NotAllowed", True, True, False),
        ("Lost", "AgentNotConnected", True, True, True),
        ("Cancelled", "TaskCancelled", True, False, False),
        ("Skipped", "TooManyFailures", True, False, False),
    ],
)
def test_what_a_phase_means(
    phase: str, reason: str, final: bool, failed: bool, absent: bool
) -> None:
    row = Row("n", phase, reason)
    assert (row.final, row.failed, row.absent) == (final, failed, absent)


def test_rows_of_other_tasks_are_passed_over() -> None:
    reports: list[dict[str, Any]] = [
        {"task": {"uid": "u"}, "nodes": [{"node": "b", "phase": "Lost"}, {"node": "a"}]},
        {"task": {"uid": "other"}, "nodes": [{"node": "c", "phase": "Lost"}]},
        {"task": {"uid": "u"}},
    ]
    assert [row.node for row in rows_of(reports, "u")] == ["a", "b"]


def test_names_are_cut_only_when_asked_to() -> None:
    rows = [Row(name, "Lost") for name in "cabd"]
    assert names(rows) == "a, b, c, d"
    assert names(rows, 4) == "a, b, c, d"
    assert names(rows, 2) == "a, b and 2 more"


# ---------------------------------------------------------------- times


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.001, 100))
def test_a_percentile_is_a_value_that_enough_do_not_exceed(
    values: list[float], percent: float
) -> None:
    ordered = sorted(values)
    found = timing.percentile(ordered, percent)
    assert found in values
    at_most = sum(value <= found for value in values)
    below = sum(value < found for value in values)
    assert at_most * 100 >= percent * len(values) * (1 - 1e-9)
    assert below * 100 < percent * len(values) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("count", "percent", "wanted"),
    [(1, 50, 1), (2, 50, 1), (3, 50, 2), (100, 99, 99), (100, 100, 100), (10, 95, 10)],
)
def test_percentiles(count: int, percent: float, wanted: float) -> None:
    assert timing.percentile(range(1, count + 1), percent) == wanted


def test_no_percentile_of_nothing() -> None:
    assert timing.summary([]) is None
    for values, percent in (([], 50), ([1.0], 0), ([1.0], 101)):
        with pytest.raises(ValueError, match="no percentile"):
            timing.percentile(values, percent)


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [(0, "0s"), (119, "119s"), (120, "2m"), (10799, "179m"), (10800, "3h"), (172800, "2d")],
)
def test_ages(seconds: float, wanted: str) -> None:
    assert text.age(seconds) == wanted


@pytest.mark.parametrize(
    ("seconds", "wanted"), [(0.0032, "3.2 ms"), (1.25, "1.25 s"), (125, "2m05s")]
)
def test_spans(seconds: float, wanted: str) -> None:
    assert text.span(seconds) == wanted


# ---------------------------------------------------------------- text and tables


@given(st.text())
def test_nothing_printable_steers_a_terminal(printed: str) -> None:
    shown = text.printable(printed)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)
    assert not any(0x7F <= ord(c) < 0xA0 for c in shown)
    assert "\n" not in text.printable(printed, line=True)


def test_harmless_text_stays() -> None:
    assert text.printable("grün 日本\tx\r\ny\n") == "grün 日本\tx\ny\n"
    assert text.printable("\x1b[31mred\u202e") == "�[31mred�"


CELL = st.text(string.ascii_letters + " \n\x1b", max_size=8)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELL, min_size=n, max_size=n))))
def test_a_table_has_a_line_a_row_and_columns_that_line_up(rows: list[list[str]]) -> None:
    head = ["H" * (n + 1) for n in range(len(rows[0]) if rows else 2)]
    lines = text.columns(head, rows).splitlines()
    assert len(lines) == len(rows) + 1
    starts = [lines[0].index(" " + name) + 1 if n else 0 for n, name in enumerate(head)]
    for line, row in zip(lines[1:], rows, strict=True):
        for start, cell in zip(starts, row, strict=True):
            assert line[start:].startswith(text.printable(cell, line=True))


def task(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "t", "namespace": "ns", "uid": "u"}, "status": status}


def test_the_tables_of_results() -> None:
    rows = [
        row_of(
            {
                "node": "a",
                "phase": "Succeeded",
                "attempt": 1,
                "exitCode": 0,
                "preview": "one\ntwo\n",
                "outputBytes": 8,
                "startTime": "2026-01-01T00:00:00.000000Z",
                "finishTime": "2026-01-01T00:00:01.500000Z",
            }
        ),
        Row("b", "Lost", "AgentNotConnected", "its agent has not come back within 300 s"),
    ]
    assert render.results(task(), rows, "table") == (
        "NODE   PHASE       EXIT   REASON              OUTPUT\n"
        "a      Succeeded   0                          one …\n"
        "b      Lost               AgentNotConnected   "
        "its agent has not come back within 300 s\n"
    )
    wide = render.results(task(), rows, "wide").splitlines()
    assert "1.50 s" in wide[1]
    assert render.results(task(), rows, "name") == "a\nb\n"


@pytest.mark.parametrize("form", render.FORMS)
def test_every_form_shows_nothing_at_all_too(form: str) -> None:
    render.results(task(), [], form)


def test_agents_are_told_with_their_reason() -> None:
    ready = {"type": "Ready", "status": "True", "reason": "Connected"}
    ready["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    found: list[dict[str, Any]] = [
        {"metadata": {"name": "b"}},
        {"metadata": {"name": "a"}, "status": {"version": "1", "conditions": [ready]}},
    ]
    now = text.time_of("2026-01-01T00:03:00Z") or 0.0
    lines = render.agents(found, "table", now).splitlines()
    assert lines[1].split() == ["a", "True", "Connected", "3m", "1"]
    assert lines[2].split() == ["b", "Unknown"]


# ---------------------------------------------------------------- selectors and requests


@pytest.mark.parametrize(
    ("given_text", "wanted"),
    [
        ("a=b", {"matchLabels": {"a": "b"}}),
        ("a==b, c=", {"matchLabels": {"a": "b", "c": ""}}),
        ("x.io/y!=b", [("x.io/y", "NotIn", ["b"])]),
        ("a in (b, c)", [("a", "In", ["b", "c"])]),
        ("a notin (b),c", [("a", "NotIn", ["b"]), ("c", "Exists", None)]),
        ("!a,b", [("a", "DoesNotExist", None), ("b", "Exists", None)]),
    ],
)
def test_selectors(given_text: str, wanted: Any) -> None:
    if isinstance(wanted, list):
        wanted = {
            "matchExpressions": [
                {"key": key, "operator": operator} | ({"values": values} if values else {})
                for key, operator, values in wanted
            ]
        }
    assert selector.parse(given_text) == wanted


@pytest.mark.parametrize(
    "given_text", ["a b", "a in b", "=x", "a=b,", "a=b,a=c", "a in (b c)", "-a"]
)
def test_wrong_selectors_are_told(given_text: str) -> None:
    with pytest.raises(ValueError, match="label"):
        selector.parse(given_text)


NAME = st.from_regex(r"\A[a-z]([a-z0-9.-]{0,8}[a-z0-9])?\Z").filter(
    lambda x: x not in ("in", "notin")
)


@given(st.dictionaries(NAME, NAME, min_size=1), st.dictionaries(NAME, st.lists(NAME, min_size=1)))
def test_what_is_written_is_read(labels: dict[str, str], sets: dict[str, list[str]]) -> None:
    parts = [f"{key}={value}" for key, value in labels.items()]
    parts += [f"{key} notin ({','.join(values)})" for key, values in sets.items()]
    found = selector.parse(",".join(parts))
    assert found["matchLabels"] == labels
    expressions = found.get("matchExpressions", [])
    assert {e["key"]: e["values"] for e in expressions} == sets


@pytest.mark.parametrize(
    ("given_text", "wanted"), [("90", 90), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("1m5", 65)]
)
def test_durations(given_text: str, wanted: int) -> None:
    assert request.duration(given_text) == wanted


@pytest.mark.parametrize("given_text", ["", "s", "0", "-1", "1.5s", "5 m", "m5", "1s1h"])
def test_wrong_durations_are_told(given_text: str) -> None:
    with pytest.raises(ValueError, match="is no time"):
        request.duration(given_text)


def test_what_a_request_leaves_open_is_left_to_the_definition() -> None:
    made = request.task(request.Request(name="n", namespace="ns", run={"command": ["true"]}))
    assert made["spec"] == {
        "run": {"command": ["true"]},
        "target": {},
        "ttlSecondsAfterFinished": request.KEPT_SECONDS,
    }


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"max_concurrent": 5}, {"maxConcurrent": 5, "waves": ["100%"]}),
        (
            {"max_concurrent": "9%", "waves": [1, "100%"]},
            {"maxConcurrent": "9%", "waves": [1, "100%"]},
        ),
        ({"max_failures": 0}, {"maxFailures": 0}),
    ],
)
def test_rollouts(changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    asked = request.Request(name="n", namespace="ns", run={}, **changes)
    assert request.task(asked)["spec"]["rollout"] == wanted


@pytest.mark.parametrize(
    ("source", "interpreter", "wanted"),
    [
        ("echo", "", None),
        ("#!/bin/bash -eu\necho", "", ["/bin/bash", "-eu"]),
        ("#!/bin/bash\necho", "python3 -X 'a b'", ["python3", "-X", "a b"]),
        ("#!\necho", "", None),
    ],
)
def test_scripts_name_their_interpreter(source: str, interpreter: str, wanted: Any) -> None:
    made = request.script(source, interpreter)["script"]
    assert made["source"] == source
    assert made.get("interpreter") == wanted


# ---------------------------------------------------------------- what a task waits for


def counted(**counts: int) -> waiting.Snapshot:
    return waiting.snapshot(task(phase="Running", counts=counts))


def test_progress_adds_up() -> None:
    found = counted(targeted=9, succeeded=3, failed=1, timedOut=1, running=2, pending=2)
    assert found.done == 5
    assert waiting.progress(found) == (
        "5 of 9 nodes done: 3 succeeded, 1 failed, 1 timed out; 2 running, 2 pending"
    )


def test_a_task_that_nobody_began_says_so() -> None:
    (reason,) = waiting.reasons(waiting.snapshot(task()), [])
    assert "no server has begun" in reason


def test_reasons_name_the_nodes_and_those_that_hold_it_up_come_first() -> None:
    away = [Row(n, "Pending", "AgentNotConnected", "its agent is not connected") for n in "ab"]
    rows = [Row("x", "Succeeded"), *(Row(f"r{n}", "Running") for n in range(3)), *away]
    assert waiting.reasons(counted(targeted=6), rows) == [
        "2 nodes AgentNotConnected (its agent is not connected): a, b",
        "3 nodes running it: r0, r1, r2",
    ]
    assert waiting.reasons(counted(targeted=6), rows, True)[1].startswith("3 nodes ending it")


@given(ROWS)
def test_whoever_has_not_ended_is_named(rows: list[Row]) -> None:
    told = " ".join(waiting.reasons(counted(targeted=len(rows)), rows))
    unfinished = [row.node for row in rows if not row.final][: waiting.NAMED]
    assert all(node in told for node in unfinished)


def test_an_ended_task_waits_for_nothing() -> None:
    found = waiting.snapshot(task(phase="Failed", reason="NodesFailed", counts={"targeted": 1}))
    assert waiting.reasons(found, [Row("a", "Pending")]) == []
