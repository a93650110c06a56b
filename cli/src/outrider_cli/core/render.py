"""Results, agents and pings in the forms that -o names: tables, groups, JSON and YAML."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from outrider_cli.core.groups import group, show
from outrider_cli.core.rows import Row
from outrider_cli.core.text import age, clipped, columns, span, time_of
from outrider_cli.core.timing import Summary

#: Forms of results.
FORMS: Final = ("table", "wide", "group", "json", "yaml", "name")
#: Most characters of an output's first line in a table.
FIRST_LINE: Final = 60


def structured(value: Any, form: str) -> str:
    """A value as JSON or YAML."""
    if form == "json":
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    import yaml  # seldom needed, and not quick to import

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def results(task: Mapping[str, Any], rows: Sequence[Row], form: str) -> str:
    """The results of a task.

    Args:
        task: The AgentTask.
        rows: What is to be shown.
        form: One of FORMS.
    """
    name = str(task["metadata"]["name"])
    if form in ("json", "yaml"):
        status = task.get("status") or {}
        value = {
            "task": name,
            "namespace": task["metadata"].get("namespace", ""),
            "uid": task["metadata"].get("uid", ""),
            "phase": status.get("phase", "Pending"),
            "reason": status.get("reason", ""),
            "counts": status.get("counts", {}),
            "nodes": [dict(row.raw) for row in rows],
        }
        return structured(value, form)
    if form == "group":
        return show(group(rows), name)
    if form == "name":
        return "".join(f"{row.node}\n" for row in rows)
    if form == "wide":
        head = ["NODE", "PHASE", "EXIT", "REASON", "ATTEMPT", "TOOK", "BYTES", "STATE", "MESSAGE"]
        return columns([*head, "OUTPUT"], [_wide(row) for row in rows])
    return columns(["NODE", "PHASE", "EXIT", "REASON", "OUTPUT"], [_short(row) for row in rows])


def _short(row: Row) -> list[str]:
    return [row.node, row.phase, _exit(row), row.reason, _first_line(row) or _said(row)]


def _wide(row: Row) -> list[str]:
    size = f"{row.output_bytes}{'+' if row.truncated else ''}"
    middle = [str(row.attempt), took(row), size, row.node_state]
    return [row.node, row.phase, _exit(row), row.reason, *middle, row.message, _first_line(row)]


def _exit(row: Row) -> str:
    return "" if row.exit_code is None else str(row.exit_code)


def _first_line(row: Row) -> str:
    lines = row.preview.strip().splitlines()
    if not lines:
        return ""
    more = len(lines) > 1 or row.output_bytes > len(row.preview.encode())
    # The mark of what is left out, where the line itself was not cut.
    shown = clipped(lines[0], FIRST_LINE)
    return shown + (" …" if more and not shown.endswith("…") else "")


def _said(row: Row) -> str:
    return clipped(row.message, FIRST_LINE) if row.message else ""


def took(row: Row) -> str:
    """How long a run took, by the node's clock."""
    begin, end = time_of(row.started), time_of(row.finished)
    return "" if begin is None or end is None else span(max(0.0, end - begin))


def agents(found: Sequence[Mapping[str, Any]], form: str, now: float) -> str:
    """The Agent objects.

    Args:
        found: Them.
        form: table, wide, json, yaml or name.
        now: Seconds since the Unix epoch.
    """
    ordered = sorted(found, key=lambda agent: str(agent["metadata"]["name"]))
    if form in ("json", "yaml"):
        return structured([dict(agent) for agent in ordered], form)
    if form == "name":
        return "".join(f"{agent['metadata']['name']}\n" for agent in ordered)
    head = ["NODE", "READY", "REASON", "SINCE", "VERSION", "SERVER"]
    if form == "wide":
        head += ["ADDRESS", "POD", "PLATFORM", "KERNEL", "MESSAGE"]
    return columns(head, [_agent(agent, form, now) for agent in ordered])


def ready(agent: Mapping[str, Any]) -> Mapping[str, Any]:
    """The condition Ready of an Agent; one of status Unknown where it has none."""
    conditions = (agent.get("status") or {}).get("conditions") or []
    return next(
        (found for found in conditions if found.get("type") == "Ready"), {"status": "Unknown"}
    )


def _agent(agent: Mapping[str, Any], form: str, now: float) -> list[str]:
    status, condition = agent.get("status") or {}, ready(agent)
    since = time_of(str(condition.get("lastTransitionTime", "")))
    row = [
        str(agent["metadata"]["name"]),
        str(condition["status"]),
        str(condition.get("reason", "")),
        "" if since is None else age(now - since),
        str(status.get("version", "")),
        str(status.get("server", "")),
    ]
    if form == "wide":
        row += [str(status.get(name, "")) for name in ("address", "pod", "platform", "kernel")]
        row.append(str(condition.get("message", "")))
    return row


def pings(times: Mapping[str, float], found: Summary | None) -> str:
    """A line for each node that answered, the quickest first, and the percentiles.

    Args:
        times: Round trips in seconds, by node.
        found: Their summary.
    """
    slowest_last = sorted(times.items(), key=lambda item: (item[1], item[0]))
    text = columns(["NODE", "ROUND TRIP"], [[node, span(took)] for node, took in slowest_last])
    if found is None:
        return text
    parts = [f"min {span(found.least)}"]
    parts += [f"p{percent} {span(value)}" for percent, value in found.percentiles.items()]
    return text + "\n" + "   ".join([*parts, f"max {span(found.most)}"]) + "\n"
