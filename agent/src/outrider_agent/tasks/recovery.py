"""Ends what an earlier agent process left, before a new one takes anything.

Its processes are ended by their mark, its runs are ended in the journal: as interrupted, or as what
they are where the agent's own end was the run's work.
"""

import asyncio
import time
from collections.abc import Callable

from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.core import leaving
from outrider_agent.core.leaving import Absence
from outrider_agent.core.outcome import Outcome, ended
from outrider_agent.core.runs import RunKey, key_of, phase_name
from outrider_agent.core.storage import Journal, Unfinished
from outrider_agent.metrics import AgentMetrics
from outrider_agent.tasks import processes
from outrider_agent.tasks.execution import Host
from outrider_agent.tasks.placing import clear_scripts

log = get_logger("outrider.tasks")

#: How long the processes of an earlier agent are killed again and again, seconds.
RECOVER_SECONDS = 10.0


async def recover(
    journal: Journal,
    host: Host,
    metrics: AgentMetrics,
    notify: Callable[[pb.RunState], None],
    absence: Absence | None,
) -> None:
    """End what an earlier agent process left.

    Args:
        journal: Where its runs are.
        host: Where they took place.
        metrics: Counts them.
        notify: Told of each.
        absence: What the marker of a Shutdown told.

    Raises:
        StorageError: The journal cannot be read or written.
    """
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(host.threads, clear_scripts, host.place.work_directory)
    for left in await journal.unfinished_runs():
        key = key_of(left.state.id)
        outcome = leaving.outcome_after(left.state, str(key), absence)
        if outcome is None:
            gone = await loop.run_in_executor(host.threads, _end_left, key, left, host.place.node)
            outcome = _interrupted(gone)
        state = ended(left.state, outcome, time.time_ns())
        if state.phase == pb.RUN_PHASE_SUCCEEDED:
            state.exit_code = 0
        await journal.update_run(state)
        metrics.runs.labels(phase_name(state.phase)).inc()
        log.warning(
            "run of an earlier agent ended",
            run=str(key),
            phase=phase_name(state.phase),
            detail=state.message,
        )
        notify(state)


def _interrupted(gone: bool) -> Outcome:
    return Outcome(
        pb.RUN_PHASE_INTERRUPTED,
        "AgentRestarted",
        "the agent ended before the run did; its processes were ended"
        + ("" if gone else ", but for some that do not go away"),
    )


def _end_left(key: RunKey, left: Unfinished, node: str) -> bool:
    leader = None
    process = left.process
    if process and processes.same_process(process.pid, process.start, process.boot_id):
        leader = process.pid
    mark = processes.mark_for(key, node)
    return processes.kill_all(mark, leader, seconds=RECOVER_SECONDS, below=None)
