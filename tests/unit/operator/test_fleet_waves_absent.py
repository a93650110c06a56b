"""Waves of a rollout when some of its nodes are not connected."""

from __future__ import annotations

import pytest
from fakes.cluster import MemoryCluster
from outrider_operator.core.registry import Registry, Session
from outrider_operator.fleet.tasks import TaskRunner, World
from outrider_operator.settings import TaskSettings
from outrider_proto.v1.agent_pb2 import Command, RunId, RunPhase, RunState

NODES = ("a", "b", "c", "d")
NOW = 1_000_000.0


@pytest.mark.parametrize("absent", NODES)
async def test_absent_node_holds_up_no_other_whatever_its_turn(absent: str) -> None:
    cluster = MemoryCluster()
    rollout = {"maxConcurrent": "100%", "waves": [1, 2, "100%"]}
    cluster.add_task("t", {"run": {"builtin": "Ping"}, "rollout": rollout})
    registry, sent = Registry(NOW), list[tuple[str, Command]]()
    present = [node for node in NODES if node != absent]
    for number, node in enumerate(NODES, 1):
        registry.joined(Session(node, node, number, "gateway", "server", NOW))
    registry.left(absent, NODES.index(absent) + 1, "Closed", NOW)
    world = World(
        cluster=cluster,
        registry=registry,
        nodes={node: {} for node in NODES},
        send=sent.extend,
        now=lambda: NOW,
        settings=TaskSettings(),
        ended=lambda _: None,
    )
    runner = TaskRunner(cluster.task("t"), world)
    for begun in (1, 2, 3):
        await runner.advance()
        runs = [node for node, command in sent if command.runs]
        assert len(runs) == begun, "one more after each wave, and never more"
        last = RunState(
            id=RunId(task_uid="uid-of-t", attempt=1), phase=RunPhase.RUN_PHASE_SUCCEEDED
        )
        runner.report(runs[-1], [last], complete=False)
    await runner.advance()
    assert sorted(runs) == present
    rows = cluster.rows()
    assert {rows[node]["phase"] for node in present} == {"Succeeded"}
    assert (rows[absent]["phase"], bool(rows[absent]["reason"])) == ("Pending", True)
