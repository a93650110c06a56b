"""Counting what a serialized message holds agrees with parsing it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_proto.v1.agent_pb2 import EncodedRecord, PackagedData, RunReport, RunState
from outrider_proto.wire import OTHER_FIELDS, beyond

COUNTS = st.integers(0, 30)


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_agrees_with_protobuf(runs: int, records: int, most_runs: int, most_records: int) -> None:
    data = PackagedData(
        agent_id="x" * 300,
        records=[EncodedRecord(data_type=5, timestamp=-1, data=b"y")] * records,
        run_report=RunReport(runs=[RunState(output_bytes=2**63)] * runs, complete=True),
    ).SerializeToString()
    found = beyond(data, {(18, 1): most_runs, (1,): most_records})
    expected = {
        path
        for path, past in {(18, 1): runs > most_runs, (1,): records > most_records}.items()
        if past
    }
    assert found in expected if expected else found is None


@given(st.binary(max_size=200), COUNTS)
def test_rubbish_is_counted_without_an_error(data: bytes, limit: int) -> None:
    beyond(data, {(18, 1): limit, (1,): limit})


def test_a_split_report_is_counted_as_a_whole() -> None:
    """Fields that may stand once are merged when they stand twice."""
    half = PackagedData(run_report=RunReport(runs=[RunState()] * 6)).SerializeToString()
    assert len(PackagedData.FromString(half + half).run_report.runs) == 12
    assert beyond(half + half, {(18, 1): 11}) == (18, 1)
    assert beyond(half + half, {(18, 1): 12}) is None


@pytest.mark.parametrize(
    ("start", "entry", "path"),
    [
        (b"\x92\x01\x80\x80\x80\x05", b"\x0a\x00", (18, 1)),
        (b"", b"\x0a\x00", (1,)),
        (b"", b"\x58\x00", ()),  # a number that is not known
        (b"\x92\x01\x80\x80\x80\x05", b"\x50\x00", ()),  # the same inside a report
        (b"", b"\x92\x01\x00", ()),  # empty reports
        (b"", b"\xa3\x06\xa4\x06", ()),  # empty groups
    ],
)
def test_counting_ends_at_the_bound(start: bytes, entry: bytes, path: tuple[int, ...]) -> None:
    """Nothing behind the bound is looked at: it may as well be rubbish."""
    bounds = {(18, 1): OTHER_FIELDS, (1,): OTHER_FIELDS}
    data = start + entry * (OTHER_FIELDS + 1) + b"\xff" * 1024 * 1024
    assert beyond(data, bounds) == path
    if not start:
        assert beyond(entry * OTHER_FIELDS, bounds) is None


def test_counting_does_not_end_at_a_group() -> None:
    """Protobuf reads over groups, which no message of ours has, and takes what follows."""
    data = b"\xa3\x06\x58\x07\xa4\x06" + b"\x0a\x00" * 12
    assert len(PackagedData.FromString(data).records) == 12
    assert beyond(data, {(1,): 11}) == (1,)
    assert beyond(data, {(1,): 12}) is None
