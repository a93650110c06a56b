"""How much may come, and when to come back: token buckets, pauses, and slots for connects.

Pure: the time is passed in, as seconds of a clock that never goes back. Nothing here waits.
"""

from typing import Final

#: A pause is at most so long, seconds: a debt beyond it is told again.
MOST_PAUSE_SECONDS: Final = 60.0
#: What comes so soon after an agent was told to pause was on its way already, seconds.
GRACE_SECONDS: Final = 2.0
#: What has passed is counted in spans of so many seconds.
FLOW_SECONDS: Final = 0.5
#: A connect that is due so soon waits here instead of being sent away, seconds.
HOLD_SECONDS: Final = 1.0
#: The farthest slot that is given away, seconds from now.
MOST_SLOT_SECONDS: Final = 300.0
#: Slots are a little farther apart than the rate would have it, for those that come unasked.
SLOT_SHARE: Final = 0.95


class TokenBucket:
    """So many units a second, and some saved up; may be overdrawn, which is a debt.

    Args:
        rate: units a second; 0: no limit.
        burst: most units that are saved up.
        now: seconds.
    """

    __slots__ = ("_at", "_burst", "_level", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at = now

    def spend(self, units: float, now: float) -> float:
        """Take units, also those that are not there; returns the seconds until there is no debt."""
        if not self._rate:
            return 0.0
        if now > self._at:
            self._level = min(self._burst, self._level + (now - self._at) * self._rate)
            self._at = now
        self._level -= units
        return max(0.0, -self._level / self._rate)


class Allowance:
    """What one agent, or the process, may send: records and bytes.

    Args:
        records: records a second; 0: no limit.
        size: bytes a second; 0: no limit.
        burst_seconds: what is saved up, in seconds of the rates.
        now: seconds.
    """

    __slots__ = ("_bytes", "_records")

    def __init__(self, records: float, size: float, burst_seconds: float, now: float) -> None:
        self._records = TokenBucket(records, records * burst_seconds, now)
        self._bytes = TokenBucket(size, size * burst_seconds, now)

    def spend(self, records: int, size: int, now: float) -> float:
        """Count what came; returns the seconds until there is no debt of either."""
        return max(self._records.spend(records, now), self._bytes.spend(size, now))


class Flow:
    """How much has passed lately, per second: over the last one to two spans of half a second.

    Args:
        now: seconds.
    """

    __slots__ = ("_before", "_here", "_since")

    def __init__(self, now: float) -> None:
        self._since = now
        self._before = 0.0
        self._here = 0.0

    def add(self, units: float, now: float) -> None:
        """So much has passed."""
        self._turn(now)
        self._here += units

    def rate(self, now: float) -> float:
        """Units a second."""
        self._turn(now)
        return (self._before + self._here) / (FLOW_SECONDS + now - self._since)

    def _turn(self, now: float) -> None:
        passed = now - self._since
        if passed >= FLOW_SECONDS:
            self._before = self._here if passed < 2 * FLOW_SECONDS else 0.0
            self._here = 0.0
            self._since = now


class Pauses:
    """What one agent was told to wait, and whether it does."""

    __slots__ = ("_told", "_until")

    def __init__(self) -> None:
        self._told = 0.0
        self._until = 0.0

    def step(self, debt: float, now: float) -> tuple[float, float]:
        """Batches came and left a debt of so many seconds, above 0.

        Returns:
            For how long the agent is to be told to send none (0: it knows already), and for how
            long it is not to be read (0: it could not know yet), seconds.
        """
        debt = min(debt, MOST_PAUSE_SECONDS)
        paused = now < self._until
        hold = debt if paused and now - self._told > GRACE_SECONDS else 0.0
        tell = 0.0
        if now + debt > self._until:
            tell = debt
            self._until = now + debt
            if not paused:
                self._told = now
        return tell, hold


class Admission:
    """Lets so many in a second; gives the others slots, one each, in the order they came.

    Args:
        rate: a second, above 0.
        burst: how many at once when none came before; at least 1.
        now: seconds.
    """

    __slots__ = ("_at", "_burst", "_level", "_rate", "_slot")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at = now
        self._slot = now

    def ask(self, now: float, *, crowded: bool = False) -> tuple[bool, float]:
        """Somebody came.

        Args:
            now: seconds.
            crowded: those who were let in wait for something already: nobody more is let in.

        Returns:
            True and how long to hold it before it goes on, or False and when it is to come back,
            in seconds.
        """
        if now > self._at:
            self._level = min(self._burst, self._level + (now - self._at) * self._rate)
            self._at = now
        if not crowded and self._level - 1 >= -HOLD_SECONDS * self._rate:
            self._level -= 1
            return True, max(0.0, -self._level / self._rate)
        spacing = 1 / (self._rate * SLOT_SHARE)
        slot = max(self._slot, now + HOLD_SECONDS) + spacing
        # So far away nobody keeps to its place: they come back together, and are told anew.
        self._slot = min(slot, now + MOST_SLOT_SECONDS)
        return False, self._slot - now
