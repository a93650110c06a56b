"""The phases of a run, what ends mean, and which runs are taken."""

import errno
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.core import outcome, policy, runs
from outrider_agent.core.outcome import Cause, Ending
from outrider_agent.core.policy import RUN_KINDS, Load, Policy
from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

PHASES = [p for p in pb.RunPhase.values() if p != pb.RUN_PHASE_UNSPECIFIED]
FREE = Load(held=0, limit=10)
ALL = Policy(kinds=RUN_KINDS)


def command(**change: object) -> pb.RunCommand:
    base = pb.RunCommand(
        id=pb.RunId(task_uid="t", attempt=1),
        command=pb.Exec(argv=["true"]),
        timeout_seconds=5,
    )
    base.MergeFrom(pb.RunCommand(**change))  # type: ignore[arg-type] # fields by name
    return base


def test_every_phase_of_the_wire_is_in_the_table() -> None:
    assert set(runs.TRANSITIONS) == set(PHASES)


def test_final_phases_are_those_from_succeeded_on() -> None:
    assert {p for p in PHASES if p >= pb.RUN_PHASE_SUCCEEDED} == runs.FINAL


@given(st.lists(st.sampled_from(PHASES), max_size=8))
def test_no_walk_leaves_a_final_phase(steps: list[runs.Phase]) -> None:
    state = runs.accepted(pb.RunId(task_uid="t", attempt=1))
    for step in steps:
        ended = runs.is_final(state)
        try:
            state = runs.advance(state, step)
        except runs.IllegalTransitionError:
            continue
        assert not ended


def test_advance_leaves_its_argument_alone_and_cuts_the_message() -> None:
    before = runs.accepted(pb.RunId(task_uid="t", attempt=1))
    after = runs.advance(before, pb.RUN_PHASE_FAILED, reason="X", message="ä" * 2000)
    assert before.phase == pb.RUN_PHASE_ACCEPTED
    assert len(after.message.encode()) == limits.RUN_MESSAGE_BYTES


def test_phase_names_are_as_in_the_objects() -> None:
    assert runs.phase_name(pb.RUN_PHASE_TIMED_OUT) == "TimedOut"


def test_a_tombstone_keeps_how_a_run_ended_and_not_its_output() -> None:
    state = pb.RunState(phase=pb.RUN_PHASE_FAILED, reason="NonZeroExit", preview=b"x", exit_code=3)
    kept = runs.tombstone(state)
    assert (kept.reason, kept.exit_code, kept.preview) == ("NonZeroExit", 3, b"")


@pytest.mark.parametrize(
    ("ending", "phase", "reason"),
    [
        (Ending(exit_code=0), pb.RUN_PHASE_SUCCEEDED, ""),
        (Ending(exit_code=3), pb.RUN_PHASE_FAILED, "NonZeroExit"),
        (Ending(signal=signal.SIGSEGV), pb.RUN_PHASE_FAILED, "Signalled"),
        (Ending(Cause.TIMEOUT, signal=signal.SIGTERM), pb.RUN_PHASE_TIMED_OUT, "DeadlineExceeded"),
        # It may end in good order when told to: that is no success.
        (Ending(Cause.TIMEOUT, exit_code=0), pb.RUN_PHASE_TIMED_OUT, "DeadlineExceeded"),
        (Ending(Cause.CANCEL, exit_code=0), pb.RUN_PHASE_CANCELLED, "Cancelled"),
        (Ending(Cause.STOP, signal=signal.SIGKILL), pb.RUN_PHASE_INTERRUPTED, "AgentStopped"),
    ],
)
def test_classify(ending: Ending, phase: runs.Phase, reason: str) -> None:
    found = outcome.classify(ending, timeout_seconds=5)
    assert (found.phase, found.reason) == (phase, reason)


def test_a_process_that_stays_is_told() -> None:
    found = outcome.classify(Ending(Cause.TIMEOUT, stuck=True), timeout_seconds=5)
    assert "did not go away" in found.message


def test_signals_are_named() -> None:
    assert outcome.classify(Ending(signal=9), timeout_seconds=1).message == (
        "ended by signal SIGKILL"
    )
    assert outcome.signal_name(99) == "99"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOENT, "CommandNotFound"),
        (errno.EACCES, "NotExecutable"),
        (errno.ENOEXEC, "NotExecutable"),
        (errno.EAGAIN, "NoResources"),
        (errno.EIO, "StartFailed"),
        (None, "StartFailed"),
    ],
)
def test_start_failures(number: int | None, reason: str) -> None:
    found = outcome.start_failure("/x", number, "input/output error")
    assert (found.phase, found.reason) == (pb.RUN_PHASE_FAILED, reason)
    assert "'/x'" in found.message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"builtin": 99}, "UnknownKind"),
        ({"builtin": pb.BUILTIN_UNSPECIFIED}, "UnknownKind"),
        ({"timeout_seconds": limits.TIMEOUT_SECONDS + 1}, "InvalidRun"),
        ({"command": pb.Exec(argv=["a"] * 1025)}, "InvalidRun"),
        ({"command": pb.Exec(argv=["a\0b"])}, "InvalidRun"),
        ({"command": pb.Exec(argv=["a" * (limits.ARGUMENT_BYTES + 1)])}, "InvalidRun"),
        ({"script": pb.Script(interpreter=[], source="x")}, "InvalidRun"),
        (
            {"script": pb.Script(interpreter=["sh"], source="x" * (limits.SCRIPT_BYTES + 1))},
            "InvalidRun",
        ),
        ({"env": {"A=B": "x"}}, "InvalidRun"),
        ({"env": {"A": "x\0"}}, "InvalidRun"),
        ({"env": {f"A{i}": "" for i in range(limits.ENVIRONMENT + 1)}}, "InvalidRun"),
        ({"not_after_unix_nanos": 99}, "Expired"),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    found = policy.refuse(command(**change), now_nanos=100, policy=ALL, load=FREE)
    assert found is not None
    assert (found.phase, found.reason) == (pb.RUN_PHASE_REJECTED, reason)


def test_a_run_without_a_timeout_is_refused() -> None:
    bare = pb.RunCommand(id=pb.RunId(task_uid="t", attempt=1), command=pb.Exec(argv=["true"]))
    found = policy.refuse(bare, now_nanos=1, policy=ALL, load=FREE)
    assert found is not None
    assert "timeout" in found.message


def test_good_runs_are_taken() -> None:
    for change in (
        {},
        {"builtin": pb.BUILTIN_PING},
        {"script": pb.Script(interpreter=["sh", "-e"], source="true")},
        {"not_after_unix_nanos": 100},
    ):
        run = command(**change)
        assert policy.refuse(run, now_nanos=100, policy=ALL, load=FREE) is None


def test_what_the_node_does_not_allow_is_refused() -> None:
    found = policy.refuse(command(), now_nanos=1, policy=Policy(kinds=["builtin/Ping"]), load=FREE)
    assert found is not None
    assert found.reason == "NotAllowed"
    assert "tasks.allowedKinds" in found.message


def test_a_full_agent_refuses() -> None:
    assert policy.refuse(command(), now_nanos=1, policy=ALL, load=Load(9, 10)) is None
    found = policy.refuse(command(), now_nanos=1, policy=ALL, load=Load(10, 10))
    assert found is not None
    assert found.reason == "TooManyRuns"


@pytest.mark.parametrize(
    ("uid", "attempt", "nameless"),
    [("t", 1, False), ("", 1, True), ("t", 0, True), ("t" * 65, 1, True)],
)
def test_nameless_runs(uid: str, attempt: int, nameless: bool) -> None:
    run = pb.RunCommand(id=pb.RunId(task_uid=uid, attempt=attempt))
    assert policy.nameless(run) is nameless
