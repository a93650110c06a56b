"""Token buckets, pauses and slots: what they promise over any history, without a clock."""

import heapq
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.rates import (
    HOLD_SECONDS,
    MOST_PAUSE_SECONDS,
    MOST_SLOT_SECONDS,
    Admission,
    Allowance,
    Flow,
    Pauses,
    TokenBucket,
)
from outrider_operator.gateway.pace import Limiter
from outrider_operator.settings import LimitSettings

steps = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 500)), min_size=1, max_size=60)


@given(steps, st.integers(1, 100), st.integers(1, 300))
def test_who_waits_for_its_debt_gets_the_rate_and_no_more(
    history: list[tuple[float, int]], rate: int, burst: int
) -> None:
    bucket = TokenBucket(rate, burst, 0.0)
    now, spent, last = 0.0, 0, 0
    for pause, units in history:
        now += pause
        spent, last = spent + units, units
        now += bucket.spend(units, now)
    # What was there at first, what came since, and nothing else.
    assert spent <= burst + rate * now + 1e-6 * (1 + spent)
    assert bucket.spend(0, now) == pytest.approx(0.0, abs=1e-6)
    assert last > 0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(10, 10, 100.0)
    assert bucket.spend(20, 100.0) == 1.0
    assert bucket.spend(0, 50.0) == 1.0
    assert bucket.spend(0, 101.0) == 0.0


def test_no_rate_is_no_limit() -> None:
    assert TokenBucket(0, 0, 0.0).spend(1e12, 1.0) == 0.0


def test_either_records_or_bytes_make_a_debt() -> None:
    assert Allowance(10, 1000, 1.0, 0.0).spend(30, 1, 0.0) == 2.0
    assert Allowance(10, 1000, 1.0, 0.0).spend(1, 4000, 0.0) == 3.0


@given(st.integers(1, 1000), st.integers(1, 400))
def test_a_steady_flow_is_measured_and_forgotten(units: int, turns: int) -> None:
    flow = Flow(0.0)
    now = 0.0
    for _ in range(turns):
        now += 0.01
        flow.add(units, now)
    assert flow.rate(now) <= units * 100 * 1.05
    if turns > 100:
        assert flow.rate(now) == pytest.approx(units * 100, rel=0.05)
    assert flow.rate(now + 5.0) == 0.0


def test_told_once_and_held_only_when_it_does_not_listen() -> None:
    pauses = Pauses()
    assert pauses.step(3.0, 100.0) == (3.0, 0.0)
    assert pauses.step(2.9, 100.1) == (0.0, 0.0)  # it was on its way, and changes nothing
    assert pauses.step(5.0, 100.2) == (5.0, 0.0)  # more of it
    assert pauses.step(4.0, 103.0) == (4.0, 4.0)  # it must have heard by now
    assert pauses.step(1.0, 200.0) == (1.0, 0.0)  # long after: anew
    assert pauses.step(1e9, 300.0)[0] == MOST_PAUSE_SECONDS


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=300), st.integers(1, 50))
def test_admission_keeps_its_rate_for_any_arrivals(gaps: list[float], rate: int) -> None:
    admission = Admission(rate, 10, 0.0)
    now, begun = 0.0, []
    for gap in gaps:
        now += gap
        admitted, seconds = admission.ask(now)
        assert 0 <= seconds <= (HOLD_SECONDS if admitted else MOST_SLOT_SECONDS) + 1e-9
        if admitted:
            begun.append(now + seconds)
    assert begun == sorted(begun)
    # In any second, however it is cut, at most the burst and the rate.
    for at, first in enumerate(begun):
        assert sum(first <= other < first + 1 for other in begun[at:]) <= 10 + rate + 1


def test_five_thousand_come_back_in_order_and_are_all_in_soon() -> None:
    admission = Admission(100, 200, 0.0)
    due, tries, last = [(0.0, number) for number in range(5000)], 0, 0.0
    while due:
        now, number = heapq.heappop(due)
        admitted, seconds = admission.ask(now)
        tries += 1
        if admitted:
            last = max(last, now + seconds)
        else:
            heapq.heappush(due, (now + seconds, number))
    assert last < 55  # 5,000 less the burst, at 100 a second
    assert tries < 2 * 5000


def test_a_crowd_lets_nobody_in_and_costs_no_turns() -> None:
    admission = Admission(10, 2, 0.0)
    for _ in range(5):
        admitted, seconds = admission.ask(0.0, crowded=True)
        assert not admitted
        assert seconds > HOLD_SECONDS
    assert [admission.ask(0.0) for _ in range(2)] == [(True, 0.0)] * 2


def test_slots_are_apart() -> None:
    admission = Admission(10, 1, 0.0)
    answers = [admission.ask(0.0) for _ in range(50)]
    slots = [seconds for admitted, seconds in answers if not admitted]
    assert len(slots) > 30
    gaps = [after - before for before, after in itertools.pairwise(slots)]
    assert min(gaps) >= 0.1


def test_debts_outlive_streams_and_are_bounded() -> None:
    now = 0.0
    limiter = Limiter(
        LimitSettings(agent_records_per_second=10.0, burst_seconds=1.0), 3, lambda: now
    )
    assert limiter.spend("loud", 110, 1) == 10.0
    assert limiter.spend("quiet", 1, 1) == 0.0
    assert limiter.spend("loud", 0, 0) == 10.0
    for number in range(10):
        limiter.spend(f"other-{number}", 1, 1)
    assert len(limiter) == 3


def test_the_process_has_a_limit_of_its_own() -> None:
    settings = LimitSettings(
        agent_records_per_second=0.0,
        agent_bytes_per_second=0.0,
        records_per_second=100.0,
        burst_seconds=1.0,
    )
    limiter = Limiter(settings, 3, lambda: 0.0)
    assert limiter.spend("one", 100, 1) == 0.0
    assert limiter.spend("other", 100, 1) == 1.0
    assert len(limiter) == 0
