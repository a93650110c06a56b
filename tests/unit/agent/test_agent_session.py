"""The agent's side of a stream, without a stream."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.core import session as protocol
from outrider_agent.core.runs import RunKey
from outrider_agent.core.session import (
    ANSWER_SECONDS,
    IDLE_SECONDS,
    WELCOME_SECONDS,
    BatchesAcked,
    CancelsRequested,
    Draining,
    End,
    ProtocolError,
    RunsAcked,
    RunsRequested,
    Session,
    TaskRequested,
    Want,
    Welcomed,
)
from outrider_proto.v1 import agent_pb2 as pb

EPOCH = 7


def welcome(**fields: int) -> pb.Command:
    return pb.Command(welcome=pb.Welcome(server="s", version="1", agent_id="u", **fields))


def ack(first: int, last: int, epoch: int = EPOCH) -> pb.Command:
    return pb.Command(batch_acks=[pb.BatchAck(epoch=epoch, first=first, last=last)])


def new() -> Session:
    return Session(EPOCH, random.Random(1), started=0.0)


def opened(window: int = 100, **fields: int) -> Session:
    session = new()
    session.sent_hello(0.0)
    session.receive(welcome(window_bytes=window, **fields), 0.0, 0)
    session.begin_report()
    session.sent(0.0)
    return session


def state(uid: str, phase: pb.RunPhase.ValueType = pb.RUN_PHASE_RUNNING) -> pb.RunState:
    return pb.RunState(id=pb.RunId(task_uid=uid, attempt=1), phase=phase)


def test_hello_then_welcome_then_report_then_batches() -> None:
    session = new()
    assert session.next(0.0) is Want.HELLO
    session.sent_hello(0.0)
    assert session.next(0.0) is None
    effects = session.receive(welcome(window_bytes=10), 0.1, 0)
    assert effects == [Welcomed("s", "1", "u")]
    assert session.next(0.1) is Want.REPORT
    session.begin_report()
    assert session.next(0.1) is Want.BATCHES


def test_a_first_message_without_a_welcome_is_an_error() -> None:
    session = new()
    session.sent_hello(0.0)
    with pytest.raises(ProtocolError):
        session.receive(ack(1, 1), 0.0, 0)


def test_without_a_welcome_the_stream_is_given_up() -> None:
    session = new()
    session.sent_hello(0.0)
    assert session.ended(WELCOME_SECONDS - 0.1) is None
    assert session.ended(WELCOME_SECONDS) is End.NO_WELCOME
    assert not End.NO_WELCOME.planned


def test_changes_coalesce_and_go_before_batches() -> None:
    session = opened()
    session.changed(state("a", pb.RUN_PHASE_ACCEPTED))
    session.changed(state("b"))
    session.changed(state("a", pb.RUN_PHASE_SUCCEEDED))
    assert session.next(0.0) is Want.CHANGES
    assert not session.idle
    taken = session.take_changes()
    assert {(s.id.task_uid, s.phase) for s in taken} == {
        ("a", pb.RUN_PHASE_SUCCEEDED),
        ("b", pb.RUN_PHASE_RUNNING),
    }
    assert session.idle


def test_a_report_takes_the_place_of_changes_before_it_and_not_of_those_after() -> None:
    session = opened()
    session.changed(state("before"))
    session.receive(pb.Command(report_runs=True), 0.0, 0)
    assert session.next(0.0) is Want.REPORT
    session.begin_report()
    session.changed(state("after"))
    assert [s.id.task_uid for s in session.take_changes()] == ["after"]


def test_changes_are_bounded_by_number_and_size() -> None:
    session = opened()
    for number in range(1500):
        session.changed(state(f"r{number}"))
    assert len(session.take_changes()) == 1000
    assert len(session.take_changes()) == 500
    for number in range(3):
        big = state(f"b{number}")
        big.preview = b"x" * (protocol.CHANGES_BYTES - 1000)
        session.changed(big)
    assert [len(session.take_changes()) for _ in range(3)] == [1, 1, 1]


def test_the_window_bounds_what_is_in_flight() -> None:
    session = opened(window=100)
    session.sent_batch(1, 60, 0.0)
    assert session.budget == 40
    assert not session.nothing_in_flight
    session.sent_batch(2, 40, 0.0)
    assert session.next(0.0) is None
    assert session.receive(ack(1, 1), 0.0, 0) == [BatchesAcked(EPOCH, 1, 1)]
    assert session.next(0.0) is Want.BATCHES
    assert session.budget == 60


def test_with_nothing_in_flight_there_is_always_a_budget() -> None:
    assert opened(window=1).budget == 1


def test_acks_of_other_epochs_and_of_what_was_not_sent_do_nothing() -> None:
    session = opened()
    session.sent_batch(5, 10, 0.0)
    assert session.receive(ack(5, 5, epoch=EPOCH + 1), 0.0, 0) == []
    assert session.receive(ack(6, 2**63), 0.0, 0) == []
    # A range that is too wide deletes only what was sent here.
    assert session.receive(ack(1, 2**63), 0.0, 0) == [BatchesAcked(EPOCH, 5, 5)]


def test_batches_go_in_order() -> None:
    session = opened()
    session.sent_batch(3, 1, 0.0)
    with pytest.raises(ValueError, match="out of order"):
        session.sent_batch(3, 1, 0.0)


def test_an_empty_outbox_is_not_asked_again_until_there_is_more() -> None:
    session = opened()
    session.begin_read()
    assert session.next(0.0) is None
    session.appended()
    assert session.next(0.0) is Want.BATCHES


def test_what_happens_while_the_outbox_is_read_is_not_forgotten() -> None:
    session = opened(window=100)
    session.sent_batch(1, 90, 0.0)
    session.begin_read()
    session.receive(ack(1, 1), 0.0, 0)  # makes room, after the outbox was asked for ten bytes
    assert session.next(0.0) is Want.BATCHES


def test_requests_become_effects() -> None:
    session = opened()
    run = pb.RunCommand(id=pb.RunId(task_uid="t", attempt=2))
    task = pb.Task(data_type=1060, object_name="outrider-agent")
    command = pb.Command(runs=[run], cancels=[run.id], run_acks=[run.id], task=task)
    key = RunKey("t", 2)
    assert session.receive(command, 0.0, 0) == [
        RunsRequested([run]),
        CancelsRequested([key]),
        RunsAcked([key]),
        TaskRequested(task),
    ]


def test_an_idle_stream_beats_and_expects_an_answer() -> None:
    session = opened()
    session.begin_read()
    assert session.wake_at() == IDLE_SECONDS
    assert session.next(IDLE_SECONDS) is Want.HEARTBEAT
    session.sent_heartbeat(IDLE_SECONDS)
    assert session.next(IDLE_SECONDS * 2) is None
    assert session.wake_at() == IDLE_SECONDS + ANSWER_SECONDS
    assert session.ended(IDLE_SECONDS + ANSWER_SECONDS) is End.NO_ANSWER


def test_any_message_answers_a_heartbeat() -> None:
    session = opened()
    session.sent_heartbeat(20.0)
    session.receive(pb.Command(), 21.0, 0)
    assert session.ended(20.0 + ANSWER_SECONDS) is None


def test_a_drain_ends_the_stream_within_its_spread() -> None:
    session = opened()
    effects = session.receive(pb.Command(drain=pb.Drain(reason="r", spread_millis=5000)), 100.0, 0)
    assert effects == [Draining("r")]
    assert session.ended(100.0 + 5.0) is End.DRAIN
    assert session.wake_at() <= 105.0
    assert End.DRAIN.planned


def test_the_stream_is_renewed_before_the_token_expires() -> None:
    session = opened(expires_unix_nanos=600 * 10**9)
    assert session.ended(539.0) is None
    assert session.ended(586.0) is End.RENEW
    assert End.RENEW.planned


def test_a_token_that_is_about_to_expire_is_not_renewed_in_a_loop() -> None:
    assert opened(expires_unix_nanos=5 * 10**9).ended(19.0) is None
    # With little time left it does not leave at once either.
    assert opened(expires_unix_nanos=30 * 10**9).ended(23.0) is None


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.integers(1, 80)),
            st.tuples(st.just("ack"), st.integers(1, 40)),
        ),
        max_size=60,
    )
)
def test_in_flight_never_passes_the_window_but_for_a_single_batch(
    steps: list[tuple[str, int]],
) -> None:
    session = opened(window=100)
    flight: dict[int, int] = {}
    seq = 0
    for what, number in steps:
        if what == "ack":
            effects = session.receive(ack(1, number), 0.0, 0)
            gone = [n for n in flight if n <= number]
            assert effects == ([BatchesAcked(EPOCH, gone[0], gone[-1])] if gone else [])
            for n in gone:
                del flight[n]
        elif session.next(0.0) is Want.BATCHES and (
            number <= session.budget or session.nothing_in_flight
        ):
            seq += 1
            session.sent_batch(seq, number, 0.0)
            flight[seq] = number
            assert sum(flight.values()) <= 100 or len(flight) == 1
