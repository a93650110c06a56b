"""What an Agent object says of its agent's configuration. Reads fields leniently."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from outrider_cli.core.render import ready
from outrider_cli.core.text import age, time_of

#: Digits of a hash that are shown to people.
SHOWN: Final = 10

Part = tuple[str, str]
"""An AgentConfig and one of its revisions, by name."""


@dataclass(frozen=True)
class Report:
    """What an Agent object says of the configuration.

    Attributes:
        known: the operator has written of it at all.
        hash: of what is in force; "": nothing.
        phase: Applying, Applied, Failed or "".
        message: why it failed.
        parts: the revisions that what it is to run is made of.
        plugins: as the agent reported them.
        drift: what differs from what is in force, sentences.
        away: why it is not connected, a sentence; "": it is.
    """

    known: bool = False
    hash: str = ""
    phase: str = ""
    message: str = ""
    parts: tuple[Part, ...] = ()
    plugins: Sequence[Mapping[str, Any]] = ()
    drift: Sequence[str] = ()
    away: str = ""


def report_of(agent: Mapping[str, Any], now: float) -> Report:
    """Read an Agent as the API server gives it. `now`: seconds since the Unix epoch."""
    found = (agent.get("status") or {}).get("config")
    condition = ready(agent)
    away = ""
    if condition["status"] != "True":
        since = time_of(str(condition.get("lastTransitionTime", "")))
        span = "" if since is None else f" since {age(now - since)}"
        away = f"its agent is not connected{span}: {condition.get('message') or 'reason unknown'}"
    if not found:
        return Report(away=away)
    phase = str(found.get("phase", ""))
    return Report(
        known=True,
        hash=str(found.get("hash", "")),
        phase="" if phase == "None" else phase,
        message=str(found.get("message", "")),
        parts=tuple((str(p["name"]), str(p["revision"])) for p in found.get("revisions") or []),
        plugins=found.get("plugins") or [],
        drift=found.get("drift") or [],
        away=away,
    )


def short(digest: str) -> str:
    """A hash as people see it."""
    return digest[:SHOWN]
