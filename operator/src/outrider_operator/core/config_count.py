"""How many nodes of each AgentConfig have what it asks for: the numbers in its status.

Pure, as config_plan is, on whose picture it counts.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from outrider_operator.core.config_plan import (
    Config,
    NodeState,
    Picture,
    base,
    ill,
    plugin_names,
    stand,
)
from outrider_operator.core.config_rollout import NodeView, Rollout, Standing


@dataclass
class Counts:
    """Numbers of nodes of one AgentConfig, as its status gives them.

    Those in `absent`, whose agents are not connected, are pending as well.
    """

    targeted: int = 0
    updated: int = 0
    applied: int = 0
    failed: int = 0
    pending: int = 0
    absent: int = 0


def count(config: Config, found: Iterable[NodeView], before: Rollout | None = None) -> Counts:
    """The numbers of an AgentConfig with a change on its way.

    Args:
        config: with the state as it is to be written.
        found: its nodes, as they stand to what they are to have by the state before.
        before: that state; None: it is the same. Who is to have something else now has not got it.
    """
    counts, after = Counts(), config.rollout
    settled = after.settled == config.target
    standings: Counter[tuple[bool, Standing]] = Counter()
    for view in found:
        standing = view.standing
        if (
            before is not None
            and standing is Standing.WELL
            and _held(before, view) != _held(after, view)
        ):
            standing = Standing.APPLYING
        standings[after.in_trial(view) or settled, standing] += 1
    for (newest, standing), number in standings.items():
        _add(counts, newest, standing, number)
    return counts


def count_settled(
    configs: Iterable[Config], nodes: Mapping[str, NodeState], now: Picture
) -> dict[str, Counts]:
    """The numbers of AgentConfigs without a change on its way, by name.

    There may be hundreds, and all for all nodes: each node is looked at once, not once for each.
    """
    wanted = {config.name: config for config in configs}
    plugins = {name: plugin_names(config) for name, config in wanted.items()}
    found = {name: Counts() for name in wanted}
    for concerned, members in now.groups:
        own = [name for name in concerned if name in wanted]
        standings: Counter[Standing] = Counter()
        sick: list[str] = []
        for member in members:
            node = nodes[member]
            standing = base(member, node, now)[0]
            if standing is Standing.WELL and ill(node):
                sick.append(member)
            else:
                standings[standing] += 1
        for name in own:
            newest = wanted[name].rollout.settled == wanted[name].target
            for standing, number in standings.items():
                _add(found[name], newest, standing, number)
            for member in sick:
                standing = stand(nodes[member], now.desired[member], plugins[name], 0.0)[0]
                _add(found[name], newest, standing, 1)
    return found


def _held(state: Rollout, view: NodeView) -> str:
    """The revision a node is to have."""
    return state.trial if state.in_trial(view) else state.settled


def _add(counts: Counts, newest: bool, standing: Standing, number: int) -> None:
    counts.targeted += number
    counts.updated += number if newest else 0
    if newest and standing is Standing.WELL:
        counts.applied += number
    elif newest and standing is Standing.FAILED:
        counts.failed += number
    else:
        counts.pending += number
        counts.absent += number if standing in (Standing.ABSENT, Standing.LEFT) else 0
