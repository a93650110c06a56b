"""The outbox against a model of it: appends, lanes, splits, acknowledgements, eviction, kills."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fakes.agent_parts import new_batch, store_in
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from outrider_agent.core.records import RecordClass
from outrider_agent.core.storage import OutboxFullError
from outrider_agent.store.store import Store, StoreLimits
from outrider_proto import batches
from outrider_proto.v1 import agent_pb2 as pb

T = TypeVar("T")
MAX_BYTES, RESERVE = 6_000, 2_000
CODECS = st.sampled_from([pb.CODEC_NONE, pb.CODEC_ZSTD, pb.CODEC_LZ4])


@dataclass
class Kept:
    """A batch as the model knows it; its size is taken from the store, once."""

    record_class: RecordClass
    ids: list[int]
    size: int


class OutboxMachine(RuleBasedStateMachine):
    relaxed = False

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = Path(tempfile.mkdtemp(dir=memory))
        self.place = 0
        self.next_id = 1
        self.model: dict[int, Kept] = {}
        self.context: AbstractAsyncContextManager[Store]
        self.store: Store
        self._open()
        self.epoch = self.store.epoch

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def _open(self) -> None:
        limits = StoreLimits(MAX_BYTES, 3600, 100, RESERVE, relaxed=self.relaxed)
        self.context = store_in(self.folder / str(self.place), limits)
        self.store = self.do(self.context.__aenter__())

    def _close(self) -> None:
        self.do(self.context.__aexit__(None, None, None))

    def _bytes(self, *classes: RecordClass) -> int:
        return sum(k.size for k in self.model.values() if not classes or k.record_class in classes)

    def _stored(self, above: int) -> dict[int, tuple[list[int], int, RecordClass]]:
        found = self.do(self.store.batches_after(above, 10**9))
        return {
            w.seq: ([r.timestamp for r in batches.decode(w.batch)], w.size, w.record_class)
            for w in found
        }

    @rule(
        record_class=st.sampled_from(RecordClass),
        sizes=st.lists(st.integers(0, 600), min_size=1, max_size=12),
        codec=CODECS,
        max_bytes=st.sampled_from([300, 1_000, 10**6]),
    )
    def append(
        self,
        record_class: RecordClass,
        sizes: list[int],
        codec: pb.Codec.ValueType,
        max_bytes: int,
    ) -> None:
        ids = list(range(self.next_id, self.next_id + len(sizes)))
        self.next_id += len(sizes)
        made = [
            pb.EncodedRecord(data_type=1, timestamp=n, data=bytes(s))
            for n, s in zip(ids, sizes, strict=True)
        ]
        before = self.store.last_seq
        try:
            done = self.do(self.store.append_batch(new_batch(made, record_class, codec, max_bytes)))
        except OutboxFullError:
            assert record_class is RecordClass.RESULT
            # It had no room even if it does not get smaller, and nothing of it was kept.
            raw = sum(sizes) + 60 * len(sizes) + 100
            assert self._bytes(RecordClass.RESULT) + raw > MAX_BYTES + RESERVE
            return
        assert self.store.last_seq == done.seq > before
        stored = self._stored(before)
        lost = sum(loss.records for loss in done.losses.by_class.values())
        self._take_new(stored, record_class, ids, before, done.seq)
        held = sum(len(k.ids) for k in self.model.values())
        self._evict()
        assert held - sum(len(k.ids) for k in self.model.values()) == lost

    def _take_new(
        self,
        stored: dict[int, tuple[list[int], int, RecordClass]],
        record_class: RecordClass,
        ids: list[int],
        before: int,
        last: int,
    ) -> None:
        """Enter new batches; those that were given up at once are told from their numbers."""
        there = [n for seq in sorted(stored) for n in stored[seq][0]]
        assert there == ids[len(ids) - len(there) :], "of one batch the oldest pieces go first"
        for seq, (found, size, kind) in stored.items():
            assert before < seq <= last
            assert kind is record_class
            self.model[seq] = Kept(record_class, found, size)
        missing = ids[: len(ids) - len(there)]
        if missing:
            assert record_class is not RecordClass.RESULT
            # Large enough to go first in the model too.
            self.model[before + 1] = Kept(record_class, missing, MAX_BYTES)

    def _evict(self) -> None:
        while self._bytes() > MAX_BYTES:
            going = [s for s, k in self.model.items() if k.record_class is not RecordClass.RESULT]
            if not going:
                return
            del self.model[min(going, key=lambda s: (self.model[s].record_class, s))]

    @rule(place=st.integers(0, 30), max_bytes=st.integers(1, 1_500))
    def split(self, place: int, max_bytes: int) -> None:
        seq = sorted(self.model)[place] if place < len(self.model) else 999_999
        before = self.store.last_seq
        count = self.do(self.store.split_batch(self.epoch, seq, max_bytes))
        old = self.model.get(seq)
        if old is None or len(old.ids) == 1:
            assert count == 0
            assert self.store.last_seq == before
            return
        assert count >= 2
        assert self.store.last_seq == before + count
        del self.model[seq]
        made = self._stored(before)
        assert [n for new in sorted(made) for n in made[new][0]] == old.ids
        for new, (ids, size, kind) in made.items():
            assert kind is old.record_class
            self.model[new] = Kept(kind, ids, size)
        for waiting in self.do(self.store.batches_after(before, 10**9)):
            assert len(waiting.batch.records) <= max_bytes or waiting.batch.count == 1

    @rule(first=st.integers(0, 30), length=st.integers(0, 5), foreign=st.booleans())
    def acknowledge(self, first: int, length: int, foreign: bool) -> None:
        known = sorted(self.model)
        if first >= len(known):
            return
        low, high = known[first], known[min(first + length, len(known) - 1)]
        epoch = self.epoch + foreign
        gone = [] if foreign else [s for s in known if low <= s <= high]
        assert self.do(self.store.ack_batches(epoch, low, high)) == len(gone)
        for seq in gone:
            del self.model[seq]

    @rule(
        above=st.integers(0, 40),
        upto=st.none() | st.integers(0, 60),
        classes=st.none() | st.sets(st.sampled_from(RecordClass)),
        limit=st.sampled_from([0, 800, 3_000, 10**6]),
        at_least_one=st.booleans(),
    )
    def read_a_lane(
        self,
        above: int,
        upto: int | None,
        classes: set[RecordClass] | None,
        limit: int,
        at_least_one: bool,
    ) -> None:
        base = min(self.model, default=0)  # numbers go far beyond the small ones in time
        above += base and base - 1
        upto = None if upto is None else upto + base
        expected: list[int] = []
        size = 0
        for seq in sorted(self.model):
            kept = self.model[seq]
            wanted = classes is None or kept.record_class in classes
            if not wanted or seq <= above or (upto is not None and seq > upto):
                continue
            if size + kept.size > limit and (expected or not at_least_one):
                break
            expected.append(seq)
            size += kept.size
        found = self.do(
            self.store.batches_after(
                above, limit, upto=upto, classes=classes, at_least_one=at_least_one
            )
        )
        assert [w.seq for w in found] == expected

    @rule()
    def reopen(self) -> None:
        before = self.store.last_seq
        self._close()
        self._open()
        assert self.store.last_seq == before

    @rule()
    def kill(self) -> None:
        """Go on with the files as they lie there while the store is open."""
        source, before = self.folder / str(self.place), self.store.last_seq
        self.place += 1
        shutil.copytree(source, self.folder / str(self.place))
        self._close()
        self._open()
        assert self.store.last_seq >= before

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        found = self._stored(0)
        assert {s: (k.ids, k.size, k.record_class) for s, k in self.model.items()} == found
        totals = self.do(self.store.totals())
        assert (totals.bytes, totals.batches) == (self._bytes(), len(self.model))
        if self._bytes(RecordClass.RESULT) <= MAX_BYTES:
            assert totals.bytes <= MAX_BYTES + RESERVE
        results = self._bytes(RecordClass.RESULT)
        assert (RecordClass.LOG in self.store.crowded) == (results >= MAX_BYTES)
        assert self.store.epoch == self.epoch

    def teardown(self) -> None:
        self._close()
        self.runner.close()
        shutil.rmtree(self.folder)


class RelaxedMachine(OutboxMachine):
    relaxed = True


TestOutboxMachine = OutboxMachine.TestCase
TestRelaxedMachine = RelaxedMachine.TestCase
TestOutboxMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestRelaxedMachine.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)


async def test_another_epoch_has_nothing_to_split(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        await store.append_batch(new_batch([pb.EncodedRecord(data=b"x")] * 2))
        assert await store.split_batch(store.epoch + 1, 1, 1) == 0
        assert await store.split_batch(store.epoch, 1, 1) == 2
        assert [w.seq for w in await store.batches_after(0, 10**6)] == [2, 3]


async def test_a_damaged_batch_is_counted_where_it_is_split(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        await store.append_batch(new_batch([pb.EncodedRecord(data=b"x")] * 2))
        await store._do(lambda db: db.execute("UPDATE batches SET batch = zeroblob(9)").rowcount)
        assert await store.split_batch(store.epoch, 1, 1) == 0
        assert (await store.totals()).batches == 0
        assert store.losses["damaged"].by_class[RecordClass.LOG].records == 2


async def test_an_append_that_cannot_be_made_leaves_no_trace(tmp_path: Path) -> None:
    async with store_in(tmp_path) as store:
        with pytest.raises(batches.BatchError):
            await store.append_batch(new_batch([pb.EncodedRecord()] * 10_001))
        assert store.last_seq == 0
        assert (await store.append_batch(new_batch([pb.EncodedRecord()]))).seq == 1
