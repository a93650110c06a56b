"""Names of machines, and the rules that cut them off from each other."""

from __future__ import annotations

import pytest
from cluster.layout import machine_address, machine_name
from cluster.network import partition_rules


@pytest.mark.parametrize(
    ("text", "name"), [("2", "node2"), ("node2", "node2"), ("cp", "cp"), ("node12", "node12")]
)
def test_machine_names(text: str, name: str) -> None:
    assert machine_name(text) == name


@pytest.mark.parametrize("text", ["", "node", "nodex", "cp1", "-1"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected cp, a node's number, or nodeN"):
        machine_name(text)


def test_addresses_differ() -> None:
    machines = ["cp", "node1", "node2", "node8"]
    assert len({machine_address(machine) for machine in machines}) == len(machines)


def test_partition_from_all_drops_both_directions_and_the_router() -> None:
    rules = partition_rules({"node1": []})
    assert rules.count('iifname "v-node1" drop;') == 1
    assert rules.count('oifname "v-node1" drop;') == 2


def test_partition_from_a_peer_leaves_the_others() -> None:
    rules = partition_rules({"node1": ["node2"]})
    assert 'iifname "v-node1" oifname "v-node2" drop;' in rules
    assert 'iifname "v-node2" oifname "v-node1" drop;' in rules
    assert rules.count("drop;") == 2


def test_no_partition_no_rule() -> None:
    assert "drop" not in partition_rules({})
