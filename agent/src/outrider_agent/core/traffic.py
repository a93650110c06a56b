"""How much went over the uplink, and rates between two looks at it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Traffic:
    """Totals since the agent began."""

    sent_bytes: int = 0
    received_bytes: int = 0
    sent_records: int = 0
    received_messages: int = 0


class Rates:
    """Rates of counters per second. A counter that went down began anew."""

    def __init__(self) -> None:
        self._before: Mapping[str, float] = {}
        self._when = 0.0

    def update(self, counters: Mapping[str, float], now: float) -> dict[str, float]:
        """The rates since the last call; 0 at the first.

        Args:
            counters: Totals by name.
            now: Seconds of a steady clock.
        """
        seconds = now - self._when
        rates = {
            name: max(0.0, value - self._before[name]) / seconds
            if name in self._before and seconds > 0
            else 0.0
            for name, value in counters.items()
        }
        self._before, self._when = dict(counters), now
        return rates
