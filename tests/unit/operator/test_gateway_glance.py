"""What is skipped before parsing is exactly the content of batches, for any message at all."""

import itertools

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.gateway.glance import besides_records
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD, Heartbeat, PackagedData
from outrider_proto.wire import _fields

sizes = st.lists(st.integers(0, 70_000), max_size=5)


def message(sizes: list[int]) -> PackagedData:
    made = PackagedData()
    for seq, size in enumerate(sizes, 1):
        made.batches.add(
            epoch=2**63 + seq,
            seq=seq,
            codec=CODEC_ZSTD,
            records=bytes(size),
            count=1,
            data_types=[9],
        )
    return made


@given(sizes)
def test_counts_all_but_records(sizes: list[int]) -> None:
    data = message(sizes).SerializeToString()
    # Once one has no records, which is refused later, all that follows counts.
    known = list(itertools.takewhile(bool, sizes))
    assert besides_records(data) == len(data) - sum(known)


@given(sizes, st.binary(max_size=300))
def test_what_follows_counts_in_full(sizes: list[int], tail: bytes) -> None:
    data = message([size + 1 for size in sizes]).SerializeToString()
    rest = PackagedData(heartbeat=Heartbeat(unix_nanos=1)).SerializeToString() + tail
    assert besides_records(data + rest) >= besides_records(data)
    assert besides_records(rest) == len(rest)


@given(st.binary(max_size=400) | sizes.map(lambda s: message(s).SerializeToString()), st.data())
def test_never_hides_what_would_be_parsed(data: bytes, source: st.DataObject) -> None:
    if data:
        at = source.draw(st.integers(0, len(data) - 1))
        data = data[:at] + source.draw(st.binary(max_size=3)) + data[at + 1 :]
    try:
        PackagedData.FromString(data)
    except DecodeError:
        return
    # Skipped is at most what stands in field 4 of field 17, as it is parsed.
    batches = [content for number, content in _fields(memoryview(data)) if number == 17]
    most = sum(len(c) for batch in batches for number, c in _fields(batch) if number == 4)
    assert besides_records(data) >= len(data) - most
