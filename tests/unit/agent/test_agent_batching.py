"""When records become a batch, how it gets smaller, and what goes when there is no room."""

from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.core import eviction
from outrider_agent.core.batching import Batcher, BatchLimits, group_numbers, halves, pieces
from outrider_agent.core.eviction import BatchInfo, Bounds, Disk, crowded_out
from outrider_agent.core.records import RecordClass
from outrider_proto import batches
from outrider_proto.v1 import agent_pb2 as pb


def entry(number: int, size: int) -> bytes:
    return batches.entry(pb.EncodedRecord(data_type=1, timestamp=number, data=b"x" * size))


def test_a_batch_is_due_after_its_delay_or_at_its_size() -> None:
    batcher = Batcher(BatchLimits(max_delay=0.1, max_bytes=1000))
    assert batcher.due() is None
    assert batcher.add(entry(1, 10), 1, now=5.0)
    assert not batcher.add(entry(2, 10), 1, now=5.05)
    assert batcher.due() == 5.1
    assert batcher.add(entry(3, 1000), 1, now=5.06)
    assert batcher.due() == float("-inf")
    assert len(batcher.take().entries) == 3
    assert batcher.due() is None


def test_the_delay_counts_from_the_first_record_of_each_batch() -> None:
    batcher = Batcher(BatchLimits(max_delay=1.0, max_bytes=1000))
    batcher.add(entry(1, 10), 1, now=5.0)
    batcher.close()
    batcher.add(entry(2, 10), 2, now=7.0)
    assert batcher.due() == float("-inf")
    assert batcher.take().data_types == {1}
    assert batcher.due() == 8.0
    assert batcher.take().data_types == {2}


@given(st.lists(st.tuples(st.integers(0, 400), st.booleans()), max_size=50))
def test_batches_hold_every_record_once_in_order_within_limits(
    steps: list[tuple[int, bool]],
) -> None:
    batcher = Batcher(BatchLimits(max_delay=1, max_bytes=500, max_records=7))
    made = []
    for number, (size, close) in enumerate(steps):
        made.append(entry(number, size))
        batcher.add(made[-1], number % 3, 0.0)
        if close:
            batcher.close()
    taken: list[bytes] = []
    while batcher.due() is not None:
        held = batcher.take()
        assert 0 < len(held.entries) <= 7
        assert sum(map(len, held.entries[:-1])) < 500
        assert held.size == sum(map(len, held.entries))
        numbers = range(len(taken), len(taken) + len(held.entries))
        assert held.data_types == {n % 3 for n in numbers}
        taken += held.entries
    assert taken == made


def test_groups_are_numbered_and_a_type_is_in_the_first_that_names_it() -> None:
    assert group_numbers([]) == {}
    assert group_numbers([{1, 2}, {2, 3}]) == {1: 1, 2: 1, 3: 2}
    assert len(group_numbers([{n} for n in range(100)])) == 32


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    st.integers(1, 2000),
    st.sampled_from([pb.CODEC_NONE, pb.CODEC_ZSTD, pb.CODEC_LZ4]),
)
def test_pieces_hold_every_record_once_in_order(
    sizes: list[int], max_bytes: int, codec: pb.Codec.ValueType
) -> None:
    made = [
        pb.EncodedRecord(data_type=n % 5, timestamp=n, data=b"x" * s) for n, s in enumerate(sizes)
    ]
    batch = batches.encode(made, epoch=3, seq=4, codec=codec, created_unix_nanos=5)
    for found in (pieces(batch, max_bytes), halves(batch)):
        assert [r for piece in found for r in batches.decode(piece)] == made
        for piece in found:
            assert (piece.epoch, piece.codec, piece.created_unix_nanos) == (3, codec, 5)
            records = batches.decode(piece)
            assert list(piece.data_types) == sorted({r.data_type for r in records})
    assert len(halves(batch)) == min(2, len(made))
    for piece in pieces(batch, max_bytes):
        assert len(piece.records) <= max_bytes or piece.count == 1


def test_the_least_class_goes_first_and_its_oldest_and_results_never() -> None:
    totals = {RecordClass.RESULT: 10, RecordClass.LOG: 7, RecordClass.TELEMETRY: 5}
    assert eviction.class_order(totals) == [RecordClass.TELEMETRY, RecordClass.LOG]
    assert eviction.class_order({RecordClass.LOG: 0, RecordClass.TELEMETRY: 5}) == [
        RecordClass.TELEMETRY
    ]
    infos = [BatchInfo(n, RecordClass.TELEMETRY, size=10, records=1) for n in (1, 2, 3)]
    assert [b.seq for b in eviction.choose(infos, 15)] == [1, 2]
    assert eviction.choose(infos, 0) == []


def test_losses_add_up() -> None:
    losses = eviction.Losses()
    assert not losses
    for seq in (7, 3):
        losses.add(BatchInfo(seq, RecordClass.LOG, size=10, records=4))
    more = eviction.Losses()
    more.add(BatchInfo(9, RecordClass.LOG, size=1, records=1))
    losses.merge(more)
    loss = losses.by_class[RecordClass.LOG]
    assert (loss.batches, loss.records, loss.bytes) == (3, 9, 21)
    assert (loss.first_seq, loss.last_seq) == (3, 9)


def test_a_class_is_crowded_out_by_worthier_ones_only() -> None:
    held = {RecordClass.TELEMETRY: 50, RecordClass.LOG: 40, RecordClass.RESULT: 60}
    assert crowded_out(held, 101) == frozenset()
    assert crowded_out(held, 100) == {RecordClass.TELEMETRY}
    assert crowded_out(held, 60) == {RecordClass.TELEMETRY, RecordClass.LOG}
    assert crowded_out({}, 0) == {RecordClass.TELEMETRY, RecordClass.LOG}


def test_results_have_a_reserve() -> None:
    bounds = Bounds(100, result_reserve=20)
    assert bounds.results_fit(100, 20)
    assert not bounds.results_fit(100, 21)


BYTES = st.integers(0, 10**6)


@given(held=BYTES, spare=BYTES, free=BYTES, keep=BYTES)
def test_the_limit_leaves_room_on_the_disk(held: int, spare: int, free: int, keep: int) -> None:
    bounds = Bounds(500_000, min_free_bytes=keep)
    disk = Disk(size=10**7, free=free)
    limit = bounds.limit(disk, held=held, spare=spare)
    assert 0 <= limit <= 500_000
    # Were it filled to its limit, the disk would have what is to stay free, or nothing was added.
    grown = max(0, limit - held - spare)
    assert grown == 0 or free - grown >= keep
    # What is given up makes room in the file: nothing more goes for the same shortage.
    after = min(held, limit)
    again = bounds.limit(disk, held=after, spare=spare + held - after)
    assert again >= after


def test_the_larger_of_bytes_and_percent_stays_free() -> None:
    disk = Disk(size=1000, free=100)
    assert Bounds(1, min_free_bytes=150, min_free_percent=5).shortage(disk) == 50
    assert Bounds(1, min_free_bytes=10, min_free_percent=20).shortage(disk) == 100
    assert Bounds(1).shortage(disk) == -100
