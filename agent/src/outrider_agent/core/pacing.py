"""How fast batches may go: the bandwidth that the settings allow, and pauses a server asks for.

Both only count; who sends asks them first. Reads no clock: `now` is seconds of a steady clock.
"""

#: The longest pause that a server gets by asking once, seconds.
MAX_PAUSE_SECONDS = 300.0
#: A pause is over, for the log, once there was none for so long, seconds: servers ask for many
#: short ones in a row.
QUIET_SECONDS = 10.0
#: How much may go at once after a silence, as seconds of the rate.
BURST_SECONDS = 1.0


class TokenBucket:
    """A rate of bytes with a burst of one second.

    What goes may be more than there is, and what may not wait goes in any case: the bucket owes it
    then, and is closed until that is paid. So over any time no more passes than the rate gives,
    the burst, the last thing that went, and what did not ask.

    Args:
        rate: Bytes per second; 0: no limit.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._burst = rate * BURST_SECONDS
        self._level = self._burst
        self._when: float | None = None

    def set_rate(self, rate: int, now: float) -> None:
        """Another rate from now on; what is owed stays owed."""
        level = self._filled(now) if self._rate else rate * BURST_SECONDS
        self._rate, self._burst = rate, rate * BURST_SECONDS
        self._level, self._when = min(level, self._burst), now

    def take(self, size: int, now: float) -> None:
        """So many bytes go."""
        if self._rate:
            self._level = self._filled(now) - size
            self._when = now

    def open(self, now: float) -> bool:
        """Whether anything may go that can wait."""
        return not self._rate or self._filled(now) > 0

    def opens_at(self, now: float) -> float:
        """When it is open at the latest if nothing more goes; `now` if it is."""
        if self.open(now):
            return now
        # A byte more than what is owed: at 0 it is closed still.
        return now + (1 - self._filled(now)) / self._rate

    def _filled(self, now: float) -> float:
        if self._when is None:
            return self._level
        return min(self._burst, self._level + max(0.0, now - self._when) * self._rate)


class Pause:
    """The server's wish that no batches come for a while; a later one replaces an earlier one."""

    def __init__(self) -> None:
        self._until = float("-inf")
        self._counted = 0.0
        self._told = False

    def ask(self, seconds: float, now: float) -> None:
        """No batches for so long from now on; 0: they may come again."""
        if not self.active(now):
            self._counted = now
        self._until = now + min(max(0.0, seconds), MAX_PAUSE_SECONDS)

    def active(self, now: float) -> bool:
        """Whether it lasts."""
        return now < self._until

    @property
    def until(self) -> float:
        """When it ends or ended."""
        return self._until

    def elapsed(self, now: float) -> float:
        """Seconds of pause since the last call."""
        end = min(now, self._until)
        seconds = max(0.0, end - self._counted)
        self._counted = max(self._counted, end)
        return seconds

    def news(self, now: float) -> bool | None:
        """True when it began, False when it is over for good, None where nothing changed."""
        if self._told == self.active(now) or (self._told and now < self._until + QUIET_SECONDS):
            return None
        self._told = not self._told
        return self._told
