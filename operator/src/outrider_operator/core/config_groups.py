"""Which AgentConfigs are for which nodes: nodes that the same ones are for, together.

There are hundreds of AgentConfigs and thousands of nodes, and far fewer different sets: what is
merged once for each set need not be merged for each node. Sets of nodes are bits of an integer, so
that a selector takes a few operations, whatever the number of nodes.
"""

from collections.abc import Iterator, Mapping, Sequence

from outrider_operator.core.model import LabelSelector, Requirement


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
    names = sorted(nodes)
    keys = {key for selector in selectors.values() for key in _keys(selector)}
    index = _Index([nodes[name] for name in names], keys)
    groups: list[tuple[tuple[str, ...], int]] = [((), index.everybody)] if names else []
    for config in sorted(selectors):
        chosen = index.select(selectors[config])
        parts = []
        for configs, members in groups:
            parts.append(((*configs, config), members & chosen))
            parts.append((configs, members & ~chosen))
        groups = [part for part in parts if part[1]]
    return {configs: [names[bit] for bit in _bits(members)] for configs, members in groups}


def _keys(selector: LabelSelector) -> list[str]:
    return [*selector.match_labels, *(r.key for r in selector.match_expressions)]


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
