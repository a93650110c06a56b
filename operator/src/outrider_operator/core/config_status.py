"""What the objects say: the status of AgentConfigs, their Events, and Agents' status.config.

Pure: now is passed in, the status that stands comes in, the one to be written goes out. The part
`rollout` is also what the next leader goes on from, so it is read back here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from outrider_proto.merging import Conflict, Path
from outrider_proto.v1 import agent_pb2 as pb

from outrider_operator.core.config_count import Counts
from outrider_operator.core.config_plan import Config, Desired
from outrider_operator.core.config_rollout import Rollout, RolloutPhase
from outrider_operator.core.status import condition
from outrider_operator.core.times import micros, nanos_of, seconds

P = RolloutPhase

#: Changes that a status remembers.
HISTORY: Final = 10
#: Conflicts that a message names at most, and AgentConfigs at each.
NAMED_CONFLICTS: Final = 5
NAMED_CONFIGS: Final = 3
#: AgentConfigs and differences that an Agent's status names at most.
AGENT_REVISIONS: Final = 256
AGENT_DRIFTS: Final = 16

#: While one of these holds, a change is on its way.
UNDER_WAY: Final = frozenset({P.CANARY, P.SOAKING, P.ROLLING, P.ROLLING_BACK})

EventKind = Literal["Normal", "Warning"]


@dataclass(frozen=True)
class Told:
    """A Kubernetes Event: its type, a CamelCase word, a sentence."""

    kind: EventKind
    reason: str
    text: str


def rollout_of(status: Mapping[str, Any]) -> Rollout:
    """The state that stands in a status; that of a new AgentConfig where there is none.

    Raises:
        ValueError: Somebody wrote there what is none.
    """
    found = status.get("rollout") or {}
    return Rollout(
        phase=P(found.get("phase", P.SETTLED)),
        settled=found.get("settled", ""),
        trial=found.get("revision", ""),
        attempt=found.get("attempt", ""),
        through=found.get("through", ""),
        started=_at(found.get("started")),
        soaking_since=_at(found.get("soakingSince")),
        reason=found.get("reason", ""),
        message=found.get("message", ""),
    )


def rollout_status(rollout: Rollout) -> dict[str, Any]:
    """A state as it stands in a status."""
    made: dict[str, Any] = {
        "phase": rollout.phase.value,
        "settled": rollout.settled,
        "revision": rollout.trial,
        "attempt": rollout.attempt,
        "through": rollout.through,
        "reason": rollout.reason,
        "message": rollout.message,
    }
    if rollout.started:
        made["started"] = _time(rollout.started)
    if rollout.soaking_since:
        made["soakingSince"] = _time(rollout.soaking_since)
    return made


def _time(at: float) -> str:
    """As it is read back: rounded, for what is cut off would be a little earlier each time."""
    return micros(round(at * 1e6) * 1000)


def _at(text: str | None) -> float:
    """As it was written, exactly: by way of whole microseconds, which a float holds."""
    return nanos_of(text) // 1000 / 1e6 if text else 0.0


def status_of(
    config: Config,
    counts: Counts,
    clashes: Mapping[Path, Conflict],
    previous: Mapping[str, Any],
    generation: int,
    now: float,
    problem: str = "",
) -> dict[str, Any]:
    """The whole status of an AgentConfig; equal to `previous` when nothing has changed.

    Args:
        config: with the state as it is to be written.
        counts: its nodes.
        clashes: what others of its priority ask differently, by path.
        previous: the status as it stands.
        generation: of the spec that is looked at.
        now: seconds since the Unix epoch.
        problem: why its spec cannot be read, empty if it can.
    """
    rollout = config.rollout
    before = {item.get("type"): item for item in previous.get("conditions") or []}
    ready, progressing, clashing = (
        _ready(config, counts, problem),
        (rollout.phase in UNDER_WAY, rollout.reason or rollout.phase.value, rollout.message),
        _conflicting(config.name, clashes),
    )
    return {
        "observedGeneration": generation,
        "revision": config.target,
        "settledRevision": rollout.settled,
        "rollout": rollout_status(rollout),
        "counts": {
            "targeted": counts.targeted,
            "updated": counts.updated,
            "applied": counts.applied,
            "failed": counts.failed,
            "pending": counts.pending,
            "absent": counts.absent,
        },
        "history": history(previous, rollout, generation, now),
        "conditions": [
            condition(name, holds, reason, message, generation, before.get(name), now)
            for name, (holds, reason, message) in (
                ("Ready", ready),
                ("Progressing", progressing),
                ("Conflicting", clashing),
            )
        ],
    }


def _ready(config: Config, counts: Counts, problem: str) -> tuple[bool, str, str]:
    rollout = config.rollout
    if problem:
        return False, "Invalid", f"{problem}; revision {rollout.settled or 'none'} stays in force"
    if rollout.phase is not P.SETTLED or rollout.settled != config.target:
        return False, rollout.reason or "Progressing", rollout.message
    away = f"; {counts.absent} are not connected" if counts.absent else ""
    if counts.failed:
        text = f"{counts.failed} of {counts.targeted} nodes could not take it{away}"
        return False, "NodesFailed", text
    if counts.pending > counts.absent:
        text = f"{counts.pending - counts.absent} of {counts.targeted} nodes have not answered yet"
        return False, "Pending", text + away
    return True, "Applied", f"{counts.applied} of {counts.targeted} nodes run it{away}"


def _conflicting(name: str, clashes: Mapping[Path, Conflict]) -> tuple[bool, str, str]:
    if not clashes:
        return False, "NoConflict", ""
    told = [_clash(name, clash) for _, clash in sorted(clashes.items())[:NAMED_CONFLICTS]]
    more = len(clashes) - len(told)
    text = "; ".join(told) + (f"; and {more} more" if more else "")
    return True, "EqualPriority", text


def _clash(name: str, clash: Conflict) -> str:
    unheard = ", ".join(clash.unheard[:NAMED_CONFIGS])
    unheard += " and others" if len(clash.unheard) > NAMED_CONFIGS else ""
    heard = f"{clash.heard} (this one)" if clash.heard == name else clash.heard
    return f"{'.'.join(clash.path)}: {heard} is heard, not {unheard}"


_ENDS: Final = {
    P.PAUSED: "Failed",
    P.ROLLED_BACK: "RolledBack",
}


def history(
    previous: Mapping[str, Any], rollout: Rollout, generation: int, now: float
) -> list[dict[str, Any]]:
    """The latest changes with what became of them, the newest first."""
    found = [dict(entry) for entry in previous.get("history") or []]
    last = rollout_of(previous)
    tried = (rollout.trial, rollout.attempt, rollout.started)
    if rollout.trial and (last.trial, last.attempt, last.started) != _stored(tried):
        _end(found, "Superseded")
        entry = {"revision": rollout.trial, "generation": generation, "time": seconds(now)}
        found.insert(0, {**entry, "result": "Progressing"})
    if rollout.phase is P.SETTLED and last.trial:
        _end(found, "Applied" if rollout.settled == last.trial else "Superseded")
    elif rollout.phase is P.SETTLED and rollout.settled != last.settled:
        # Where there is no node it needs no time.
        entry = {"revision": rollout.settled, "generation": generation, "time": seconds(now)}
        found.insert(0, {**entry, "result": "Applied"})
    elif rollout.phase in _ENDS:
        _end(found, _ENDS[rollout.phase])
    return found[:HISTORY]


def _stored(tried: tuple[str, str, float]) -> tuple[str, str, float]:
    """As it comes back from a status, where times are microseconds."""
    revision, attempt, started = tried
    return revision, attempt, _at(_time(started)) if started else 0.0


def _end(found: list[dict[str, Any]], result: str) -> None:
    if found and found[0].get("result") == "Progressing":
        found[0]["result"] = result


def events(before: Rollout, after: Rollout) -> list[Told]:
    """What is worth an Event when one state follows another."""
    found: list[Told] = []
    new = after.trial and (after.trial, after.attempt, after.started) != (
        before.trial,
        before.attempt,
        before.started,
    )
    if new:
        was = f" in place of {before.settled}" if before.settled else ""
        found.append(Told("Normal", "RolloutStarted", f"revision {after.trial}{was} is tried"))
    if after.phase is P.ROLLING and before.phase in (P.CANARY, P.SOAKING) and not new:
        text = f"the first nodes are well with revision {after.trial}: the others follow"
        found.append(Told("Normal", "CanaryWell", text))
    if after.phase is P.SETTLED and (before.trial or after.settled != before.settled):
        same = before.trial in ("", after.settled)
        end = "" if same else f", {before.trial} is given up"
        rest = f": {after.message}" if after.message else ""
        kind: EventKind = "Warning" if after.message else "Normal"
        found.append(Told(kind, "Settled", f"revision {after.settled} is in force{end}{rest}"))
    if after.phase is not before.phase or new:
        text = f"revision {after.trial}: {after.message}"
        if after.phase is P.ROLLING_BACK:
            back = f"; back to {after.settled or 'none'}"
            found.append(Told("Warning", "RollingBack", text + back))
        elif after.phase is P.ROLLED_BACK:
            found.append(Told("Warning", "RolledBack", text))
        elif after.phase is P.PAUSED:
            found.append(Told("Warning", "Paused", text))
    return found


_AGENT_PHASES: Final = {
    pb.CONFIG_PHASE_UNSPECIFIED: "None",
    pb.CONFIG_PHASE_NONE: "None",
    pb.CONFIG_PHASE_APPLYING: "Applying",
    pb.CONFIG_PHASE_APPLIED: "Applied",
    pb.CONFIG_PHASE_FAILED: "Failed",
}


def agent_config(told: pb.ConfigReport, wanted: Desired) -> dict[str, Any]:
    """status.config of an Agent: what it reported, and what the one it is to have is made of."""
    phase = _AGENT_PHASES.get(told.phase, "None")
    if phase == "Applied" and told.hash != wanted.packed.hash:
        phase = "Applying"
    return {
        "hash": told.hash,
        "phase": phase,
        "message": wanted.problem[:1024] or told.message,
        "revisions": [{"name": n, "revision": r} for n, r in wanted.parts[:AGENT_REVISIONS]],
        "plugins": [
            {
                "name": plugin.name,
                "version": plugin.version,
                "phase": _plugin_phase(plugin.phase),
                "healthy": plugin.healthy,
                "restarts": plugin.restarts,
                "message": plugin.message or plugin.reason,
            }
            for plugin in told.plugins
        ],
        "drift": list(told.drift[:AGENT_DRIFTS]),
    }


def _plugin_phase(phase: int) -> str:
    """PLUGIN_PHASE_BACKING_OFF as BackingOff."""
    try:
        name = pb.PluginPhase.Name(phase)  # type: ignore[arg-type] # any number may come
    except ValueError:
        return "Unknown"
    return "".join(word.capitalize() for word in name.removeprefix("PLUGIN_PHASE_").split("_"))


def essence(status: Mapping[str, Any]) -> dict[str, Any]:
    """What of a status is worth writing soon: all but numbers, and the sentences with them."""
    kept = {key: value for key, value in status.items() if key != "counts"}
    kept["conditions"] = [
        {key: value for key, value in item.items() if key != "message"}
        for item in status.get("conditions") or []
    ]
    return kept


def noted(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Told]:
    """What is worth an Event when one status follows another, besides the change itself."""
    found = []
    for name, state, reason, word in (
        ("Ready", "False", "Invalid", "Invalid"),
        ("Conflicting", "True", "EqualPriority", "Conflict"),
    ):
        was, now = (_condition(status, name) for status in (before, after))
        if (now.get("status"), now.get("reason")) != (state, reason):
            continue
        if (was.get("reason"), was.get("message")) != (reason, now.get("message")):
            found.append(Told("Warning", word, now.get("message", "")))
    return found


def _condition(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    for item in status.get("conditions") or []:
        if item.get("type") == name and isinstance(item, Mapping):
            return item
    return {}


def not_kept(
    standing: Mapping[str, Any], wanted: Mapping[str, Any], problem: str, now: float
) -> dict[str, Any]:
    """The status of an AgentConfig whose new revision could not be kept, and so is not tried."""
    before = {item.get("type"): item for item in standing.get("conditions") or []}
    generation = wanted["observedGeneration"]
    text = f"revision {wanted['revision']} is not tried, it could not be kept: {problem}"
    others = [item for item in wanted["conditions"] if item["type"] == "Conflicting"]
    made = [
        condition(name, False, "RevisionNotKept", text, generation, before.get(name), now)
        for name in ("Ready", "Progressing")
    ]
    kept = {key: standing[key] for key in ("rollout", "history") if key in standing}
    rest = {k: v for k, v in wanted.items() if k not in ("rollout", "history")}
    return {**rest, **kept, "conditions": [*made, *others]}
