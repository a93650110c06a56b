"""Which nodes a task is for."""

import pytest
from outrider_operator.core.model import LabelSelector, Requirement, Target, parse_spec, resolve
from outrider_operator.core.targeting import first_rows, matches, targets

NODES = {
    "n1": {"os": "linux", "zone": "a"},
    "n2": {"os": "linux", "zone": "b"},
    "n3": {"os": "windows"},
    "n4": {"os": "linux", "zone": "c", "gpu": ""},
}


@pytest.mark.parametrize(
    ("amount", "total", "up", "expected"),
    [
        (3, 10, True, 3),
        ("25%", 10, True, 3),
        ("25%", 10, False, 2),
        ("100%", 7, True, 7),
        ("1%", 3, True, 1),
        ("0%", 100, True, 0),
        ("10%", 3, False, 0),
    ],
)
def test_amounts(amount, total, up, expected) -> None:
    assert resolve(amount, total, up=up) == expected


@pytest.mark.parametrize("amount", ["ten", "10", "-1%", "%", ""])
def test_what_is_no_amount(amount) -> None:
    with pytest.raises(ValueError, match="expected a number or a percentage"):
        resolve(amount, 10, up=True)


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        (Requirement(key="zone", operator="In", values=["a", "b"]), {"n1", "n2"}),
        (Requirement(key="zone", operator="NotIn", values=["a", "b"]), {"n3", "n4"}),
        (Requirement(key="gpu", operator="Exists"), {"n4"}),
        (Requirement(key="zone", operator="DoesNotExist"), {"n3"}),
    ],
)
def test_expressions(requirement, expected) -> None:
    selector = LabelSelector(match_expressions=[requirement])
    assert {name for name, labels in NODES.items() if matches(selector, labels)} == expected


def test_an_unknown_operator_is_an_error_and_no_match() -> None:
    selector = LabelSelector(match_expressions=[Requirement(key="os", operator="Gt")])
    with pytest.raises(ValueError, match="Gt"):
        matches(selector, NODES["n1"])


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target(), {"n1", "gone"}),  # all that have or had an agent
        (Target(node_selector=LabelSelector(match_labels={"os": "linux"})), {"n1", "n2", "n4"}),
        (Target(node_names=["n3", "ghost"]), {"n3", "ghost"}),
        (
            Target(
                node_names=["n3", "n1", "ghost"],
                node_selector=LabelSelector(match_labels={"os": "linux"}),
            ),
            {"n1", "ghost"},
        ),
        (Target(node_selector=LabelSelector(match_labels={"os": "plan9"})), set()),
    ],
)
def test_targets(target, expected) -> None:
    assert set(targets(target, "uid", NODES, {"n1", "gone"})) == expected


@pytest.mark.parametrize(("sample", "size"), [(1, 1), (3, 3), (50, 20), ("10%", 2), ("1%", 1)])
def test_a_sample_is_random_but_the_same_for_one_task(sample, size) -> None:
    nodes = {f"node-{n}": {"os": "linux"} for n in range(20)}
    target = Target(node_names=list(nodes), sample=sample)
    first = targets(target, "uid-1", nodes, ())
    assert len(first) == size
    assert first == targets(target, "uid-1", dict(reversed(nodes.items())), ())
    others = {tuple(targets(target, f"uid-{n}", nodes, ())) for n in range(2, 30)}
    assert size == 20 or len(others) > 1


def test_first_rows_name_what_is_missing() -> None:
    rows = first_rows(["n1", "n2", "ghost"], NODES, {"n1"})
    assert {name: row.reason for name, row in rows.items()} == {
        "n1": "",
        "n2": "AgentNotConnected",
        "ghost": "NodeNotFound",
    }


def test_a_spec_of_another_form_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"spec: .*timeoutSeconds"):
        parse_spec({"run": {"builtin": "Ping"}, "timeoutSeconds": "soon"})
