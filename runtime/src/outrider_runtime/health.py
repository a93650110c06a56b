"""What a program says of its own health: readiness conditions and liveness checks.

Readiness is set by the parts as they change; liveness is asked. Serves nothing: see `ops`.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """One line of an answer: whether `name` is well, and why not."""

    name: str
    ok: bool
    reason: str = ""


class Health:
    """The health of one program. All names are known to the program: they are few and constant."""

    def __init__(self) -> None:
        self._ready: dict[str, Condition] = {}
        self._live: dict[str, Callable[[], str | None]] = {}
        self._watchers: list[Callable[[bool], None]] = []

    def set(self, name: str, ok: bool, reason: str = "") -> None:
        """State a readiness condition; the program is ready when all of them are well."""
        before = self.ready
        self._ready[name] = Condition(name, ok, "" if ok else reason)
        if self.ready != before:
            for watcher in self._watchers:
                watcher(self.ready)

    def live(self, name: str, check: Callable[[], str | None]) -> None:
        """Add a liveness check: it returns None when well, else the reason, and never blocks."""
        self._live[name] = check

    def watch(self, watcher: Callable[[bool], None]) -> None:
        """Have `watcher` called with the new readiness at each change."""
        self._watchers.append(watcher)

    @property
    def ready(self) -> bool:
        """True when there is a condition and all of them are well."""
        return bool(self._ready) and all(c.ok for c in self._ready.values())

    def readiness(self) -> list[Condition]:
        """All readiness conditions, by name."""
        return sorted(self._ready.values(), key=lambda c: c.name)

    def liveness(self) -> list[Condition]:
        """The answers of all liveness checks, by name."""
        found = []
        for name, check in sorted(self._live.items()):
            reason = check()
            found.append(Condition(name, reason is None, reason or ""))
        return found
