"""When a cron expression is due in a time zone: the one place that knows cron.

cronsim reads expressions and walks the calendar; this adds what CronJobs have and it has not (names
such as @daily, "?"), leaves out what they have not (seconds), and makes the answers exact around
changes of the clock: each is later than what was asked from, and forwards and backwards agree.
Reads no clock; of the outside only the time zone database, by zoneinfo.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

#: Names for common expressions, as in a CronJob.
NAMES: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
#: No zone moves its clocks further back at once.
_FURTHEST: Final = timedelta(hours=3)


class CronError(ValueError):
    """No cron expression; the text says which part of it."""


class ZoneError(ValueError):
    """No time zone that this server knows."""


@lru_cache(maxsize=4096)
def due_times(expression: str, zone: str) -> "DueTimes":
    """The due times of an expression.

    Args:
        expression: five fields, or one of NAMES.
        zone: name of the IANA time zone database; empty: UTC.

    Raises:
        CronError: The expression has another form.
        ZoneError: There is no such zone.
    """
    return DueTimes(expression, zone)


class DueTimes:
    """Due times, in seconds since the Unix epoch. Arguments and errors as of `due_times`.

    An expression of fixed hours and minutes is due once for each time it names: once where the
    clock shows that time twice (the first time), and right after the gap where the clock leaves it
    out. One whose minute or hour begins with a star goes by what the clock shows, minute by minute.
    """

    def __init__(self, expression: str, zone: str) -> None:
        fields = NAMES.get(expression.strip(), expression).split()
        if len(fields) != 5:
            raise CronError(
                "expected five fields (minute, hour, day of month, month, day of week) or one of "
                f"{', '.join(NAMES)}"
            )
        fields = ["*" if field == "?" else field for field in fields]
        self._expression = " ".join(fields)
        self._fixed = not fields[0].startswith("*") and not fields[1].startswith("*")
        self._zone = _zone(zone)
        try:
            CronSim(self._expression, datetime(2000, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            raise CronError(f"{str(error).lower()} in {expression!r}") from None
        except (AssertionError, TypeError, ValueError):  # on some that mix signs, such as 1#2/3
            raise CronError(f"cannot be read: {expression!r}") from None

    def after(self, at: float) -> float | None:
        """The first due time later than `at`; None where there is none in 50 years."""
        for found in self._walk(datetime.fromtimestamp(int(at), self._zone), reverse=False):
            if found > at:
                return found
        return None

    def latest(self, at: float) -> float | None:
        """The last due time not later than `at`; None where there is none in 50 years."""
        begin = datetime.fromtimestamp(int(at) + 1, UTC)
        if self._fixed:
            # Where clocks were set back, what was due before may show a later time than now.
            begin += _FURTHEST
        for found in self._walk(begin.astimezone(self._zone), reverse=True):
            if found <= at:
                return found
        return None

    def between(self, begin: float, end: float, most: int) -> list[float]:
        """The first `most` due times later than `begin` and before `end`."""
        found: list[float] = []
        at = self.after(begin)
        while at is not None and at < end and len(found) < most:
            found.append(at)
            at = self.after(at)
        return found

    def _walk(self, begin: datetime, reverse: bool) -> Iterator[float]:
        steps = CronSim(self._expression, begin, reverse=reverse)
        while True:
            try:
                yield next(steps).timestamp()
            except (StopIteration, OverflowError, ValueError):  # the end of time, for a datetime
                return


def _zone(name: str) -> tzinfo:
    if name in ("", "UTC", "Etc/UTC"):
        return UTC  # cronsim is quickest with this one
    try:
        # On some systems there is a file of this name, with another zone on each.
        if name.lower() not in ("local", "localtime"):
            return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # a name that is none, is a path, or is a folder
        pass
    raise ZoneError(f"no time zone {name!r} in this server's time zone database")
