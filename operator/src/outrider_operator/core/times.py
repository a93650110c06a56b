"""Times as objects carry them (RFC 3339, UTC) and as decisions use them. Reads no clock."""

from datetime import UTC, datetime

#: The last moment a datetime can hold, nanoseconds since the Unix epoch.
_LAST_NANOS = 253_402_300_799 * 10**9


def micros(nanos: int) -> str:
    """Nanoseconds since the Unix epoch as RFC 3339 with microseconds."""
    seconds, rest = divmod(min(max(nanos, 0), _LAST_NANOS), 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"


def seconds(at: float) -> str:
    """Seconds since the Unix epoch as RFC 3339 with whole seconds, as Kubernetes writes them."""
    return f"{datetime.fromtimestamp(int(at), UTC):%Y-%m-%dT%H:%M:%SZ}"


def nanos_of(text: str) -> int:
    """RFC 3339 as nanoseconds since the Unix epoch.

    Raises:
        ValueError: It is no such time.
    """
    when = datetime.fromisoformat(text)
    return int(when.replace(microsecond=0).timestamp()) * 10**9 + when.microsecond * 1000


def seconds_of(text: str | None) -> float | None:
    """RFC 3339 as seconds since the Unix epoch; None for none.

    Raises:
        ValueError: It is no such time.
    """
    return nanos_of(text) / 1e9 if text else None
