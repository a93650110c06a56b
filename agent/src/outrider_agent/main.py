"""Puts the agent together, starts it, and stops it in order.

The only module that knows all parts. One TaskGroup owns everything that runs; the first error in
it ends the agent, whose cause is the last line of its log.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import structlog
from outrider_runtime import life, logs
from outrider_runtime.health import Health
from outrider_runtime.life import Stop
from outrider_runtime.metrics import LoopLag, new_registry
from outrider_runtime.ops import OpsServer
from outrider_runtime.settings import SettingsError, load
from prometheus_client import CollectorRegistry

from outrider_agent.collectors.heartbeat import AgentStatus, Heartbeat
from outrider_agent.collectors.ownuse import OwnUse
from outrider_agent.collectors.start import Collectors, paths_of
from outrider_agent.configuring import Configuring
from outrider_agent.core.effects import Welcomed
from outrider_agent.core.leaving import stays_away
from outrider_agent.made import (
    PROGRAM,
    VERSION,
    builtins,
    identity,
    place,
    plugins_options,
    recorder_options,
)
from outrider_agent.metrics import AgentMetrics
from outrider_agent.plugins.manager import Plugins
from outrider_agent.settings import AgentSettings, check
from outrider_agent.store.recorder import Recorder
from outrider_agent.store.store import Store, StoreLimits, open_store
from outrider_agent.tasks import processes
from outrider_agent.tasks.execution import Host
from outrider_agent.tasks.leaving import Exit, Leave, Marker
from outrider_agent.tasks.program import Children
from outrider_agent.tasks.supervisor import RunLimits, Supervisor
from outrider_agent.uplink.uplink import Uplink

#: Threads for programs: starting and ending them blocks, for moments.
RUN_THREADS = 4
#: At the end, for plug-ins to end, besides their time between TERM and KILL, seconds.
PLUGINS_SECONDS = 15.0
#: At the end, for what is still to be sent and stored, seconds.
SETTLE_SECONDS = 2.0
FINISH_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the agent until it is told to stop; the exit code."""
    try:
        settings = load(
            AgentSettings,
            program=PROGRAM,
            version=VERSION,
            argv=sys.argv[1:] if argv is None else argv,
            environ=os.environ,
        )
        check(settings)
    except SettingsError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return life.USAGE
    logs.configure(settings.log.level, settings.log.format)
    log = logs.get_logger("outrider.agent", node=settings.node.name)
    log.info("starting", version=VERSION, pid=os.getpid())
    anew = False

    async def program(stop: Stop) -> None:
        nonlocal anew
        anew = await serve(settings, stop, log)

    code = life.run(program, log)
    if anew and code == life.OK:
        begin_anew(log)
    return code


def begin_anew(log: structlog.stdlib.BoundLogger) -> NoReturn:
    """Be a fresh process of the same id, with the same arguments and environment.

    Raises:
        OSError: The program is not there any more; whoever started us may do it again.
    """
    log.info("beginning anew")
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - our own program


async def serve(settings: AgentSettings, stop: Stop, log: structlog.stdlib.BoundLogger) -> bool:
    """Run the agent until `stop` is set, or a task takes it away.

    Returns:
        Whether the program is to begin anew.

    Raises:
        SettingsError: An address or a directory cannot be used.
    """
    registry = new_registry()
    metrics = AgentMetrics(registry)
    metrics.info.labels(VERSION).set(1)
    health = Health()
    processes.become_subreaper()
    marker = Marker(Path(settings.state.directory))
    before = await asyncio.to_thread(marker.read)
    leave = Stop()
    way_out = Exit(marker, settings.node.pod_uid, lambda why: leave.request(why.value), before)
    async with OpsServer(settings.ops.address, registry, health) as ops:
        log.info("listening", address=settings.ops.address, port=ops.port)
        if not stays_away(before, settings.node.pod_uid):
            async with _agent(settings, metrics, health, way_out) as agent:
                await agent.run(stop, leave, registry)
        if stop.is_set():  # a signal goes before what a task wanted
            return False
        if leave.reason == Leave.RESTART.value:
            return True
        metrics.shut_down.set(1)
        metrics.connected.set(0)
        health.set("connected", False, "ShutDown: a task said so; until this Pod is made anew")
        log.warning("shut down: idle until this Pod is made anew")
        await stop.wait()
    return False


@contextlib.asynccontextmanager
async def _agent(
    settings: AgentSettings, metrics: AgentMetrics, health: Health, way_out: Exit
) -> "AsyncIterator[_Agent]":
    """The agent's parts on its file, both closed in the end."""
    state = settings.state
    limits = StoreLimits(
        max_outbox_bytes=state.max_outbox_bytes,
        tombstone_seconds=settings.tasks.tombstone_seconds,
        max_tombstones=settings.tasks.max_tombstones,
        result_reserve_bytes=state.result_reserve_bytes,
        min_free_bytes=state.min_free_bytes,
        min_free_percent=state.min_free_percent,
        relaxed=state.durability == "relaxed",
    )
    async with open_store(Path(state.directory), limits, metrics) as store:
        with ThreadPoolExecutor(RUN_THREADS, thread_name_prefix="run") as threads:
            yield _Agent.build(settings, store, metrics, health, threads, way_out)
        health.live("store", lambda: None)  # closed on purpose: nobody is to be ended for it


@dataclass
class _Agent:
    """The parts that run, wired to one another."""

    settings: AgentSettings
    store: Store
    metrics: AgentMetrics
    health: Health
    recorder: Recorder
    uplink: Uplink
    supervisor: Supervisor
    way_out: Exit
    started: float
    host: Host
    plugins: Plugins
    configuring: Configuring | None = None

    @classmethod
    def build(
        cls,
        settings: AgentSettings,
        store: Store,
        metrics: AgentMetrics,
        health: Health,
        threads: ThreadPoolExecutor,
        way_out: Exit,
    ) -> "_Agent":
        """Make all parts; nothing runs yet."""
        started = time.time()
        paths = paths_of(settings)
        recorder = Recorder(store, recorder_options(settings), metrics)
        uplink = Uplink(
            settings.server,
            identity(settings, started),
            store,
            metrics,
            partial(health.set, "connected"),
        )
        store.on_append = uplink.batch_appended
        uplink.on_welcome = partial(_welcomed, recorder, uplink)
        health.live("store", store.check)
        where, children = place(settings), Children()
        plugins = Plugins(plugins_options(settings, where), recorder, metrics, children, threads)
        host = Host(
            place=where,
            builtins=builtins(settings, paths, uplink),
            records=recorder,
            threads=threads,
            children=children,
            plugins=plugins,
        )
        run_limits = RunLimits(
            max_concurrent=settings.tasks.max_concurrent,
            max_queued=settings.tasks.max_queued,
        )
        notify = uplink.run_changed
        supervisor = Supervisor(store, host, run_limits, metrics, notify, way_out)
        return cls(
            settings,
            store,
            metrics,
            health,
            recorder,
            uplink,
            supervisor,
            way_out,
            started,
            host,
            plugins,
        )

    async def run(self, stop: Stop, leave: Stop, registry: CollectorRegistry) -> None:
        """Own all parts until `stop` or `leave` is set; then stop them in order."""
        await self.supervisor.recover()
        # Only now: the journal has all that it told.
        await asyncio.to_thread(self.way_out.marker.remove)
        collectors = self._collectors(registry)
        assert self.configuring is not None
        OwnUse(registry)
        async with asyncio.TaskGroup() as group:

            def start(name: str, part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
                return group.create_task(part, name=name)

            recorder = start("recorder", self.recorder.run())
            stop_plugins = asyncio.Event()
            plugins = start("plug-ins", self.plugins.run(stop_plugins))
            rest = [
                start("signals", _forward(stop, leave)),
                start("store", self.store.watch()),
                start("loop lag", LoopLag(registry).watch()),
                start("supervisor", self.supervisor.run()),
                *(start(name, part) for name, part in collectors),
                # Before the uplink: the last good one is in force without any server.
                start("configuration", self.configuring.applier.run()),
            ]
            # After the supervisor's task, which takes what servers ask for.
            rest.append(start("uplink", self.uplink.run(self.supervisor)))
            await leave.wait()
            await self.supervisor.drain(self.settings.tasks.drain_seconds)
            # After the runs, which may wait for them; before the recorder: they write to the last.
            stop_plugins.set()
            await self._end_plugins(plugins)
            await self._end(recorder)
            for task in rest:
                task.cancel()

    async def _end_plugins(self, plugins: asyncio.Task[None]) -> None:
        """Wait until they have ended, though not for ever: what they wrote is to be stored."""
        seconds = self.settings.plugins.termination_grace_seconds + PLUGINS_SECONDS
        await asyncio.wait({plugins}, timeout=seconds)
        if not plugins.done():
            logs.get_logger("outrider.agent").error(
                "plug-ins have not ended in time; the next agent on this node ends what is left",
                seconds=seconds,
            )
            plugins.cancel()

    async def _end(self, recorder: asyncio.Task[None]) -> None:
        """What is left when nothing makes records any more: they go to the disk and the server."""
        if self.configuring is not None:
            await self.configuring.close()
        await self.recorder.finish()
        await asyncio.wait({recorder}, timeout=FINISH_SECONDS)
        if not recorder.done():
            recorder.cancel()
        if self.health.ready:  # a server may still take what is left
            await self.uplink.settle(SETTLE_SECONDS)

    def _collectors(
        self, registry: CollectorRegistry
    ) -> list[tuple[str, Coroutine[Any, Any, None]]]:
        settings, paths = self.settings, paths_of(self.settings)
        heartbeat = Heartbeat(
            paths=paths,
            state_directory=Path(settings.state.directory),
            region=settings.server.region,
            traffic=self.uplink.traffic,
            status=self._status,
            started=self.started,
        )
        made = Collectors(settings, heartbeat, self.recorder, self.metrics, registry)
        parts = made.parts()
        self.configuring = Configuring.build(
            settings, self.uplink, made, self.recorder, self.metrics, self.plugins
        )
        applier = self.configuring.applier
        self.plugins.on_change = lambda: applier.plugins_changed(self.plugins.states())
        self.host.children.on_start = self.configuring.limits.release
        return parts

    def _status(self) -> AgentStatus:
        well = all(condition.ok for condition in self.health.liveness())
        conditions = [*self.health.liveness(), *self.health.readiness()]
        problems = [condition.reason for condition in conditions if not condition.ok]
        # Without a server the agent itself is well: the detail tells of it.
        return AgentStatus(
            "running" if well else "abnormal", "; ".join(problems), self.uplink.net_mode
        )


async def _forward(stop: Stop, leave: Stop) -> None:
    await stop.wait()
    leave.request(stop.reason)


def take_terms(recorder: Recorder, terms: Welcomed) -> None:
    """Make batches as the server wants them from now on."""
    recorder.set_max_batch_bytes(terms.max_batch_bytes)
    recorder.set_groups(terms.groups)


def _welcomed(recorder: Recorder, uplink: Uplink, terms: Welcomed) -> None:
    take_terms(recorder, terms)
    if uplink.config is not None:
        uplink.config.answered()


if __name__ == "__main__":
    raise SystemExit(main())
