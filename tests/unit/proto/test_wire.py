"""Counting what a serialized message holds agrees with parsing it."""

from hypothesis import given
from hypothesis import strategies as st
from outrider_proto.v1.agent_pb2 import EncodedRecord, PackagedData, RunReport, RunState
from outrider_proto.wire import too_many


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_agrees_with_protobuf(runs: int, records: int, limit: int) -> None:
    data = PackagedData(
        agent_id="x" * 300,
        records=[EncodedRecord(data_type=5, timestamp=-1, data=b"y")] * records,
        run_report=RunReport(runs=[RunState(output_bytes=2**63)] * runs, complete=True),
    ).SerializeToString()
    assert too_many(data, (18, 1), limit) == (runs > limit)
    assert too_many(data, (1,), limit) == (records > limit)


@given(st.binary(max_size=200), st.integers(0, 5))
def test_rubbish_is_counted_without_an_error(data: bytes, limit: int) -> None:
    too_many(data, (18, 1), limit)
    too_many(data, (1,), limit)


def test_a_split_report_is_counted_as_a_whole() -> None:
    """Fields that may stand once are merged when they stand twice."""
    half = PackagedData(run_report=RunReport(runs=[RunState()] * 6)).SerializeToString()
    assert len(PackagedData.FromString(half + half).run_report.runs) == 12
    assert too_many(half + half, (18, 1), 11)


def test_millions_of_entries() -> None:
    data = b"\x92\x01\x80\x80\x80\x05" + b"\x0a\x00" * (5 * 1024 * 1024)
    assert too_many(data, (18, 1), 1000)
