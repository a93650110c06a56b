"""Which AgentConfigs are for which nodes: nodes that the same ones are for, together.

There are hundreds of AgentConfigs and thousands of nodes, and far fewer different sets: what is
merged once for each set need not be merged for each node. Sets of nodes are bits of an integer, so
that a selector takes a few operations, whatever the number of nodes.
"""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Final

from outrider_operator.core.model import LabelSelector, Requirement

_FLAGS: Final = bytes.maketrans(b"01", b"\x00\x01")


class _Index:
    """The nodes by their labels, as far as any selector looks at them."""

    def __init__(self, labels: Sequence[Mapping[str, str]], keys: set[str]) -> None:
        self.everybody = (1 << len(labels)) - 1
        self._with_key: dict[str, int] = {}
        self._with_value: dict[tuple[str, str], int] = {}
        for number, own in enumerate(labels):
            bit = 1 << number
            for key in keys & own.keys():
                self._with_key[key] = self._with_key.get(key, 0) | bit
                pair = (key, own[key])
                self._with_value[pair] = self._with_value.get(pair, 0) | bit

    def select(self, selector: LabelSelector) -> int:
        """The nodes that meet all of a selector's conditions."""
        chosen = self.everybody
        for pair in selector.match_labels.items():
            chosen &= self._with_value.get(pair, 0)
        for requirement in selector.match_expressions:
            chosen &= self._meeting(requirement)
        return chosen

    def _meeting(self, requirement: Requirement) -> int:
        having = self._with_key.get(requirement.key, 0)
        listed = 0
        for value in requirement.values:
            listed |= self._with_value.get((requirement.key, value), 0)
        match requirement.operator:
            case "In":
                return listed
            case "NotIn":
                # As everywhere in Kubernetes, a node without the label meets NotIn.
                return self.everybody & ~listed
            case "Exists":
                return having
            case "DoesNotExist":
                return self.everybody & ~having
            case other:
                raise ValueError(f"unknown operator {other!r} in selector.matchExpressions")


def group(
    nodes: Mapping[str, Mapping[str, str]], selectors: Mapping[str, LabelSelector]
) -> dict[tuple[str, ...], list[str]]:
    """The nodes by the names of the AgentConfigs that are for them.

    Args:
        nodes: labels of every node, by name.
        selectors: of every AgentConfig, by name.

    Returns:
        Names of nodes, sorted, by names of AgentConfigs, sorted. Every node is in one group.
    """
    names, configs = sorted(nodes), sorted(selectors)
    if not (names and configs):
        return {(): names} if names else {}
    keys = {key for selector in selectors.values() for key in _keys(selector)}
    index = _Index([nodes[name] for name in names], keys)
    columns = [_flags(index.select(selectors[config]), len(names)) for config in configs]
    rows: dict[tuple[int, ...], list[str]] = {}
    for name, row in zip(names, zip(*columns, strict=True), strict=True):
        rows.setdefault(row, []).append(name)
    return {tuple(compress(configs, row)): members for row, members in rows.items()}


def _keys(selector: LabelSelector) -> list[str]:
    return [*selector.match_labels, *(r.key for r in selector.match_expressions)]


def _flags(chosen: int, count: int) -> bytes:
    """The lowest bits of a number as bytes 0 and 1, the lowest first."""
    return f"{chosen:0{count}b}"[::-1].encode().translate(_FLAGS)
