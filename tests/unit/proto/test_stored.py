"""Files of batches in both forms: whole, cut anywhere, growing, damaged."""

import io
import itertools

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from outrider_proto import batches, records, stored
from outrider_proto.v1.agent_pb2 import CODEC_NONE, CODEC_ZSTD
from outrider_proto.v1.sink_pb2 import StoredBatch


def made(seq: int, text: str = "v") -> bytes:
    batch = batches.encode(
        [records.payload(1000, 60, {"k": text * seq})],
        epoch=9,
        seq=seq,
        codec=CODEC_ZSTD if seq % 2 else CODEC_NONE,
        created_unix_nanos=1,
    )
    return stored.frame(StoredBatch(agent_id="id", node="n", server_unix_nanos=3, batch=batch))


#: Three writes of two batches each.
GROUPS = [[made(2 * n + 1), made(2 * n + 2)] for n in range(3)]
PLAIN = b"".join(b"".join(group) for group in GROUPS)
PARTS = [zstandard.ZstdCompressor(1).compress(b"".join(group)) for group in GROUPS]
PACKED = b"".join(PARTS)


def seqs(data: bytes) -> list[int]:
    return [item.batch.seq for item in stored.read_stored(io.BytesIO(data))]


@pytest.mark.parametrize("whole", [PLAIN, PACKED])
def test_both_forms_are_told_apart(whole) -> None:
    assert seqs(whole) == [1, 2, 3, 4, 5, 6]


@given(st.integers(0, len(PACKED)))
@settings(max_examples=300)
def test_a_compressed_file_cut_anywhere_is_a_prefix_with_every_whole_write(cut) -> None:
    found = seqs(PACKED[:cut])
    assert found == list(range(1, len(found) + 1))
    ends = [sum(map(len, PARTS[: n + 1])) for n in range(3)]
    assert len(found) >= 2 * sum(end <= cut for end in ends)


@given(st.integers(0, len(PLAIN)))
@settings(max_examples=300)
def test_a_plain_file_cut_anywhere_is_its_whole_batches(cut) -> None:
    found = seqs(PLAIN[:cut])
    ends = [len(b"".join([f for g in GROUPS for f in g][: n + 1])) for n in range(6)]
    assert found == [n + 1 for n, end in enumerate(ends) if end <= cut]


@given(st.sampled_from([PLAIN, PACKED]), st.lists(st.integers(0, 2000), max_size=8))
def test_a_file_that_grows_is_read_as_it_comes(whole, cuts) -> None:
    at = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    parser, found = stored.Parser(), []
    for begin, end in itertools.pairwise(at):
        found += [item.batch.seq for item in parser.feed(whole[begin:end])]
    assert found == [1, 2, 3, 4, 5, 6]


@given(st.integers(0, len(PACKED) - 1), st.integers(1, 255))
def test_damage_is_told_or_harmless_and_never_another_content(at, flip) -> None:
    """Without a checksum in these: a flipped byte may still give a batch, which says so itself."""
    damaged = PACKED[:at] + bytes([PACKED[at] ^ flip]) + PACKED[at + 1 :]
    try:
        for item in stored.read_stored(io.BytesIO(damaged)):
            records.decode_stored(item)
    except batches.BatchError:
        pass


def test_a_part_that_would_not_fit_into_memory_is_refused() -> None:
    bomb = zstandard.ZstdCompressor(1).compress(bytes(stored.FRAME_BYTES + 1))
    with pytest.raises(batches.BatchError, match="states"):
        seqs(bomb)
    unstated = zstandard.ZstdCompressor(1, write_content_size=False).compress(PLAIN)
    with pytest.raises(batches.BatchError, match="states"):
        seqs(unstated)


def test_files_are_oldest_first_whatever_their_form(tmp_path) -> None:
    for name in ("2.records", "1.records.zst", "3.records.zst", "0.dead-letter", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    names = [path.name for path in stored.files_in(tmp_path)]
    assert names == ["1.records.zst", "2.records", "3.records.zst"]
