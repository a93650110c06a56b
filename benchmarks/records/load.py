"""A process full of agents that send records: the real agent's uplink on an outbox in memory.

Why it exists: what is measured is the gateway, so that the agents must cost as little as they can
while each has its own TLS connection, its own token and its own stream, and speaks the protocol by
the very code of the real agent. Batches are made before the load begins, each one different; only
their numbers are new when they are sent. It must not stand in for the cost of an agent: see
`records.agent_program`.

    python -m records.load SETTINGS.json
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop
from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import Backlog, Waiting
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings import ServerSettings
from outrider_agent.uplink.uplink import Identity, Uplink
from outrider_proto import batches
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime import logs
from outrider_runtime.metrics import new_registry
from records.content import Content
from swarm.agents import (
    Connection,
    Member,
    PretendedRuns,
    SwarmSettings,
    Tally,
    write_status,
)

STATUS_SECONDS = 0.25
#: A record waits so long for company, seconds; as the agent's default.
BATCH_SECONDS = 0.1
#: Most batches that are read from an outbox at once.
READ_BATCHES = 256
#: What a batch counts besides its records, bytes.
HEAD_BYTES = 64


class LoadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What one process is told.

    Attributes:
        target, ca_file, server_name: as for the real agent.
        status_file: where `LoadTally` is written, as JSON, a few times a second.
        start_seconds: the agents connect spread over this time.
        pool: different batches; each agent begins at another one.
        rate: records a second and agent; 0: as many as the windows take.
        go_file: records are sent while this file is there.
        seed: of the content.
        members: the agents.
    """

    target: str
    ca_file: str
    server_name: str
    status_file: str
    start_seconds: float
    pool: int
    rate: float
    go_file: str
    seed: int
    members: list[Member]


@dataclass
class LoadTally(Tally):
    """As the swarm's, and what was acknowledged.

    Attributes:
        at: time of the look, seconds of the machine's steady clock.
        acked_records, acked_batches, acked_bytes: what servers have acknowledged.
    """

    at: float = 0.0
    acked_records: int = 0
    acked_batches: int = 0
    acked_bytes: int = 0


class Pool:
    """Batches, made once."""

    def __init__(self, size: int, seed: int) -> None:
        content = Content(seed)
        self.batches = [content.batch() for _ in range(size)]
        self.records = [content.record() for _ in range(1000)]


class PoolOutbox:
    """An outbox that never runs empty, or holds what `add` was given; see core.storage.Outbox.

    It seems empty until `open` is set.
    """

    def __init__(self, pool: Pool, tally: LoadTally, *, endless: bool) -> None:
        self.epoch = random.getrandbits(62) + 1
        self._pool = pool.batches
        self._place = random.randrange(len(pool.batches))
        self._tally = tally
        self._endless = endless
        self._waiting: dict[int, Waiting] = {}
        self.last_seq = 0
        self.open = False

    @property
    def backlog(self) -> Backlog:
        """What waits."""
        return Backlog(0, len(self._waiting))

    def add(self, batch: pb.RecordBatch) -> None:
        """Put in a batch under the next number."""
        self.last_seq += 1
        batch.epoch, batch.seq = self.epoch, self.last_seq
        size = len(batch.records) + HEAD_BYTES
        self._waiting[self.last_seq] = Waiting(self.last_seq, size, batch)

    async def batches_after(
        self,
        seq: int,
        limit: int,
        *,
        upto: int | None = None,
        classes: Collection[RecordClass] | None = None,
        at_least_one: bool = False,
    ) -> list[Waiting]:
        """Batches above `seq`, at most `limit` bytes; made up as needed where it is endless."""
        found: list[Waiting] = []
        if not self.open or (classes is not None and RecordClass.TELEMETRY not in classes):
            return found
        number, size = seq, 0
        while len(found) < READ_BATCHES and (upto is None or number < upto):
            number += 1
            if number > self.last_seq:
                if not self._endless:
                    break
                self._make()
            item = self._waiting.get(number)
            if item is None:
                continue
            size += item.size
            if size > limit and (found or not at_least_one):
                break
            found.append(item)
        return found

    def _make(self) -> None:
        self._place = (self._place + 1) % len(self._pool)
        made = self._pool[self._place]
        batch = pb.RecordBatch(
            codec=made.codec,
            records=made.records,
            count=made.count,
            decompressed_bytes=made.decompressed_bytes,
            data_types=made.data_types,
            created_unix_nanos=time.time_ns(),
        )
        self.add(batch)

    async def split_batch(self, epoch: int, seq: int, max_bytes: int) -> int:
        """None is too large."""
        return 0

    async def ack_batches(self, epoch: int, first: int, last: int) -> int:
        """Forget and count batches."""
        count = 0
        for seq in range(first, last + 1):
            item = self._waiting.pop(seq, None)
            if item is not None:
                count += 1
                self._tally.acked_records += item.batch.count
                self._tally.acked_bytes += item.size
        self._tally.acked_batches += count
        return count


class Paced:
    """Makes the records of one agent at a steady rate and batches them as the agent does."""

    def __init__(
        self, pool: Pool, outbox: PoolOutbox, appended: Callable[[], None], rate: float
    ) -> None:
        self._pool = pool
        self._outbox = outbox
        self._appended = appended
        self._every = 1 / rate
        self._held: list[pb.EncodedRecord] = []
        self._loop = asyncio.get_running_loop()
        self._place = random.randrange(len(pool.records))
        self._next = 0.0

    def start(self) -> None:
        """Begin, each agent at a time of its own."""
        self._next = self._loop.time() + random.random()
        self._loop.call_at(self._next, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        if not self._held:
            self._loop.call_at(now + BATCH_SECONDS, self._close)
        self._held.append(self._record())
        self._next += self._every
        self._loop.call_at(self._next, self._tick)

    def _record(self) -> pb.EncodedRecord:
        self._place = (self._place + 1) % len(self._pool.records)
        made = self._pool.records[self._place]
        # Another field at the end of a Payload, without making it anew.
        stamp = pb.Payload(fields={STAMP: str(time.time_ns())}).SerializeToString()
        return pb.EncodedRecord(
            data_type=made.data_type, timestamp=int(time.time()), data=made.data + stamp
        )

    def _close(self) -> None:
        taken, self._held = self._held, []
        self._outbox.add(
            batches.encode(
                taken, epoch=1, seq=1, codec=pb.CODEC_ZSTD, created_unix_nanos=time.time_ns()
            )
        )
        self._appended()


#: Field with the time a record was made, nanoseconds since the Unix epoch.
STAMP = "made_unix_nanos"


async def run_member(
    member: Member,
    settings: LoadSettings,
    pool: Pool,
    metrics: AgentMetrics,
    tally: LoadTally,
    go: asyncio.Event,
) -> None:
    """One agent, for ever; sends records once `go` is set."""
    await asyncio.sleep(random.uniform(0, settings.start_seconds))
    hello = pb.Hello(
        node=member.node,
        version="0.1.0-swarm",
        instance=f"{random.getrandbits(64):016x}",
        started_unix=int(time.time()),
        platform="linux/amd64",
        kernel="6.1.0-18-amd64",
    )
    server = ServerSettings(
        target=settings.target,
        ca_file=settings.ca_file,
        server_name=settings.server_name,
        token_file=member.token_file,
    )
    envelope = pb.PackagedData(hostname=member.node, version="0.1.0-swarm", product="outrider")
    outbox = PoolOutbox(pool, tally, endless=not settings.rate)
    uplink = Uplink(server, Identity(hello, envelope), outbox, metrics, Connection(tally))
    async with asyncio.TaskGroup() as group:
        group.create_task(uplink.run(PretendedRuns(_nothing_runs(settings), tally, _ignore)))
        await go.wait()
        outbox.open = True
        if settings.rate:
            Paced(pool, outbox, uplink.batch_appended, settings.rate).start()
        else:
            uplink.batch_appended()


def _ignore(state: pb.RunState) -> None:
    """Nothing is run here."""


def _nothing_runs(settings: LoadSettings) -> SwarmSettings:
    return SwarmSettings(
        target=settings.target,
        ca_file=settings.ca_file,
        server_name=settings.server_name,
        status_file=settings.status_file,
        start_seconds=0,
        begin_seconds=0,
        run_seconds=0,
        members=[],
    )


async def run_all(settings: LoadSettings) -> None:
    """All agents of this process, until it is killed."""
    tally, metrics = LoadTally(), AgentMetrics(new_registry())
    pool = Pool(settings.pool, settings.seed)
    go = asyncio.Event()
    gc.collect()
    gc.freeze()
    async with asyncio.TaskGroup() as group:
        for member in settings.members:
            group.create_task(run_member(member, settings, pool, metrics, tally, go))
        frozen = False
        while True:
            tally.at = time.monotonic()
            write_status(settings.status_file, tally)
            if not go.is_set() and os.path.exists(settings.go_file):  # noqa: PTH110, ASYNC240 - memory
                go.set()
            if not frozen and tally.connected == len(settings.members):
                # As in the swarm: the collector must not walk through all connections.
                gc.collect()
                gc.freeze()
                frozen = True
            await asyncio.sleep(STATUS_SECONDS)


def main() -> int:
    """Read the settings and run."""
    settings = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=LoadSettings)
    logs.configure("error", "json")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_all(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
