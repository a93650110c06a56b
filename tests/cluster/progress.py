"""Show what is being done and how far it is, for everything that takes more than a few seconds.

Why it exists: the first run on a machine builds an API server, for minutes; who waits must see that
it goes on, and how far. On a terminal the steps under way stand below each other and move;
elsewhere (CI logs) there is a line when a step starts, one when it ends, and one every 15 s for
what still goes on. It must not decide or run anything but the steps handed to it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TextIO

from cluster.errors import ClusterError, MissingError
from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_INTERVAL_SECONDS = 15.0
LIVE_REFRESH_PER_SECOND = 4
# A step that takes no longer than this gets one line, not two: its end says it all.
QUIET_SECONDS = 1.0


class Step:
    """One thing under way. Made by `Steps.step`; `update` may be called from any thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = time.monotonic()
        self.detail = ""
        self.announced = False
        self.last_line = self.started

    def update(self, detail: str) -> None:
        """Say how far it is, e.g. "312/1480 packages"; it is shown when a line is due."""
        self.detail = detail

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.started

    def line(self) -> str:
        """Name, detail and seconds, as shown while it goes on."""
        detail = f" {self.detail}," if self.detail else ""
        return f"{self.name} …{detail} {self.seconds:.0f} s"


class Steps:
    """The display of all steps of one command.

    Thread-safe. It needs no closing: the thread that draws lives while a step is under way.

    Args:
        stream: where to write; standard error if not given, so that a command's result stays clean.
        interval: seconds between two lines about the same step where there is no terminal.
    """

    def __init__(
        self, stream: TextIO | None = None, interval: float = PLAIN_INTERVAL_SECONDS
    ) -> None:
        self._console = Console(
            file=stream or sys.stderr, highlight=False, markup=False, soft_wrap=True
        )
        self._interval = interval
        self._lock = threading.Lock()
        self._active: list[Step] = []
        self._live: Live | None = None
        self._ticking: threading.Event | None = None  # set: the thread that prints is to end

    def say(self, text: str) -> None:
        """Print a line between the steps."""
        with self._lock:
            self._console.print(text)

    @contextmanager
    def step(self, name: str, done: str = "") -> Iterator[Step]:
        """Show a step for as long as the block runs, then its time, or that it failed.

        Args:
            name: what is done and to what, e.g. "kube-apiserver: build".
            done: a last remark, in place of the step's last detail.
        """
        step = Step(name)
        self._begin(step)
        try:
            yield step
        except BaseException:
            self._end(step, f"✗ {step.name} failed after {step.seconds:.1f} s")
            raise
        # The last detail of a finished step ("1480/1480") says nothing; a remark does.
        remark = f" ({done})" if done else ""
        self._end(step, f"✓ {step.name}: {step.seconds:.1f} s{remark}")

    def together(self, *jobs: Callable[[], object]) -> None:
        """Run independent jobs side by side, in threads, and wait for all of them.

        Raises:
            ClusterError: jobs failed with such; of several, one with all their texts.
            BaseExceptionGroup: more than one job failed, and not only so. Of one, its own error.
        """
        if not jobs:
            return
        with ThreadPoolExecutor(max_workers=len(jobs), thread_name_prefix="step") as pool:
            futures = [pool.submit(job) for job in jobs]
        errors = [error for error in (future.exception() for future in futures) if error]
        if len(errors) == 1:
            raise errors[0]
        if errors and all(isinstance(error, ClusterError) for error in errors):
            missing = [error for error in errors if isinstance(error, MissingError)]
            kind = MissingError if missing else ClusterError
            raise kind("\n".join(map(str, missing or errors)))
        if errors:
            raise BaseExceptionGroup("several steps failed", errors)

    def _begin(self, step: Step) -> None:
        with self._lock:
            self._active.append(step)
            if self._console.is_terminal:
                if self._live is None:
                    self._live = Live(
                        console=self._console,
                        get_renderable=self._picture,
                        refresh_per_second=LIVE_REFRESH_PER_SECOND,
                        transient=True,
                        redirect_stdout=False,
                        redirect_stderr=False,
                    )
                    self._live.start()
            elif self._ticking is None:
                self._ticking = threading.Event()
                threading.Thread(
                    target=self._tick, args=(self._ticking,), name="progress", daemon=True
                ).start()

    def _end(self, step: Step, line: str) -> None:
        with self._lock:
            self._active.remove(step)
            self._console.print(line)
            if self._active:
                return
            if self._live is not None:
                self._live.stop()  # its thread never takes our lock, so that this cannot hang
                self._live = None
            if self._ticking is not None:
                self._ticking.set()
                self._ticking = None

    def _picture(self) -> Text:
        lines = "\n".join(step.line() for step in tuple(self._active))
        return Text(lines, style="cyan", no_wrap=True, overflow="ellipsis")

    def _tick(self, end: threading.Event) -> None:
        while not end.wait(min(QUIET_SECONDS, self._interval)):
            with self._lock:
                for step in self._active:
                    self._print_if_due(step)

    def _print_if_due(self, step: Step) -> None:
        now = time.monotonic()
        if not step.announced and now - step.started >= min(QUIET_SECONDS, self._interval):
            step.announced = True
            self._console.print(f"· {step.name} …")
        elif now - step.last_line >= self._interval:
            step.last_line = now
            self._console.print(f"· {step.line()}")
