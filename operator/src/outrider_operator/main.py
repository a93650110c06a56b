"""The server: puts the parts together and owns their lives.

Every replica is a gateway; the one that holds the Lease leads as well. Decides nothing itself.
What takes long to import comes after the settings were checked: a wrong one is told at once.
"""

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from outrider_runtime import life, logs
from outrider_runtime.discovery import check_target
from outrider_runtime.health import Health
from outrider_runtime.metrics import LoopLag, new_registry
from outrider_runtime.ops import OpsServer
from outrider_runtime.settings import SettingsError, load, readable

from outrider_operator import heap
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import ServerSettings, check_lease_times

if TYPE_CHECKING:
    from outrider_operator.core.identity import ReviewStatus
    from outrider_operator.leading import Leadership

PROGRAM = "outrider-server"
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
#: A loop that was not seen alive for so long hangs, seconds.
LOOP_HANGS_SECONDS = 60.0

#: When Python's cycle collector runs, by generation. Thousands of streams are a million objects
#: that live long; with Python's own thresholds, walking through them took a third of the time.
COLLECT_AFTER = (20_000, 10, 5)

log = logs.get_logger("outrider.server")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until SIGTERM. Returns the exit code: 0, 1, or 2 for wrong settings."""
    release = version("outrider-operator")
    arguments = sys.argv[1:] if argv is None else argv
    try:
        settings = load(
            ServerSettings, program=PROGRAM, version=release, argv=arguments, environ=os.environ
        )
    except SettingsError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return life.USAGE
    # kopf attaches these to every record, the first with all of its settings.
    hidden = ("settings", "k8s_ref", "k8s_skip")
    logs.configure(settings.log.level, settings.log.format, hidden=hidden)
    heap.few_arenas()
    return life.run(lambda stop: Server(settings, release).run(stop), log)


class Server:
    """One replica.

    Args:
        settings: all settings.
        release: version of the program.
    """

    def __init__(self, settings: ServerSettings, release: str) -> None:
        self._settings = settings
        self._release = release
        self._replica = settings.gateway.advertise_name or socket.gethostname()
        self._registry = new_registry()
        self._metrics = ServerMetrics(self._registry)
        self._health = Health()
        self._lag = LoopLag(self._registry)
        self._leadership: Leadership | None = None
        self._connected = asyncio.Event()

    async def run(self, stop: life.Stop) -> None:
        """Serve until `stop` is set, then leave in order.

        Raises:
            SettingsError: A setting cannot be used.
        """
        settings = self._settings
        if settings.leader.enabled:
            readable(settings.fleet.ca_file, setting="fleet.caFile")
            readable(settings.fleet.token_file, setting="fleet.tokenFile")
            check_lease_times(settings.leader)
            check_target(settings.fleet.gateways, setting="fleet.gateways")
        namespace = lease_namespace(settings) if settings.leader.enabled else ""
        self._health.set("api", False, "the API server was not asked yet")
        self._health.live("loop", self._loop_problem)
        self._health.live("watch", self._watch_problem)
        log.info("starting", version=self._release, replica=self._replica)
        async with OpsServer(settings.ops.address, self._registry, self._health):
            await self._serve(stop, namespace)

    async def _serve(self, stop: life.Stop, namespace: str) -> None:
        from outrider_operator.gateway.server import Gateway
        from outrider_operator.sinks.choose import make_sink

        gc.freeze()  # what was imported stays, and need not be looked at again
        gc.set_threshold(*COLLECT_AFTER)
        settings = self._settings
        sink = make_sink(settings.sink, self._metrics, self._health)
        gateway = Gateway(
            settings.gateway,
            settings.auth,
            sink=sink,
            review=self._review,
            metrics=self._metrics,
            health=self._health,
            replica=self._replica,
            version=self._release,
        )
        stop_gateway, stop_sink = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            lag = group.create_task(self._lag.watch(), name="loop lag")
            trimming = group.create_task(heap.give_back(), name="give memory back")
            storing = group.create_task(sink.run(stop_sink), name="sink")
            serving = group.create_task(gateway.run(stop_gateway), name="gateway")
            await gateway.started.wait()
            leading = group.create_task(self._use_cluster(namespace), name="leader")
            await stop.wait()
            # The next leader takes over while the agents are sent away from here.
            leading.cancel()
            await asyncio.wait([leading])
            stop_gateway.set()
            await asyncio.wait([serving])
            stop_sink.set()
            await asyncio.wait([storing])
            lag.cancel()
            trimming.cancel()

    async def _use_cluster(self, namespace: str) -> None:
        """Reach the API server, and lead when it is this replica's turn."""
        from outrider_operator.kube.client import KubeClient, configuration
        from outrider_operator.leading import Leadership

        settings = self._settings
        config = await configuration(settings.kube.kubeconfig)
        kube = KubeClient(
            config,
            settings.kube.request_timeout_seconds,
            lambda result: self._metrics.api_requests.labels(result).inc(),
        )
        try:
            self._leadership = Leadership(
                kube, config, settings, self._metrics, self._health, self._replica
            )
            self._connected.set()
            await self._leadership.run(namespace)
        finally:
            await kube.close()

    async def _review(self, token: str, audience: str) -> "ReviewStatus":
        await self._connected.wait()
        assert self._leadership is not None
        return await self._leadership.review(token, audience)

    def _loop_problem(self) -> str | None:
        if self._lag.last_seen is None:
            return None
        late = asyncio.get_running_loop().time() - self._lag.last_seen
        return f"the event loop hangs for {late:.0f} s" if late > LOOP_HANGS_SECONDS else None

    def _watch_problem(self) -> str | None:
        return self._leadership.problem() if self._leadership is not None else None


def lease_namespace(settings: ServerSettings) -> str:
    """Namespace of the Lease: the setting, else the Pod's own.

    Raises:
        SettingsError: Neither is known.
    """
    found = settings.leader.lease_namespace or os.environ.get("POD_NAMESPACE", "")
    if not found and NAMESPACE_FILE.exists():
        found = NAMESPACE_FILE.read_text().strip()
    if not found:
        raise SettingsError(
            'setting "leader.leaseNamespace": expected a namespace, for this is no Pod that '
            "knows its own"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
