"""The agent's file against a model of it: any order of operations, reopening and kills."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fakes.agent_parts import batch_of, run_state, store_in
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from outrider_agent.core.records import RecordClass
from outrider_agent.core.runs import RunKey
from outrider_agent.core.storage import OutboxFullError
from outrider_agent.store.store import Store, StoreLimits
from outrider_proto import batches
from outrider_proto.v1 import agent_pb2 as pb

T = TypeVar("T")
MAX_BYTES = 4_000
LIMITS = StoreLimits(max_outbox_bytes=MAX_BYTES, tombstone_seconds=3600, max_tombstones=1000)
UIDS = st.sampled_from(["a", "b", "c", "d", "e"])


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        # In memory where there is such a place: thousands of commits wait for a disk otherwise.
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.folder = Path(tempfile.mkdtemp(dir=memory))
        self.place = 0
        self.runs: dict[str, int] = {}
        self.buried: dict[str, int] = {}
        self.batches: dict[int, tuple[RecordClass, int]] = {}
        self.next_seq = 1
        self.context: AbstractAsyncContextManager[Store]
        self.store: Store
        self._open()
        self.epoch = self.store.epoch

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def _open(self) -> None:
        self.context = store_in(self.folder / str(self.place), LIMITS)
        self.store = self.do(self.context.__aenter__())

    def _close(self) -> None:
        self.do(self.context.__aexit__(None, None, None))

    @rule(uid=UIDS)
    def accept(self, uid: str) -> None:
        known = self.do(self.store.accept_run(run_state(uid)))
        expected = self.runs.get(uid, self.buried.get(uid))
        assert (known.phase if known else None) == expected
        if expected is None:
            self.runs[uid] = pb.RUN_PHASE_ACCEPTED

    @rule(uid=UIDS, phase=st.sampled_from([pb.RUN_PHASE_RUNNING, pb.RUN_PHASE_FAILED]))
    def update(self, uid: str, phase: pb.RunPhase.ValueType) -> None:
        self.do(self.store.update_run(run_state(uid, phase)))
        if self.runs.get(uid, pb.RUN_PHASE_FAILED) < pb.RUN_PHASE_SUCCEEDED:
            self.runs[uid] = phase

    @rule(uids=st.lists(UIDS, max_size=4, unique=True))
    def acknowledge_runs(self, uids: list[str]) -> None:
        ended = [u for u in uids if self.runs.get(u, 0) >= pb.RUN_PHASE_SUCCEEDED]
        assert self.do(self.store.ack_runs([RunKey(u, 1) for u in uids])) == len(ended)
        for uid in ended:
            self.buried[uid] = self.runs.pop(uid)

    @rule(record_class=st.sampled_from(RecordClass), size=st.integers(1, 2_000))
    def append(self, record_class: RecordClass, size: int) -> None:
        new = batch_of("x" * size, record_class)
        made = batches.pack(
            b"".join(new.held.entries),
            count=1,
            data_types=new.held.data_types,
            epoch=self.epoch,
            seq=self.next_seq,
            codec=new.codec,
            created_unix_nanos=new.created_unix_nanos,
        )
        results = sum(s for c, s in self.batches.values() if c is RecordClass.RESULT)
        if record_class is RecordClass.RESULT and results + made.ByteSize() > MAX_BYTES:
            with pytest.raises(OutboxFullError):
                self.do(self.store.append_batch(new))
            return
        done = self.do(self.store.append_batch(new))
        assert done.seq == self.next_seq
        self.next_seq += 1
        self.batches[done.seq] = (record_class, made.ByteSize())
        lost = 0
        while sum(size for _, size in self.batches.values()) > MAX_BYTES:
            del self.batches[min(self.batches, key=lambda s: (self.batches[s][0], s))]
            lost += 1
        assert sum(loss.batches for loss in done.losses.by_class.values()) == lost

    @rule(first=st.integers(1, 20), length=st.integers(0, 5))
    def acknowledge_batches(self, first: int, length: int) -> None:
        gone = [s for s in self.batches if first <= s <= first + length]
        assert self.do(self.store.ack_batches(self.epoch, first, first + length)) == len(gone)
        for seq in gone:
            del self.batches[seq]

    @rule()
    def reopen(self) -> None:
        self._close()
        self._open()

    @rule()
    def kill(self) -> None:
        """Go on with the files as they lie there while the store is open."""
        before = self.folder / str(self.place)
        self.place += 1
        shutil.copytree(before, self.folder / str(self.place))
        self._close()
        self._open()

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        states = {s.id.task_uid: s.phase for s in self.do(self.store.run_states())}
        assert states == self.runs
        found = self.do(self.store.batches_after(0, 10**9))
        assert [w.seq for w in found] == sorted(self.batches)
        assert self.store.epoch == self.epoch
        totals = self.do(self.store.totals())
        assert totals.bytes == sum(w.size for w in found)
        assert totals.batches == len(found)

    def teardown(self) -> None:
        self._close()
        self.runner.close()
        shutil.rmtree(self.folder)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
