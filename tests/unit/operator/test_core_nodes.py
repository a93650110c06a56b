"""What is kept of a Node, from the object and from the API server's table."""

import pytest
from outrider_operator.core.nodes import NodeFacts, facts, from_table, slim

META = {"name": "n", "uid": "u", "labels": {"a": "b"}, "creationTimestamp": "1970-01-01T00:01:00Z"}


def node(ready: str | None, cordoned: bool) -> dict[str, object]:
    conditions = [{"type": "MemoryPressure", "status": "False"}]
    if ready is not None:
        conditions.append({"type": "Ready", "status": ready})
    return {
        "metadata": {**META, "managedFields": [1]},
        "spec": {"unschedulable": True, "podCIDR": "x"} if cordoned else {},
        "status": {"conditions": conditions, "images": [1, 2]},
    }


@pytest.mark.parametrize(
    ("ready", "cordoned", "cell", "state"),
    [
        ("True", False, "Ready", ""),
        ("True", True, "Ready,SchedulingDisabled", "Cordoned"),
        ("False", False, "NotReady", "NotReady"),
        ("Unknown", False, "NotReady", "NotReady"),
        ("Unknown", True, "NotReady,SchedulingDisabled", "Cordoned,NotReady"),
        (None, False, "Unknown", ""),
        (None, True, "Unknown,SchedulingDisabled", "Cordoned"),
    ],
)
def test_both_ways_say_the_same(ready, cordoned, cell, state) -> None:
    table = {
        "columnDefinitions": [{"name": "Name"}, {"name": "Status"}],
        "rows": [{"cells": ["n", cell], "object": {"metadata": META}}],
    }
    for body in (slim(node(ready, cordoned)), from_table(table)[0]):
        assert facts(body) == NodeFacts(state, 60.0)
        assert body["metadata"] == META


def test_no_nodes_and_no_status() -> None:
    assert from_table({"columnDefinitions": [], "rows": None}) == []
    with pytest.raises(ValueError, match="Status"):
        from_table({"columnDefinitions": [{"name": "Name"}], "rows": [{"cells": ["n"]}]})
