"""What is in force, tried and told: the pure part, against a model."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from outrider_agent.core.config import DISABLED, MOST_DRIFT, Standing, bounded
from outrider_agent.core.pacing import TokenBucket
from outrider_agent.core.session import Session, Want
from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

HASHES = st.sampled_from(["a", "b", "c", "d"])


def config(name: str) -> pb.EffectiveConfig:
    return pb.EffectiveConfig(hash=name, content=name.encode())


class Machine(RuleBasedStateMachine):
    """Servers ask for whatever they like, and what is tried succeeds, fails or is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.standing = Standing()
        self.asked: str | None = None  # the last, while it was not begun
        self.trying: str | None = None
        self.giving_up = False  # another one came for what is tried, whatever came after it
        self.in_force = ""

    @rule(name=HASHES)
    def ask(self, name: str) -> None:
        self.standing.ask(config(name))
        self.asked = None if name == self.trying else name
        self.giving_up |= self.trying is not None and self.asked is not None
        assert self.standing.superseded == (self.trying is not None and self.asked is not None)

    @precondition(lambda self: self.trying is not None)
    @rule()
    def ask_again(self) -> None:
        self.ask(str(self.trying))

    @rule()
    def begin(self) -> None:
        begun = self.standing.begin()
        if self.trying is not None or self.asked is None:
            assert begun is None
            return
        wanted, self.asked = self.asked, None
        if wanted == self.in_force and not self.standing.drift:
            assert begun is None
            assert self.standing.report().phase == pb.CONFIG_PHASE_APPLIED
            assert self.standing.report().tried_hash == wanted
            return
        # What failed before is tried again when it is asked for again.
        assert begun == config(wanted)
        self.trying, self.giving_up = wanted, False
        assert self.standing.report().phase == pb.CONFIG_PHASE_APPLYING

    @precondition(lambda self: self.trying is not None)
    @rule()
    def apply(self) -> None:
        self.standing.applied()
        self.in_force, self.trying = str(self.trying), None
        report = self.standing.report()
        assert (report.hash, report.tried_hash) == (self.in_force, self.in_force)
        assert (report.phase, report.message) == (pb.CONFIG_PHASE_APPLIED, "")

    @precondition(lambda self: self.trying is not None)
    @rule()
    def fail(self) -> None:
        self.standing.failed("no room")
        report = self.standing.report()
        assert (report.tried_hash, report.phase) == (self.trying, pb.CONFIG_PHASE_FAILED)
        assert report.message == "no room"
        self.trying = None

    @precondition(lambda self: self.trying is not None)
    @rule()
    def fail_in_part(self) -> None:
        self.standing.failed("no way back", mixed=True)
        self.trying, self.in_force = None, ""

    @rule(name=HASHES)
    def go_back(self, name: str) -> None:
        self.standing.went_back(name)
        self.in_force = name

    @precondition(lambda self: self.trying is not None and self.giving_up)
    @rule()
    def drop(self) -> None:
        # It takes its time: it may have been asked for again meanwhile.
        self.standing.dropped()
        self.asked = self.asked or self.trying
        self.trying = None

    @rule(drift=st.lists(st.sampled_from(["x", "y"]), max_size=2))
    def look(self, drift: list[str]) -> None:
        news = list(self.standing.report().drift) != drift
        assert self.standing.differs(drift) == news
        assert list(self.standing.report().drift) == drift

    @rule()
    def answered(self) -> None:
        self.standing.answered()  # nothing was on the disk: it changes nothing

    @invariant()
    def what_is_in_force_changes_by_success_alone(self) -> None:
        assert self.standing.report().hash == self.in_force
        if self.trying is None and self.asked is None:
            assert self.standing.begin() is None, "it loops by itself"


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=30)


def test_the_newest_waits_and_those_between_are_dropped() -> None:
    standing = Standing()
    standing.ask(config("a"))
    assert standing.begin() == config("a")
    standing.ask(config("b"))
    standing.ask(config("c"))
    assert standing.superseded
    assert standing.begin() is None
    standing.applied()
    assert standing.begin() == config("c")
    standing.ask(config("d"))
    standing.ask(config("c"))  # what is tried already
    standing.applied()
    assert standing.begin() is None
    assert standing.report().hash == "c"


def test_after_a_failure_what_is_in_force_is_not_applied_anew() -> None:
    standing = Standing()
    for name in "ab":
        standing.ask(config(name))
        assert standing.begin()
        standing.applied() if name == "a" else standing.failed("bad")
    assert standing.report() == pb.ConfigReport(
        hash="a", tried_hash="b", phase=pb.CONFIG_PHASE_FAILED, message="bad"
    )
    standing.ask(config("a"))
    assert standing.begin() is None
    assert standing.report() == pb.ConfigReport(
        hash="a", tried_hash="a", phase=pb.CONFIG_PHASE_APPLIED
    )


def test_what_failed_from_the_disk_is_tried_once_more_when_a_server_answers() -> None:
    standing = Standing()
    standing.start(config("a"))
    assert standing.begin() == config("a")
    standing.failed("no package")
    assert standing.begin() is None
    standing.answered()
    assert standing.begin() == config("a")
    standing.failed("no package")
    standing.answered()
    assert standing.begin() is None

    standing = Standing()
    standing.start(config("a"))
    assert standing.begin() == config("a")
    standing.failed("no package")
    standing.ask(config("b"))
    standing.answered()
    assert standing.begin() == config("b")


def test_a_node_that_takes_none_says_so() -> None:
    standing = Standing(enabled=False)
    standing.ask(config("a"))
    assert standing.begin() is None
    report = standing.report()
    assert (report.hash, report.tried_hash, report.message) == ("", "a", DISABLED)
    assert report.phase == pb.CONFIG_PHASE_FAILED


def test_reports_are_within_their_bounds() -> None:
    state = pb.PluginState(name="x" * 63, message="m" * limits.CONFIG_MESSAGE_BYTES)
    standing = Standing(plugins=(state,) * 200)
    standing.ask(config("a" * 5000))
    standing.begin()
    standing.failed("ü" * 5000)
    standing.differs(["ö" * 5000] * 100)
    report = standing.report()
    assert len(report.message.encode()) <= limits.CONFIG_MESSAGE_BYTES
    assert report.message.endswith("…")
    assert len(report.drift) == MOST_DRIFT
    assert report.ByteSize() <= limits.CONFIG_REPORT_BYTES
    assert bounded("short") == "short"


# In the session.


def welcomed() -> Session:
    session = Session(1, random.Random(1), started=0.0)
    session.config_changed()
    session.sent_hello(0.0)
    session.receive(pb.Command(welcome=pb.Welcome(server="s")), 0.0, 0)
    return session


def test_the_report_goes_after_that_of_the_runs_and_only_the_newest() -> None:
    session = welcomed()
    session.changed(pb.RunState(id=pb.RunId(task_uid="a", attempt=1)))
    assert session.next(0.0) is Want.REPORT
    session.begin_report()
    session.changed(pb.RunState(id=pb.RunId(task_uid="a", attempt=1)))
    assert session.next(0.0) is Want.CHANGES
    session.take_changes()
    assert session.next(0.0) is Want.CONFIG
    session.begin_config()
    assert session.next(0.0) is None
    session.config_changed()
    session.config_changed()
    assert session.next(0.0) is Want.CONFIG
    session.begin_config()
    assert session.next(0.0) is None


def test_another_rate_holds_from_now_on() -> None:
    bucket = TokenBucket(0)
    bucket.take(10_000, 0.0)
    bucket.set_rate(100, 1.0)
    assert bucket.open(1.0)
    bucket.take(300, 1.0)
    assert not bucket.open(1.0)
    assert not bucket.open(2.9)
    bucket.set_rate(1000, 2.0)  # 100 are owed
    assert not bucket.open(2.05)
    assert bucket.open(2.2)
    bucket.take(10_000, 2.2)
    bucket.set_rate(0, 2.3)
    assert bucket.open(2.3)
