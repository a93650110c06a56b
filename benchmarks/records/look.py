"""Looks at running processes and at the topic: rates, CPU by thread, memory, latencies.

Reads only; starts and decides nothing.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from outrider_proto import batches
from outrider_proto.records import decode_message, fields_of
from records.load import STAMP
from records.stage import TOPIC, Load, Stage
from swarm import measure

READ_SECONDS = 300.0
MIB = 1024 * 1024
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Window:
    """What happened in a stretch of time, per second.

    Attributes:
        seconds: its length.
        records, batches, bytes: acknowledged, a second.
        cpu: CPU seconds of the gateway, a second.
        parts: CPU seconds by part, a second.
        rss: of the gateway at its end, bytes.
    """

    seconds: float
    records: float
    batches: float
    bytes: float
    cpu: float
    parts: dict[str, float]
    rss: int

    @property
    def records_per_cpu_second(self) -> float:
        """Records acknowledged for each CPU-second of the gateway."""
        return self.records / self.cpu if self.cpu else 0.0

    def figures(self) -> dict[str, Any]:
        """For a report."""
        return {
            "seconds": round(self.seconds, 2),
            "records_per_second": round(self.records),
            "batches_per_second": round(self.batches),
            "mib_per_second": round(self.bytes / MIB, 1),
            "records_per_cpu_second": round(self.records_per_cpu_second),
            "gateway_cores": round(self.cpu, 3),
            **{f"{name}_cores": round(value, 3) for name, value in self.parts.items()},
            "gateway_rss_mib": round(self.rss / MIB, 1),
        }


def window(stage: Stage, load: Load, server: int, seconds: float) -> Window:
    """Look at a load for a while.

    Args:
        stage: where it runs.
        load: under way.
        server: process id of the gateway.
        seconds: how long.
    """
    spent = measure.Spent({"gateway": [server], "load": load.pids(), "kafka": [stage.kafka_pid()]})
    # The tallies are a moment old, so that their own clock counts for them.
    before, began = load.status(), load.at
    time.sleep(seconds)
    after, ended = load.status(), load.at
    figures = spent.figures()
    wall = figures["wall_seconds"]
    took = ended - began
    rates = {
        name: (after[name] - before[name]) / took
        for name in ("acked_records", "acked_batches", "acked_bytes")
    }
    return Window(
        seconds=wall,
        records=rates["acked_records"],
        batches=rates["acked_batches"],
        bytes=rates["acked_bytes"],
        cpu=figures["cpu_gateway_seconds"] / wall,
        parts={name: figures[f"cpu_{name}_seconds"] / wall for name in ("load", "kafka", "other")},
        rss=measure.rss(server),
    )


def threads(pid: int) -> dict[str, float]:
    """CPU seconds of a process so far, by the name of its threads."""
    found: dict[str, float] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip() if task.name != str(pid) else "main"
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        found[name] = found.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / _TICKS
    return found


@dataclass(frozen=True)
class Memory:
    """The gateway's memory over time.

    Attributes:
        base: before the load, bytes.
        samples: resident set sizes under load, bytes, evenly spaced.
        seconds: how long it was looked at.
    """

    base: int
    samples: Sequence[int]
    seconds: float

    @property
    def most(self) -> int:
        """The largest."""
        return max(self.samples)

    @property
    def growth(self) -> float:
        """Bytes a minute in the second half: by how much the line through it rises."""
        half = self.samples[len(self.samples) // 2 :]
        step = self.seconds / len(self.samples)
        slope = statistics.linear_regression([n * step for n in range(len(half))], half).slope
        return slope * 60


def memory(pid: int, base: int, seconds: float, tell: Callable[[int], None]) -> Memory:
    """Watch the memory of a process; `tell` is called with each sample."""
    samples: list[int] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        samples.append(measure.rss(pid))
        tell(samples[-1])
        time.sleep(1.0)
    return Memory(base, samples, seconds)


@dataclass(frozen=True)
class Latencies:
    """From the making of records to their place in Kafka, milliseconds."""

    values: Sequence[float]

    def percentile(self, part: float) -> float:
        """Such as 0.99."""
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


def topic_ends(bootstrap: str) -> dict[TopicPartition, int]:
    """Where the topic ends; also how many messages it was ever given."""
    return asyncio.run(_with_consumer(bootstrap, None)) or {}


def latencies(bootstrap: str, begin: dict[TopicPartition, int]) -> Latencies:
    """Of all stamped records in the topic from some offsets on.

    Raises:
        TimeoutError: it takes too long to read.
    """
    values: list[float] = []
    asyncio.run(_with_consumer(bootstrap, begin, values))
    return Latencies(values)


async def _with_consumer(
    bootstrap: str, begin: dict[TopicPartition, int] | None, values: list[float] | None = None
) -> dict[TopicPartition, int]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    async with asyncio.timeout(READ_SECONDS):
        await admin.start()
        await consumer.start()
        try:
            (topic,) = await admin.describe_topics([TOPIC])
            partitions = [TopicPartition(TOPIC, p["partition"]) for p in topic["partitions"]]
            if not partitions:
                return {}
            consumer.assign(partitions)
            ends = dict(await consumer.end_offsets(partitions))
            if begin is not None and values is not None:
                await _read(consumer, begin, ends, values)
            return ends
        finally:
            await consumer.stop()
            await admin.close()


async def _read(
    consumer: AIOKafkaConsumer,
    begin: dict[TopicPartition, int],
    ends: dict[TopicPartition, int],
    values: list[float],
) -> None:
    for partition in ends:
        consumer.seek(partition, begin.get(partition, 0))
    while left := [p for p in ends if await consumer.position(p) < ends[p]]:
        for messages in (await consumer.getmany(*left, timeout_ms=500)).values():
            for message in messages:
                for record in decode_message(message.headers, message.value).records:
                    made = _stamp(record)
                    if made:
                        values.append(message.timestamp - made / 1e6)


def _stamp(record: Any) -> int:
    try:
        return int(fields_of(record).get(STAMP, "0"))
    except batches.BatchError:
        return 0
