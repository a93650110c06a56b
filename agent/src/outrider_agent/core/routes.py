"""In which order the agent tries the addresses of its servers, and when one asks it to come later.

First those that DNS names, then the private address of its region, then the public one. Resolves
and connects to nothing.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

#: Most addresses of DNS that are tried in one round.
MAX_DISCOVERED = 10
#: Metadata key of the time after which a server wants a refused call again, milliseconds; as in
#: gRPC's own retries (A6 of its proposals).
PUSHBACK_KEY = "grpc-retry-pushback-ms"
#: Within which bounds we keep to that time, seconds.
LEAST_PUSHBACK_SECONDS = 0.1
MOST_PUSHBACK_SECONDS = 600.0
#: We come later than asked by up to this share of it and this long, never sooner: the server has
#: given each agent a time of its own.
PUSHBACK_SPREAD = 0.1
PUSHBACK_SPREAD_SECONDS = 1.0


class NetMode(Enum):
    """How a server's address was found; as in Hello.net_mode."""

    DISCOVERED = "sd"
    PRIVATE = "private"
    PUBLIC = "public"


@dataclass(frozen=True)
class Route:
    """One way to a server."""

    address: str
    mode: NetMode


def plan(
    discovered: Sequence[str],
    *,
    private: str = "",
    public: str = "",
    avoid: str = "",
    prefer: str = "",
) -> list[Route]:
    """The routes of one round, in order, none twice.

    Args:
        discovered: Addresses from DNS, shuffled already.
        private: The region's private address, or empty.
        public: The region's public address, or empty.
        avoid: An address that asked us to go: tried after the others of its kind.
        prefer: An address that asked us to come later: tried first of all, where it is still one.
    """
    ordered = [a for a in discovered if a != avoid] + [a for a in discovered if a == avoid]
    routes = [Route(address, NetMode.DISCOVERED) for address in ordered[:MAX_DISCOVERED]]
    if private:
        routes.append(Route(private, NetMode.PRIVATE))
    if public:
        routes.append(Route(public, NetMode.PUBLIC))
    routes.sort(key=lambda route: route.address != prefer)  # keeps the order of the others
    seen: set[str] = set()
    return [r for r in routes if not (r.address in seen or seen.add(r.address))]  # type: ignore[func-returns-value] # set.add as the "remember it" half of the test


def pushback(metadata: Iterable[tuple[str, str | bytes]], rng: random.Random) -> float | None:
    """Seconds after which a refused call is to come again; None: the server did not say.

    Args:
        metadata: The trailing metadata of the call.
        rng: Where the spread comes from.
    """
    for key, value in metadata:
        text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
        if key != PUSHBACK_KEY or not (text.isascii() and text.isdecimal() and len(text) <= 18):
            continue
        seconds = min(max(int(text) / 1000, LEAST_PUSHBACK_SECONDS), MOST_PUSHBACK_SECONDS)
        return seconds + rng.uniform(0, min(seconds * PUSHBACK_SPREAD, PUSHBACK_SPREAD_SECONDS))
    return None
