"""Agent objects are written on change only, and put right when somebody else writes them."""

import asyncio
import copy
from collections.abc import Callable
from dataclasses import replace

from fakes.cluster import MemoryCluster
from outrider_operator.core.registry import Registry, Session
from outrider_operator.fleet.agents import AgentKeeper
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import AgentSettings
from outrider_runtime.metrics import new_registry

NOW = 1_000_000.0
SESSION = Session("a", "uid", 10**18, "g", "server", NOW, version="1", address="10.0.0.1:5")


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def test_an_agent_is_written_on_change_and_put_right_when_others_write() -> None:
    cluster, registry = MemoryCluster(), Registry(NOW)
    metrics = ServerMetrics(new_registry())
    keeper = AgentKeeper(cluster, registry, {"a": {}}, AgentSettings(), metrics, lambda: NOW)
    registry.joined(SESSION)
    working = asyncio.create_task(keeper.run())

    def writes() -> int:
        return cluster.requests.count("write_agent_status")

    try:
        keeper.changed("a")
        await _until(lambda: writes() == 1)
        right = copy.deepcopy(cluster.agents["a"])
        assert right["status"]["version"] == "1"

        # What was written comes back by the watch, in another order: nothing to do.
        same = {**right, "status": dict(reversed(right["status"].items()))}
        keeper.seen(same, gone=False)
        assert len(keeper._queue) == 0
        keeper.changed("a")
        await _until(lambda: len(keeper._queue) == 0 and not keeper._queue._busy)
        assert writes() == 1

        # Somebody else writes; and what is older than that is of no interest.
        wrong = copy.deepcopy(right)
        wrong["status"]["version"] = "2"
        wrong["metadata"]["resourceVersion"] = "1000"
        keeper.seen(wrong, gone=False)
        keeper.seen(right, gone=False)
        await _until(lambda: writes() == 2)
        assert cluster.agents["a"]["status"] == right["status"]

        registry.joined(replace(SESSION, session=SESSION.session + 1, version="3"))
        keeper.changed("a")
        await _until(lambda: writes() == 3)
        assert cluster.agents["a"]["status"]["version"] == "3"
    finally:
        working.cancel()
        await asyncio.wait([working])
