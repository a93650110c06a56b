"""What a node is to run, in the forms that -o names."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from outrider_cli.core.config_effective import Value, Wanted, runs, standing
from outrider_cli.core.config_report import Report
from outrider_cli.core.render import structured
from outrider_cli.core.text import clipped, columns

#: Most characters of a value in a table.
VALUE_WIDTH: Final = 60


def node(name: str, report: Report, desired: Wanted, form: str) -> str:
    """What a node is to run, each value with where it comes from.

    Args:
        name: of the node.
        report: what its agent said.
        desired: what it is to run.
        form: table, wide, yaml or json.
    """
    if form in ("yaml", "json"):
        return structured(_whole(name, report, desired), form)
    wide = form == "wide"
    head = ["FIELD", "VALUE", "FROM", *(["REVISION", "PRIORITY", "NOT HEARD"] if wide else [])]
    text = columns(head, [_row(v, wide) for v in desired.values]) if desired.values else ""
    if report.plugins:
        titles = ["PLUGIN", "VERSION", "PHASE", "HEALTHY", "RESTARTS", "MESSAGE"]
        text += ("\n" if text else "") + columns(titles, [_plugin(p) for p in report.plugins])
    return text


def dotted(path: Sequence[str]) -> str:
    """A path as people write it."""
    return ".".join(path)


def _row(value: Value, wide: bool) -> list[str]:
    name, revision = value.origin
    shown = [dotted(value.path), _short(value, wide), name]
    return [*shown, revision, str(value.priority), ",".join(value.unheard)] if wide else shown


def _short(value: Value, wide: bool) -> str:
    if value.path[0] == "plugins" and not wide:
        return str(value.value["version"])
    if value.path[0] == "datasets":
        return "yes"
    text = value.value if isinstance(value.value, str) else json.dumps(value.value)
    return clipped(text, VALUE_WIDTH)


def _plugin(plugin: Mapping[str, Any]) -> list[str]:
    healthy = plugin.get("healthy")
    return [
        str(plugin.get("name", "")),
        str(plugin.get("version", "")),
        str(plugin.get("phase", "")),
        "" if healthy is None else str(bool(healthy)),
        str(plugin.get("restarts", 0)),
        clipped(str(plugin.get("message", "")), VALUE_WIDTH),
    ]


def _whole(name: str, report: Report, desired: Wanted) -> dict[str, Any]:
    return {
        "node": name,
        "config": desired.content,
        "hash": desired.hash,
        "revisions": [{"name": n, "revision": r} for n, r in desired.parts],
        "origins": {
            dotted(v.path): {"name": v.origin[0], "revision": v.origin[1], "priority": v.priority}
            for v in desired.values
        },
        "conflicts": [
            {"field": dotted(c.path), "heard": c.heard, "notHeard": list(c.unheard)}
            for c in desired.conflicts
        ],
        "leftOut": [dotted(path) for path in desired.left_out],
        "problem": desired.problem,
        "agent": {
            "connected": not report.away,
            "runsIt": runs(report, desired),
            "standing": standing(report, desired),
            "hash": report.hash,
            "phase": report.phase,
            "message": report.message,
            "plugins": [dict(plugin) for plugin in report.plugins],
            "drift": list(report.drift),
        },
    }


def remarks(desired: Wanted, report: Report) -> list[str]:
    """What people should know besides the values: a line each."""
    lines = []
    if desired.problem:
        lines.append(f"it cannot be made, so the agent keeps what it has: {desired.problem}")
    for conflict in desired.conflicts:
        others = ", ".join(conflict.unheard)
        lines.append(
            f"conflict: {dotted(conflict.path)}: {conflict.heard} is heard, not {others}, which "
            "asks for something else at the same priority"
            if len(conflict.unheard) == 1
            else f"conflict: {dotted(conflict.path)}: {conflict.heard} is heard, not {others}, "
            "which ask for something else at the same priority"
        )
    lines += [f"left out, for the list is full: {dotted(path)}" for path in desired.left_out]
    lines += [f"drift: {text}" for text in report.drift]
    return lines
