"""Ties the API server, the links and the controllers together on the replica that leads.

Began when the Lease is won, cancelled when it is lost or the server stops. Decides nothing about
tasks; knows kube/ and fleet/, which do not know each other.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from kubernetes.aio.client import Configuration
from outrider_runtime.backoff import Backoff
from outrider_runtime.health import Health
from outrider_runtime.logs import get_logger

from outrider_operator.core.ports import Change, ClusterError, Object
from outrider_operator.fleet.controller import RESYNC_SECONDS, Controller
from outrider_operator.fleet.links import Links
from outrider_operator.fleet.schedules import Schedules
from outrider_operator.kube.client import FencedClient, KubeClient
from outrider_operator.kube.configs import ConfigObjects
from outrider_operator.kube.lease import Candidate
from outrider_operator.kube.objects import ClusterStore
from outrider_operator.kube.schedules import ScheduleObjects
from outrider_operator.kube.tokens import reviewer
from outrider_operator.kube.watch import Watches
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import ServerSettings

#: Time between two looks whether the API server answers, seconds.
PROBE_SECONDS: Final = 10.0
#: The Nodes are read anew at each so many-th reading of the tasks.
NODES_EVERY: Final = 5

log = get_logger("outrider.leader")


class Leadership:
    """What a replica does at the API server.

    Args:
        kube: connection to it.
        config: how it is reached, for the watches.
        settings: all settings.
        metrics: the server's.
        health: the condition "api" is set here.
        replica: name of this replica.
    """

    def __init__(
        self,
        kube: KubeClient,
        config: Configuration,
        settings: ServerSettings,
        metrics: ServerMetrics,
        health: Health,
        replica: str,
    ) -> None:
        self._kube, self._config, self._settings = kube, config, settings
        self._metrics, self._health, self._replica = metrics, health, replica
        self._watches: Watches | None = None
        self.review = reviewer(kube)

    def problem(self) -> str | None:
        """For the liveness probe: None when the watches run, or none are needed."""
        return self._watches.problem() if self._watches is not None else None

    async def run(self, namespace: str) -> None:
        """Take part in the election, for ever. `namespace`: of the Lease."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._probe(), name="API server probe")
            if self._settings.leader.enabled:
                # A replica that was restarted is not the one that held the Lease before.
                identity = f"{self._replica}_{secrets.token_hex(4)}"
                candidate = Candidate(self._kube, self._settings.leader, namespace, identity)
                group.create_task(
                    candidate.campaign(lambda term: self._lead(term, candidate, namespace)),
                    name="election",
                )

    async def _probe(self) -> None:
        while True:
            try:
                await self._kube.request("GET", "/version")
                self._health.set("api", True)
            except ClusterError as error:
                self._health.set("api", False, str(error))
            await asyncio.sleep(PROBE_SECONDS)

    async def _lead(self, term: int, candidate: Candidate, namespace: str) -> None:
        fenced = FencedClient(self._kube, lambda: candidate.leads)
        cluster = ClusterStore(
            fenced, self._replica, lambda result: self._metrics.events_posted.labels(result).inc()
        )
        schedules = Schedules(ScheduleObjects(fenced, cluster), self._metrics, time.time)
        self._metrics.leads.set(1)
        self._metrics.leader_terms.inc()
        try:
            configs = ConfigObjects(fenced, cluster, namespace)
            controller = Controller(cluster, configs, self._settings, self._metrics)
            await _until_done(controller.load, "the cluster cannot be read")
            # Tasks do not wait for schedules: what cannot be read now, the watches show later.
            await _tried(schedules.resync)

            def changed(change: Change) -> None:
                controller.changed(change)
                schedules.changed(change)

            async def resync() -> list[Object]:
                await _tried(controller.reread_configs)
                return [*await controller.resync(), *(await _tried(schedules.resync) or [])]

            links = Links(self._settings.fleet, self._replica, term, controller, self._metrics)
            watches = self._watches = Watches(self._config, changed, self._metrics)
            async with asyncio.TaskGroup() as group:
                group.create_task(controller.run(links), name="controller")
                group.create_task(schedules.run(), name="schedules")
                group.create_task(links.run(), name="links")
                group.create_task(watches.run(lambda: _tried(resync)), name="watches")
                group.create_task(_resync(controller, resync, watches), name="resync")
        finally:
            self._watches = None
            self._metrics.leads.set(0)
            self._metrics.leader_links.set(0)


async def _resync(
    controller: Controller, resync: Callable[[], Awaitable[list[Object]]], watches: Watches
) -> None:
    """Read tasks and schedules now and then, and see whether the watches have shown them."""
    rounds = 0
    while True:
        await asyncio.sleep(RESYNC_SECONDS)
        rounds += 1
        listed = await _tried(resync)
        if listed is not None:
            watches.check(listed)
        if rounds % NODES_EVERY == 0:
            await _tried(controller.reread_nodes)


async def _tried(action: Callable[[], Awaitable[Any]]) -> Any:
    """The result of an action that may fail while the API server is away; None then."""
    try:
        return await action()
    except ClusterError as error:
        log.warning("the cluster cannot be read, trying again later", error=str(error))
        return None


async def _until_done(action: Callable[[], Awaitable[Any]], complaint: str) -> None:
    """Try until it works: a leader that cannot read yet must not give the Lease away for it."""
    backoff = Backoff(1.0, 10.0)
    while True:
        try:
            await action()
        except ClusterError as error:
            log.warning(complaint, error=str(error))
            await asyncio.sleep(backoff.next())
        else:
            return
