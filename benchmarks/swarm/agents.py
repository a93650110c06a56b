"""A process full of agents: the real agent's uplink, its stream and its protocol, and no more.

Why it exists: thousands of agents as processes of their own would need a hundred times the memory
of what they measure. Each agent in here has its own TLS connection, its own token and its own
stream, finds and loses servers as the real one does (the very code of it), and answers to runs as
the real one would: accepted, running, succeeded with a line of output; and to configurations:
applying, applied or failed. It must not execute or apply anything, and keeps its journal in memory.

    python -m swarm.agents SETTINGS.json
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import uvloop
from outrider_agent.core.records import RecordClass
from outrider_agent.core.runs import RunKey, accepted, advance, is_final, key_of, tombstone
from outrider_agent.core.storage import Backlog, Waiting
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings import ServerSettings
from outrider_agent.uplink.uplink import Identity, Uplink
from outrider_proto.effective import unpack
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime import logs
from outrider_runtime.metrics import new_registry

OUTPUT = b"6.1.0-18-amd64\n"
#: Time between two looks at how the agents do, seconds.
STATUS_SECONDS = 0.25


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One agent: its node, and the file with its token."""

    node: str
    token_file: str


class SwarmSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What one process is told.

    Attributes:
        target: gateways, as for the real agent.
        ca_file: issuers of their certificates.
        server_name: name in their certificates.
        status_file: where `Tally` is written, as JSON, a few times a second.
        start_seconds: the agents start spread over this time.
        begin_seconds: time from accepting a run to its start, at most.
        run_seconds: time from its start to its end, at most.
        config_seconds: time to put a configuration into force, at most.
        config_failures: share of the agents that refuse every configuration but the first.
        members: the agents.
    """

    target: str
    ca_file: str
    server_name: str
    status_file: str
    start_seconds: float
    begin_seconds: float
    run_seconds: float
    config_seconds: float = 0.2
    config_failures: float = 0.0
    members: list[Member]


@dataclass
class Tally:
    """How the agents of one process do.

    Attributes:
        connected: agents a server has welcomed.
        connects: welcomes in all.
        executed: attempts begun.
        repeated: attempts that were sent again; each is answered with its state and not begun.
        finished: attempts that ended.
        acknowledged: results that servers have acknowledged.
        configs: configurations that were sent.
        applied: configurations put into force.
    """

    connected: int = 0
    connects: int = 0
    executed: int = 0
    repeated: int = 0
    finished: int = 0
    acknowledged: int = 0
    configs: int = 0
    applied: int = 0
    problems: dict[str, int] = field(default_factory=dict)

    def problem(self, text: str) -> None:
        """Count a reason for not being connected, of at most twenty different ones."""
        text = _TIMES.sub("N s", text)
        if text in self.problems or len(self.problems) < 20:
            self.problems[text] = self.problems.get(text, 0) + 1


#: The time to come back at differs from one refusal to the next.
_TIMES = re.compile(r"\d+(\.\d+)? s\b")


class NoOutbox:
    """An outbox that nothing is ever put into."""

    epoch = 1
    last_seq = 0
    backlog = Backlog(0, 0)

    async def batches_after(
        self,
        seq: int,
        limit: int,
        *,
        upto: int | None = None,
        classes: Collection[RecordClass] | None = None,
        at_least_one: bool = False,
    ) -> list[Waiting]:
        """Nothing waits."""
        return []

    async def split_batch(self, epoch: int, seq: int, max_bytes: int) -> int:
        """There is none."""
        return 0

    async def ack_batches(self, epoch: int, first: int, last: int) -> int:
        """Nothing was sent."""
        return 0


class PretendedRuns:
    """The runs of one agent: they take their time and print a line, but no process is started.

    Args:
        settings: how long they take.
        tally: of the process.
        changed: told each new state; the uplink.
    """

    def __init__(
        self, settings: SwarmSettings, tally: Tally, changed: Callable[[pb.RunState], None]
    ) -> None:
        self._settings = settings
        self._tally = tally
        self._changed = changed
        self._states: dict[RunKey, pb.RunState] = {}
        self._buried: dict[RunKey, pb.RunState] = {}
        self._loop = asyncio.get_running_loop()

    async def submit(self, commands: Sequence[pb.RunCommand]) -> None:
        """Take runs; of a known one tell the state."""
        for command in commands:
            key = key_of(command.id)
            known = self._states.get(key) or self._buried.get(key)
            if known is not None:
                self._tally.repeated += 1
                self._changed(known)
                continue
            self._tally.executed += 1
            self._note(accepted(command.id))
            self._later(self._settings.begin_seconds, self._begin, key)

    async def cancel(self, keys: Sequence[RunKey]) -> None:
        """End runs early."""
        for key in keys:
            state = self._states.get(key)
            if state is not None and not is_final(state):
                self._end(key, pb.RUN_PHASE_CANCELLED)

    async def acknowledge(self, keys: list[RunKey]) -> None:
        """Forget results but for a tombstone."""
        for key in keys:
            state = self._states.pop(key, None)
            if state is not None:
                self._tally.acknowledged += 1
                self._buried[key] = tombstone(state)

    async def foreign(self, task: pb.Task) -> None:
        """Nothing here is shut down."""

    async def report(self) -> list[pb.RunState]:
        """The states of all runs whose result was not acknowledged yet."""
        return list(self._states.values())

    def _later(self, most: float, call: Callable[[RunKey], None], key: RunKey) -> None:
        self._loop.call_later(random.uniform(0, most), call, key)

    def _begin(self, key: RunKey) -> None:
        state = self._states.get(key)
        if state is None or is_final(state):
            return
        after = advance(state, pb.RUN_PHASE_RUNNING)
        after.started_unix_nanos = time.time_ns()
        self._note(after)
        self._later(self._settings.run_seconds, self._succeed, key)

    def _succeed(self, key: RunKey) -> None:
        state = self._states.get(key)
        if state is not None and not is_final(state):
            self._end(key, pb.RUN_PHASE_SUCCEEDED)

    def _end(self, key: RunKey, phase: pb.RunPhase.ValueType) -> None:
        after = advance(self._states[key], phase)
        after.finished_unix_nanos = time.time_ns()
        if phase == pb.RUN_PHASE_SUCCEEDED:
            after.exit_code = 0
            after.preview = OUTPUT
            after.output_bytes = len(OUTPUT)
        self._tally.finished += 1
        self._note(after)

    def _note(self, state: pb.RunState) -> None:
        self._states[key_of(state.id)] = state
        self._changed(state)


class PretendedConfig:
    """The configuration of one agent: opened and checked as the real one does, and then in force.

    Args:
        settings: how long that takes, and how many refuse.
        tally: of the process.
        changed: called when there is something to report; the uplink.
    """

    def __init__(self, settings: SwarmSettings, tally: Tally, changed: Callable[[], None]) -> None:
        self._settings = settings
        self._tally = tally
        self._changed = changed
        self._report = pb.ConfigReport(phase=pb.CONFIG_PHASE_NONE)
        self._refuses = random.random() < settings.config_failures
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, config: pb.EffectiveConfig) -> None:
        """A server asks for this one."""
        self._tally.configs += 1
        unpack(config)
        if self._timer is not None:
            self._timer.cancel()
        self._report.tried_hash = config.hash
        self._report.phase = pb.CONFIG_PHASE_APPLYING
        self._changed()
        delay = random.uniform(0, self._settings.config_seconds)
        self._timer = asyncio.get_running_loop().call_later(delay, self._end, config.hash)

    def answered(self) -> None:
        """Nothing failed at the start."""

    def report(self) -> pb.ConfigReport:
        """How it stands."""
        return self._report

    def _end(self, digest: str) -> None:
        if self._refuses and self._report.hash:
            self._report.phase, self._report.message = pb.CONFIG_PHASE_FAILED, "as it was told to"
        else:
            self._report.phase, self._report.hash = pb.CONFIG_PHASE_APPLIED, digest
            self._report.message = ""
            self._tally.applied += 1
        self._changed()


class Connection:
    """Counts in a tally whether one agent is connected."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._connected = False

    def __call__(self, connected: bool, problem: str) -> None:
        """As the uplink tells it."""
        self._tally.connected += connected - self._connected
        self._tally.connects += connected and not self._connected
        self._connected = connected
        if problem and problem != "not connected yet":
            self._tally.problem(problem.partition(": ")[2][:120] or problem)


async def run_member(
    member: Member, settings: SwarmSettings, metrics: AgentMetrics, tally: Tally
) -> None:
    """One agent, for ever."""
    await asyncio.sleep(random.uniform(0, settings.start_seconds))
    hello = pb.Hello(
        node=member.node,
        version="0.1.0-swarm",
        instance=f"{random.getrandbits(64):016x}",
        started_unix=int(time.time()),
        platform="linux/amd64",
        kernel="6.1.0-18-amd64",
        run_kinds=["command", "script", "builtin/Ping", "builtin/Facts"],
    )
    server = ServerSettings(
        target=settings.target,
        ca_file=settings.ca_file,
        server_name=settings.server_name,
        token_file=member.token_file,
    )
    envelope = pb.PackagedData(hostname=member.node, version="0.1.0-swarm", product="outrider")
    uplink = Uplink(server, Identity(hello, envelope), NoOutbox(), metrics, Connection(tally))
    uplink.config = PretendedConfig(settings, tally, uplink.config_changed)
    await uplink.run(PretendedRuns(settings, tally, uplink.run_changed))


def write_status(file: str, tally: Tally) -> None:
    """Put a tally where it is read, whole."""
    fresh = Path(file + ".new")
    fresh.write_text(json.dumps(asdict(tally)))
    fresh.replace(file)


async def run_all(settings: SwarmSettings) -> None:
    """All agents of this process, until it is killed."""
    tally, metrics = Tally(), AgentMetrics(new_registry())
    async with asyncio.TaskGroup() as group:
        for member in settings.members:
            group.create_task(run_member(member, settings, metrics, tally))
        frozen = False
        while True:
            write_status(settings.status_file, tally)
            if not frozen and tally.connected == len(settings.members):
                # What is measured is the server: the collector must not walk through thousands
                # of connections here again and again.
                gc.collect()
                gc.freeze()
                frozen = True
            await asyncio.sleep(STATUS_SECONDS)


def main() -> int:
    """Read the settings and run."""
    settings = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=SwarmSettings)
    logs.configure("error", "json")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_all(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
