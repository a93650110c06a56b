"""What the status of an AgentConfig says; the next leader reads what the last one wrote."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.config_count import Counts
from outrider_operator.core.config_objects import (
    attempt_of,
    content_of,
    name_of,
    plan_of,
    report_of,
    revision_of,
    to_object,
)
from outrider_operator.core.config_plan import Config
from outrider_operator.core.config_rollout import Plan, Rollout, RolloutPhase
from outrider_operator.core.config_status import (
    events,
    noted,
    rollout_of,
    rollout_status,
    status_of,
)
from outrider_proto.effective import EffectiveError
from outrider_proto.merging import Conflict, Path
from outrider_proto.v1 import agent_pb2 as pb

P = RolloutPhase
times = st.floats(1.5e9, 2.5e9).map(lambda at: round(at, 6))
words = st.text("abc", max_size=3)
rollouts = st.builds(
    Rollout, st.sampled_from(P), words, words, words, words, times, times, words, words
)


@given(rollouts)
def test_a_state_is_read_back_as_it_was_written(state: Rollout) -> None:
    assert rollout_of({"rollout": rollout_status(state)}) == state


@given(st.floats(1.5e9, 2.5e9))
def test_times_do_not_creep(at: float) -> None:
    once = rollout_of({"rollout": rollout_status(Rollout(started=at, soaking_since=at))})
    assert abs(once.started - at) < 1e-5
    assert rollout_of({"rollout": rollout_status(once)}) == once


def config(state: Rollout, target: str = "new") -> Config:
    return Config("a", "uid", Plan(), target, "", state, {})


def status(
    state: Rollout,
    counts: Counts | None = None,
    previous: dict[str, Any] | None = None,
    clashes: dict[Path, Conflict] | None = None,
    problem: str = "",
) -> dict[str, Any]:
    numbers = counts if counts is not None else Counts()
    return status_of(config(state), numbers, clashes or {}, previous or {}, 7, 2e9, problem)


def ready(found: dict[str, Any]) -> tuple[str, str]:
    first = found["conditions"][0]
    assert first["type"] == "Ready"
    return first["status"], first["reason"]


@pytest.mark.parametrize(
    ("state", "counts", "expected"),
    [
        (Rollout(settled="new"), Counts(3, 3, 3), ("True", "Applied")),
        (Rollout(settled="new"), Counts(3, 3, 2, 0, 1, 1), ("True", "Applied")),
        (Rollout(settled="new"), Counts(3, 3, 2, 0, 1), ("False", "Pending")),
        (Rollout(settled="new"), Counts(3, 3, 2, 1), ("False", "NodesFailed")),
        (Rollout(P.CANARY, "old", "new", reason="Canary"), Counts(3), ("False", "Canary")),
        (Rollout(P.ROLLED_BACK, "old", "new", reason="Bad"), Counts(3), ("False", "Bad")),
        (Rollout(settled="old"), Counts(3), ("False", "Progressing")),
    ],
)  # fmt: skip
def test_ready(state: Rollout, counts: Counts, expected: tuple[str, str]) -> None:
    assert ready(status(state, counts)) == expected


def test_the_same_again_is_no_change() -> None:
    first = status(Rollout(settled="new"), Counts(3, 3, 3))
    assert status(Rollout(settled="new"), Counts(3, 3, 3), first) == first


def test_conflicts_are_bounded_and_told_when_they_change() -> None:
    names = tuple(f"c{n}" for n in range(9))
    clashes: dict[Path, Conflict] = {
        ("collectors", str(n)): Conflict(("collectors", str(n)), "a", names) for n in range(9)
    }
    before, after = status(Rollout()), status(Rollout(), clashes=clashes)
    (told,) = noted(before, after)
    assert (told.kind, told.reason) == ("Warning", "Conflict")
    assert "collectors.0: a (this one) is heard, not c0, c1, c2 and others" in told.text
    assert told.text.endswith("and 4 more")
    assert noted(after, status(Rollout(), previous=after, clashes=clashes)) == []
    del clashes["collectors", "0"]
    assert len(noted(after, status(Rollout(), previous=after, clashes=clashes))) == 1


def test_what_cannot_be_read_is_told_once() -> None:
    before, after = status(Rollout()), status(Rollout(), problem="spec: bad")
    assert [told.reason for told in noted(before, after)] == ["Invalid"]
    assert noted(after, status(Rollout(), previous=after, problem="spec: bad")) == []


def test_history_keeps_ten() -> None:
    found: dict[str, Any] = {}
    for number in range(15):
        trial = Rollout(P.ROLLING, str(number), str(number + 1), started=1e9 + number)
        found = status(trial, previous=found)
    assert [entry["revision"] for entry in found["history"]] == [str(n) for n in range(15, 5, -1)]
    assert {entry["result"] for entry in found["history"][1:]} == {"Superseded"}


def test_events_of_a_change() -> None:
    trial = Rollout(P.CANARY, "old", "new", started=5.0)
    rolling = Rollout(P.ROLLING, "old", "new", started=5.0)
    back = Rollout(P.ROLLING_BACK, "old", "new", started=5.0, message="1 node failed: n (x)")
    gone = Rollout(P.ROLLED_BACK, "old", "new", started=5.0, message="1 node failed: n (x)")
    done = Rollout(settled="new")
    steps = [Rollout(settled="old"), trial, rolling, back, gone]
    found = [events(*pair) for pair in pairwise(steps)]
    told = [[(t.kind, t.reason) for t in some] for some in found]
    assert told == [
        [("Normal", "RolloutStarted")],
        [("Normal", "CanaryWell")],
        [("Warning", "RollingBack")],
        [("Warning", "RolledBack")],
    ]
    assert "n (x)" in found[-1][0].text
    assert [t.reason for t in events(rolling, done)] == ["Settled"]
    assert events(trial, trial) == []
    lost = Rollout(settled="new", message="1 nodes could not take it: n (x)")
    assert [t.kind for t in events(rolling, lost)] == ["Warning"]


def test_a_revision_is_all_but_the_rollout() -> None:
    spec = {"priority": 1, "selector": {}, "agent": {"logLevel": "info"}, "rollout": {"x": 1}}
    content = content_of(spec)
    assert content == {"priority": 1, "selector": {}, "agent": {"logLevel": "info"}}
    same = {"agent": {"logLevel": "info"}, "selector": {}, "priority": 1}
    assert name_of(content) == name_of(same)
    assert len(name_of(content)) == 10
    assert name_of({**content, "priority": 2}) != name_of(content)
    body = {"metadata": {"name": "a", "uid": "u"}}
    assert to_object(body, content, 3)["metadata"]["name"] == f"a-{name_of(content)}"


def test_an_unknown_operator_is_refused() -> None:
    requirement = {"key": "a", "operator": "Maybe", "values": []}
    with pytest.raises(EffectiveError, match="unknown operator 'Maybe'"):
        revision_of("a", {"selector": {"matchExpressions": [requirement]}})


def test_how_a_change_is_to_be_made() -> None:
    assert plan_of({}) == Plan()
    rollout = {
        "maxUnavailable": 3,
        "canary": {"nodes": "5%", "soakSeconds": 9},
        "onFailure": "Pause",
        "progressDeadlineSeconds": 7,
    }
    assert plan_of({"rollout": rollout}) == Plan(3, "5%", 9, False, 7)
    body = {"metadata": {"annotations": {"outrider.dev/retry": "x" * 999}}}
    assert attempt_of(body) == "x" * 256


def test_a_report_keeps_its_time_while_it_stands_the_same() -> None:
    told = pb.ConfigReport(hash="a", tried_hash="b", phase=pb.CONFIG_PHASE_APPLYING)
    first = report_of(told, None, 1.0)
    assert report_of(told, first, 2.0).at == 1.0
    told.plugins.append(pb.PluginState(name="p", healthy=False))
    ill = report_of(told, first, 3.0)
    assert ill.at == 3.0
    told.phase = pb.CONFIG_PHASE_FAILED
    failed = report_of(told, ill, 4.0)
    assert failed.refused
    assert report_of(told, failed, 5.0).at == 5.0, "it was asked again, and refuses again"
