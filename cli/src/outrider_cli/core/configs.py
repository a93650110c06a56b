"""AgentConfigs and their revisions, as the commands look at them.

Reads fields leniently: a newer server may write more of them. Merges nothing (config_effective),
and writes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

KIND: Final = "agentconfig.outrider.dev"
#: Any new value of it has the same revision tried again.
RETRY: Final = "outrider.dev/retry"

SETTLED: Final = "Settled"
PAUSED: Final = "Paused"
ROLLING_BACK: Final = "RollingBack"
ROLLED_BACK: Final = "RolledBack"
#: While one of these holds, some nodes run the revision in trial.
IN_TRIAL: Final = frozenset({"Canary", "Soaking", "Rolling", PAUSED})
#: What became of a revision that all nodes took.
APPLIED: Final = "Applied"

Spec = Mapping[str, Any]


@dataclass(frozen=True)
class Config:
    """An AgentConfig.

    Attributes:
        uid: of the object.
        seen: a server has looked at the newest spec.
        target: revision that the spec asks for; of an older spec while not `seen`.
        settled: revision that all nodes are to run but for those in trial; "": none yet.
        trial: revision that is, or last was, on its way; "": none.
        phase: of the rollout; "": no server has begun.
        reason: CamelCase word for why the rollout stands as it does.
        message: the same as a sentence.
        counts: numbers of nodes.
        ready: the condition Ready, empty where there is none.
        history: entries of status.history, the newest first.
        spec: what is asked for.
    """

    name: str
    uid: str = ""
    seen: bool = False
    target: str = ""
    settled: str = ""
    trial: str = ""
    phase: str = ""
    reason: str = ""
    message: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    ready: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    spec: Spec = field(default_factory=dict)


def config_of(body: Mapping[str, Any]) -> Config:
    """Read an AgentConfig as the API server gives it."""
    metadata, status = body.get("metadata") or {}, body.get("status") or {}
    rollout = status.get("rollout") or {}
    conditions = status.get("conditions") or []
    return Config(
        name=str(metadata.get("name", "")),
        uid=str(metadata.get("uid", "")),
        seen=int(status.get("observedGeneration", 0)) >= int(metadata.get("generation", 1)),
        target=str(status.get("revision", "")),
        settled=str(status.get("settledRevision", "")),
        trial=str(rollout.get("revision", "")),
        phase=str(rollout.get("phase", "")),
        reason=str(rollout.get("reason", "")),
        message=str(rollout.get("message", "")),
        counts=status.get("counts") or {},
        ready=next((c for c in conditions if c.get("type") == "Ready"), {}),
        history=status.get("history") or [],
        spec=body.get("spec") or {},
    )


@dataclass(frozen=True)
class Revision:
    """One revision of an AgentConfig.

    Attributes:
        name: the beginning of its hash.
        time: when it came, RFC 3339, or "".
        result: what became of it, or "".
        generation: the metadata.generation it came from; 0: not known.
        spec: what it asks for; None: its object is not kept any more.
    """

    name: str
    time: str = ""
    result: str = ""
    generation: int = 0
    spec: Spec | None = None


def revisions_of(config: Config, objects: Iterable[Mapping[str, Any]]) -> list[Revision]:
    """All that is known of its revisions, the oldest first.

    Args:
        config: the AgentConfig.
        objects: ControllerRevisions; those of an earlier AgentConfig of the name are left out.
    """
    kept = {}
    for body in sorted(objects, key=lambda o: int(o.get("revision", 0))):
        if belongs(body, config):
            kept[revision_name(body, config.name)] = body
    newest: dict[str, Mapping[str, Any]] = {}
    for entry in config.history:
        newest.setdefault(str(entry.get("revision", "")), entry)
    names = [*(name for name in kept if name not in newest), *reversed(newest)]
    return [_revision(name, newest.get(name, {}), kept.get(name)) for name in names]


def belongs(body: Mapping[str, Any], config: Config) -> bool:
    """Whether a ControllerRevision is one of this AgentConfig."""
    owners = (body.get("metadata") or {}).get("ownerReferences") or []
    return any(o.get("kind") == "AgentConfig" and o.get("uid") == config.uid for o in owners)


def revision_name(body: Mapping[str, Any], config: str) -> str:
    """The revision that a ControllerRevision keeps."""
    return str(body["metadata"]["name"]).removeprefix(f"{config}-")


def _revision(name: str, entry: Mapping[str, Any], body: Mapping[str, Any] | None) -> Revision:
    made = "" if body is None else str(body["metadata"].get("creationTimestamp") or "")
    return Revision(
        name=name,
        time=str(entry.get("time") or made),
        result=str(entry.get("result", "")),
        generation=int(entry.get("generation", 0)),
        spec=None if body is None else (body.get("data") or {}),
    )


def state(revision: Revision, config: Config) -> str:
    """How a revision counts now, such as "settled" or "in trial (Soaking)"; "" if it does not."""
    parts = []
    if revision.name == config.settled:
        parts.append("settled")
    if revision.name == config.trial and config.phase in IN_TRIAL:
        parts.append(f"in trial ({config.phase})")
    if config.seen and revision.name == config.target and not parts:
        parts.append("asked for")
    return ", ".join(parts)


def pick(revisions: Sequence[Revision], asked: str) -> Revision:
    """The revision of this name, of which the first digits are enough.

    Raises:
        ValueError: There is none, or several begin so.
    """
    found = [revision for revision in revisions if revision.name.startswith(asked)]
    exact = [revision for revision in found if revision.name == asked]
    if len(exact or found) == 1:
        return (exact or found)[0]
    names = ", ".join(revision.name for revision in (found or revisions)) or "none"
    if not found:
        raise ValueError(f"there is no revision {asked!r}; there are: {names}")
    raise ValueError(f"several revisions begin with {asked!r}: {names}")


def asked_for(spec: Spec) -> dict[str, Any]:
    """What makes a revision: the spec without how a change of it is rolled out."""
    return {key: value for key, value in spec.items() if key != "rollout"}


def current(config: Config, revisions: Sequence[Revision]) -> Revision | None:
    """The revision that the spec asks for, also before a server has looked at it."""
    if config.seen:
        return next((r for r in revisions if r.name == config.target), None)
    wanted = asked_for(config.spec)
    return next((r for r in reversed(revisions) if r.spec == wanted), None)


def earlier(config: Config, revisions: Sequence[Revision]) -> Revision | None:
    """Where a rollback goes by itself: to the last revision that settled and is not asked for now.

    That is the settled one while, or after, another is tried; else the one that settled before it.
    """
    now = current(config, revisions)
    known = [r for r in revisions if r.spec is not None and r != now]
    for revision in known:
        if revision.name == config.settled:
            return revision
    place = revisions.index(now) if now in revisions else len(revisions)
    before = [r for r in revisions[:place] if r in known and r.result == APPLIED]
    return before[-1] if before else None
