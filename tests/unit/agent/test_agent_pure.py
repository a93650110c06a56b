"""Output within limits, routes and rates."""

import base64

from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.core import output, routes
from outrider_agent.core.output import CHUNK_BYTES, Output, as_text
from outrider_agent.core.routes import NetMode, plan
from outrider_agent.core.traffic import Rates


@given(
    pieces=st.lists(st.one_of(st.just(None), st.binary(max_size=50)), max_size=30),
    preview=st.integers(0, 60),
    limit=st.integers(0, 200),
)
def test_output_is_the_first_bytes_in_order(
    pieces: list[bytes | None], preview: int, limit: int
) -> None:
    found = Output(preview_bytes=preview, max_bytes=limit)
    chunks = []
    for piece in pieces:
        chunks += found.flush() if piece is None else found.feed(piece)
    chunks += found.flush(last=True)
    whole = b"".join(p for p in pieces if p)
    assert b"".join(c.data for c in chunks) == whole[:limit]
    offset = 0
    for chunk in chunks:
        assert chunk.offset == offset
        assert 0 < len(chunk.data) <= CHUNK_BYTES
        offset += len(chunk.data)
    assert found.preview == whole[:preview]
    assert found.total == len(whole)
    assert found.truncated is (len(whole) > limit)


def test_chunks_do_not_split_characters() -> None:
    found = Output(preview_bytes=0, max_bytes=10 * CHUNK_BYTES)
    text = "x" + "€" * CHUNK_BYTES
    chunks = [*found.feed(text.encode()), *found.flush(last=True)]
    assert len(chunks) == 4
    assert "".join(c.data.decode() for c in chunks) == text


def test_a_flush_keeps_a_character_that_is_not_whole() -> None:
    found = Output(preview_bytes=0, max_bytes=100)
    found.feed("a€".encode()[:-1])
    assert [c.data for c in found.flush()] == [b"a"]
    found.feed("€".encode()[-1:])
    assert [c.data.decode() for c in found.flush()] == ["€"]


def test_bytes_that_are_no_text_never_stay_behind() -> None:
    found = Output(preview_bytes=0, max_bytes=CHUNK_BYTES * 2)
    chunks = found.feed(b"\xff" * (CHUNK_BYTES + 10))
    assert sum(len(c.data) for c in chunks) + found.pending == CHUNK_BYTES + 10
    assert len(chunks) == 1


@given(st.binary(max_size=100))
def test_text_loses_nothing(data: bytes) -> None:
    text, encoding = as_text(data)
    assert (text.encode() if encoding == "utf-8" else base64.b64decode(text)) == data
    assert encoding in ("utf-8", "base64")
    assert output.as_text(b"\xff")[1] == "base64"


def test_routes_go_from_discovered_over_private_to_public() -> None:
    found = plan(["a:1", "b:1"], private="p:1", public="q:1")
    assert [(r.address, r.mode) for r in found] == [
        ("a:1", NetMode.DISCOVERED),
        ("b:1", NetMode.DISCOVERED),
        ("p:1", NetMode.PRIVATE),
        ("q:1", NetMode.PUBLIC),
    ]


def test_routes_are_bounded_and_have_no_repeats() -> None:
    many = [f"h{n}:1" for n in range(20)]
    assert len(plan(many)) == routes.MAX_DISCOVERED
    assert len(plan(["a:1", "a:1"], private="a:1")) == 1


def test_a_server_that_leaves_is_tried_last() -> None:
    assert [r.address for r in plan(["a:1", "b:1"], avoid="a:1")] == ["b:1", "a:1"]
    assert [r.address for r in plan(["a:1"], avoid="a:1")] == ["a:1"]


def test_rates_begin_at_zero_and_survive_a_counter_that_begins_anew() -> None:
    rates = Rates()
    assert rates.update({"x": 100}, 10.0) == {"x": 0.0}
    assert rates.update({"x": 150}, 20.0) == {"x": 5.0}
    assert rates.update({"x": 10}, 30.0) == {"x": 0.0}
    assert rates.update({"x": 20}, 30.0) == {"x": 0.0}
