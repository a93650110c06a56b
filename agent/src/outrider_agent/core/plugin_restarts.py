"""When a plug-in that ended is started again, and when it is given up for a while.

Decides only: `now` is seconds of a steady clock, `chance` a random number.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RestartLimits:
    """How often a plug-in may end.

    Attributes:
        base: Bound of the first wait, seconds; each further one is twice as long.
        cap: Bound that waits grow to, seconds.
        ends: So many ends within `window` are a crash loop.
        window: Seconds.
        rest: How long a plug-in in a crash loop is left alone, seconds.
    """

    base: float = 1.0
    cap: float = 60.0
    ends: int = 5
    window: float = 300.0
    rest: float = 600.0


@dataclass(frozen=True)
class Decision:
    """What becomes of a plug-in that ended: started again after `wait` seconds.

    Attributes:
        wait: Seconds.
        failed: It counts as failed meanwhile.
    """

    wait: float
    failed: bool


class Restarts:
    """The ends of one plug-in since its configuration came."""

    def __init__(self, limits: RestartLimits) -> None:
        self._limits = limits
        self._ends: list[float] = []

    def ended(self, now: float, chance: float) -> Decision:
        """It ended, or could not be started.

        Args:
            now: When.
            chance: From 0 to 1; spreads the restarts of many nodes.
        """
        limits = self._limits
        self._ends = [*(end for end in self._ends if end > now - limits.window), now]
        count = len(self._ends)
        if count >= limits.ends:
            self._ends.clear()
            return Decision(limits.rest, failed=True)
        bound = min(limits.cap, limits.base * 2.0 ** (count - 1))
        # Never at once: half of the bound is certain.
        return Decision(bound / 2 + bound / 2 * chance, failed=False)
