"""One process of a plug-in: what it writes is read to its end, what it prints is logged.

A plug-in that writes faster than it may, or than records can be stored, is read later: its pipe
fills and it waits. Knows nothing of restarts, see `runner`.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.core.pacing import TokenBucket
from outrider_agent.core.plugin_wire import RESERVED_TYPES, Frames, MalformedError, record_of
from outrider_agent.core.plugins import Lines
from outrider_agent.core.records import RecordClass, RecordSink
from outrider_agent.metrics import AgentMetrics
from outrider_agent.plugins.pipes import ReadEnd, WriteEnd
from outrider_agent.plugins.spawning import Spawned
from outrider_agent.plugins.tasking import Tasks

log = get_logger("outrider.plugins")

#: Lines that a plug-in may print, per second, and the bytes it may print them in.
LINES_PER_SECOND: Final = 20
PRINTED_BYTES_PER_SECOND: Final = 256 * 1024
#: Longest line that is logged, bytes.
LINE_BYTES: Final = 1024
#: Between two messages of how many lines were not logged, seconds.
SUPPRESSED_SECONDS: Final = 10.0


@dataclass
class Counts:
    """What went through the pipes of a plug-in since the agent began."""

    records: int = 0
    bytes: int = 0
    tasks: int = 0
    task_bytes: int = 0


@dataclass(frozen=True)
class Surroundings:
    """What an instance needs of the agent.

    Attributes:
        sink: Takes its records.
        metrics: Counts them.
        records_per_second: Most of them; 0: no limit.
        bytes_per_second: The same in bytes.
    """

    sink: RecordSink
    metrics: AgentMetrics
    records_per_second: int
    bytes_per_second: int


@dataclass
class Fault:
    """What a plug-in did that it is ended for: a word and a sentence."""

    reason: str
    text: str


@dataclass
class Instance:
    """A running process of a plug-in.

    Attributes:
        name: The plug-in's.
        spawned: Its process and pipes.
        around: What it needs of the agent.
        counts: Where its records are counted.
        fault: Done when it is to be ended for what it did.
    """

    name: str
    spawned: Spawned
    around: Surroundings
    counts: Counts
    fault: asyncio.Future[Fault] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def __post_init__(self) -> None:
        self.pid = self.spawned.process.pid
        self.started = time.time()
        self._tasks_end = WriteEnd(self.spawned.tasks)
        self.tasks = Tasks(self.name, self._tasks_end)
        # Set once all its processes have ended: what is in the pipes then is all there will be.
        self._gone = asyncio.Event()
        self._broken = False
        self._records = asyncio.create_task(self._read_records(), name=f"records of {self.name}")
        self._prints = asyncio.create_task(self._read_prints(), name=f"prints of {self.name}")
        self._writer = asyncio.create_task(self.tasks.run(), name=f"tasks of {self.name}")
        for task in (self._records, self._prints, self._writer):
            task.add_done_callback(self._part_ended)

    def _part_ended(self, task: asyncio.Task[None]) -> None:
        """A fault of ours must not leave a plug-in that nobody reads."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.error("a fault of the agent in a plug-in", plugin=self.name, exc_info=error)
            self.blame("InternalError", f"a fault in the agent: {error}")

    def blame(self, reason: str, text: str) -> None:
        """Have it ended for something; the first fault counts."""
        if not self.fault.done():
            self.fault.set_result(Fault(reason, text))

    async def take_no_tasks(self, why: str) -> None:
        """Fail the tasks that are open, and close its end of tasks."""
        self.tasks.end(why)
        self._writer.cancel()
        await asyncio.wait([self._writer])
        self._tasks_end.close()

    async def finish(self, seconds: float) -> asyncio.Task[None] | None:
        """Read what is left, now that all its processes have ended.

        Args:
            seconds: How long to wait.

        Returns:
            None, or what is reading still because records cannot be stored: it ends by itself.
        """
        self._gone.set()
        await asyncio.wait([self._records, self._prints], timeout=seconds)
        if not self._prints.done():
            self._prints.cancel()
        return None if self._records.done() else self._records

    # Records.

    async def _read_records(self) -> None:
        pipe = ReadEnd(self.spawned.records)
        frames = Frames()
        around = self.around
        rates = (TokenBucket(around.records_per_second), TokenBucket(around.bytes_per_second))
        try:
            while True:
                await self._wait_for_turn(rates)
                gone = self._gone.is_set()
                data = pipe.read()
                if data == b"" or (data is None and gone):
                    break
                if data is None:
                    await pipe.readable(self._gone)
                    continue
                if self._broken:
                    continue  # only so that it does not hang in a write when it is to end
                await self._take(data, frames, rates)
                await asyncio.sleep(0)  # it may write without end: others have their turn
        finally:
            pipe.close()
        if frames.pending:
            around.metrics.plugin_faults.labels(self.name, "torn").inc()
            log.warning("plug-in ended in the midst of a record", plugin=self.name)

    async def _wait_for_turn(self, rates: tuple[TokenBucket, TokenBucket]) -> None:
        """Wait until it may be read; not once it has ended, for then there is little left."""
        now = time.monotonic()
        seconds = max(rate.opens_at(now) for rate in rates) - now
        if seconds <= 0 or self._gone.is_set() or self._broken:
            return
        self.around.metrics.plugin_throttled.labels(self.name).inc(seconds)
        try:
            async with asyncio.timeout(seconds):
                await self._gone.wait()
        except TimeoutError:
            return

    async def _take(
        self, data: bytes, frames: Frames, rates: tuple[TokenBucket, TokenBucket]
    ) -> None:
        messages = frames.feed(data)
        now = time.monotonic()
        rates[0].take(len(messages), now)
        rates[1].take(len(data), now)
        for message in messages:
            try:
                record = record_of(message)
            except MalformedError as error:
                self._break("record", str(error))
                return
            await self._pass_on(record, len(message))
        if frames.fault is not None:
            self._break("framing", frames.fault)

    async def _pass_on(self, record: pb.EncodedRecord, size: int) -> None:
        metrics = self.around.metrics
        if record.data_type in RESERVED_TYPES:
            metrics.plugin_faults.labels(self.name, "reserved_type").inc()
            self.blame(
                "ReservedType", f"it wrote a record of type {record.data_type}, the agent's own"
            )
            return
        self.tasks.answered(record)
        await self.around.sink.put(record, RecordClass.LOG)
        self.counts.records += 1
        self.counts.bytes += size
        metrics.plugin_records.labels(self.name).inc()
        metrics.plugin_bytes.labels(self.name).inc(size)

    def _break(self, kind: str, text: str) -> None:
        """Nothing of what follows can be made sense of."""
        self._broken = True
        self.around.metrics.plugin_faults.labels(self.name, kind).inc()
        self.blame("BadRecords", f"it wrote {text}")

    # What it prints.

    async def _read_prints(self) -> None:
        pipe = ReadEnd(self.spawned.prints)
        lines = Lines(LINE_BYTES)
        printed = _Printed(self.name, self.around.metrics)
        size = TokenBucket(PRINTED_BYTES_PER_SECOND)
        try:
            while True:
                wait = size.opens_at(time.monotonic()) - time.monotonic()
                if wait > 0 and not self._gone.is_set():
                    await asyncio.sleep(wait)
                gone = self._gone.is_set()
                data = pipe.read()
                if data == b"" or (data is None and gone):
                    break
                if data is None:
                    await pipe.readable(self._gone)
                    continue
                size.take(len(data), time.monotonic())
                printed.tell(lines.feed(data))
                await asyncio.sleep(0)
        finally:
            pipe.close()
        printed.tell(lines.flush(), last=True)


class _Printed:
    """Logs lines at a rate, and counts those beyond it."""

    def __init__(self, name: str, metrics: AgentMetrics) -> None:
        self._name = name
        self._metrics = metrics
        self._rate = TokenBucket(LINES_PER_SECOND)
        self._suppressed = 0
        self._told = float("-inf")

    def tell(self, lines: list[str], *, last: bool = False) -> None:
        """Log what may be logged."""
        now = time.monotonic()
        shown = 0
        for line in lines:
            if self._rate.open(now):
                self._rate.take(1, now)
                shown += 1
                log.info("plug-in says", plugin=self._name, line=line)
        self._suppressed += len(lines) - shown
        self._metrics.plugin_lines.labels(self._name, "logged").inc(shown)
        self._metrics.plugin_lines.labels(self._name, "suppressed").inc(len(lines) - shown)
        if self._suppressed and (last or now >= self._told + SUPPRESSED_SECONDS):
            log.warning("lines of a plug-in left out", plugin=self._name, lines=self._suppressed)
            self._suppressed, self._told = 0, now


#: Called when the state of a plug-in may have changed.
Changed = Callable[[], None]
