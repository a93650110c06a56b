"""The live bar of a task, on a terminal. A module of its own, for its library is large."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from outrider_cli.core.waiting import Snapshot, progress


@contextmanager
def bar(
    name: str, stream: IO[str], max_reasons: int
) -> Iterator[Callable[[Snapshot, Sequence[str]], None]]:
    """Show a bar while the context lasts.

    Args:
        name: Of the task.
        stream: A terminal.
        max_reasons: So many reasons for waiting are shown at once.

    Yields:
        What is called with each new state and the reasons for waiting.
    """
    shown = Progress(
        TextColumn(name, markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[told]}", markup=False),
        TimeElapsedColumn(),
    )
    row = shown.add_task(name, total=None, told="not begun")
    console = Console(file=stream, highlight=False)
    with Live(shown, console=console, refresh_per_second=8, transient=True) as live:

        def update(found: Snapshot, waits: Sequence[str]) -> None:
            # The state comes after the bar, and has no style: names may have brackets.
            shown.update(row, total=found.total or None, completed=found.done, told=progress(found))
            notes = [Text(f"  waiting: {wait}", style="yellow") for wait in waits[:max_reasons]]
            live.update(Group(shown, *notes))

        yield update
