"""What the agent costs its node: the real program, connected, idle and with a load.

    agent_program.py MODULE ARGUMENT...

is the real agent with one collector more, which hands over records at the rate in the environment
variable BENCH_RECORDS_RATE, made before it begins. What the load itself takes is in the figures.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Coroutine
from typing import Any

from cluster.programs import Program
from cluster.progress import Steps
from cluster.supervised import wait_for
from outrider_agent import main as program
from outrider_agent.core.records import RecordClass
from records.content import Content
from records.stage import Stage
from swarm import measure

#: What Python is told before the agent's module, to run it with a load.
LOADED = __file__
RATE_VARIABLE = "BENCH_RECORDS_RATE"
RATES = (1000, 5000, 20_000)
TICK_SECONDS = 0.1
#: The bounds of docs/performance.md.
MOST_IDLE_MIB, MOST_IDLE_PERCENT = 60.0, 0.5
MOST_CORES_AT_20000 = 0.5
SETTLE_SECONDS = 10.0
#: The agent's metric of records that went to a server, and the share of the load it must have sent.
SENT, KEPT = "outrider_agent_sent_records_total", 0.9
MIB = 1024 * 1024


class LoadedAgent(program._Agent):  # noqa: SLF001 - there is no other way to add a collector
    """The real agent with a collector that makes load."""

    def _collectors(self, *given: Any) -> list[tuple[str, Coroutine[Any, Any, None]]]:
        return [
            *super()._collectors(*given),
            ("load", self._load(float(os.environ[RATE_VARIABLE]))),
        ]

    async def _load(self, rate: float) -> None:
        content = Content(seed=0)
        made = [content.record() for _ in range(2000)]
        place, owed, before = 0, 0.0, time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            owed, before = owed + rate * (now - before), now
            while owed >= 1:
                owed -= 1
                place = (place + 1) % len(made)
                await self.recorder.put(made[place], RecordClass.LOG)


def measure_agent(
    stage: Stage, report: measure.Report, steps: Steps, idle_seconds: float, load_seconds: float
) -> None:
    """Run the agent without and with load, and report CPU and memory.

    Args:
        stage: with a server that runs.
        report: where figures go.
        steps: where progress is shown.
        idle_seconds: how long it is looked at without load.
        load_seconds: and with it, at each rate.
    """
    agent = stage.programs.agent("bench-agent", overrides={"log": {"level": "warning"}})
    with steps.step(f"the agent, idle for {idle_seconds:.0f} s"):
        _run(stage, agent, 0)
        cores, memory, _ = _look(stage, agent, idle_seconds)
        stage.processes.stop(agent.name, 30)
    report.line("agent, idle", cpu_percent=round(100 * cores, 2), rss_mib=round(memory, 1))
    report.bound("agent, idle: memory", memory, "MiB", MOST_IDLE_MIB)
    report.bound("agent, idle: CPU", 100 * cores, "% of a core", MOST_IDLE_PERCENT)
    for rate in RATES:
        with steps.step(f"the agent at {rate} records a second"):
            _run(stage, agent, rate)
            cores, memory, sent = _look(stage, agent, load_seconds)
            stage.processes.stop(agent.name, 30)
        if sent < KEPT * rate:
            raise RuntimeError(f"the agent sent {sent:.0f} records a second of {rate}")
        each = cores * 1000 / sent
        report.line(
            "agent, loaded",
            records_per_second=rate,
            sent_per_second=round(sent),
            cores=round(cores, 3),
            cores_per_1000_records=round(each, 4),
            rss_mib=round(memory, 1),
        )
        report.bound(
            f"agent, {rate} records/s: CPU per 1,000 records/s",
            100 * each,
            "% of a core",
            # The bound is one of many records: what is paid by the second weighs less there.
            100 * MOST_CORES_AT_20000 / 20 if rate >= 20_000 else None,
        )


def _run(stage: Stage, agent: Program, rate: int) -> None:
    """Start the agent and leave it to find its pace."""
    os.environ[RATE_VARIABLE] = str(rate)
    stage.programs.start(agent, through=[LOADED] if rate else ["-m"])
    time.sleep(SETTLE_SECONDS)


def _look(stage: Stage, agent: Program, seconds: float) -> tuple[float, float, float]:
    """Cores used, MiB resident, and records sent a second."""
    pid = stage.pid(agent.name)
    sent = measure.metric(agent, SENT)
    before, began = measure.cpu([pid]), time.monotonic()
    wait_for("time passes", lambda: time.monotonic() - began >= seconds, seconds + 30, 0.5)
    took = time.monotonic() - began
    cores = (measure.cpu([pid]) - before) / took
    return cores, measure.rss(pid) / MIB, (measure.metric(agent, SENT) - sent) / took


def main() -> int:
    """Be the agent; the first argument is the name of its module, as for `python -m`."""
    program._Agent = LoadedAgent  # type: ignore[misc]  # noqa: SLF001 - see above
    return program.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
