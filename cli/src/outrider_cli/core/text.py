"""Text for people: columns as kubectl has them, numbers with their noun, harmless characters.

What nodes print is shown on terminals, so it must not be able to steer them.
"""

import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

#: Between two columns.
GAP: Final = "   "


def printable(text: str, *, line: bool = False) -> str:
    """A text without the characters that steer a terminal; they become "�".

    Args:
        text: What a node printed.
        line: Make one line of it: line ends and tabs become spaces.
    """
    text = text.replace("\r\n", "\n")
    if line:
        text = " ".join(text.split())
    return "".join(c if c in "\n\t" or _harmless(c) else "�" for c in text)


def _harmless(character: str) -> bool:
    # Cc: control characters; Cf: invisible ones, such as those that turn the direction of writing.
    return unicodedata.category(character) not in {"Cc", "Cf", "Cs"}


def clipped(text: str, width: int) -> str:
    """One line of a text, at most `width` characters; "…" stands for what is left out."""
    text = printable(text, line=True)
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def plural(count: int, noun: str) -> str:
    """A number and its noun, such as "1 node" or "5,000 nodes"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as kubectl prints it: columns as wide as they need, nothing after the last one.

    Raises:
        ValueError: A row has another number of cells than the head.
    """
    cells = [list(head), *([printable(cell, line=True) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "".join(line.rstrip() + "\n" for line in lines)


def time_of(text: str) -> float | None:
    """A time of the API server as seconds since the Unix epoch; None if it is none."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def age(seconds: float) -> str:
    """A span of time as kubectl shows ages: "5s", "12m", "3h", "9d"."""
    whole = max(0, int(seconds))
    for unit, size, least in (("d", 86400, 48 * 3600), ("h", 3600, 10800), ("m", 60, 120)):
        if whole >= least:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def span(seconds: float) -> str:
    """How long something took: "3.2 ms", "1.25 s", "2m05s"."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    return f"{int(seconds) // 60}m{int(seconds) % 60:02}s"
