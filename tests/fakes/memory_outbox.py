"""An outbox in memory, for tests of who reads it; the same contract as the agent's file."""

import asyncio
from collections.abc import Callable, Collection

from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import Backlog, StorageError, Waiting
from outrider_proto.v1 import agent_pb2 as pb


class MemoryOutbox:
    """Implements core.storage.Outbox. Every attribute may be changed while it is used."""

    def __init__(self, epoch: int = 7) -> None:
        self.epoch = epoch
        self.last_seq = 0
        self.held: dict[int, Waiting] = {}
        self.acks: list[tuple[int, int]] = []
        self.reads = 0
        self.on_append: Callable[[], None] = lambda: None
        #: Cleared: the disk takes no acknowledgement until it is set again.
        self.disk_takes = asyncio.Event()
        self.disk_takes.set()
        self.fails = False

    @property
    def backlog(self) -> Backlog:
        return Backlog(sum(item.size for item in self.held.values()), len(self.held))

    def add(
        self,
        size: int = 100,
        record_class: RecordClass = RecordClass.TELEMETRY,
        *,
        count: int = 1,
        content: bytes | None = None,
    ) -> int:
        """Add a batch of so many bytes of content; its number."""
        self.last_seq += 1
        batch = pb.RecordBatch(
            epoch=self.epoch,
            seq=self.last_seq,
            codec=pb.CODEC_NONE,
            records=b"x" * size if content is None else content,
            count=count,
        )
        self.held[batch.seq] = Waiting(batch.seq, batch.ByteSize(), batch, record_class)
        self.on_append()
        return batch.seq

    async def batches_after(
        self,
        seq: int,
        limit: int,
        *,
        upto: int | None = None,
        classes: Collection[RecordClass] | None = None,
        at_least_one: bool = False,
    ) -> list[Waiting]:
        self._check()
        self.reads += 1
        await asyncio.sleep(0)
        found: list[Waiting] = []
        size = 0
        for number in range(seq + 1, 1 + (self.last_seq if upto is None else upto)):
            item = self.held.get(number)
            if item is None or (classes is not None and item.record_class not in classes):
                continue
            if size + item.size > limit and (found or not at_least_one):
                break
            found.append(item)
            size += item.size
        return found

    async def split_batch(self, epoch: int, seq: int, max_bytes: int) -> int:
        self._check()
        item = self.held.get(seq) if epoch == self.epoch else None
        if item is None or item.batch.count < 2:
            return 0
        del self.held[seq]
        content, records = item.batch.records, item.batch.count
        parts = min(records, max(2, -(-len(content) // max_bytes)))
        for number in range(parts):
            piece = content[len(content) * number // parts : len(content) * (number + 1) // parts]
            count = records * (number + 1) // parts - records * number // parts
            self.add(record_class=item.record_class, count=count, content=piece)
        return parts

    async def ack_batches(self, epoch: int, first: int, last: int) -> int:
        self._check()
        await self.disk_takes.wait()
        if epoch != self.epoch:
            return 0
        self.acks.append((first, last))
        gone = [seq for seq in self.held if first <= seq <= last]
        for seq in gone:
            del self.held[seq]
        return len(gone)

    def _check(self) -> None:
        if self.fails:
            raise StorageError("the disk is full")
