"""Which batch goes next, and how fast: the order, the turns, the window and the bucket."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.core.lanes import Lanes, Look
from outrider_agent.core.pacing import MAX_PAUSE_SECONDS, QUIET_SECONDS, Pause, TokenBucket
from outrider_agent.core.records import RecordClass
from outrider_agent.core.routes import PUSHBACK_KEY, plan, pushback
from outrider_agent.core.storage import Waiting
from outrider_agent.core.window import Lane, Room, Window, ranges
from outrider_agent.uplink.acks import merged
from outrider_proto.v1 import agent_pb2 as pb

RESULT, LOG, TELEMETRY = RecordClass.RESULT, RecordClass.LOG, RecordClass.TELEMETRY


def item(seq: int, size: int, record_class: RecordClass = TELEMETRY) -> Waiting:
    return Waiting(seq, size, pb.RecordBatch(seq=seq), record_class)


class Outbox:
    """What Lanes reads, without a disk."""

    def __init__(self) -> None:
        self.items: dict[int, Waiting] = {}
        self.last_seq = 0

    def add(self, size: int, record_class: RecordClass = TELEMETRY) -> int:
        self.last_seq += 1
        self.items[self.last_seq] = item(self.last_seq, size, record_class)
        return self.last_seq

    def read(self, look: Look, most: int) -> list[Waiting]:
        found = [
            item
            for seq, item in sorted(self.items.items())
            if look.after < seq <= (look.upto or self.last_seq)
            and (look.classes is None or item.record_class in look.classes)
        ]
        return found[:most]


def always(lane: Lane, size: int) -> Room:
    return Room.FITS


def feed(lanes: Lanes, outbox: Outbox, most: int = 3) -> int:
    """Read until something can be sent; how often it was read."""
    count = 0
    while (look := lanes.look(always)) is not None:
        lanes.begin(look)
        lanes.fill(look, outbox.read(look, most), outbox.last_seq)
        count += 1
        assert count < 100
    return count


def drain(lanes: Lanes, outbox: Outbox) -> list[tuple[Lane, int]]:
    sent: list[tuple[Lane, int]] = []
    while True:
        feed(lanes, outbox)
        lane = lanes.pick(always)
        if lane is None:
            return sent
        sent.append((lane, lanes.take(lane).seq))


def test_results_go_first_and_live_batches_take_turns_with_the_backlog() -> None:
    outbox = Outbox()
    for _ in range(4):
        outbox.add(100)
    outbox.add(100, RESULT)
    lanes = Lanes(outbox.last_seq)
    for _ in range(2):
        outbox.add(100, LOG)
    outbox.add(100, RESULT)
    order = drain(lanes, outbox)
    assert [seq for _, seq in order[:2]] == [5, 8]
    assert [lane for lane, _ in order[2:6]] == [Lane.LIVE, Lane.BACKLOG] * 2
    assert [seq for lane, seq in order if lane is Lane.BACKLOG] == [1, 2, 3, 4]
    assert [seq for lane, seq in order if lane is Lane.LIVE] == [6, 7]


def test_one_look_finds_a_fresh_record_and_a_fresh_result() -> None:
    outbox = Outbox()
    lanes = Lanes(0)
    feed(lanes, outbox)
    outbox.add(10)
    outbox.add(10, RESULT)
    lanes.appended()
    assert feed(lanes, outbox) == 1
    assert drain(lanes, outbox) == [(Lane.RESULTS, 2), (Lane.LIVE, 1)]


def test_a_result_behind_fresh_records_that_have_no_room_is_found() -> None:
    outbox = Outbox()
    lanes = Lanes(0)
    for _ in range(10):
        outbox.add(10)
    feed(lanes, outbox)
    outbox.add(10, RESULT)
    lanes.appended()

    def full(lane: Lane, size: int) -> Room:
        return Room.FITS if lane is Lane.RESULTS else Room.FULL

    for _ in range(3):
        look = lanes.look(full)
        if look is None:
            break
        lanes.begin(look)
        lanes.fill(look, outbox.read(look, 3), outbox.last_seq)
    assert lanes.pick(full) is Lane.RESULTS
    assert lanes.take(Lane.RESULTS).seq == 11
    assert [lanes.take(Lane.LIVE).seq for _ in range(3)] == [1, 2, 3]
    outbox.add(10)
    lanes.appended()
    feed(lanes, outbox, most=20)  # a look for both, which finds the result once more
    assert [seq for _, seq in drain(lanes, outbox)] == [*range(4, 11), 12]


def test_while_there_are_more_results_to_read_nothing_else_goes() -> None:
    outbox = Outbox()
    for _ in range(4):
        outbox.add(10, RESULT)
    lanes = Lanes(0)
    outbox.add(10)
    feed(lanes, outbox)
    assert [lanes.take(Lane.RESULTS).seq for _ in range(3)] == [1, 2, 3]
    assert lanes.pick(always) is None
    assert drain(lanes, outbox) == [(Lane.RESULTS, 4), (Lane.LIVE, 5)]


def test_after_the_backlog_one_look_is_enough_for_what_is_fresh() -> None:
    outbox = Outbox()
    outbox.add(10)
    lanes = Lanes(1)
    drain(lanes, outbox)
    outbox.add(10)
    lanes.appended()
    assert feed(lanes, outbox) == 1


@pytest.mark.parametrize("there", [0, 1])
def test_what_comes_while_the_outbox_is_read_is_not_forgotten(there: int) -> None:
    outbox = Outbox()
    for _ in range(there):
        outbox.add(1)
    lanes = Lanes(0)
    look = lanes.look(always)
    assert look is not None
    lanes.begin(look)
    found = outbox.read(look, 3)
    outbox.add(1)
    lanes.appended()
    lanes.fill(look, found, there)
    assert drain(lanes, outbox) == [(Lane.LIVE, seq) for seq in range(1, there + 2)]


def test_a_lane_that_has_its_share_lets_others_go_and_a_full_window_keeps_the_turn() -> None:
    outbox = Outbox()
    outbox.add(100)
    outbox.add(100)
    lanes = Lanes(2)
    feed(lanes, outbox)
    assert lanes.pick(always) is Lane.BACKLOG
    lanes.take(Lane.BACKLOG)
    outbox.add(150)
    lanes.appended()
    feed(lanes, outbox)
    lanes.take(Lane.LIVE)
    outbox.add(100)
    lanes.appended()
    feed(lanes, outbox)  # the turn is the backlog's
    assert lanes.pick(always) is Lane.BACKLOG
    rooms = {Lane.BACKLOG: Room.SHARE, Lane.LIVE: Room.FITS, Lane.RESULTS: Room.FITS}
    assert lanes.pick(lambda lane, _: rooms[lane]) is Lane.LIVE
    rooms[Lane.BACKLOG] = Room.FULL
    assert lanes.pick(lambda lane, _: rooms[lane]) is None
    assert lanes.pick(always, urgent_only=True) is None


classes = st.sampled_from([RESULT, LOG, TELEMETRY, TELEMETRY])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 50), classes),
        st.tuples(st.just("send"), st.integers(1, 4), st.none()),
        st.tuples(st.just("acknowledge"), st.integers(1, 4), st.none()),
    ),
    max_size=80,
)


@given(st.lists(st.tuples(st.integers(1, 50), classes), max_size=20), steps, st.integers(1, 5))
def test_each_batch_goes_once_in_its_lanes_order_and_results_first(
    before: list[tuple[int, RecordClass]], then: list[tuple[str, int, RecordClass]], most: int
) -> None:
    outbox = Outbox()
    for size, record_class in before:
        outbox.add(size, record_class)
    start = outbox.last_seq
    lanes, window = Lanes(start), Window(100, 10)
    sent: dict[Lane, list[int]] = {lane: [] for lane in Lane}
    flight: list[int] = []

    def send() -> bool:
        while (look := lanes.look(window.room)) is not None:
            lanes.begin(look)
            lanes.fill(look, outbox.read(look, most), outbox.last_seq)
        lane = lanes.pick(window.room)
        if lane is None:
            assert flight or not (
                outbox.items.keys() - {seq for seqs in sent.values() for seq in seqs}
            ), "something waits, nothing is in flight, and nothing goes"
            return False
        taken = lanes.take(lane)
        if lane is not Lane.RESULTS:  # no result is left behind
            gone = set(sent[Lane.RESULTS])
            assert all(i.record_class is not RESULT or i.seq in gone for i in outbox.items.values())
        window.sent(taken.seq, lane, taken.size)
        sent[lane].append(taken.seq)
        flight.append(taken.seq)
        return True

    def acknowledge() -> None:
        if flight:
            seq = flight.pop(0)
            assert window.acknowledged(seq, seq) == [seq]
            del outbox.items[seq]

    for what, number, record_class in then:
        for _ in range(number if what != "add" else 1):
            if what == "add":
                outbox.add(number, record_class)
                lanes.appended()
            elif what == "send":
                send()
            else:
                acknowledge()
    while send() or flight:
        acknowledge()
    assert not outbox.items
    for seqs in sent.values():
        assert seqs == sorted(set(seqs))
    assert all(seq <= start for seq in sent[Lane.BACKLOG])
    assert all(seq > start for seq in sent[Lane.LIVE])


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40), st.integers(1, 1000), st.data())
def test_neither_of_two_busy_lanes_is_given_much_more_than_the_other(
    sizes: list[int], live_size: int, data: st.DataObject
) -> None:
    outbox = Outbox()
    for size in sizes:
        outbox.add(size)
    lanes = Lanes(outbox.last_seq)
    given_bytes = {Lane.LIVE: 0, Lane.BACKLOG: 0}
    left = sum(sizes)
    # Live is idle at first, and gets no credit for that.
    for _ in range(data.draw(st.integers(0, len(sizes) - 1))):
        feed(lanes, outbox)
        left -= lanes.take(Lane.BACKLOG).size
    while left:
        outbox.add(live_size)  # there is always another one
        lanes.appended()
        feed(lanes, outbox)
        lane = lanes.pick(always)
        assert lane is not None
        size = lanes.take(lane).size
        given_bytes[lane] += size
        left -= size if lane is Lane.BACKLOG else 0
        assert abs(given_bytes[Lane.LIVE] - given_bytes[Lane.BACKLOG]) <= 2 * max(*sizes, live_size)


# The window.


def test_a_backlog_leaves_room_for_fresh_records_and_both_for_results() -> None:
    window = Window(800, 100)
    seq = 0
    for lane, bytes_of in ((Lane.BACKLOG, 600), (Lane.LIVE, 100), (Lane.RESULTS, 100)):
        sent = 0
        while window.room(lane, 10) is Room.FITS:
            seq += 1
            window.sent(seq, lane, 10)
            sent += 10
        assert sent == bytes_of
    assert window.room(Lane.BACKLOG, 10) is Room.SHARE
    assert window.room(Lane.LIVE, 10) is window.room(Lane.RESULTS, 10) is Room.FULL


def test_a_full_backlog_goes_on_in_large_steps() -> None:
    """Else each acknowledgement would make room for one batch, in a message of its own."""
    window = Window(8000, 1000)
    for seq in range(1, 61):
        window.sent(seq, Lane.BACKLOG, 100)
    assert window.room(Lane.BACKLOG, 100) is Room.SHARE
    window.acknowledged(1, 14)
    assert window.room(Lane.BACKLOG, 100) is Room.SHARE
    window.acknowledged(15, 15)
    for seq in range(61, 76):
        assert window.room(Lane.BACKLOG, 100) is Room.FITS
        window.sent(seq, Lane.BACKLOG, 100)
    assert window.room(Lane.BACKLOG, 100) is Room.SHARE


def test_the_window_is_one_of_batches_too() -> None:
    window = Window(10**9, 8)
    for lane, most in ((Lane.BACKLOG, 6), (Lane.LIVE, 1), (Lane.RESULTS, 1)):
        for _ in range(most):
            assert window.room(lane, 1) is Room.FITS
            window.sent(window.in_flight_bytes + 1, lane, 1)
        assert window.room(lane, 1) is not Room.FITS


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_with_nothing_in_flight_any_batch_may_go(batches: int) -> None:
    window = Window(1, batches)
    for lane in Lane:
        assert window.room(lane, 10**9) is Room.FITS
    window.sent(1, Lane.BACKLOG, 10**9)
    assert window.room(Lane.RESULTS, 1) is Room.FULL
    assert window.acknowledged(1, 2**63) == [1]
    assert window.in_flight_bytes == 0


def test_an_old_batch_beyond_its_lanes_share_goes_where_the_window_has_room() -> None:
    window = Window(1000, 100)
    window.sent(1, Lane.LIVE, 50)
    assert window.room(Lane.BACKLOG, 800) is Room.FITS
    window.sent(2, Lane.BACKLOG, 10)
    assert window.room(Lane.BACKLOG, 800) is Room.SHARE


def test_only_what_was_sent_is_acknowledged() -> None:
    window = Window()
    for seq in (5, 6, 9):
        window.sent(seq, Lane.LIVE, 1)
    assert window.acknowledged(7, 8) == []
    assert window.acknowledged(9, 5) == []
    assert window.acknowledged(5, 9) == [5, 6, 9]
    assert ranges([5, 6, 9]) == [(5, 6), (9, 9)]
    assert window.refused(5) is None
    with pytest.raises(ValueError, match="twice"):
        for _ in range(2):
            window.sent(1, Lane.LIVE, 1)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5))))
def test_merged_ranges_hold_the_same_numbers_and_do_not_touch(pairs: list[tuple[int, int]]) -> None:
    given_ranges = [(first, first + more) for first, more in pairs]
    found = merged(given_ranges)
    assert {n for a, b in found for n in range(a, b + 1)} == {
        n for a, b in given_ranges for n in range(a, b + 1)
    }
    assert all(b + 1 < c for (_, b), (c, _) in itertools.pairwise(found))


# How fast.


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 30_000)), min_size=1, max_size=60),
)
def test_the_bucket_lets_no_more_pass_than_its_rate_its_burst_and_one_batch(
    rate: int, offers: list[tuple[float, int]]
) -> None:
    bucket = TokenBucket(rate)
    now, passed, largest = 100.0, 0, 0
    for pause, size in offers:
        now += pause
        if bucket.open(now):
            bucket.take(size, now)
            passed += size
            largest = max(largest, size)
            assert passed <= rate * (now - 100.0) + rate + largest + 1
        else:
            at = bucket.opens_at(now)
            assert at > now
            assert bucket.open(at + 1e-6)


def test_what_may_not_wait_counts_and_delays_the_rest() -> None:
    bucket = TokenBucket(100)
    bucket.take(100, 0.0)
    bucket.take(400, 0.0)
    assert not bucket.open(3.9)
    assert bucket.open(4.1)
    assert TokenBucket(0).open(0.0)


def test_a_silence_gives_no_more_than_the_burst() -> None:
    bucket = TokenBucket(100)
    bucket.take(50, 0.0)
    bucket.take(100, 1000.0)
    assert not bucket.open(1000.0)


def test_a_clock_that_steps_back_does_not_open_the_bucket() -> None:
    bucket = TokenBucket(100)
    bucket.take(200, 50.0)
    assert not bucket.open(10.0)
    assert bucket.opens_at(10.0) < 12.0


def test_a_pause_is_bounded_replaced_ended_and_counted() -> None:
    pause = Pause()
    assert not pause.active(0.0)
    assert pause.elapsed(0.0) == 0.0
    pause.ask(10**9, 10.0)
    assert pause.until == 10.0 + MAX_PAUSE_SECONDS
    pause.ask(5.0, 11.0)
    assert pause.elapsed(13.0) == 3.0
    assert pause.elapsed(100.0) == 3.0
    assert pause.elapsed(200.0) == 0.0
    pause.ask(5.0, 200.0)
    pause.ask(0.0, 202.0)
    assert not pause.active(202.0)
    assert pause.elapsed(300.0) == 2.0


def test_a_pause_is_news_once_however_often_it_is_asked_for() -> None:
    pause = Pause()
    assert pause.news(0.0) is None
    told = []
    for now in range(20):
        pause.ask(0.5, now)
        told += [pause.news(now), pause.news(now + 0.9)]
    assert [news for news in told if news is not None] == [True]
    assert pause.news(19.5 + QUIET_SECONDS - 0.1) is None
    assert pause.news(19.5 + QUIET_SECONDS) is False
    assert pause.news(100.0) is None


# When to come again.


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("5000", 5.0, 5.5),
        (b"5000", 5.0, 5.5),
        ("60000", 60.0, 61.0),
        ("0", 0.1, 0.11),
        ("999999999999", 600.0, 601.0),
    ],
)
def test_a_pushback_is_kept_to_within_its_bounds(
    value: str | bytes, least: float, most: float
) -> None:
    for seed in range(20):
        seconds = pushback([("x", "1"), (PUSHBACK_KEY, value)], random.Random(seed))
        assert seconds is not None
        assert least <= seconds <= most


@pytest.mark.parametrize("value", ["", "-1", "soon", "1.5", "9" * 30, "²", b"\xff"])
def test_a_pushback_that_makes_no_sense_is_none(value: str | bytes) -> None:
    assert pushback([(PUSHBACK_KEY, value)], random.Random(1)) is None
    assert pushback([], random.Random(1)) is None


def test_the_server_that_gave_us_a_time_is_tried_first() -> None:
    routes = plan(["a:1", "b:1", "c:1"], private="p:1", prefer="c:1")
    assert [route.address for route in routes] == ["c:1", "a:1", "b:1", "p:1"]
    assert [route.address for route in plan(["a:1"], prefer="gone:1")] == ["a:1"]


def test_another_window_counts_for_what_is_sent_from_then_on() -> None:
    window = Window(100, 10)
    window.sent(1, Lane.RESULTS, 60)
    assert window.room(Lane.RESULTS, 40) is Room.FITS
    window.resize(80)
    assert window.room(Lane.RESULTS, 40) is Room.FULL
    assert window.room(Lane.RESULTS, 20) is Room.FITS
    window.resize(0)  # says nothing
    assert window.room(Lane.RESULTS, 21) is Room.FULL
    window.resize(200)
    assert window.room(Lane.RESULTS, 140) is Room.FITS
