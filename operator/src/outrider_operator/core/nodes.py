"""What is kept of a Node: its labels, its age, and whether it is cordoned or not ready.

A Node is 20 KB, of which this is the part that anybody looks at. Decides nothing: a node that is
cordoned or not ready is targeted as any other, and only said to be so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from outrider_operator.core.times import seconds_of

CORDONED: Final = "Cordoned"
NOT_READY: Final = "NotReady"


class NodeFacts(msgspec.Struct, frozen=True):
    """A Node: "Cordoned", "NotReady", both or neither; and when it was made, epoch seconds."""

    state: str = ""
    created: float = 0.0


NO_FACTS: Final = NodeFacts()


def slim(body: Mapping[str, Any]) -> dict[str, Any]:
    """A Node object without what nobody looks at."""
    conditions = (body.get("status") or {}).get("conditions") or []
    return {
        "metadata": _slim_metadata(body["metadata"]),
        "spec": {"unschedulable": bool((body.get("spec") or {}).get("unschedulable"))},
        "status": {
            "conditions": [
                {"type": "Ready", "status": item.get("status")}
                for item in conditions
                if item.get("type") == "Ready"
            ]
        },
    }


def from_table(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The Nodes of a meta.k8s.io/v1 Table, as `slim` gives them.

    Raises:
        ValueError: The table has no column "Status".
    """
    names = [column.get("name") for column in table.get("columnDefinitions") or []]
    rows: Sequence[Mapping[str, Any]] = table.get("rows") or []
    if rows and "Status" not in names:
        raise ValueError(f"the API server's table of Nodes has the columns {names}, not Status")
    return [_from_row(row, names.index("Status")) for row in rows]


def _from_row(row: Mapping[str, Any], column: int) -> dict[str, Any]:
    words = str(row["cells"][column]).split(",")
    known = {"Ready": "True", "NotReady": "False"}
    return {
        "metadata": _slim_metadata(row["object"]["metadata"]),
        "spec": {"unschedulable": "SchedulingDisabled" in words},
        "status": {
            "conditions": [
                {"type": "Ready", "status": known[word]} for word in words if word in known
            ]
        },
    }


def _slim_metadata(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: meta.get(key) for key in ("name", "uid", "labels", "creationTimestamp")}


def facts(body: Mapping[str, Any]) -> NodeFacts:
    """What is to be known of a Node. One that says nothing about Ready counts as ready."""
    cordoned = (body.get("spec") or {}).get("unschedulable")
    conditions = (body.get("status") or {}).get("conditions") or []
    unready = any(c.get("type") == "Ready" and c.get("status") != "True" for c in conditions)
    words = [word for word, holds in ((CORDONED, cordoned), (NOT_READY, unready)) if holds]
    created = seconds_of(body["metadata"].get("creationTimestamp"))
    return NodeFacts(",".join(words), created or 0.0)
