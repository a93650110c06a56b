"""Which nodes a task is for, and in which order they get their turn.

Decided once, when the task starts, and fixed in its reports then. Reads no cluster: the nodes and
agents there are come in as arguments.
"""

import hashlib
from collections.abc import Collection, Mapping

import msgspec

from outrider_operator.core.model import LabelSelector, NodeRun, Requirement, Target, resolve

#: Reasons of rows that cannot begin yet.
NODE_NOT_FOUND = "NodeNotFound"
NOT_CONNECTED = "AgentNotConnected"


def matches(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether labels meet all of a selector's conditions."""
    return all(labels.get(k) == v for k, v in selector.match_labels.items()) and all(
        _meets(requirement, labels) for requirement in selector.match_expressions
    )


def _meets(requirement: Requirement, labels: Mapping[str, str]) -> bool:
    value = labels.get(requirement.key)
    match requirement.operator:
        case "In":
            return value is not None and value in requirement.values
        case "NotIn":
            # As everywhere in Kubernetes, a node without the label meets NotIn.
            return value is None or value not in requirement.values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case other:
            raise ValueError(f"unknown operator {other!r} in nodeSelector.matchExpressions")


def rank(uid: str, node: str) -> bytes:
    """Where a node stands in the random but fixed order of one task."""
    return hashlib.sha256(f"{uid}/{node}".encode()).digest()


def targets(
    target: Target, uid: str, nodes: Mapping[str, Mapping[str, str]], agents: Collection[str]
) -> list[str]:
    """Names of the nodes a task is for, in the order of their turns.

    The order is random and the same for the whole life of the task: a canary ought not to be the
    same node each time, and a sample not the first of the alphabet.

    Args:
        target: spec.target.
        uid: UID of the task, the seed of the order.
        nodes: Labels of every Node, by name.
        agents: Names of the nodes that have, or had, an agent.
    """
    if target.node_names:
        # A name without a Node stays: it is reported, never passed over.
        chosen = {
            name
            for name in target.node_names
            if name not in nodes or matches(target.node_selector, nodes[name])
        }
    elif target.node_selector.empty:
        chosen = set(agents)
    else:
        chosen = {name for name, labels in nodes.items() if matches(target.node_selector, labels)}
    ordered = sorted(chosen, key=lambda name: rank(uid, name))
    if target.sample is not None:
        ordered = ordered[: max(1, resolve(target.sample, len(ordered), up=True))]
    return ordered


def late(
    target: Target,
    uid: str,
    nodes: Mapping[str, Mapping[str, str]],
    agents: Collection[str],
    known: Collection[str],
) -> list[str]:
    """Names of nodes that a task was not for when it began and is now, in the order of turns.

    A sample stays of its size: of the nodes that are there now and those it has already, the
    first in the task's random order, and no more.

    Args:
        target: spec.target.
        uid: UID of the task, the seed of the order.
        nodes: Labels of every Node, by name.
        agents: Names of the nodes that have, or had, an agent.
        known: names of the nodes that the task has rows for.
    """
    fits = targets(msgspec.structs.replace(target, sample=None), uid, nodes, agents)
    new = [name for name in fits if name not in known]
    if not new or target.sample is None:
        return new
    everybody = sorted({*fits, *known}, key=lambda name: rank(uid, name))
    size = max(1, resolve(target.sample, len(everybody), up=True))
    chosen = set(everybody[:size])
    return [name for name in new if name in chosen][: max(0, size - len(known))]


def first_rows(
    names: list[str], nodes: Collection[str], connected: Collection[str]
) -> dict[str, NodeRun]:
    """The rows of a task that begins; those that cannot begin at once say why."""
    return {name: _first_row(name, nodes, connected) for name in names}


def _first_row(name: str, nodes: Collection[str], connected: Collection[str]) -> NodeRun:
    if name in connected:
        return NodeRun(node=name)
    if name not in nodes:
        text = "there is no Node of this name"
        return NodeRun(node=name, reason=NODE_NOT_FOUND, message=text)
    return NodeRun(node=name, reason=NOT_CONNECTED, message="no agent of this node is connected")
