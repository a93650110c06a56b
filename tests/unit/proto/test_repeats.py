"""Repeats: told from what is new within a bound; nothing new is ever dropped."""

from hypothesis import given
from hypothesis import strategies as st
from outrider_proto import batches, limits, records
from outrider_proto.repeats import Repeats
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD
from outrider_proto.v1.sink_pb2 import MQData

AGENTS = st.sampled_from("abcd")
NAMES = st.lists(st.tuples(AGENTS, st.integers(1, 2), st.integers(1, 30)), max_size=200)
INDEXED = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), max_size=100)


@given(NAMES)
def test_within_the_bound_each_comes_once(names) -> None:
    repeats = Repeats()
    seen = set()
    for name in names:
        assert repeats.is_new(*name) == (name not in seen)
        seen.add(name)


@given(NAMES, st.integers(1, 3), st.integers(2, 4))
def test_beyond_the_bound_nothing_new_is_dropped(names, lives, ranges) -> None:
    repeats = Repeats(lives, ranges)
    seen = set()
    for name in names:
        if name not in seen:
            assert repeats.is_new(*name)
        else:
            repeats.is_new(*name)
        seen.add(name)
        assert len(repeats) <= lives
        assert repeats.ranges <= lives * ranges


@given(INDEXED, st.booleans())
def test_single_records_each_come_once(names, counted) -> None:
    repeats = Repeats()
    seen = set()
    for seq, index in names:
        new = repeats.is_new("a", 1, seq, index, 4 if counted else 0)
        assert new == ((seq, index) not in seen)
        seen.add((seq, index))


def test_an_endless_stream_costs_one_range() -> None:
    repeats = Repeats()
    for seq in range(1, 5000):
        assert repeats.is_new("a", 1, seq)
        for index in range(3):
            assert repeats.is_new("b", 1, seq, index, 3)
    assert (len(repeats), repeats.ranges) == (2, 2)
    assert not repeats.is_new("a", 1, 1)
    assert not repeats.is_new("b", 1, 1, 1, 3)


def test_the_life_silent_longest_is_forgotten() -> None:
    repeats = Repeats(max_lives=2)
    for agent in "aba":
        repeats.is_new(agent, 1, 1)
    repeats.is_new("c", 1, 1)
    assert not repeats.is_new("a", 1, 1)
    assert repeats.is_new("b", 1, 1)


def message(index: int, count: int = 2) -> tuple[list[tuple[str, bytes]], bytes]:
    made = [records.payload(1000 + n, 60, {"n": str(n)}) for n in range(count)]
    batch = batches.encode(made, epoch=9, seq=4, codec=CODEC_ZSTD, created_unix_nanos=1)
    record = made[index]
    value = MQData(
        data_type=record.data_type, agent_time=60, body=record.data, agent_id="id", svr_time=77
    )
    return records.record_headers("id", "n1", batch, index), value.SerializeToString()


def test_both_forms_are_opened_and_repeats_dropped() -> None:
    came = [records.decode_message(*message(index)) for index in (0, 1, 0, 1)]
    found = list(records.first_seen(came))
    assert [(item.index, item.count, item.server_unix_nanos) for item in found] == [
        (0, 2, 77_000_000_000),
        (1, 2, 77_000_000_000),
    ]
    assert [records.fields_of(item.records[0]) for item in found] == [{"n": "0"}, {"n": "1"}]


def test_what_came_before_is_remembered_over_calls() -> None:
    repeats = Repeats()
    item = records.decode_message(*message(0))
    assert list(records.first_seen([item], repeats)) == [item]
    assert list(records.first_seen([item], repeats)) == []


def test_room_for_every_index() -> None:
    repeats = Repeats()
    assert repeats.is_new("a", 1, 1, limits.BATCH_RECORDS - 1)
    assert repeats.is_new("a", 1, 2, 0)
    assert not repeats.is_new("a", 1, 1, limits.BATCH_RECORDS - 1)
