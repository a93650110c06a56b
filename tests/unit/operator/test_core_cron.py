"""Due times against a slow and obvious answer: every minute is asked what the clock shows."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from outrider_operator.core.cron import NAMES, CronError, ZoneError, due_times

MINUTE, HOUR = 60, 3600


def at(text: str, zone: str = "UTC", fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


def shown(times: list[float], zone: str) -> list[str]:
    return [f"{datetime.fromtimestamp(t, ZoneInfo(zone)):%m-%d %H:%M%z}" for t in times]


# Days on which clocks are changed; Lord Howe by half an hour, Troll by two hours.
CHANGES = [
    ("America/New_York", at("2026-03-08T07:00")),
    ("America/New_York", at("2026-11-01T06:00")),
    ("Europe/Berlin", at("2026-03-29T01:00")),
    ("Europe/Berlin", at("2026-10-25T01:00")),
    ("Australia/Lord_Howe", at("2026-04-04T15:00")),
    ("Australia/Lord_Howe", at("2026-10-03T15:30")),
    ("Antarctica/Troll", at("2026-03-29T01:00")),
    ("Antarctica/Troll", at("2026-10-25T01:00")),
    ("Asia/Kolkata", at("2026-06-01T00:00")),
    ("UTC", at("2026-02-28T23:00")),
]


def span(begin: float, end: float) -> list[float]:
    return [float(t) for t in range(int(begin), int(end), MINUTE)]


def obvious(
    minutes: set[int], hours: set[int], fixed: bool, zone: str, around: float
) -> set[float]:
    """Due times of the day before and after `around`."""
    tz = ZoneInfo(zone)
    instants = span(around - 30 * HOUR, around + 30 * HOUR)
    wall = [datetime.fromtimestamp(t, tz).replace(tzinfo=None, fold=0) for t in instants]
    if not fixed:
        return {
            t
            for t, w in zip(instants, wall, strict=True)
            if w.minute in minutes and w.hour in hours
        }
    found, first, highest = set[float](), dict[datetime, float](), wall[0]
    for instant, now in zip(instants, wall, strict=True):
        first.setdefault(now, instant)
        if now > highest:
            # All the times between two looks at the clock, where it leaps.
            passed = span(highest.replace(tzinfo=UTC).timestamp() + MINUTE,
                          now.replace(tzinfo=UTC).timestamp() + MINUTE)  # fmt: skip
            for moment in passed:
                named = datetime.fromtimestamp(moment, UTC)
                if named.minute in minutes and named.hour in hours:
                    found.add(instant)
            highest = now
    return found


fields = st.sets(st.integers(0, 59), min_size=1, max_size=4)


@settings(max_examples=120, deadline=None)
@given(
    change=st.sampled_from(CHANGES),
    minutes=fields | st.none(),
    hours=st.sets(st.integers(0, 23), min_size=1, max_size=6) | st.none(),
)
@example(CHANGES[0], {30}, {2})
@example(CHANGES[0], {0, 30}, {2, 3})
@example(CHANGES[1], {50}, {1})
@example(CHANGES[5], {15}, {2})
@example(CHANGES[7], {30}, {1, 2})
def test_forwards_and_backwards_are_what_the_clock_shows(change, minutes, hours) -> None:
    zone, around = change
    # cronsim walks by whole hours where the minute or the hour is free, and loses half of one where
    # clocks move by half an hour: on one island, one night a year.
    assume(zone != "Australia/Lord_Howe" or (minutes is not None and hours is not None))
    first = "*" if minutes is None else ",".join(map(str, sorted(minutes)))
    second = "*" if hours is None else ",".join(map(str, sorted(hours)))
    times = due_times(f"{first} {second} * * *", zone)
    fixed = minutes is not None and hours is not None
    every = obvious(minutes or set(range(60)), hours or set(range(24)), fixed, zone, around)
    begin, end = around - 24 * HOUR, around + 24 * HOUR
    expected = sorted(t for t in every if begin < t < end)
    assert shown(times.between(begin, end, 5000), zone) == shown(expected, zone)
    if not expected:
        return
    # Backwards it is the same, also from between two of them; where clocks were set back, from when
    # they show an earlier time than the last due one.
    near = sorted(expected, key=lambda t: abs(t - around))[:20]
    for now in (t + late for t in near for late in (0, 90, 1500, 3000)):
        assert times.latest(now) == max(t for t in every if t <= now)
        later = [t for t in every if t > now]
        assert not later or times.after(now) == min(later)


@given(now=st.floats(0, 4e9))
def test_after_is_later_and_latest_is_not(now) -> None:
    times = due_times("17 3 * * 1-5", "Europe/Berlin")
    after, latest = times.after(now), times.latest(now)
    assert after is not None
    assert latest is not None
    assert latest <= now < after
    assert times.after(latest) == after
    assert times.latest(after) == after


def test_a_daily_time_is_kept_once_a_day_whatever_the_clocks_do() -> None:
    times = due_times("30 2 * * *", "America/New_York")
    spring = times.between(at("2026-03-07"), at("2026-03-10"), 9)
    assert shown(spring, "America/New_York") == [
        "03-07 02:30-0500", "03-08 03:00-0400", "03-09 02:30-0400"
    ]  # fmt: skip
    times = due_times("30 1 * * *", "America/New_York")
    autumn = times.between(at("2026-10-31"), at("2026-11-03"), 9)
    assert shown(autumn, "America/New_York") == [
        "10-31 01:30-0400", "11-01 01:30-0400", "11-02 01:30-0500"
    ]  # fmt: skip


def test_an_hourly_time_is_kept_each_hour_whatever_the_clocks_do() -> None:
    times = due_times("5 * * * *", "Europe/Berlin")
    begin = at("2026-10-25T00:00")
    assert times.between(begin, begin + 4 * HOUR, 9) == [begin + n * HOUR + 300 for n in range(4)]


@pytest.mark.parametrize(
    ("expression", "first"),
    [
        ("0 0 29 2 *", "2028-02-29T00:00"),
        ("0 0 L * *", "2026-01-31T00:00"),
        ("0 0 LW * *", "2026-01-30T00:00"),
        ("0 0 * * 5L", "2026-01-30T00:00"),
        ("0 0 * * MON#2", "2026-01-12T00:00"),
        ("0 0 13 * FRI", "2026-01-02T00:00"),
        ("0 0 ? * 7", "2026-01-04T00:00"),
        (" 5/20   4 1 feb  * ", "2026-02-01T04:05"),
        ("@monthly", "2026-02-01T00:00"),
        ("0 12 31 1,3 *", "2026-01-31T12:00"),
    ],
)
def test_expressions(expression, first) -> None:
    assert due_times(expression, "").after(at("2026-01-01T00:00")) == at(first)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_known(name) -> None:
    assert due_times(name, "Asia/Tokyo").after(0.0) is not None


@pytest.mark.parametrize(
    ("expression", "part"),
    [
        ("", "five fields"),
        ("* * * *", "five fields"),
        ("* * * * * *", "five fields"),
        ("@every 5m", "five fields"),
        ("@sometimes", "five fields"),
        ("60 * * * *", "bad minute"),
        ("* 24 * * *", "bad hour"),
        ("* * 0 * *", "bad day-of-month"),
        ("* * * 13 *", "bad month"),
        ("* * * * 8", "bad day-of-week"),
        ("5-1 * * * *", "bad minute"),
        ("*/0 * * * *", "bad minute"),
        ("0 0 30 2 *", "bad day-of-month"),
    ],
)
def test_what_is_no_expression_is_told_apart(expression, part) -> None:
    with pytest.raises(CronError, match=part):
        due_times(expression, "")


@given(st.text("0123456789*/-,#LW? ", max_size=24) | st.text(max_size=12))
@example("0 0 * * 1#2/3")
@example("0 0 L-3 * *")
@example("0 0 1/L * *")
def test_any_text_is_an_expression_or_refused(text) -> None:
    try:
        times = due_times(text, "")
    except CronError:
        return
    assert times.after(1e9) is None or times.after(1e9)


@pytest.mark.parametrize(
    "zone",
    ["Europe/Berln", "../../etc/passwd", "/etc/passwd", "Europe", "Local", "localtime", "\0"],
)
def test_what_is_no_zone_is_refused(zone) -> None:
    with pytest.raises(ZoneError, match="no time zone"):
        due_times("* * * * *", zone)


def test_what_is_never_due_ends() -> None:
    times = due_times("* * */20 * 1L", "")
    assert times.after(1e9) is None
    assert times.latest(1e9) is None
