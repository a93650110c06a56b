"""The agent's side of a stream, without a stream."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.core import session as protocol
from outrider_agent.core.effects import (
    BatchesAcked,
    BatchRefused,
    BatchTooLarge,
    CancelsRequested,
    Draining,
    PauseAsked,
    RunsAcked,
    RunsRequested,
    TaskRequested,
    Welcomed,
)
from outrider_agent.core.pacing import MAX_PAUSE_SECONDS, TokenBucket
from outrider_agent.core.records import RecordClass
from outrider_agent.core.runs import RunKey
from outrider_agent.core.session import (
    ANSWER_SECONDS,
    IDLE_SECONDS,
    MESSAGE_BATCHES,
    MESSAGE_BYTES,
    WELCOME_SECONDS,
    End,
    ProtocolError,
    Session,
    Want,
)
from outrider_agent.core.storage import Waiting
from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

EPOCH = 7


def welcome(**fields: Any) -> pb.Command:
    return pb.Command(welcome=pb.Welcome(server="s", version="1", agent_id="u", **fields))


def ack(first: int, last: int, epoch: int = EPOCH) -> pb.Command:
    return pb.Command(batch_acks=[pb.BatchAck(epoch=epoch, first=first, last=last)])


def new(rate: int = 0) -> Session:
    return Session(EPOCH, random.Random(1), started=0.0, bucket=TokenBucket(rate))


def opened(window: int = 100, rate: int = 0, **fields: Any) -> Session:
    session = new(rate)
    session.sent_hello(0.0)
    session.receive(welcome(window_bytes=window, **fields), 0.0, 0)
    session.begin_batches(0)
    session.begin_report()
    session.sent(0, 0.0)
    return session


def offer(session: Session, *sizes: int, record_class: RecordClass = RecordClass.LOG) -> None:
    """Have the outbox hold batches of these sizes, with the next numbers."""
    first = offered.get(id(session), 0) + 1
    offered[id(session)] = first + len(sizes) - 1
    session.appended()
    look = session.begin_look(0.0)
    assert look is not None
    items = [
        Waiting(seq, size, pb.RecordBatch(epoch=EPOCH, seq=seq), record_class)
        for seq, size in enumerate(sizes, start=first)
    ]
    session.found(look, items, items[-1].seq)


#: The last number that `offer` gave, by session.
offered: dict[int, int] = {}


@pytest.fixture(autouse=True)
def _numbers_begin_anew() -> None:
    offered.clear()


def sent(session: Session, now: float = 0.0) -> list[int]:
    return [item.seq for item in session.take_batches(now)]


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
    assert session.next(0.1) is None
    session.begin_batches(0)
    assert session.next(0.1) is Want.LOOK


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
    session = opened(window=200)
    offer(session, 60, 100, 40)
    assert sent(session) == [1, 2]
    assert session.in_flight_bytes == 160
    assert session.next(0.0) is None
    assert session.receive(ack(1, 1), 0.0, 0) == [BatchesAcked(EPOCH, ((1, 1),))]
    assert session.next(0.0) is Want.BATCHES
    assert sent(session) == [3]


def test_with_nothing_in_flight_a_batch_goes_whatever_its_size() -> None:
    session = opened(window=1)
    offer(session, 1000, 1000)
    assert sent(session) == [1]
    session.receive(ack(1, 1), 0.0, 0)
    assert sent(session) == [2]


def test_the_window_bounds_the_number_of_batches_too() -> None:
    session = opened(window=10**6, window_batches=8)
    offer(session, *[1] * 20)
    assert sent(session) == [1, 2, 3, 4, 5, 6, 7]


def test_acks_of_other_epochs_and_of_what_was_not_sent_do_nothing() -> None:
    session = opened()
    offer(session, 10)
    assert sent(session) == [1]
    assert session.receive(ack(1, 1, epoch=EPOCH + 1), 0.0, 0) == []
    assert session.receive(ack(2, 2**63), 0.0, 0) == []
    # A range that is too wide deletes only what was sent here.
    assert session.receive(ack(0, 2**63), 0.0, 0) == [BatchesAcked(EPOCH, ((1, 1),))]


def test_a_range_with_gaps_deletes_only_what_was_sent() -> None:
    session = opened(window=1000)
    offer(session, 1, 1, 1)
    assert sent(session) == [1, 2, 3]
    offered[id(session)] = 7
    offer(session, 1)
    assert sent(session) == [8]
    both = pb.Command(batch_acks=[*ack(3, 9).batch_acks, *ack(1, 1).batch_acks])
    assert session.receive(both, 0.0, 0) == [BatchesAcked(EPOCH, ((1, 1), (3, 3), (8, 8)))]


def test_several_batches_go_in_one_message_within_its_bounds() -> None:
    session = opened(window=10**9)
    offer(session, *[10] * (MESSAGE_BATCHES + 5))
    assert len(sent(session)) == MESSAGE_BATCHES
    assert len(sent(session)) == 5
    offer(session, MESSAGE_BYTES - 10, 10, 10, MESSAGE_BYTES * 2, 1)
    assert [len(sent(session)) for _ in range(4)] == [2, 1, 1, 1]
    assert sent(session) == []


def test_an_empty_outbox_is_not_asked_again_until_there_is_more() -> None:
    session = opened()
    look = session.begin_look(0.0)
    assert look is not None
    session.found(look, [], 0)
    assert session.next(0.0) is None
    session.appended()
    assert session.next(0.0) is Want.LOOK


def test_a_limit_of_bandwidth_holds_batches_and_not_results_or_reports() -> None:
    session = opened(window=10**6, rate=100)
    offer(session, 90, 90, 90)
    assert sent(session) == [1, 2]
    assert session.next(0.0) is None
    at = session.batches_at(0.0)
    assert at is not None
    assert 0.8 <= at <= 0.82
    session.changed(state("a"))
    assert session.next(0.0) is Want.CHANGES
    session.take_changes()
    session.sent(100, 0.0)
    offer(session, 50, record_class=RecordClass.RESULT)
    assert sent(session) == [4]
    assert session.next(2.2) is None  # what did not wait was counted
    assert session.next(2.4) is Want.BATCHES


def test_a_pause_holds_batches_and_nothing_else() -> None:
    session = opened()
    slow = pb.Command(slow_down=pb.SlowDown(millis=2000, reason="too much"))
    assert session.receive(slow, 1.0, 0) == [PauseAsked(2.0, "too much")]
    assert session.next(1.0) is None
    assert session.batches_at(1.0) == 3.0
    session.changed(state("a"))
    assert session.next(1.0) is Want.CHANGES
    session.take_changes()
    assert session.next(3.0) is Want.LOOK
    session.receive(pb.Command(slow_down=pb.SlowDown(millis=2**32 - 1)), 3.0, 0)
    assert session.batches_at(3.0) == 3.0 + MAX_PAUSE_SECONDS
    session.receive(pb.Command(slow_down=pb.SlowDown(millis=0)), 4.0, 0)
    assert session.next(4.0) is Want.LOOK


def reject(seq: int, reason: int = pb.REJECT_REASON_TOO_LARGE, most: int = 0) -> pb.Command:
    found = pb.BatchReject(epoch=EPOCH, seq=seq, max_bytes=most)
    found.reason = reason  # type: ignore[assignment] # also those that do not exist yet
    return pb.Command(batch_rejects=[found])


def test_a_rejected_batch_leaves_the_window_and_is_not_sent_again() -> None:
    session = opened(window=10_000)
    offer(session, 4000, 4000, 4000)
    assert sent(session) == [1, 2]
    assert session.receive(reject(1, most=2000), 0.0, 0) == [BatchTooLarge(EPOCH, 1, 2000)]
    assert session.receive(reject(1, most=2000), 0.0, 0) == []
    assert session.receive(reject(3, most=2000), 0.0, 0) == []
    assert session.receive(reject(2, reason=77), 0.0, 0) == [BatchRefused(EPOCH, 2, 77)]
    assert session.in_flight_bytes == 0
    assert sent(session) == [3]
    assert session.receive(ack(1, 3), 0.0, 0) == [BatchesAcked(EPOCH, ((3, 3),))]


@pytest.mark.parametrize(
    ("asked", "taken"), [(0, 2000), (1, 1024), (3000, 3000), (10**12, limits.BATCH_BYTES)]
)
def test_the_size_that_a_server_asks_for_is_bounded(asked: int, taken: int) -> None:
    session = opened(window=10_000)
    offer(session, 4000)
    sent(session)
    assert session.receive(reject(1, most=asked), 0.0, 0) == [BatchTooLarge(EPOCH, 1, taken)]


def test_the_terms_of_a_welcome_are_bounded() -> None:
    many = [pb.DataTypes(data_types=range(n * 100, n * 100 + 70)) for n in range(40)]
    command = welcome()
    command.welcome.max_batch_bytes = 1
    command.welcome.separate.extend(
        [pb.DataTypes(data_types=[5, 6]), pb.DataTypes(data_types=[6, 5]), *many]
    )
    session = new()
    session.sent_hello(0.0)
    (effect,) = session.receive(command, 0.0, 0)
    assert isinstance(effect, Welcomed)
    assert effect.max_batch_bytes == 1024
    assert effect.groups[0] == {5, 6}
    assert len(effect.groups) == limits.DATA_TYPE_GROUPS - 1
    assert all(0 < len(group) <= limits.BATCH_DATA_TYPES for group in effect.groups)
    assert not effect.groups[0] & effect.groups[1]


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
    look = session.begin_look(0.0)
    assert look is not None
    session.found(look, [], 0)
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
    sizes: dict[int, int] = {}
    flight: dict[int, int] = {}
    for what, number in steps:
        if what == "ack":
            effects = session.receive(ack(1, number), 0.0, 0)
            gone = [n for n in flight if n <= number]
            assert effects == ([BatchesAcked(EPOCH, ((gone[0], gone[-1]),))] if gone else [])
            for n in gone:
                del flight[n]
        elif session.next(0.0) is Want.LOOK:
            sizes[len(sizes) + 1] = number
            offer(session, number)
            offered.clear()
            offered[id(session)] = len(sizes)
        for seq in sent(session):
            flight[seq] = sizes[seq]
        assert sum(flight.values()) <= 100 or len(flight) == 1
        assert session.in_flight_bytes == sum(flight.values())
