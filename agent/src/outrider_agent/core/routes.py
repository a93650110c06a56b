"""In which order the agent tries the addresses of its servers.

First those that DNS names, then the private address of its region, then the public one. Resolves
and connects to nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

#: Most addresses of DNS that are tried in one round.
MAX_DISCOVERED = 10


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
) -> list[Route]:
    """The routes of one round, in order, none twice.

    Args:
        discovered: Addresses from DNS, shuffled already.
        private: The region's private address, or empty.
        public: The region's public address, or empty.
        avoid: An address that asked us to go: tried after the others of its kind.
    """
    ordered = [a for a in discovered if a != avoid] + [a for a in discovered if a == avoid]
    routes = [Route(address, NetMode.DISCOVERED) for address in ordered[:MAX_DISCOVERED]]
    if private:
        routes.append(Route(private, NetMode.PRIVATE))
    if public:
        routes.append(Route(public, NetMode.PUBLIC))
    seen: set[str] = set()
    return [r for r in routes if not (r.address in seen or seen.add(r.address))]  # type: ignore[func-returns-value] # set.add as the "remember it" half of the test
