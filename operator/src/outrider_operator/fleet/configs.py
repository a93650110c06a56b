"""Tells the owners of AgentConfigs that this version does not act on them, so nobody is misled.

Reads nothing of what they ask for.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from outrider_runtime.logs import get_logger

from outrider_operator.core.ports import Cluster, ClusterError, NotFoundError
from outrider_operator.core.status import condition
from outrider_operator.fleet.queue import WorkQueue

REASON: Final = "NotSupported"
TEXT: Final = "this version of Outrider stores AgentConfigs but does not act on them"
RETRY_SECONDS: Final = 30.0


class ConfigNotices:
    """One condition and one Event for each AgentConfig. `now`: seconds since the Unix epoch."""

    def __init__(self, cluster: Cluster, now: Callable[[], float]) -> None:
        self._cluster = cluster
        self._now = now
        self._bodies: dict[str, Mapping[str, Any]] = {}
        self._queue = WorkQueue(asyncio.get_running_loop().time)
        self._log = get_logger("outrider.configs")

    def seen(self, body: Mapping[str, Any], gone: bool) -> None:
        """An AgentConfig was seen, or is gone."""
        name = body["metadata"]["name"]
        if gone:
            self._bodies.pop(name, None)
        else:
            self._bodies[name] = body
            self._queue.add(name, 0.5)

    async def run(self) -> None:
        """Write what is to be told, for ever."""
        while True:
            name = await self._queue.get()
            try:
                await self._tell(name)
            except NotFoundError:
                self._bodies.pop(name, None)
            except ClusterError as error:
                self._log.warning("config not marked, trying again", name=name, error=str(error))
                self._queue.add(name, RETRY_SECONDS)
            finally:
                self._queue.done(name)

    async def _tell(self, name: str) -> None:
        body = self._bodies.get(name)
        if body is None:
            return
        generation = body["metadata"].get("generation", 0)
        status = body.get("status") or {}
        if status.get("observedGeneration") == generation:
            return
        before = {item.get("type"): item for item in status.get("conditions", [])}.get("Ready")
        told = condition("Ready", False, REASON, TEXT, generation, before, self._now())
        made = {"observedGeneration": generation, "conditions": [told]}
        await self._cluster.write_config_status(name, made)
        await self._cluster.tell(body, "Warning", REASON, TEXT)
