"""Owns all runs of the node: accepts each once, journals every step, reports every change.

The order of things is what makes a run happen at most once: a run is in the journal before it is
reported as accepted, and its process is in the journal as soon as it is there; a new agent process
ends whatever an old one left, by its mark too, and reports it as interrupted. Reports go to
`notify`; the final ones stay in the journal until they are acknowledged.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.backoff import Backoff
from outrider_runtime.logs import get_logger

from outrider_agent.core import leaving, policy, runs
from outrider_agent.core.outcome import NOT_BEGUN, Cause, Outcome, ended
from outrider_agent.core.runs import RunKey, advance, key_of, phase_name
from outrider_agent.core.storage import (
    Journal,
    JournalFullError,
    Process,
    StorageError,
)
from outrider_agent.metrics import AgentMetrics
from outrider_agent.tasks import processes
from outrider_agent.tasks.execution import Host, execute, with_result
from outrider_agent.tasks.leaving import Exit
from outrider_agent.tasks.program import DRAIN_SECONDS, KILL_SECONDS, Started
from outrider_agent.tasks.recovery import recover

log = get_logger("outrider.tasks")

#: Between two looks for ended orphans, seconds.
REAP_SECONDS = 30.0


@dataclass(frozen=True)
class RunLimits:
    """How much the agent takes on.

    Attributes:
        max_concurrent: Most runs at once.
        max_queued: Most runs that wait.
    """

    max_concurrent: int
    max_queued: int


@dataclass
class _Run:
    """A run that has not ended."""

    command: pb.RunCommand
    state: pb.RunState
    stop: asyncio.Future[Cause] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def end(self, cause: Cause) -> None:
        """Have it ended early; the first cause counts."""
        if not self.stop.done():
            self.stop.set_result(cause)


class Supervisor:
    """All runs of the node."""

    def __init__(
        self,
        journal: Journal,
        host: Host,
        limits: RunLimits,
        metrics: AgentMetrics,
        notify: Callable[[pb.RunState], None],
        way_out: Exit,
    ) -> None:
        self._journal = journal
        self._host = host
        self._limits = limits
        self._metrics = metrics
        self._notify = notify
        self._exit = way_out
        self._places = asyncio.Semaphore(limits.max_concurrent)
        self._runs: dict[RunKey, _Run] = {}
        self._held = 0
        self._queued = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._group: asyncio.TaskGroup | None = None
        self._stopping = False
        self._boot = processes.boot_id()

    # What the server asks for.

    async def submit(self, commands: Sequence[pb.RunCommand]) -> None:
        """Take runs, or refuse them, and report which; of known ones report the state."""
        # Together, so that the journal writes them together. And to the end, though the stream that
        # brought them may break meanwhile: a run that is in the journal must begin as well.
        await asyncio.shield(asyncio.gather(*(self._submit(command) for command in commands)))

    async def _submit(self, command: pb.RunCommand) -> None:
        key = key_of(command.id)
        if self._stopping:
            # Said nothing of, it is sent again to the agent that comes after.
            log.info("run not taken: the agent stops", run=str(key))
            return
        if policy.nameless(command):
            log.error("run not taken: it has no task UID, or no attempt number")
            return
        now = time.time_ns()
        load = policy.Load(self._held, self._limits.max_concurrent + self._limits.max_queued)
        allowed = self._host.place.policy
        refusal = policy.refuse(command, now_nanos=now, policy=allowed, load=load)
        state = runs.accepted(command.id)
        if refusal is not None:
            state = ended(state, refusal, now)
        self._held += 1  # before anything is awaited: commands come many at a time
        taken = False
        try:
            known = await self._journal.accept_run(state)
            taken = known is None and refusal is None
        except StorageError as error:
            await self._refuse_unjournalled(command, error)
            return
        finally:
            if not taken:
                self._held -= 1
        if taken:
            self._begin(key, _Run(command, state))
        else:
            self._settle(key, known, state)

    def _begin(self, key: RunKey, run: _Run) -> None:
        self._runs[key] = run
        self._idle.clear()
        self._count_queued(1)
        self._notify(run.state)
        assert self._group is not None, "submit before run"
        self._group.create_task(self._carry_out(key, run), name=f"run {key}")

    def _count_queued(self, change: int) -> None:
        self._queued += change
        self._metrics.runs_queued.set(self._queued)

    def _settle(self, key: RunKey, known: pb.RunState | None, state: pb.RunState) -> None:
        """Report a run that is not to be run: one that is known, or one that was refused."""
        if known is not None:
            self._metrics.runs_repeated.inc()
            run = self._runs.get(key)
            log.info("run is known already", run=str(key), phase=phase_name(known.phase))
            self._notify(run.state if run else known)
            return
        log.warning("run rejected", run=str(key), reason=state.reason, detail=state.message)
        self._metrics.runs.labels(phase_name(state.phase)).inc()
        self._notify(state)

    async def _refuse_unjournalled(self, command: pb.RunCommand, error: StorageError) -> None:
        """Without the journal nothing is run: it could be run twice."""
        reason = "TooManyRuns" if isinstance(error, JournalFullError) else "JournalUnavailable"
        outcome = Outcome(pb.RUN_PHASE_REJECTED, reason, str(error))
        state = ended(runs.accepted(command.id), outcome, time.time_ns())
        try:
            await self._journal.bury_run(state)
        except StorageError:
            # Not even that: a repeat of the command may be taken then. It has not begun yet.
            log.warning("a rejected run could not be noted", run=str(key_of(command.id)))
        self._settle(key_of(command.id), None, state)

    async def cancel(self, keys: Sequence[RunKey]) -> None:
        """End runs early; of those that have ended report the state again."""
        for key in keys:
            run = self._runs.get(key)
            if run is not None:
                log.info("run is to be cancelled", run=str(key))
                run.end(Cause.CANCEL)
                continue
            known = await self._journal.find_run(key)
            if known is not None:
                self._notify(known)
            else:
                log.info("run to cancel is not known", run=str(key))

    async def acknowledge(self, keys: list[RunKey]) -> None:
        """Forget results that stand in the report."""
        await self._journal.ack_runs(keys)
        self._exit.acknowledged(keys)

    async def foreign(self, task: pb.Task) -> None:
        """Do what a task in the form of other servers asks of the agent itself."""
        if not leaving.is_shutdown(task):
            log.info("task of another form passed over", data_type=task.data_type)
        elif policy.SHUTDOWN not in self._host.place.policy.kinds:
            log.warning("shutdown refused: tasks.allowedKinds lacks it", kind=policy.SHUTDOWN)
        elif not self._stopping:
            try:
                await self._exit.keep_away(f"a task of type {task.data_type}")
            except OSError as error:
                log.warning("not shut down: that cannot be noted on disk", error=str(error))
                return
            self._stopping = True
            await self._exit.shut_down(None)

    async def report(self) -> list[pb.RunState]:
        """The states of all runs whose result was not acknowledged yet."""
        states = {key_of(s.id): s for s in await self._journal.run_states()}
        # What is in hand is never behind the journal.
        states.update({key: run.state for key, run in self._runs.items()})
        return list(states.values())

    # Life.

    async def recover(self) -> None:
        """End what an earlier agent process left, and report it."""
        before = self._exit.before
        await recover(self._journal, self._host, self._metrics, self._notify, before)

    async def run(self) -> None:
        """Own the runs until `drain` has ended them all. Runs can be submitted from its start."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            reaper = group.create_task(self._reap(), name="reaper")
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                reaper.cancel()

    async def drain(self, seconds: float) -> None:
        """Take no more runs; let those there are end, and after so long end them."""
        self._stopping = True
        if self._runs:
            log.info("waiting for runs to end", runs=len(self._runs), seconds=seconds)
        if not await self._wait_for_none(seconds):
            for run in list(self._runs.values()):
                run.end(Cause.STOP)
            if not await self._wait_for_none(
                self._host.place.grace + KILL_SECONDS + DRAIN_SECONDS + 1
            ):
                log.error("runs did not end in time", runs=len(self._runs))

    async def _wait_for_none(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _reap(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(REAP_SECONDS)
            await self._reap_once(loop)

    async def _reap_once(self, loop: asyncio.AbstractEventLoop) -> None:
        ended = await loop.run_in_executor(
            self._host.threads, lambda: list(processes.ended_children())
        )
        self._metrics.reaped.inc(self._host.children.reap(ended))

    # One run.

    async def _carry_out(self, key: RunKey, run: _Run) -> None:
        try:
            if await self._take_place(run):
                self._metrics.runs_active.inc()
                try:
                    await self._execute(key, run)
                finally:
                    self._metrics.runs_active.dec()
                    self._places.release()
            else:
                await self._finish(key, run, NOT_BEGUN[run.stop.result()])
        finally:
            del self._runs[key]
            self._held -= 1
            if not self._runs:
                self._idle.set()

    async def _take_place(self, run: _Run) -> bool:
        """Wait for a place among those that run; False if the run is to be ended before."""
        acquire = asyncio.ensure_future(self._places.acquire())
        try:
            either: set[asyncio.Future[Any]] = {acquire, run.stop}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._count_queued(-1)
            if not acquire.done():
                acquire.cancel()
        if not run.stop.done():
            return True
        await asyncio.wait({acquire})
        if not acquire.cancelled():
            self._places.release()
        return False

    async def _execute(self, key: RunKey, run: _Run) -> None:
        now = time.time_ns()
        if policy.expired(run.command, now):
            await self._finish(key, run, policy.expiry(run.command, now))
            return
        if policy.kind_of(run.command) in policy.LEAVING:
            await self._go(key, run)
            return

        async def on_start(started: Started | None) -> None:
            run.state = advance(run.state, pb.RUN_PHASE_RUNNING)
            run.state.started_unix_nanos = time.time_ns()
            process = Process(started.pid, started.start, self._boot) if started else None
            log.info(
                "run started",
                run=str(key),
                task=f"{run.command.namespace}/{run.command.name}",
                kind=policy.kind_of(run.command),
                pid=started.pid if started else None,
            )
            try:
                await self._journal.update_run(run.state, process)
            except StorageError as error:
                # Its acceptance is on disk, and its processes bear its mark: good enough.
                log.warning("the start of a run could not be noted", run=str(key), error=str(error))
            self._notify(run.state)

        try:
            result = await execute(run.command, self._host, stop=run.stop, on_start=on_start)
        except Exception:  # a fault of ours in one run must not end all others
            log.exception("run failed inside the agent", run=str(key))
            text = "a fault in the agent; its log has the details"
            await self._finish(key, run, Outcome(pb.RUN_PHASE_FAILED, "InternalError", text))
            return
        await self._settle_result(key, run, with_result(run.state, result))

    async def _go(self, key: RunKey, run: _Run) -> None:
        """Restart or shut down. The run's end is the agent's, which is noted before it begins."""
        shutdown = policy.kind_of(run.command) == policy.SHUTDOWN
        reason = leaving.SHUTTING_DOWN if shutdown else leaving.RESTARTING
        run.state = advance(run.state, pb.RUN_PHASE_RUNNING, reason=reason)
        run.state.started_unix_nanos = time.time_ns()
        try:
            await self._journal.update_run(run.state)
            if shutdown:
                await self._exit.keep_away(str(key))
        except (StorageError, OSError) as error:
            text = f"the agent stays, for it cannot note on disk that it goes: {error}"
            await self._finish(key, run, Outcome(pb.RUN_PHASE_FAILED, "StateUnavailable", text))
            return
        self._stopping = True
        self._notify(run.state)
        log.info("leaving as a run says", run=str(key), kind=policy.kind_of(run.command))
        if not shutdown:
            self._exit.restart()
            return
        text = "shut down until its Pod is made anew"
        state = ended(run.state, Outcome(pb.RUN_PHASE_SUCCEEDED, "", text), time.time_ns())
        state.exit_code = 0
        await self._settle_result(key, run, state)
        await self._exit.shut_down(key)

    async def _finish(self, key: RunKey, run: _Run, outcome: Outcome) -> None:
        """Keep and report the end of a run that has no result but its outcome."""
        await self._settle_result(key, run, ended(run.state, outcome, time.time_ns()))

    async def _settle_result(self, key: RunKey, run: _Run, state: pb.RunState) -> None:
        """Keep and report a final state; one that the disk does not take is reported first."""
        run.state = state
        backoff = Backoff(0.5, 10.0)
        while True:
            try:
                await self._journal.update_run(state)
                break
            except StorageError as error:
                if not backoff.failures:
                    log.warning("a result could not be stored", run=str(key), error=str(error))
                    self._notify(state)
                if self._stopping:
                    break
                await asyncio.sleep(backoff.next())
        self._notify(state)
        seconds = (state.finished_unix_nanos - state.started_unix_nanos) / 1e9
        if state.started_unix_nanos:
            self._metrics.run_seconds.observe(seconds)
        self._metrics.runs.labels(phase_name(state.phase)).inc()
        self._metrics.run_output_bytes.inc(state.output_bytes)
        log.info(
            "run ended",
            run=str(key),
            phase=phase_name(state.phase),
            reason=state.reason,
            exit_code=state.exit_code if state.HasField("exit_code") else None,
            seconds=round(seconds, 3) if state.started_unix_nanos else 0,
        )
