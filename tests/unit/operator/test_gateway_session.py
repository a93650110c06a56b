"""The protocol of a stream, what waits for an agent and for the leader: no input or output."""

import tracemalloc
from typing import TypeVar

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.identity import Identity, Role
from outrider_operator.gateway.link import PENDING_REPORT_BYTES, LinkOutgoing
from outrider_operator.gateway.outgoing import AckRanges, Outgoing, OutgoingFullError
from outrider_operator.gateway.session import (
    BatchesCame,
    Event,
    HeartbeatCame,
    Opened,
    Refused,
    RunsReported,
    SessionProtocol,
    State,
)
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import (
    CODEC_NONE,
    Command,
    Drain,
    EncodedRecord,
    Heartbeat,
    Hello,
    PackagedData,
    RecordBatch,
    RunCommand,
    RunId,
    RunReport,
    RunState,
    Script,
)
from outrider_proto.v1.fleet_pb2 import AgentLeft, AgentSession, NodeRunReport

M = TypeVar("M", bound=Message)
IDENTITY = Identity(Role.AGENT, "outrider/outrider-agent", "n", "uid", "p", "pu")
HELLO = PackagedData(hello=Hello(node="n"))
BATCH = RecordBatch(epoch=1, seq=1, codec=CODEC_NONE, records=b"x", count=1, decompressed_bytes=1)


def changed(**fields: object) -> PackagedData:
    batch = RecordBatch()
    batch.CopyFrom(BATCH)
    for name, value in fields.items():
        setattr(batch, name, value)
    return PackagedData(batches=[batch])


def padded(message: M, size: int) -> M:
    """A copy with so many bytes in a field that nobody knows; receivers keep such fields."""
    length = bytes(size >> shift & 0x7F | (0x80 if shift < 21 else 0) for shift in (0, 7, 14, 21))
    copy = type(message)()
    copy.CopyFrom(message)
    copy.MergeFromString(b"\xc2\x3e" + length + bytes(size))  # field 1000, with a length
    return copy


def run(uid: str = "t", attempt: int = 1, **fields: object) -> PackagedData:
    state = RunState(id=RunId(task_uid=uid, attempt=attempt))
    for name, value in fields.items():
        setattr(state, name, value)
    return PackagedData(run_report=RunReport(runs=[state]))


def opened() -> SessionProtocol:
    protocol = SessionProtocol(IDENTITY)
    assert isinstance(protocol.receive(HELLO.SerializeToString()), Opened)
    return protocol


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (PackagedData(), "NoHello"),
        (PackagedData(heartbeat=Heartbeat()), "NoHello"),
        (PackagedData(hello=Hello(node="m")), "ForeignNode"),
        (PackagedData(hello=Hello()), "ForeignNode"),
        (PackagedData(hello=Hello(node="n"), agent_id="other"), "ForeignAgentId"),
        (PackagedData(hello=Hello(node="n"), heartbeat=Heartbeat()), "SeveralKinds"),
        (PackagedData(hello=Hello(node="n", kernel="x" * 1000)), "BadHello"),
        (PackagedData(hello=Hello(node="n", run_kinds=["x"] * 100)), "BadHello"),
        (PackagedData(hello=padded(Hello(node="n"), limits.HELLO_BYTES)), "BadHello"),
    ],
)
def test_first_message_refused(message: PackagedData, reason: str) -> None:
    protocol = SessionProtocol(IDENTITY)
    event = protocol.receive(message.SerializeToString())
    assert isinstance(event, Refused)
    assert event.reason == reason
    assert protocol.state is State.ENDED
    with pytest.raises(ValueError, match="ended"):
        protocol.receive(HELLO.SerializeToString())


def test_own_agent_id_is_accepted() -> None:
    message = PackagedData(hello=Hello(node="n"), agent_id="uid")
    assert isinstance(SessionProtocol(IDENTITY).receive(message.SerializeToString()), Opened)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (PackagedData(batches=[BATCH]), BatchesCame),
        (run(), RunsReported),
        (PackagedData(run_report=RunReport(complete=True)), RunsReported),
        (PackagedData(heartbeat=Heartbeat()), HeartbeatCame),
    ],
)
def test_content(message: PackagedData, kind: type[Event]) -> None:
    protocol = opened()
    for _ in range(2):
        assert isinstance(protocol.receive(message.SerializeToString()), kind)


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (HELLO, "INVALID_ARGUMENT", "SecondHello"),
        (PackagedData(), "INVALID_ARGUMENT", "Empty"),
        (PackagedData(records=[EncodedRecord()]), "INVALID_ARGUMENT", "PlainRecords"),
        (PackagedData(heartbeat=Heartbeat(), batches=[BATCH]), "INVALID_ARGUMENT", "SeveralKinds"),
        (
            PackagedData(agent_id="other", batches=[BATCH]),
            "PERMISSION_DENIED",
            "ForeignAgentId",
        ),
        (changed(seq=0), "INVALID_ARGUMENT", "BadBatch"),
        (changed(epoch=0), "INVALID_ARGUMENT", "BadBatch"),
        (changed(codec=0), "INVALID_ARGUMENT", "BadBatch"),
        (changed(count=0), "INVALID_ARGUMENT", "BadBatch"),
        (changed(records=b"x" * (limits.BATCH_BYTES + 1)), "INVALID_ARGUMENT", "BadBatch"),
        (changed(decompressed_bytes=2**31), "INVALID_ARGUMENT", "BadBatch"),
        (
            PackagedData(batches=[padded(BATCH, limits.BATCH_HEAD_BYTES)]),
            "INVALID_ARGUMENT",
            "BadBatch",
        ),
        (
            PackagedData(run_report=padded(RunReport(), limits.RUN_REPORT_BYTES)),
            "INVALID_ARGUMENT",
            "BadRunReport",
        ),
        (run(uid=""), "INVALID_ARGUMENT", "BadRunReport"),
        (run(uid="x" * 100), "INVALID_ARGUMENT", "BadRunReport"),
        (run(attempt=0), "INVALID_ARGUMENT", "BadRunReport"),
        (run(preview=b"x" * (limits.PREVIEW_BYTES + 1)), "INVALID_ARGUMENT", "BadRunReport"),
        (run(message="x" * 2000), "INVALID_ARGUMENT", "BadRunReport"),
        (run(reason="x" * 100), "INVALID_ARGUMENT", "BadRunReport"),
        (
            PackagedData(run_report=RunReport(runs=[RunState()] * 1001)),
            "INVALID_ARGUMENT",
            "BadRunReport",
        ),
    ],
)
def test_content_refused(message: PackagedData, code: str, reason: str) -> None:
    event = opened().receive(message.SerializeToString())
    assert isinstance(event, Refused)
    assert (event.code, event.reason) == (code, reason)


@given(st.binary(max_size=200))
def test_rubbish_never_opens_a_stream_and_never_raises(data: bytes) -> None:
    assert isinstance(SessionProtocol(IDENTITY).receive(data), Refused)
    event = opened().receive(data)
    if isinstance(event, Refused):
        assert event.code in ("INVALID_ARGUMENT", "PERMISSION_DENIED")


# What waits for an agent.


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), max_size=120))
def test_ack_ranges_name_exactly_what_was_stored(stored: list[tuple[int, int]]) -> None:
    ranges = AckRanges()
    for epoch, seq in stored:
        ranges.add(epoch, seq)
    count = len(ranges)
    acks = ranges.take()
    assert len(acks) == count
    assert len(ranges) == 0
    named = [(ack.epoch, seq) for ack in acks for seq in range(ack.first, ack.last + 1)]
    assert sorted(named) == sorted(set(stored))
    # As few ranges as there can be: no two of them touch.
    edges = {(ack.epoch, ack.last + 1) for ack in acks}
    assert not edges & {(ack.epoch, ack.first) for ack in acks}


def test_acknowledgements_that_nobody_reads_are_bounded() -> None:
    outgoing = Outgoing()
    with pytest.raises(OutgoingFullError):
        for seq in range(1, 20_000, 2):
            outgoing.acknowledge(1, seq)


def command(number: int, size: int = 10) -> RunCommand:
    return RunCommand(id=RunId(task_uid="t", attempt=number), script=Script(source="x" * size))


def take_all(outgoing: Outgoing) -> list[Command]:
    taken = []
    while (message := outgoing.take()) is not None:
        taken.append(message)
    assert not outgoing
    return taken


def test_everything_goes_into_one_message() -> None:
    outgoing = Outgoing()
    assert outgoing.take() is None
    outgoing.acknowledge(1, 1)
    outgoing.acknowledge(1, 2)
    outgoing.answer(Heartbeat(unix_nanos=1))
    outgoing.answer(Heartbeat(unix_nanos=2))
    outgoing.drain(Drain(reason="r"))
    cancel = RunId(task_uid="c", attempt=1)
    outgoing.merge(Command(runs=[command(1)], cancels=[cancel], report_runs=True))
    outgoing.merge(Command(run_acks=[RunId(task_uid="a", attempt=1)], cancels=[cancel]))
    (message,) = take_all(outgoing)
    assert [(ack.first, ack.last) for ack in message.batch_acks] == [(1, 2)]
    assert message.heartbeat.unix_nanos == 1
    assert (message.drain.reason, message.report_runs) == ("r", True)
    assert (len(message.runs), len(message.cancels), len(message.run_acks)) == (1, 1, 1)


def test_only_what_is_meant_for_agents_is_passed_on() -> None:
    outgoing = Outgoing()
    outgoing.merge(Command(drain=Drain(reason="no")))
    assert outgoing.take() is None


def test_runs_are_split_over_messages_in_order() -> None:
    outgoing = Outgoing()
    outgoing.merge(Command(runs=[command(n, limits.SCRIPT_BYTES) for n in range(1, 21)]))
    messages = take_all(outgoing)
    assert [run.id.attempt for message in messages for run in message.runs] == list(range(1, 21))
    assert max(message.ByteSize() for message in messages) < 2 * limits.MIB


def test_a_run_that_comes_again_replaces_the_one_that_waits() -> None:
    outgoing = Outgoing()
    for _ in range(100):  # altogether far more than may wait
        outgoing.merge(Command(runs=[command(1, limits.SCRIPT_BYTES)]))
    assert sum(len(message.runs) for message in take_all(outgoing)) == 1


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(0, 300_000))
def test_the_bound_counts_what_waits(numbers: list[int], size: int) -> None:
    outgoing = Outgoing()
    try:
        for number in numbers:
            outgoing.merge(Command(runs=[command(number, size)]))
    except OutgoingFullError:
        assert len(set(numbers)) * (size + 50) > 8 * limits.MIB
        return
    found = [run.id.attempt for message in take_all(outgoing) for run in message.runs]
    assert sorted(found) == sorted(set(numbers))
    assert outgoing._bytes == 0


def test_runs_that_nobody_reads_are_bounded() -> None:
    outgoing = Outgoing()
    with pytest.raises(OutgoingFullError):
        for number in range(1, 100):
            outgoing.merge(Command(runs=[command(number, limits.SCRIPT_BYTES)]))


# What waits for the leader.

steps = st.lists(st.tuples(st.sampled_from(["join", "leave", "send"]), st.integers(0, 2)))


@given(steps)
def test_leader_knows_the_roster_whatever_was_merged(history: list[tuple[str, int]]) -> None:
    outgoing = LinkOutgoing()
    here: dict[str, int] = {}
    known: dict[str, int] = {}

    def send() -> None:
        while (message := outgoing.take()) is not None:
            for session in message.joined:
                known[session.node] = session.session
            for left in message.left:
                if known.get(left.node) == left.session:
                    del known[left.node]

    for number, (step, which) in enumerate(history, 1):
        node = f"n{which}"
        if step == "join":
            here[node] = number
            outgoing.joined(AgentSession(node=node, session=number))
        elif step == "leave" and node in here:
            outgoing.left(AgentLeft(node=node, session=here.pop(node)))
        elif step == "send":
            send()
    send()
    assert known == here


def test_beginnings_go_before_ends_and_reports() -> None:
    outgoing = LinkOutgoing()
    outgoing.reported(NodeRunReport(node="n"))
    for number in range(1500):
        outgoing.joined(AgentSession(node=f"n{number}", session=1))
    outgoing.left(AgentLeft(node="n1400", session=1))
    messages = [outgoing.take() for _ in range(4)]
    found = [(len(m.joined), len(m.left), len(m.run_reports)) for m in messages if m is not None]
    assert found == [(1000, 0, 0), (500, 0, 0), (0, 1, 1)]


def test_reports_are_split_and_bounded() -> None:
    outgoing = LinkOutgoing()
    preview = b"x" * limits.PREVIEW_BYTES
    report = RunReport(runs=[RunState(preview=preview)] * 10)
    sent = 0
    while not outgoing.full:
        outgoing.reported(NodeRunReport(node="n", report=report))
        sent += 1
    assert outgoing.report_bytes <= PENDING_REPORT_BYTES + 100_000
    taken = 0
    while (message := outgoing.take()) is not None:
        taken += len(message.run_reports)
        assert message.ByteSize() < 2 * limits.MIB
    assert (taken, outgoing.report_bytes) == (sent, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"\x92\x01\x80\x80\x80\x01" + b"\x0a\x00" * (1024 * 1024),
        b"\x82\x01\x80\x80\x80\x01" + b"\x42\x00" * (1024 * 1024),
        b"\x0a\x00" * (1024 * 1024),
        b"\x1a\x00" * (1024 * 1024),
        b"\x58\x00" * (1024 * 1024),
        b"\xa3\x06\xa4\x06" + b"\x0a\x00" * (1024 * 1024),  # behind a group
    ],
)
def test_millions_of_empty_entries_are_refused_without_being_made(data: bytes) -> None:
    session = opened()
    tracemalloc.start()
    try:
        event = session.receive(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(event, Refused)
    assert event.reason == "TooManyEntries"
    assert peak < 1_000_000
