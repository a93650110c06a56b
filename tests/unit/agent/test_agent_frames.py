"""The framing of local programs' messages: whatever is sent is found again, and rubbish is told."""

import base64
import itertools
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.core.frames import (
    AROUND,
    HEARTBEAT,
    MOST_BYTES,
    REPORT,
    FrameError,
    Frames,
    Packet,
    frame,
)

PACKETS = st.builds(
    Packet, st.sampled_from([HEARTBEAT, REPORT]), st.binary(max_size=300) | st.just(b"{}")
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(PACKETS, max_size=5), st.lists(st.integers(0, 5000), max_size=20))
def test_packets_come_out_as_they_were_sent(packets: list[Packet], places: list[int]) -> None:
    frames, found = Frames(), []
    for part in cut(b"".join(map(frame, packets)), places):
        found += frames.feed(part)
    assert found == packets
    assert not frames.partial


@given(PACKETS, st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_never_taken_for_the_packet(
    packet: Packet, place: int, change: int
) -> None:
    raw = bytearray(frame(packet))
    raw[place % len(raw)] ^= change
    frames = Frames()
    try:
        found = frames.feed(bytes(raw))
    except FrameError:
        return
    # Its length may say now that more is to come.
    assert found == []
    assert frames.partial


@given(st.lists(st.binary(max_size=400), max_size=8))
def test_rubbish_is_an_error_and_is_not_held(parts: list[bytes]) -> None:
    frames = Frames()
    fed = 0
    try:
        for part in parts:
            frames.feed(part)
            fed += len(part)
            assert len(frames._held) <= MOST_BYTES + AROUND
    except FrameError:
        return
    assert fed == len(frames._held)  # nothing of it was taken for a packet


def test_a_frame_spelled_out() -> None:
    content = json.dumps({"content": "load", "rand": 7, "timestamp": 1_700_000_000}).encode()
    body = json.dumps(
        {"PacketType": 1, "PacketContent": base64.b64encode(content).decode()}
    ).encode()
    check = zlib.crc32(body)
    raw = (
        bytes([0xFF, 0xFF, len(body) >> 8, len(body) & 0xFF])
        + body
        + bytes([check >> 24, check >> 16 & 0xFF, 0xFF, 0xFE])
    )
    [packet] = Frames().feed(raw)
    assert (packet.kind, packet.content) == (REPORT, content)
    assert packet.timestamp == 1_700_000_000


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"no json", b"\xff", b'{"timestamp": "x"}', b'{"timestamp": -1}']
)
def test_a_time_that_is_none_is_0(content: bytes) -> None:
    assert Packet(REPORT, content).timestamp == 0


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[1]",
        b'{"PacketType": 2, "PacketContent": ""}',
        b'{"PacketType": 1, "PacketContent": "%%%"}',
        b"\xff\xfe",
    ],
)
def test_a_body_that_is_no_packet_is_an_error(body: bytes) -> None:
    check = (zlib.crc32(body) >> 16).to_bytes(2, "big")
    raw = b"\xff\xff" + len(body).to_bytes(2, "big") + body + check + b"\xff\xfe"
    with pytest.raises(FrameError):
        Frames().feed(raw)


def test_one_that_is_too_large_is_not_made() -> None:
    with pytest.raises(FrameError, match="too large"):
        frame(Packet(REPORT, bytes(60_000)))
