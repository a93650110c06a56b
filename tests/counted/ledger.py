"""Compare what agents accepted with what arrived in Kafka, record by record.

Only counts: starts nothing and waits for nothing. What was accepted is read from the files of
`counted.agents`, what arrived from the topics, with a plain consumer.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from counted.agents import END, id_of
from outrider_proto.records import Decoded, decode_message

READ_SECONDS = 120.0
#: What a report shows of those that are missing.
SHOWN = 5
Name = tuple[str, int, int]
Offsets = Mapping[TopicPartition, int]


@dataclass(frozen=True)
class Account:
    """What became of the accepted records.

    Attributes:
        accepted: records whose batch the store had on disk.
        arrived: of those, records that are in the topic.
        lost: ids of accepted records that are not.
        unnoted: records that arrived and whose note was not written: the agent was killed between
            the two.
        batches: different batches that arrived.
        repeats: messages whose batch had arrived before, with the same content.
        wrong: what must never be, in words: a name with two contents, a record in two batches.
        set_aside: records in the dead-letter topic.
    """

    accepted: int
    arrived: int
    lost: list[str]
    unnoted: int
    batches: int
    repeats: int
    wrong: list[str]
    set_aside: int

    @property
    def line(self) -> str:
        """The report."""
        return (
            f"records accepted {self.accepted}, arrived {self.arrived}, lost {len(self.lost)}; "
            f"batches {self.batches}, repeats {self.repeats}, records set aside {self.set_aside}, "
            f"unnoted {self.unnoted}"
        )

    def check(self) -> None:
        """Fail unless every record is accounted for.

        Raises:
            AssertionError: one is lost, set aside, or in two batches; or nothing was counted.
        """
        assert self.accepted, "nothing was accepted: nothing was tested"
        assert not self.lost, f"{self.line}: {sorted(self.lost)[:SHOWN]}"
        assert not self.wrong, f"{self.line}: {self.wrong[:SHOWN]}"
        assert not self.set_aside, self.line


@dataclass
class _Arrivals:
    """Batches as they are read."""

    where: dict[str, Name] = field(default_factory=dict)
    content: dict[Name, bytes] = field(default_factory=dict)
    repeats: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, decoded: Decoded) -> None:
        name = (decoded.agent_id, decoded.epoch, decoded.seq)
        digest = hashlib.sha256()
        for record in decoded.records:
            digest.update(record.SerializeToString(deterministic=True))
        before = self.content.get(name)
        if before is not None:
            self.repeats += 1
            if before != digest.digest():
                self.wrong.append(f"batch {name} has come with two contents")
            return
        self.content[name] = digest.digest()
        for record in decoded.records:
            one = id_of(record)
            if not one:
                continue
            if one in self.where:
                self.wrong.append(f"record {one} is in batch {self.where[one]} and in {name}")
            self.where[one] = name


def account(
    accepted: Iterable[str], decoded: Iterable[Decoded], aside: Iterable[Decoded] = ()
) -> Account:
    """Compare ids of accepted records with what arrived."""
    arrivals = _Arrivals()
    for batch in decoded:
        arrivals.add(batch)
    ids = Counter(accepted)
    wrong = arrivals.wrong + [f"{one} was accepted twice" for one, n in ids.items() if n > 1]
    lost = [one for one in ids if one not in arrivals.where]
    return Account(
        accepted=len(ids),
        arrived=len(ids) - len(lost),
        lost=lost,
        unnoted=sum(one not in ids for one in arrivals.where),
        batches=len(arrivals.content),
        repeats=arrivals.repeats,
        wrong=wrong,
        set_aside=sum(len(batch.records) for batch in aside),
    )


def accepted_ids(files: Iterable[Path], begin: Mapping[Path, int]) -> list[str]:
    """What stands in the files of accepted ids, from these offsets on; no half lines."""
    found: list[str] = []
    for file in files:
        data = file.read_bytes()[begin.get(file, 0) :] if file.exists() else b""
        whole = data[: data.rfind(b"\n") + 1].decode()
        # What a kill left half written is not accepted: it lacks the mark at its end.
        found += [line[:-1] for line in whole.splitlines() if line.endswith(END)]
    return found


def ends(bootstrap: str, topics: Sequence[str]) -> dict[TopicPartition, int]:
    """Where topics end now; those that are not there are left out."""
    return asyncio.run(_with_consumer(bootstrap, topics, None))[0]


def read(bootstrap: str, topics: Sequence[str], begin: Offsets) -> list[Decoded]:
    """All batches in topics from some offsets to where they end now.

    Raises:
        TimeoutError: the broker does not answer in time.
        BatchError: a message is not one of the server's.
    """
    return asyncio.run(_with_consumer(bootstrap, topics, begin))[1]


async def _with_consumer(
    bootstrap: str, topics: Sequence[str], begin: Offsets | None
) -> tuple[dict[TopicPartition, int], list[Decoded]]:
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    async with asyncio.timeout(READ_SECONDS):
        await consumer.start()
        try:
            partitions = await _partitions(bootstrap, set(topics) & await consumer.topics())
            if not partitions:
                return {}, []
            consumer.assign(partitions)
            found = dict(await consumer.end_offsets(partitions))
            return found, [] if begin is None else await _read(consumer, begin, found)
        finally:
            await consumer.stop()


async def _partitions(bootstrap: str, topics: set[str]) -> list[TopicPartition]:
    client = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await client.start()
    try:
        return [
            TopicPartition(topic["topic"], partition["partition"])
            for topic in await client.describe_topics(sorted(topics))
            for partition in topic["partitions"]
        ]
    finally:
        await client.close()


async def _read(consumer: AIOKafkaConsumer, begin: Offsets, end: Offsets) -> list[Decoded]:
    found: list[Decoded] = []
    for partition in end:
        consumer.seek(partition, begin.get(partition, 0))
    while True:
        left = [p for p in end if await consumer.position(p) < end[p]]
        if not left:
            return found
        for messages in (await consumer.getmany(*left, timeout_ms=500)).values():
            found += [decode_message(m.headers, m.value) for m in messages]


def tell(what: str, found: Account, file: Path) -> None:
    """Add a report to a file of JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "what": what,
        "accepted": found.accepted,
        "arrived": found.arrived,
        "lost": len(found.lost),
        "repeats": found.repeats,
        "batches": found.batches,
        "unnoted": found.unnoted,
        "set_aside": found.set_aside,
    }
    with file.open("a") as out:
        out.write(json.dumps(figures) + "\n")
