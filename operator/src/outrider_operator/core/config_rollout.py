"""How a change of one AgentConfig reaches its nodes: canary, soak, the rest, and back if it is bad.

A pure step from one state to the next; the state is small and stands in the object's status, so
that another leader goes on from it. Nodes have a fixed random place in the order of one
AgentConfig, and the state says up to which place the revision in trial was given out: no list of
nodes is kept.
Knows neither what a revision holds nor how it gets to an agent.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import msgspec

from outrider_operator.core.model import Amount, resolve
from outrider_operator.core.targeting import rank

#: Nodes that a message names at most.
NAMED_NODES: Final = 3


class RolloutPhase(StrEnum):
    """Where a change stands."""

    SETTLED = "Settled"
    CANARY = "Canary"
    SOAKING = "Soaking"
    ROLLING = "Rolling"
    PAUSED = "Paused"
    ROLLING_BACK = "RollingBack"
    ROLLED_BACK = "RolledBack"


P = RolloutPhase

#: What may follow what; a change of the spec may begin anew from everywhere, or settle.
TRANSITIONS: Final = {
    P.SETTLED: {P.SETTLED},
    P.CANARY: {P.CANARY, P.SOAKING, P.ROLLING, P.SETTLED, P.PAUSED, P.ROLLING_BACK},
    P.SOAKING: {P.SOAKING, P.CANARY, P.ROLLING, P.SETTLED, P.PAUSED, P.ROLLING_BACK},
    P.ROLLING: {P.ROLLING, P.SETTLED, P.PAUSED, P.ROLLING_BACK},
    P.PAUSED: {P.PAUSED},
    P.ROLLING_BACK: {P.ROLLING_BACK, P.ROLLED_BACK},
    P.ROLLED_BACK: {P.ROLLED_BACK},
}

#: While one of these holds, nodes up to the place reached are to run the revision in trial.
IN_TRIAL: Final = frozenset({P.CANARY, P.SOAKING, P.ROLLING, P.PAUSED})


class Standing(StrEnum):
    """How a node stands to what it is to run now."""

    #: No agent is connected, and none was since the change began: it gets its turn unseen.
    ABSENT = "Absent"
    #: It was told, or will be, and has not answered.
    APPLYING = "Applying"
    #: It runs it, and all its plug-ins are well.
    WELL = "Well"
    #: It runs it, and a plug-in is not well (yet).
    UNHEALTHY = "Unhealthy"
    #: It refused it, or a plug-in failed for good.
    FAILED = "Failed"
    #: Its agent was there after the change began, and is gone.
    LEFT = "Left"


class NodeView(msgspec.Struct, frozen=True, gc=False):
    """A node that the AgentConfig is for, by the old revision or the new one.

    Attributes:
        place: in the order of this AgentConfig, from `place_of`.
        created: when its Node was made, seconds since the Unix epoch.
        standing: to what it is to run now.
        since: since when it stands so, seconds since the Unix epoch.
        reason: why it failed, for people.
    """

    name: str
    place: str
    created: float
    standing: Standing
    since: float
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """How a change is to be made: spec.rollout, and how long a node may take.

    Attributes:
        progress_seconds: A node that is not well for so long has failed.
    """

    max_unavailable: Amount = "10%"
    canary_nodes: Amount = 1
    soak_seconds: float = 60
    rollback: bool = True
    progress_seconds: float = 120


@dataclass(frozen=True)
class Rollout:
    """The state of one AgentConfig's change.

    Attributes:
        settled: revision that all nodes are to run but for those in trial; empty: none yet.
        trial: revision that is, or was, on its way; empty: none.
        attempt: tells a second try of the same revision from the first.
        through: place up to which the trial was given out; empty: nobody has it.
        started: when the trial began, epoch seconds: nodes made later get the settled one.
        soaking_since: since when all canaries are well, or the way back is under way; 0: neither.
        reason: CamelCase word for why it stands as it does.
        message: the same as a sentence.
    """

    phase: RolloutPhase = P.SETTLED
    settled: str = ""
    trial: str = ""
    attempt: str = ""
    through: str = ""
    started: float = 0.0
    soaking_since: float = 0.0
    reason: str = ""
    message: str = ""

    def in_trial(self, node: NodeView) -> bool:
        """Whether a node is to run the revision in trial."""
        return self.phase in IN_TRIAL and self._reached(node)

    def touched(self, node: NodeView) -> bool:
        """Whether a node was given the revision in trial, be it that it had to give it back."""
        return self.phase is not P.SETTLED and self._reached(node)

    def _reached(self, node: NodeView) -> bool:
        return bool(self.through) and node.place <= self.through and self.takes_part(node)

    def takes_part(self, node: NodeView) -> bool:
        """Whether a node was there when the change began."""
        return node.created <= self.started


def place_of(uid: str, node: str) -> str:
    """A node's place in the order of the AgentConfig with this UID: 16 hex digits."""
    return rank(uid, node)[:8].hex()


def step(
    before: Rollout,
    target: str,
    plan: Plan,
    nodes: Sequence[NodeView],
    now: float,
    attempt: str = "",
) -> Rollout:
    """The next state; the same one if nothing is to happen.

    Args:
        before: the state as it stands in the status.
        target: revision that the spec asks for now.
        plan: how the change is to be made.
        nodes: all nodes it is for, in any order.
        now: seconds since the Unix epoch.
        attempt: changes when a person wants the same revision tried again.
    """
    if target == before.settled:
        # Also when the spec went back to it in the middle of a trial.
        return Rollout(settled=target, attempt=attempt) if before.trial else before
    if (target, attempt) != (before.trial, before.attempt):
        before = Rollout(P.CANARY, before.settled, target, attempt, started=now)
    ordered = sorted((n for n in nodes if before.takes_part(n)), key=lambda n: n.place)
    match before.phase:
        case P.CANARY | P.SOAKING:
            return _canary(before, plan, ordered, now)
        case P.ROLLING:
            return _rolling(before, plan, ordered, now)
        case P.ROLLING_BACK:
            return _rolling_back(before, plan, ordered, now)
        case _:
            return before


def budget(plan: Plan, ordered: Collection[NodeView]) -> int:
    """Most nodes that may be unavailable at once."""
    return max(1, resolve(plan.max_unavailable, len(ordered), up=True))


def _canary(before: Rollout, plan: Plan, ordered: Sequence[NodeView], now: float) -> Rollout:
    """Give the trial to the canaries, and wait until they have been well for long enough."""
    wanted = resolve(plan.canary_nodes, len(ordered), up=True)
    present = [
        n
        for n in ordered
        if _there(n) or (before.in_trial(n) and n.standing is not Standing.ABSENT)
    ]
    if not wanted or not ordered:
        return _rolling(_rolls(before), plan, ordered, now)
    failed = [n for n in ordered if before.in_trial(n) and has_failed(n, before, plan, now)]
    if failed:
        return _give_up(before, plan, failed, now)
    if not present:
        return replace(before, reason="NoAgents", message="waits for an agent to try it on")
    chosen = [n for n in present if before.in_trial(n)]
    if len(chosen) < wanted:
        # At first, and when more have come than were there then.
        chosen = present[:wanted]
    through = max(before.through, chosen[-1].place)
    well = all(before.in_trial(n) and n.standing is Standing.WELL for n in chosen)
    if not well:
        text = f"tried on {len(chosen)} nodes first"
        return replace(
            before,
            phase=P.CANARY,
            through=through,
            soaking_since=0.0,
            reason="Canary",
            message=text,
        )
    since = before.soaking_since or now
    if now - since < plan.soak_seconds:
        text = f"{len(chosen)} nodes run it and are watched for {plan.soak_seconds:g} s"
        return replace(
            before,
            phase=P.SOAKING,
            through=through,
            soaking_since=since,
            reason="Soaking",
            message=text,
        )
    return _rolling(_rolls(replace(before, through=through)), plan, ordered, now)


def _rolls(before: Rollout) -> Rollout:
    return replace(before, phase=P.ROLLING, soaking_since=0.0, reason="Rolling", message="")


def _rolling(before: Rollout, plan: Plan, ordered: Sequence[NodeView], now: float) -> Rollout:
    """Give the trial to as many more as may be unavailable; settle once all present have it."""
    allowed = budget(plan, ordered)
    reached = [n for n in ordered if before.in_trial(n)]
    failed = [n for n in reached if has_failed(n, before, plan, now)]
    if len(failed) >= allowed:
        # Nobody else could get it any more: what is left is to go back, or to wait for a person.
        return _give_up(before, plan, failed, now)
    room = allowed - sum(n.standing not in (Standing.WELL, Standing.ABSENT) for n in reached)
    through = before.through
    for node in ordered[len(reached) :]:
        # One that left during the change is soon back: it takes a place, or a moment without
        # connections would give the change to all of them. One that is away for longer does not.
        if node.standing is not Standing.ABSENT:
            if room <= 0:
                break
            room -= 1
        through = node.place
    settled = through == before.through and all(
        n.standing in (Standing.WELL, Standing.ABSENT) or n in failed for n in ordered
    )
    if settled and len(reached) == len(ordered):
        return _settle(before, failed)
    given = sum(bool(through) and n.place <= through for n in ordered)
    text = f"given to {given} of {len(ordered)} nodes, at most {allowed} at once"
    return replace(before, through=through, reason="Rolling", message=text)


def _settle(before: Rollout, failed: Sequence[NodeView]) -> Rollout:
    reason, message = "Settled", ""
    if failed:
        reason = "NodesFailed"
        message = f"{len(failed)} nodes could not take it: {_names(failed)}"
    return Rollout(settled=before.trial, attempt=before.attempt, reason=reason, message=message)


def _give_up(before: Rollout, plan: Plan, failed: Sequence[NodeView], now: float) -> Rollout:
    what = "node" if len(failed) == 1 else "nodes"
    message = f"{len(failed)} {what} failed with it: {_names(failed)}"
    phase = P.ROLLING_BACK if plan.rollback else P.PAUSED
    reason = "RollingBack" if plan.rollback else "Paused"
    # From now on the clock of the way back runs; who takes part does not change by it.
    since = now if plan.rollback else 0.0
    return replace(before, phase=phase, soaking_since=since, reason=reason, message=message)


def _rolling_back(before: Rollout, plan: Plan, ordered: Sequence[NodeView], now: float) -> Rollout:
    """Wait until all that had the trial run the settled revision again."""
    out = [
        n
        for n in ordered
        if before.touched(n) and n.standing in (Standing.APPLYING, Standing.FAILED)
    ]
    if out and now - before.soaking_since < plan.progress_seconds:
        return before
    message = before.message
    if out:
        message += f"; {len(out)} are not back: {_names(out)}"
    return replace(before, phase=P.ROLLED_BACK, reason="RolledBack", message=message)


def _there(node: NodeView) -> bool:
    """Whether an agent is connected that could be given something."""
    return node.standing not in (Standing.ABSENT, Standing.LEFT)


def has_failed(node: NodeView, state: Rollout, plan: Plan, now: float) -> bool:
    """Whether a node with the trial counts as failed: it says so, or takes too long."""
    if node.standing is Standing.FAILED:
        return True
    if node.standing in (Standing.WELL, Standing.ABSENT):
        return False
    return now - max(node.since, state.started) >= plan.progress_seconds


def _names(nodes: Sequence[NodeView]) -> str:
    told = [f"{n.name} ({n.reason or n.standing})" for n in nodes[:NAMED_NODES]]
    return ", ".join(told) + (" and others" if len(nodes) > NAMED_NODES else "")
