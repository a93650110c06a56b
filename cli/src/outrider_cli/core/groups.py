"""Like results together: nodes that ended in the same way and printed the same.

What people want to see of five thousand results is the three kinds there are, and who is in each.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from outrider_cli.core.rows import SUCCEEDED, Row, names
from outrider_cli.core.text import plural, printable

#: So many nodes of a group are named.
NAMED: Final = 10
#: Of those that did not succeed more are: they are what one looks for.
NAMED_OTHERS: Final = 100


@dataclass(frozen=True)
class Group:
    """Nodes with the same result, sorted by name; the result is that of the first."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        """One of them."""
        return self.rows[0]

    @property
    def message(self) -> str:
        """What all of them say, or "" where they say different things."""
        messages = {row.message for row in self.rows}
        return self.first.message if len(messages) == 1 else ""

    @property
    def cut(self) -> bool:
        """Whether the output of any goes on after its preview."""
        return any(row.output_bytes > len(row.preview.encode()) for row in self.rows)


def group(rows: Iterable[Row]) -> list[Group]:
    """The kinds of results there are, those of most nodes first."""
    found: dict[tuple[str, str, int | None, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.phase, row.reason, row.exit_code, row.preview), []).append(row)
    groups = [Group(tuple(sorted(rows, key=lambda row: row.node))) for rows in found.values()]
    return sorted(groups, key=lambda group: (-len(group.rows), group.first.node))


def show(groups: Iterable[Group], task: str) -> str:
    """All groups as text, each with a head line.

    Args:
        groups: From `group`.
        task: Name of the task, for the command that shows more.
    """
    return "\n".join(_show(group, task) for group in groups)


def _show(group: Group, task: str) -> str:
    first = group.first
    words = [plural(len(group.rows), "node"), first.phase]
    if first.exit_code is not None:
        words.append(f"exit code {first.exit_code}")
    if first.reason:
        words.append(first.reason)
    who = names(group.rows, NAMED if first.phase == SUCCEEDED else NAMED_OTHERS)
    lines = [f"--- {' · '.join(words)} --- {who}"]
    if group.message:
        lines.append(f"({printable(group.message)})")
    if first.preview:
        lines.append(printable(first.preview).rstrip("\n"))
    if group.cut:
        lines.append(f"(the output goes on: kubectl outrider output {task} {first.node})")
    return "\n".join(lines) + "\n"
