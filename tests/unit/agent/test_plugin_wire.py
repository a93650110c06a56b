"""What goes through a plug-in's pipe, and the rules for plug-ins: pure functions over bytes."""

import itertools
import struct

import outrider_plugin
import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.core import plugins
from outrider_agent.core.plugin_restarts import RestartLimits, Restarts
from outrider_agent.core.plugin_wire import (
    MESSAGE_BYTES,
    Frames,
    MalformedError,
    frame,
    record_of,
    token_of,
)
from outrider_agent.core.plugins import Lines, PluginPolicy
from outrider_plugin import wire
from outrider_proto.effective import Plugin, Source
from outrider_proto.v1 import agent_pb2 as pb

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(ends)]


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=20),
    st.lists(st.integers(min_value=0, max_value=10_000), max_size=20),
)
def test_messages_come_out_as_they_went_in_however_they_are_cut(
    messages: list[bytes], places: list[int]
) -> None:
    frames = Frames()
    data = b"".join(map(frame, messages))
    assert [m for piece in cut(data, places) for m in frames.feed(piece)] == messages
    assert frames.fault is None
    assert frames.pending == 0


@given(st.binary(max_size=2000), st.lists(st.integers(min_value=0, max_value=2000), max_size=8))
def test_rubbish_gives_the_same_however_it_is_cut_and_bounded_memory(
    data: bytes, places: list[int]
) -> None:
    whole, pieces = Frames(100), Frames(100)
    expected = whole.feed(data)
    assert [m for piece in cut(data, places) for m in pieces.feed(piece)] == expected
    assert whole.fault == pieces.fault
    assert all(0 < len(message) <= 100 for message in expected)
    assert pieces.pending < 104
    if whole.fault is not None:
        assert whole.feed(frame(b"x")) == []
        assert whole.pending == 0


@pytest.mark.parametrize("size", [0, MESSAGE_BYTES + 1, 2**32 - 1])
def test_what_came_before_a_bad_length_counts(size: int) -> None:
    frames = Frames()
    assert frames.feed(frame(b"good") + struct.pack("<I", size) + b"rest") == [b"good"]
    assert frames.fault is not None
    assert str(size) in frames.fault


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_malformed(data: bytes) -> None:
    try:
        record = record_of(data)
    except MalformedError:
        return
    assert record.data_type > 0
    pb.Payload.FromString(record.data)
    token_of(record)


@given(
    st.integers(min_value=1, max_value=2**31 - 1),
    st.integers(min_value=-(2**63), max_value=2**63 - 1),
    st.dictionaries(TEXTS, TEXTS, max_size=5),
)
def test_a_record_of_the_library_passes_on_as_it_is(
    data_type: int, timestamp: int, fields: dict[str, str]
) -> None:
    data = wire.record(data_type, timestamp, fields)
    (message,) = Frames().feed(data)
    record = record_of(message)
    assert (record.data_type, record.timestamp) == (data_type, timestamp)
    assert record.data in message
    assert dict(pb.Payload.FromString(record.data).fields) == fields
    assert token_of(record) == fields.get("token")


@given(st.integers(min_value=0, max_value=2**31 - 1), TEXTS, TEXTS, TEXTS)
def test_the_library_reads_the_agents_tasks(kind: int, name: str, data: str, token: str) -> None:
    task = pb.Task(data_type=kind, object_name=name, data=data, token=token)
    found = wire.task(task.SerializeToString())
    assert found == outrider_plugin.Task(kind, name, data, token)


@given(st.binary(max_size=100))
def test_the_library_says_what_is_no_task(data: bytes) -> None:
    try:
        wire.task(data)
    except ValueError as error:
        assert "protobuf" in str(error)


def test_the_library_refuses_what_no_agent_takes() -> None:
    with pytest.raises(ValueError, match="data type 0"):
        wire.record(0, 0, {})
    with pytest.raises(ValueError, match="at most 1048576"):
        wire.record(1, 0, {"x": "y" * MESSAGE_BYTES})
    assert wire.record(1, 0, {"x": "\udce9"}) == wire.record(1, 0, {"x": "?"})


def test_text_that_is_none_is_replaced_and_the_rest_kept() -> None:
    bad = b"\x0a\x0c\x0a\x04name\x12\x04caf\xe9" + b"\x0a\x06\x0a\x01a\x12\x01b"
    record = record_of(b"\x08\x05\x10\x07\x1a" + bytes((len(bad),)) + bad)
    assert dict(pb.Payload.FromString(record.data).fields) == {"name": "caf\ufffd", "a": "b"}
    with pytest.raises(MalformedError, match="no Payload"):
        record_of(b"\x08\x05\x1a\x02\x0a\xff")
    with pytest.raises(MalformedError, match="type 0"):
        record_of(b"\x10\x07")


def test_unknown_fields_are_not_passed_on() -> None:
    record = record_of(b"\x08\x05\x10\x07" + b"\xa2\x06\x03abc")
    assert record.SerializeToString() == b"\x08\x05\x10\x07"


# Restarts.


def test_waits_double_up_to_a_cap_and_never_vanish() -> None:
    restarts = Restarts(RestartLimits(base=1, cap=6, ends=100, window=1000))
    assert [restarts.ended(now, 0.0).wait for now in range(5)] == [0.5, 1, 2, 3, 3]
    assert restarts.ended(5, 1.0).wait == 6


def test_a_crash_loop_is_so_many_ends_in_the_window() -> None:
    restarts = Restarts(RestartLimits(ends=3, window=100, rest=600))
    assert [restarts.ended(now, 0).failed for now in (0, 60, 120, 180, 181)] == [
        False,
        False,
        False,
        False,
        True,
    ]
    assert restarts.ended(800, 0) == restarts.ended(10_000, 0)  # begins anew after the rest


# Rules.


@pytest.mark.parametrize(
    ("policy", "user", "setting"),
    [
        ({"enabled": False}, "", "plugins.enabled"),
        ({"names": ["a*", "b?"]}, "", "plugins.allowedNames"),
        ({"most": 1}, "", "plugins.maxPlugins"),
        ({}, "nobody", "plugins.allowedUsers"),
        ({"users": ["nobody"]}, "nobody", ""),
        ({"users": ["*"]}, "nobody", ""),
        ({"names": ["f*", "g"]}, "root", ""),
    ],
)
def test_what_the_node_does_not_allow_names_the_setting(
    policy: dict, user: str, setting: str
) -> None:
    given = {"enabled": True, "names": ["*"], "users": [], "own": ["root", "0"], "most": 2}
    source = Source(urls=("https://x/y",), sha256="0" * 64)
    wanted = [Plugin(name=n, version="1", source=source, user=user) for n in ("fim", "g")]
    refusal = plugins.refuse(wanted, PluginPolicy(**{**given, **policy}))
    assert (setting in str(refusal)) if setting else refusal is None


@given(st.binary(max_size=300), st.lists(st.integers(min_value=0, max_value=300), max_size=8))
def test_lines_are_bounded_and_none_is_lost(data: bytes, places: list[int]) -> None:
    lines = Lines(10)
    found = [line for piece in cut(data, places) for line in lines.feed(piece)] + lines.flush()
    expected = [
        line[:10].decode("utf-8", "replace")
        for line in data.replace(b"\r", b"\n").split(b"\n")
        if line
    ]
    assert found == expected
