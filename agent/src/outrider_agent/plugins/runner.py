"""Keeps one plug-in running: starts it, starts it again when it ends, ends it for good.

Its state says how it stands. A fault of one plug-in never reaches another, or the agent.
"""

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from outrider_proto import limits
from outrider_proto.effective import Plugin
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.core.accounts import Account
from outrider_agent.core.outcome import signal_name
from outrider_agent.core.plugin_restarts import RestartLimits, Restarts
from outrider_agent.core.plugins import PluginError
from outrider_agent.core.runs import clip
from outrider_agent.plugins import cgroups, places
from outrider_agent.plugins.cgroups import Group
from outrider_agent.plugins.instance import Changed, Counts, Fault, Instance, Surroundings
from outrider_agent.plugins.packages import Package, Packages, in_thread
from outrider_agent.plugins.spawning import Job, Spawned, SpawnError, spawn
from outrider_agent.tasks import processes
from outrider_agent.tasks.program import KILL_SECONDS, Children, exited

log = get_logger("outrider.plugins")

#: How long records of an ended plug-in may take to be stored before it begins anew, seconds.
DRAIN_SECONDS: Final = 10.0
#: Without a group for its memory, its address space may be so many times as large, and this much
#: larger: it bounds what is used between two looks. Address space is not memory in use, and some
#: languages reserve far more of it than they ever use.
ADDRESS_FACTOR: Final = 4
ADDRESS_EXTRA: Final = 2 * 1024 * limits.MIB


@dataclass(frozen=True)
class Site:
    """What all plug-ins of the node share.

    Attributes:
        node: Name of the node.
        directory: Where packages and working directories are.
        grace: Seconds between TERM and KILL.
        healthy: A plug-in is well after so many seconds.
        restarts: How often it may end.
        packages: What is unpacked.
        children: Processes that are waited for by name.
        threads: For calls that block for moments.
        around: Who takes records.
        changed: Told of every change of a state.
        lingering: Takes readers of plug-ins that ended, whose records cannot be stored yet.
        cgroup_root: Where control groups are mounted.
    """

    node: str
    directory: Path
    grace: float
    healthy: float
    restarts: RestartLimits
    packages: Packages
    children: Children
    threads: Executor
    around: Surroundings
    changed: Changed
    lingering: Callable[[asyncio.Task[None]], None]
    cgroup_root: Path = cgroups.ROOT


@dataclass
class Runner:
    """One plug-in, as long as its configuration stays as it is."""

    plugin: Plugin
    package: Package
    account: Account | None
    site: Site
    counts: Counts = field(default_factory=Counts)
    instance: Instance | None = None
    group: Group | None = None

    def __post_init__(self) -> None:
        self.mark = places.mark_of(self.plugin.name, self.site.directory, self.site.node)
        self._stop = asyncio.Event()
        self._restarts = Restarts(self.site.restarts)
        self._task: asyncio.Task[None] | None = None
        self._state = pb.PluginState(
            name=self.plugin.name,
            version=self.plugin.version,
            phase=pb.PLUGIN_PHASE_BACKING_OFF,
            reason="Starting",
        )

    @property
    def state(self) -> pb.PluginState:
        """How it stands; a copy."""
        state = pb.PluginState()
        state.CopyFrom(self._state)
        return state

    @property
    def needs_looks(self) -> bool:
        """Whether a limit of it holds only because somebody looks at what it uses."""
        resources, group = self.plugin.resources, self.group
        memory = resources.memory_bytes is not None and not (group and group.memory)
        return memory or (resources.cpu_millis is not None and not (group and group.cpu))

    def begin(self) -> None:
        """Start it, and keep it running until `end`."""
        self._task = asyncio.create_task(self._keep(), name=f"plug-in {self.plugin.name}")

    async def end(self) -> None:
        """End it: TERM, KILL, and what it wrote read."""
        self._stop.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    def _set(
        self,
        phase: pb.PluginPhase.ValueType,
        reason: str = "",
        message: str = "",
        *,
        healthy: bool = False,
    ) -> None:
        state = self._state
        state.phase, state.reason, state.healthy = phase, reason, healthy
        state.message = clip(message, limits.CONFIG_MESSAGE_BYTES)
        metrics, name = self.site.around.metrics, self.plugin.name
        metrics.plugin_up.labels(name).set(phase == pb.PLUGIN_PHASE_RUNNING)
        metrics.plugin_healthy.labels(name).set(healthy)
        self.site.changed()

    async def _keep(self) -> None:
        try:
            while not self._stop.is_set():
                fault = await self._live()
                if self._stop.is_set():
                    break
                await self._wait(fault)
        except Exception as error:  # a fault of ours in one plug-in must not end all others
            log.exception("a fault of the agent in a plug-in", plugin=self.plugin.name)
            self._set(pb.PLUGIN_PHASE_FAILED, "InternalError", f"a fault in the agent: {error}")

    async def _wait(self, fault: Fault) -> None:
        decision = self._restarts.ended(time.monotonic(), random.random())
        text = f"{fault.text}; started again in {decision.wait:.0f} s"
        log.warning("plug-in ended", plugin=self.plugin.name, reason=fault.reason, detail=text)
        if decision.failed:
            many = f"it ended {self.site.restarts.ends} times in a short while, at last: {text}"
            self._set(pb.PLUGIN_PHASE_FAILED, "CrashLoop", f"{many}, or once its config changes")
        else:
            self._set(pb.PLUGIN_PHASE_BACKING_OFF, fault.reason, text)
        try:
            async with asyncio.timeout(decision.wait):
                await self._stop.wait()
        except TimeoutError:
            self._state.restarts += 1
            self.site.around.metrics.plugin_restarts.labels(self.plugin.name).inc()

    async def _live(self) -> Fault:
        """One process of it, from start to end."""
        try:
            spawned = await self._start()
        except SpawnError as error:
            return Fault("StartFailed", str(error))
        except PluginError as error:
            return Fault(error.reason, error.text)
        except OSError as error:
            return Fault("StartFailed", f"it could not be started: {error}")
        instance = Instance(self.plugin.name, spawned, self.site.around, self.counts)
        self.instance = instance
        log.info("plug-in started", plugin=self.plugin.name, version=self.plugin.version,
                 pid=instance.pid)  # fmt: skip
        self._set(pb.PLUGIN_PHASE_RUNNING, message=self._limits_text())
        well = asyncio.get_running_loop().call_later(self.site.healthy, self._well)
        gone = asyncio.ensure_future(exited(instance.pid))
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            ends: set[asyncio.Future[Any]] = {gone, stopped, instance.fault}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            well.cancel()
            stopped.cancel()
            self.instance = None
            # To the end, whoever cancels us: no process may stay.
            fault = await asyncio.shield(self._end(instance, gone))
        return fault

    def _well(self) -> None:
        if self.instance is not None:
            self._set(pb.PLUGIN_PHASE_RUNNING, message=self._limits_text(), healthy=True)

    # Start.

    async def _start(self) -> Spawned:
        if not await in_thread("plug-in check", lambda: places.intact(self.package)):
            log.warning("a file of a plug-in was changed; put back", plugin=self.plugin.name)
            self.package = await self._again()
        children = self.site.children
        children.starting += 1
        try:
            loop = asyncio.get_running_loop()
            starting = loop.run_in_executor(self.site.threads, self._spawn)
            try:
                spawned = await asyncio.shield(starting)
            except asyncio.CancelledError:
                await asyncio.wait([starting])
                if starting.exception() is None:
                    await asyncio.shield(self._undo(starting.result()))
                raise
            children.known.add(spawned.process.pid)
            if self.group is None or not self.group.folders:
                children.on_start(spawned.process.pid)
            return spawned
        finally:
            children.starting -= 1

    async def _again(self) -> Package:
        """Its package anew, unless it is to end: nobody waits for a download then."""
        having = asyncio.ensure_future(self.site.packages.again(self.plugin))
        stopped = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({having, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not having.done():
                having.cancel()
                await asyncio.wait({having})
        if having.cancelled():
            raise PluginError(self.plugin.name, "Stopping", "it was ended before it began")
        return having.result()

    def _spawn(self) -> Spawned:
        """Blocks."""
        plugin, site = self.plugin, self.site
        directory = places.work_directory(site.directory, plugin.name, self.account, self.package)
        resources = plugin.resources
        self.group = cgroups.make(
            plugin.name, resources.cpu_millis, resources.memory_bytes, site.cgroup_root
        )
        address = 0
        if resources.memory_bytes is not None and self.group.memory is None:
            address = resources.memory_bytes * ADDRESS_FACTOR + ADDRESS_EXTRA
        path = str(self.package.executable)
        job = Job(
            executable=self.package.executable,
            argv=[path, *plugin.args],
            environment=places.environment(plugin, site.node, self.mark, directory, self.account),
            directory=directory,
            account=self.account,
            cgroups=self.group.procs,
            address_bytes=address,
        )
        try:
            return spawn(job)
        except SpawnError:
            self.group.remove()
            raise

    async def _undo(self, spawned: Spawned) -> None:
        await self._kill(spawned.process.pid)
        spawned.close()
        spawned.process.wait()  # at once: it has ended

    def _limits_text(self) -> str:
        resources, group = self.plugin.resources, self.group
        told = []
        if resources.memory_bytes is not None:
            how = "looks at its processes, and by its address space"
            how = f"cgroup {group.version}" if group and group.memory else how
            told.append(f"memory limited by {how}")
        if resources.cpu_millis is not None:
            how = f"cgroup {group.version}" if group and group.cpu else "looks at its processes"
            told.append(f"processor time limited by {how}")
        return "; ".join(told)

    # End.

    async def _end(
        self, instance: Instance, gone: "asyncio.Future[tuple[int | None, int]]"
    ) -> Fault:
        """End what is there of it, read what it wrote; why it ended."""
        itself = gone.done()
        blamed = instance.fault.result() if instance.fault.done() else None
        why = blamed.reason if blamed else "Ended" if itself else "Stopping"
        self._set(pb.PLUGIN_PHASE_STOPPING, why, blamed.text if blamed else "")
        await instance.take_no_tasks("it ended before it answered")
        memory = blamed is not None and blamed.reason == "MemoryLimit"
        if not itself and not memory:
            await self._terminate(instance.pid)
            await asyncio.wait([gone], timeout=self.site.grace)
        all_gone = await self._kill(instance.pid)
        if not gone.done():
            await asyncio.wait([gone], timeout=1.0)
        reader = await instance.finish(DRAIN_SECONDS)
        if reader is not None:
            self.site.lingering(reader)
        if gone.done():
            instance.spawned.process.wait()  # at once: it has ended
        gone.cancel()
        self.site.children.known.discard(instance.pid)  # one that is stuck is left to the reaper
        found = blamed or await self._how(gone)
        if not all_gone:
            found.text += "; a process of it did not go away after KILL"
        if self.group is not None:
            await in_thread("plug-in group", self.group.remove)
        return found

    async def _how(self, gone: "asyncio.Future[tuple[int | None, int]]") -> Fault:
        if not gone.done() or gone.cancelled():
            return Fault("Stuck", "it does not end")
        code, number = gone.result()
        group = self.group
        if number == signal.SIGKILL and group is not None:
            times = await in_thread("plug-in memory", group.out_of_memory)
            if times:
                text = "the kernel ended it: it used more than resources.memory"
                return Fault("OutOfMemory", text)
        if number:
            return Fault("Signalled", f"it was ended by signal {signal_name(number)}")
        return Fault("Ended", f"it ended with exit code {code}")

    async def _terminate(self, pid: int) -> None:
        loop = asyncio.get_running_loop()
        below = os.getpid()
        await loop.run_in_executor(
            self.site.threads,
            lambda: processes.signal_all(self.mark, pid, signal.SIGTERM, below=below),
        )

    async def _kill(self, pid: int) -> bool:
        """Kill all that is left of it; whether that did it."""

        def kill() -> bool:
            for member in self.group.members() if self.group is not None else ():
                info = processes.inspect(member)
                if info is not None and member != os.getpid():
                    processes.send(info, signal.SIGKILL)
            below = os.getpid()
            return processes.kill_all(self.mark, pid, seconds=KILL_SECONDS, below=below)

        return await asyncio.get_running_loop().run_in_executor(self.site.threads, kill)
