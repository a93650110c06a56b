"""All plug-ins of the node: has them prepared, switched to and ended, and hands tasks to them.

Preparing touches nothing that runs; switching cannot fail: a plug-in that does not start says so in
its state. Knows no configuration but that of plug-ins.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from outrider_proto.effective import Plugin
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.core import plugins as rules
from outrider_agent.core.accounts import Account
from outrider_agent.core.plugin_restarts import RestartLimits
from outrider_agent.core.plugins import PluginError as PluginError  # noqa: PLC0414 - of this API
from outrider_agent.core.plugins import PluginPolicy
from outrider_agent.core.records import RecordClass, RecordSink
from outrider_agent.metrics import AgentMetrics
from outrider_agent.plugins import cgroups, places
from outrider_agent.plugins.instance import Surroundings
from outrider_agent.plugins.packages import Package, Packages
from outrider_agent.plugins.runner import Runner, Site
from outrider_agent.plugins.watching import CALM_SECONDS, CLOSE_SECONDS, Watch
from outrider_agent.settings import PluginsSettings
from outrider_agent.tasks import processes
from outrider_agent.tasks.program import Children

log = get_logger("outrider.plugins")

#: At the agent's end, how long records of ended plug-ins may take to be stored, seconds.
LINGER_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Ready:
    """One plug-in that can be switched to."""

    plugin: Plugin
    package: Package
    account: Account | None


@dataclass(frozen=True)
class Prepared:
    """Plug-ins that can be switched to; a later one makes it void."""

    plugins: tuple[Ready, ...]


@dataclass(frozen=True)
class PluginsOptions:
    """What this node says of plug-ins.

    Attributes:
        settings: Its settings.
        node: Its name.
        directory: Where packages and working directories are.
        own: Name and number of the agent's own user.
        restarts: How often a plug-in may end.
        cgroup_root: Where control groups are mounted.
    """

    settings: PluginsSettings
    node: str
    directory: Path
    own: tuple[str, ...]
    restarts: RestartLimits = field(default_factory=RestartLimits)
    cgroup_root: Path = cgroups.ROOT


class Plugins:
    """All plug-ins of the node. Implements core.plugins.PluginTasks."""

    def __init__(
        self,
        options: PluginsOptions,
        sink: RecordSink,
        metrics: AgentMetrics,
        children: Children,
        threads: Executor,
    ) -> None:
        settings = options.settings
        self.on_change: Callable[[], None] = lambda: None
        self._options = options
        self._metrics = metrics
        self._threads = threads
        self._sink = sink
        self._policy = PluginPolicy(
            enabled=settings.enabled,
            names=settings.allowed_names,
            users=settings.allowed_users,
            own=options.own,
            most=settings.max_plugins,
        )
        self._packages = Packages(options.directory, settings, children)
        self._site = Site(
            node=options.node,
            directory=options.directory,
            grace=settings.termination_grace_seconds,
            healthy=settings.healthy_seconds,
            restarts=options.restarts,
            packages=self._packages,
            children=children,
            threads=threads,
            around=Surroundings(
                sink, metrics, settings.max_records_per_second, settings.max_bytes_per_second
            ),
            changed=self._changed,
            lingering=self._linger,
            cgroup_root=options.cgroup_root,
        )
        self._watch = Watch(metrics, options.directory / "work")
        self._runners: dict[str, Runner] = {}
        self._fetching: dict[str, Plugin] = {}
        self._lingering: set[asyncio.Task[None]] = set()
        self._one = asyncio.Lock()
        self._cleaned = False
        self._ending = False
        self._told: list[bytes] = []
        self._left: list[str] = []
        #: A preparation under way; and the last switch, which goes on when its caller does not.
        self._having: asyncio.Future[Mapping[str, Package]] | None = None
        self._switching: asyncio.Future[None] | None = None

    # What the configuration asks for.

    async def prepare(self, wanted: Sequence[Plugin]) -> Prepared:
        """Fetch, check and unpack all that is new; nothing that runs is touched.

        Raises:
            PluginError: One of them cannot be had, or this node does not allow it.
        """
        refusal = rules.refuse(wanted, self._policy)
        if refusal is not None:
            raise refusal
        async with self._one:
            await self._clean()
            options = self._options
            users = {p.name: places.account_of(p, options.own, options.directory) for p in wanted}
            # What was prepared and never switched to must not pile up.
            await asyncio.to_thread(self._packages.forget, self._used())
            if not wanted:
                return Prepared(())
            self._fetching = {p.name: p for p in wanted if p.name not in self._runners}
            self._changed()
            try:
                running = [r.plugin.source.sha256 for r in self._runners.values()]
                found = await self._have(wanted, running)
            finally:
                self._fetching = {}
                self._changed()
        return Prepared(tuple(Ready(p, found[p.name], users[p.name]) for p in wanted))

    async def _have(
        self, wanted: Sequence[Plugin], running: Sequence[str]
    ) -> Mapping[str, Package]:
        """The packages, unless the agent stops meanwhile: nobody waits for a download then."""
        stopping = PluginError(wanted[0].name, "Stopping", "the agent stops; it begins anew later")
        if self._ending:
            raise stopping
        self._having = asyncio.ensure_future(self._packages.have(wanted, running))
        try:
            return await self._having
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():  # not we: it was, by `_end`
                raise stopping from None
            raise
        finally:
            self._having = None

    async def switch(self, prepared: Prepared) -> None:
        """Have exactly these run from now on; an old process ends before its new one begins.

        What a plug-in wrote before it ended is read to its end. Never raises for a plug-in that
        cannot start: its state says so.
        """
        await self._one.acquire()
        # To the end, and alone, though the caller may be cancelled: else some would run twice.
        self._switching = asyncio.ensure_future(self._switch(prepared))
        self._switching.add_done_callback(self._switched)
        await asyncio.shield(self._switching)

    async def _switch(self, prepared: Prepared) -> None:
        if self._ending:
            return
        wanted = {ready.plugin.name: ready for ready in prepared.plugins}
        old = {
            name: runner
            for name, runner in self._runners.items()
            if name not in wanted or wanted[name].plugin != runner.plugin
        }
        await self._replace(old, wanted)

    def _switched(self, switching: "asyncio.Future[None]") -> None:
        self._one.release()
        if not switching.cancelled() and (error := switching.exception()) is not None:
            log.error("plug-ins are not as they should be", exc_info=error)

    async def _replace(self, old: Mapping[str, Runner], wanted: Mapping[str, Ready]) -> None:
        async with asyncio.TaskGroup() as group:
            for name in sorted({*old, *(n for n in wanted if n not in self._runners)}):
                group.create_task(self._replace_one(old.get(name), wanted.get(name)))
        await asyncio.to_thread(self._packages.forget, self._used())
        await self._keep_only()
        self._changed()

    async def _keep_only(self) -> None:
        """Remove the folders of plug-ins that are gone; what stays is tried again at each look."""
        left = await asyncio.to_thread(
            places.keep_only, self._options.directory, set(self._runners)
        )
        if left and left != self._left:
            log.warning("folders of plug-ins that are gone stay for now", problems=left)
        self._left = left

    def _used(self) -> list[Package]:
        return [runner.package for runner in self._runners.values()]

    async def _replace_one(self, old: Runner | None, ready: Ready | None) -> None:
        if old is not None:
            await old.end()
        if ready is None:
            assert old is not None
            name = old.plugin.name
            del self._runners[name]
            self._metrics.forget_plugin(name)
            log.info("plug-in removed", plugin=name)
            return
        runner = Runner(ready.plugin, ready.package, ready.account, self._site)
        if old is not None:
            runner.counts = old.counts
        self._runners[ready.plugin.name] = runner
        runner.begin()

    async def _clean(self) -> None:
        """Once: end what an earlier agent left, and remove what it unpacked."""
        if self._cleaned:
            return
        self._cleaned = True
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(
            self._threads, end_left, self._options.directory, self._options.node
        )
        await asyncio.to_thread(self._packages.clear)
        await asyncio.to_thread(cgroups.remove_left, self._options.cgroup_root)

    # How they stand.

    def states(self) -> list[pb.PluginState]:
        """All plug-ins, by name."""
        found = {name: runner.state for name, runner in self._runners.items()}
        for name, plugin in self._fetching.items():
            phase = pb.PLUGIN_PHASE_FETCHING
            found[name] = pb.PluginState(name=name, version=plugin.version, phase=phase)
        return [found[name] for name in sorted(found)]

    def drift(self) -> list[str]:
        """What differs from what was asked for, as sentences: files that somebody changed."""
        return [
            f"plug-in {name}: {runner.package.executable} was changed or removed by hand; it is "
            "put back when the plug-in is started again"
            for name, runner in sorted(self._runners.items())
            if not runner.package.unchanged()
        ]

    def _changed(self) -> None:
        now = [state.SerializeToString() for state in self.states()]
        if now != self._told:
            self._told = now
            self.on_change()

    # Tasks.

    async def ask(self, name: str, data_type: int, data: str, timeout: float) -> Mapping[str, str]:
        """Hand a task to a plug-in; the fields of its answer.

        Raises:
            PluginError: UnknownPlugin, PluginNotRunning, PluginFull, PluginEnded, or NoAnswer
                after `timeout` seconds.
        """
        runner = self._runners.get(name)
        if runner is None:
            there = ", ".join(sorted(self._runners)) or "none"
            text = f"this node has no such plug-in (it has: {there}); name one in an AgentConfig"
            raise PluginError(name, "UnknownPlugin", text)
        instance = runner.instance
        if instance is None:
            state = runner.state
            phase = pb.PluginPhase.Name(state.phase).removeprefix("PLUGIN_PHASE_")
            text = f"it does not run now ({phase}: {state.message or state.reason}); try later"
            raise PluginError(name, "PluginNotRunning", text)
        runner.counts.tasks += 1
        runner.counts.task_bytes += len(data)
        result = "answered"
        try:
            return await instance.tasks.ask(data_type, data, timeout)
        except PluginError as error:
            result = _TASK_RESULTS[error.reason]
            raise
        finally:
            self._metrics.plugin_tasks.labels(name, result).inc()

    # Life.

    async def run(self, stop: asyncio.Event) -> None:
        """Look after them until `stop` is set; then end all, and read all that they wrote."""
        heartbeat = time.monotonic() + self._options.settings.heartbeat_seconds
        try:
            while not stop.is_set():
                seconds = await self._look()
                if time.monotonic() >= heartbeat:
                    heartbeat += self._options.settings.heartbeat_seconds
                    runners = list(self._runners.values())
                    with self._guarded(runners):
                        for record in await asyncio.to_thread(self._watch.heartbeats, runners):
                            self._sink.submit(record, RecordClass.TELEMETRY)
                with contextlib.suppress(TimeoutError):
                    seconds = min(seconds, max(0.0, heartbeat - time.monotonic()))
                    async with asyncio.timeout(seconds):
                        await stop.wait()
        finally:
            await asyncio.shield(self._end())

    async def _look(self) -> float:
        """Look at what they use; seconds until the next look."""
        runners = list(self._runners.values())
        if any(runner.instance for runner in runners):
            with self._guarded(runners):
                uses = asyncio.get_running_loop().run_in_executor(
                    self._threads, self._watch.look_up, runners
                )
                self._watch.judge(runners, await uses)
        if self._left and not self._one.locked():
            async with self._one:
                await self._keep_only()
        close = any(runner.needs_looks for runner in runners)
        return CLOSE_SECONDS if close else CALM_SECONDS

    @contextlib.contextmanager
    def _guarded(self, runners: Sequence[Runner]) -> Iterator[None]:
        """Around a look at them: what it raises is told, and the next one comes."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - plug-ins must not end the agent
            for runner in runners:
                self._watch.fault(runner.plugin.name, error)

    async def _end(self) -> None:
        self._ending = True
        if self._having is not None:
            self._having.cancel()
        async with self._one:
            runners = list(self._runners.values())
            await asyncio.gather(*(runner.end() for runner in runners))
        if self._lingering:
            _, left = await asyncio.wait(self._lingering, timeout=LINGER_SECONDS)
            for task in left:
                log.error("records of a plug-in are lost: they could not be stored in time")
                task.cancel()

    def _linger(self, reader: asyncio.Task[None]) -> None:
        self._lingering.add(reader)
        reader.add_done_callback(self._lingering.discard)


_TASK_RESULTS: Final = {"NoAnswer": "no_answer", "PluginFull": "full", "PluginEnded": "ended"}


def end_left(directory: Path, node: str) -> None:
    """Kill the plug-ins that an agent which was killed left behind. Blocks."""
    marks: set[str] = set()
    for process in processes.scan():
        mark = None if process.zombie else processes.mark_of(process.pid)
        if mark is not None and places.is_mark(mark, directory, node):
            marks.add(mark)
            with contextlib.suppress(PermissionError):
                processes.send(process, signal.SIGKILL)
    for mark in marks:
        log.warning("plug-in of an earlier agent ended", mark=mark)
        processes.kill_all(mark, None, seconds=5.0, below=None)
