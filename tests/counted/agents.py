"""A process with a few agents that count: real store, recorder and uplink, and a made-up load.

Why it exists: "nothing accepted is lost" can only be checked by somebody who knows what was
accepted. Each record here has an id of its own, and the id is written to a file after the store has
said that the record's batch is on disk, never before; the file outlives a kill -9. It must not help
the agent: what it adds is the load, the notes, and a status.

    python -m counted.agents SETTINGS.json
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from outrider_agent.core.batching import BatchLimits
from outrider_agent.core.effects import Welcomed
from outrider_agent.core.records import RecordClass
from outrider_agent.core.runs import RunKey
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings import ServerSettings
from outrider_agent.store.outbox import NewBatch
from outrider_agent.store.recorder import Recorder, RecorderOptions
from outrider_agent.store.store import Store, StoreLimits, open_store
from outrider_agent.uplink.uplink import Identity, Uplink
from outrider_proto import records
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime import logs
from outrider_runtime.metrics import new_registry

#: Of every so many records one is a result, which goes before the others.
RESULTS = 10
#: Records are made in ticks of so many seconds.
TICK_SECONDS = 0.1
MIB = 1024 * 1024
#: Ends an id in the file of accepted ones: an id without it was not written to its end.
END = ";"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One agent: its node, its folder, and the file with its token."""

    node: str
    state: str
    token_file: str


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What one process is told.

    Attributes:
        target: gateways, as for the real agent.
        ca_file: issuers of their certificates.
        server_name: name in their certificates.
        load_file: records are made while this file is there.
        accepted_file: ids of accepted records, one a line; added to.
        status_file: where the status is written, as JSON, a few times a second.
        rate: records a second and agent.
        relaxed: whether batches may be synced a moment after they were accepted; a kill must not
            matter then either.
        max_outbox_bytes: of each agent.
        members: the agents.
    """

    target: str
    ca_file: str
    server_name: str
    load_file: str
    accepted_file: str
    status_file: str
    rate: float
    relaxed: bool = False
    max_outbox_bytes: int = 256 * MIB
    members: list[Member]


class Notes:
    """The ids of accepted records, in a file that a kill does not take away."""

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(self._descriptor, b"\n")  # a kill may have left half a line
        self.count = 0

    def add(self, ids: Sequence[str]) -> None:
        """Note that these were accepted; in the file when this returns."""
        data = "".join(f"{one}{END}\n" for one in ids).encode()
        while data:
            data = data[os.write(self._descriptor, data) :]
        self.count += len(ids)


def note_appends(store: Store, notes: Notes) -> None:
    """Have what a store accepts noted, before its recorder learns that it was."""
    append = store.append_batches

    async def noting(news: Sequence[NewBatch]) -> list[Any]:
        results: list[Any] = list(await append(news))
        for new, result in zip(news, results, strict=True):
            if not isinstance(result, Exception):
                content = pb.RecordList.FromString(b"".join(new.held.entries))
                notes.add([found for r in content.records if (found := id_of(r))])
        return results

    store.append_batches = noting  # type: ignore[method-assign]  # nobody else needs a hook there


def id_of(record: pb.EncodedRecord) -> str:
    """The id of a record of the load; empty for those that agents make by themselves."""
    if record.data_type not in (records.AGENT_LOG, records.TASK_OUTPUT):
        return ""
    return records.fields_of(record).get("id", "")


class NoRuns:
    """Nothing is ever run."""

    async def submit(self, commands: Sequence[pb.RunCommand]) -> None:
        """Nobody sends any."""

    async def cancel(self, keys: Sequence[RunKey]) -> None:
        """There is none."""

    async def acknowledge(self, keys: list[RunKey]) -> None:
        """There is none."""

    async def foreign(self, task: pb.Task) -> None:
        """Nothing here is shut down."""

    async def report(self) -> list[pb.RunState]:
        """None."""
        return []


class Agent:
    """One agent's parts, and its load."""

    def __init__(self, member: Member, settings: Settings, store: Store, notes: Notes) -> None:
        self._member = member
        self._settings = settings
        self.store = store
        self.metrics = AgentMetrics(new_registry())
        options = RecorderOptions(BatchLimits(0.1, 512 * 1024), pb.CODEC_ZSTD)
        note_appends(store, notes)
        self.recorder = Recorder(store, options, self.metrics)
        server = ServerSettings(
            target=settings.target,
            ca_file=settings.ca_file,
            server_name=settings.server_name,
            token_file=member.token_file,
            dial_timeout_seconds=2.0,
            backoff_base_seconds=0.1,
            backoff_cap_seconds=2.0,
        )
        hello = pb.Hello(
            node=member.node,
            version="0.1.0-counted",
            instance=secrets.token_hex(8),
            started_unix=int(time.time()),
            platform="linux/amd64",
            kernel="6.1.0",
        )
        envelope = pb.PackagedData(hostname=member.node, version="0.1.0", product="outrider-agent")
        self.connected = False
        self.uplink = Uplink(
            server, Identity(hello, envelope), store, self.metrics, self._set_connected
        )
        store.on_append = self.uplink.batch_appended
        self.uplink.on_welcome = self._take_terms
        self.made = 0

    def _set_connected(self, connected: bool, problem: str) -> None:
        self.connected = connected

    def _take_terms(self, terms: Welcomed) -> None:
        self.recorder.set_max_batch_bytes(terms.max_batch_bytes)
        self.recorder.set_groups(terms.groups)

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.recorder.run())
            group.create_task(self.store.watch())
            group.create_task(self.uplink.run(NoRuns()))
            group.create_task(self._load())

    async def _load(self) -> None:
        """Make records while the file is there."""
        # Of this process: a number would be given out again after a kill.
        instance = secrets.token_hex(6)
        load = Path(self._settings.load_file)
        owed = random.random()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if not load.exists():
                continue
            owed += self._settings.rate * TICK_SECONDS
            while owed >= 1:
                owed -= 1
                await self._make(f"{self._member.node}/{instance}/{self.made}")
                self.made += 1

    async def _make(self, name: str) -> None:
        result = self.made % RESULTS == 0
        filling = random.randbytes(random.randrange(20, 700)).hex()[: random.randrange(20, 1200)]
        record = records.payload(
            records.TASK_OUTPUT if result else records.AGENT_LOG,
            int(time.time()),
            {"id": name, "text": f"load {name} {filling}"},
        )
        await self.recorder.put(record, RecordClass.RESULT if result else RecordClass.LOG)


def write_status(file: Path, agents: Sequence[Agent], notes: Notes, *, loaded: bool) -> None:
    """Put the status where it is read, whole."""
    status = {
        "pid": os.getpid(),
        "loaded": loaded,
        "made": sum(agent.made for agent in agents),
        "accepted": notes.count,
        "waiting": sum(agent.store.backlog.batches for agent in agents),
        "connected": sum(agent.connected for agent in agents),
        "agents": len(agents),
    }
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(status))
    fresh.replace(file)


@contextlib.asynccontextmanager
async def all_agents(settings: Settings, notes: Notes) -> AsyncIterator[list[Agent]]:
    """The agents, on their files."""
    limits = StoreLimits(
        max_outbox_bytes=settings.max_outbox_bytes,
        tombstone_seconds=3600,
        max_tombstones=100,
        relaxed=settings.relaxed,
    )
    async with contextlib.AsyncExitStack() as stack:
        agents = []
        for member in settings.members:
            metrics = AgentMetrics(new_registry())
            folder = Path(member.state)
            folder.mkdir(parents=True, exist_ok=True)
            store = await stack.enter_async_context(open_store(folder, limits, metrics))
            agents.append(Agent(member, settings, store, notes))
        yield agents


async def run_all(settings: Settings) -> None:
    """All agents of this process, until it is killed."""
    notes = Notes(Path(settings.accepted_file))
    load = Path(settings.load_file)
    async with all_agents(settings, notes) as agents, asyncio.TaskGroup() as group:
        for agent in agents:
            group.create_task(agent.run())
        while True:
            write_status(Path(settings.status_file), agents, notes, loaded=load.exists())
            await asyncio.sleep(TICK_SECONDS)


def main() -> int:
    """Read the settings and run."""
    settings = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Settings)
    logs.configure("info", "json")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_all(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
