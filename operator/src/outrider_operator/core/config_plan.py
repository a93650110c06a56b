"""What every agent is to run, and how every AgentConfig stands to it.

Pure: AgentConfigs with their rollouts, nodes and what agents reported come in; what each agent is
to have, and how many of each AgentConfig's nodes have it, goes out. How a rollout moves on is
decided in config_rollout.
"""

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from outrider_proto.effective import EffectiveError, pack
from outrider_proto.merging import Asked, Conflict, Merged, Path, merge
from outrider_proto.v1.agent_pb2 import EffectiveConfig

from outrider_operator.core.config_groups import group
from outrider_operator.core.config_rollout import (
    IN_TRIAL,
    NodeView,
    Plan,
    Rollout,
    Standing,
    place_of,
)
from outrider_operator.core.model import LabelSelector

#: Merged configurations that are remembered: more than fleets have different sets of nodes.
CACHED: Final = 10_000

Part = tuple[str, str]
"""An AgentConfig and one of its revisions, by name."""


@dataclass(frozen=True)
class Revision:
    """What an AgentConfig asks, or asked, for, and of which nodes.

    Attributes:
        lost: why nobody knows what it asked for; its nodes are left as they are. Empty: it is.
    """

    name: str
    asked: Asked
    selector: LabelSelector
    lost: str = ""


@dataclass(frozen=True)
class Config:
    """An AgentConfig.

    Attributes:
        target: revision that its spec asks for.
        revisions: those that its rollout names, and the target, by name.
    """

    name: str
    uid: str
    plan: Plan
    target: str
    attempt: str
    rollout: Rollout
    revisions: Mapping[str, Revision]


@dataclass(frozen=True, slots=True)
class PluginView:
    """A plug-in as its agent reported it: whether it is well, and whether it failed for good."""

    healthy: bool
    failed: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """How an agent stands to its configuration, as it said last.

    Attributes:
        hash: of what is in force; empty: nothing.
        tried: of what it tried last.
        applied: what it tried is in force.
        refused: what it tried is not, and why is in `message`.
        at: since when it stands so, seconds since the Unix epoch.
    """

    hash: str = ""
    tried: str = ""
    applied: bool = False
    refused: bool = False
    message: str = ""
    plugins: Mapping[str, PluginView] = field(default_factory=dict)
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node with its agent.

    Attributes:
        created: when its Node was made, seconds since the Unix epoch.
        connected: since when its agent is connected, the same; None: it is not.
        left: since when it is gone, the same; None: not known, or it is there.
        told: since when it is to have what it is to have, as far as that is known, the same.
        report: what it said in its newest stream; None: nothing yet.
    """

    labels: Mapping[str, str]
    created: float = 0.0
    connected: float | None = None
    left: float | None = None
    told: float = 0.0
    report: Report | None = None


@dataclass(frozen=True)
class Desired:
    """What an agent is to have.

    Attributes:
        packed: the configuration; that of nobody asking anything where there is a problem.
        parts: the revisions it is made of, sorted.
        problem: why it could not be made, empty if it could.
    """

    packed: EffectiveConfig
    parts: tuple[Part, ...]
    merged: Merged
    problem: str = ""


class Merger:
    """Merges each set of revisions once, and sorts the nodes only when something has changed."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[Part, ...], Desired] = OrderedDict()
        self._labels: Mapping[str, Mapping[str, str]] = {}
        self._selectors: Mapping[str, LabelSelector] = {}
        self._groups: dict[tuple[str, ...], list[str]] = {}

    def groups(
        self, labels: Mapping[str, Mapping[str, str]], selectors: Mapping[str, LabelSelector]
    ) -> Mapping[tuple[str, ...], list[str]]:
        """As `config_groups.group`; what comes in must not be changed later."""
        if labels != self._labels or selectors != self._selectors:
            self._groups = group(labels, selectors)
            self._labels, self._selectors = labels, selectors
        return self._groups

    def desired(self, parts: tuple[Part, ...], configs: Mapping[str, Config]) -> Desired:
        """What comes of these revisions. `parts`: sorted."""
        made = self._made.get(parts)
        if made is None:
            revisions = [configs[c].revisions[r] for c, r in parts]
            made = _merge(parts, revisions)
            if any(revision.lost for revision in revisions):
                return made  # it may be found again
            self._made[parts] = made
            if len(self._made) > CACHED:
                self._made.popitem(last=False)
        else:
            self._made.move_to_end(parts)
        return made


def _merge(parts: tuple[Part, ...], revisions: Collection[Revision]) -> Desired:
    problem = next((revision.lost for revision in revisions if revision.lost), "")
    if not problem:
        merged = merge(revision.asked for revision in revisions)
        try:
            return Desired(pack(merged.effective), parts, merged)
        except EffectiveError as error:
            problem = str(error)
    nothing = merge(())
    return Desired(pack(nothing.effective), parts, nothing, problem)


@dataclass
class Picture:
    """Who is to have what, for one moment.

    Attributes:
        desired: by node.
        selected: the nodes that each AgentConfig is for, by the old revision or the new one.
        groups: nodes that the same AgentConfigs are for, together.
        stood: how each node stands to what it is to have, plug-ins and time apart.
    """

    desired: dict[str, Desired] = field(default_factory=dict)
    selected: dict[str, list[str]] = field(default_factory=dict)
    groups: list[tuple[frozenset[str], list[str]]] = field(default_factory=list)
    stood: dict[str, tuple[Standing, float, str]] = field(default_factory=dict)


def picture(
    configs: Mapping[str, Config], nodes: Mapping[str, NodeState], merger: Merger
) -> Picture:
    """What every agent is to have now.

    Args:
        configs: all AgentConfigs that can be read, by name.
        nodes: all nodes, by name.
        merger: kept from call to call.
    """
    made = Picture(selected={name: [] for name in configs})
    selectors = {
        _key(name, revision): config.revisions[revision].selector
        for name, config in configs.items()
        for revision in _revisions(config)
    }
    labels = {name: node.labels for name, node in nodes.items()}
    for keys, members in merger.groups(labels, selectors).items():
        parts = [_part(key) for key in keys]
        concerned = frozenset(config for config, _ in parts)
        made.groups.append((concerned, members))
        for name in concerned:
            made.selected[name] += members
        if all(configs[config].rollout.phase not in IN_TRIAL for config, _ in parts):
            own = tuple(p for p in parts if p[1] == configs[p[0]].rollout.settled)
            made.desired.update(dict.fromkeys(members, merger.desired(own, configs)))
            continue
        for member in members:
            created = nodes[member].created
            own = tuple(p for p in parts if p[1] == _holds(configs[p[0]], member, created))
            made.desired[member] = merger.desired(own, configs)
    return made


def _revisions(config: Config) -> list[str]:
    """The revisions that some node is, or soon will be, to run."""
    rollout = config.rollout
    trial = rollout.trial if rollout.phase in IN_TRIAL else ""
    return [name for name in dict.fromkeys((rollout.settled, trial, config.target)) if name]


def _holds(config: Config, node: str, created: float) -> str:
    """The revision that counts for a node."""
    if config.rollout.phase not in IN_TRIAL:
        return config.rollout.settled
    view = NodeView(node, place_of(config.uid, node), created, Standing.ABSENT, 0.0)
    return config.rollout.trial if config.rollout.in_trial(view) else config.rollout.settled


def _key(config: str, revision: str) -> str:
    return f"{config}/{revision}"


def _part(key: str) -> Part:
    config, _, revision = key.partition("/")
    return config, revision


def views(config: Config, nodes: Mapping[str, NodeState], now: Picture) -> Iterator[NodeView]:
    """The nodes of one AgentConfig as its rollout looks at them."""
    names = plugin_names(config)
    for name in now.selected[config.name]:
        node = nodes[name]
        standing, since, reason = base(name, node, now)
        if standing is Standing.ABSENT or (standing is Standing.WELL and ill(node)):
            found = stand(node, now.desired[name], names, config.rollout.started)
            standing, since, reason = found
        place = place_of(config.uid, name)
        yield NodeView(name, place, node.created, standing, since, reason)


def base(name: str, node: NodeState, now: Picture) -> tuple[Standing, float, str]:
    """How a node stands, plug-ins and time apart: the same for all AgentConfigs, so kept."""
    found = now.stood.get(name)
    if found is None:
        found = now.stood[name] = stand(node, now.desired[name], frozenset(), math.inf)
    return found


def ill(node: NodeState) -> bool:
    """Whether some plug-in is not well."""
    return node.report is not None and any(not p.healthy for p in node.report.plugins.values())


def stand(
    node: NodeState, wanted: Desired, plugins: frozenset[str], started: float
) -> tuple[Standing, float, str]:
    """How a node stands to what it is to have, since when (epoch seconds), and why it failed.

    Args:
        node: the node.
        wanted: what it is to have.
        plugins: the plug-ins that count.
        started: when the change began, seconds since the Unix epoch.
    """
    if node.connected is None:
        if node.left is not None and node.left > started:
            return Standing.LEFT, node.left, "its agent left"
        return Standing.ABSENT, node.left or 0.0, ""
    if wanted.problem:
        return Standing.FAILED, node.connected, wanted.problem
    report = node.report
    if report is None:
        return Standing.APPLYING, max(node.connected, node.told), ""
    if refused(node, wanted):
        return Standing.FAILED, report.at, report.message
    if not has(report, wanted):
        return Standing.APPLYING, max(report.at, node.connected, node.told), ""
    ill = [(n, p) for n, p in report.plugins.items() if n in plugins and not p.healthy]
    for name, plugin in ill:
        if plugin.failed:
            return Standing.FAILED, report.at, f"plug-in {name}: {plugin.reason}"
    if ill:
        name, plugin = ill[0]
        return Standing.UNHEALTHY, report.at, f"plug-in {name}: {plugin.reason or 'not well yet'}"
    return Standing.WELL, report.at, ""


def refused(node: NodeState, wanted: Desired) -> bool:
    """Whether an agent has refused what it is to have, and was not asked to try again since."""
    report = node.report
    return (
        report is not None
        and report.refused
        and report.tried == wanted.packed.hash
        and report.at >= node.told
    )


def has(report: Report, wanted: Desired) -> bool:
    """Whether an agent runs what it is to have; one that never had any need not be told nothing."""
    if not report.hash:
        return wanted.packed.content == b"{}"
    return report.hash == wanted.packed.hash and (report.applied or report.refused)


def plugin_names(config: Config) -> frozenset[str]:
    """The plug-ins that count for an AgentConfig."""
    return frozenset(
        path[1]
        for revision in _revisions(config)
        for path in config.revisions[revision].asked.values
        if path[0] == "plugins"
    )


def conflicts(now: Picture) -> dict[str, dict[Path, Conflict]]:
    """What AgentConfigs of one priority ask differently, by the name of each that takes part."""
    found: dict[str, dict[Path, Conflict]] = {}
    for wanted in {id(d): d for d in now.desired.values()}.values():
        for conflict in wanted.merged.conflicts:
            for name in (conflict.heard, *conflict.unheard):
                found.setdefault(name, {}).setdefault(conflict.path, conflict)
    return found
