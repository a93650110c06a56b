"""One stream to a server, as a protocol without input or output.

The shell asks `next` what to send, tells what it sent, and feeds what it received to `receive`,
which answers with effects. The order is always: hello, the server's welcome, a complete report of
runs, then changes of runs, how the agent stands to its configuration, signs of life, and batches
within the server's window, in the order of `lanes` and as fast as `pacing` lets them. Nothing here
reads a clock: `now` is seconds of a steady clock, `wall_nanos` the time of day.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.effects import (
    BatchesAcked,
    BatchRefused,
    BatchTooLarge,
    CancelsRequested,
    ConfigRequested,
    Draining,
    Effect,
    PauseAsked,
    RunsAcked,
    RunsRequested,
    TaskRequested,
    Welcomed,
    batch_bytes,
    terms_of,
)
from outrider_agent.core.lanes import Fits, Lanes, Look
from outrider_agent.core.pacing import Pause, TokenBucket
from outrider_agent.core.runs import RunKey, key_of
from outrider_agent.core.storage import Waiting
from outrider_agent.core.window import Lane, Room, Window, ranges

#: Longest wait for the server's welcome, seconds.
WELCOME_SECONDS = 10.0
#: After so long without having sent anything, a heart-beat goes out, seconds.
IDLE_SECONDS = 20.0
#: A heart-beat must be answered within this, else the server is taken for gone, seconds.
ANSWER_SECONDS = 60.0
#: The stream is renewed this long before the server would end it, seconds: a range, so that the
#: agents of a fleet that started together do not come back together.
RENEW_MARGIN_SECONDS = (15.0, 60.0)
#: But not before this share of what is left to the token has passed.
RENEW_SHARE = 0.8
#: Batches that wait go together, up to so many bytes (but for a single larger one) and so many.
MESSAGE_BYTES = 256 * limits.KIB
MESSAGE_BATCHES = 64
#: Largest sum of states in one message of changes, bytes.
CHANGES_BYTES = 4 * limits.MIB


class ProtocolError(Exception):
    """The server did what it must not; the stream is of no use any more."""


class Want(Enum):
    """What is to be sent next."""

    HELLO = "hello"
    REPORT = "report"
    CHANGES = "changes"
    CONFIG = "config"
    HEARTBEAT = "heartbeat"
    #: Not sent, but read from the outbox, before batches can be.
    LOOK = "look"
    BATCHES = "batches"


class End(Enum):
    """Why the agent ends a stream by itself."""

    NO_WELCOME = "no welcome in time"
    NO_ANSWER = "no answer to a heart-beat"
    RENEW = "the token expires soon"
    DRAIN = "the server leaves"

    @property
    def planned(self) -> bool:
        """Whether to connect anew at once, without having failed."""
        return self in (End.RENEW, End.DRAIN)


@dataclass
class Session:
    """The agent's side of one stream.

    Attributes:
        epoch: Life of the outbox file; acknowledgements of others are ignored.
        rng: Where the spread of renewals and drains comes from.
        started: When the stream was opened.
        bucket: The bandwidth; the same for all streams of the agent.
        pause: The server's wish that no batches come.
    """

    epoch: int
    rng: random.Random
    started: float
    bucket: TokenBucket = field(default_factory=lambda: TokenBucket(0))
    pause: Pause = field(default_factory=Pause)
    welcomed: bool = False
    _hello_sent: bool = False
    _report_due: bool = True
    _config_due: bool = False
    _changes: dict[RunKey, pb.RunState] = field(default_factory=dict)
    _window: Window = field(default_factory=Window)
    _lanes: Lanes | None = None
    _last_sent: float = 0.0
    _unanswered_since: float | None = None
    _end: tuple[float, End] | None = None

    # What to send.

    def next(self, now: float) -> Want | None:
        """What is to be sent now; None: nothing, until something happens or time passes."""
        if not self._hello_sent:
            return Want.HELLO
        if not self.welcomed:
            return None
        if self._report_due:
            return Want.REPORT
        if self._changes:
            return Want.CHANGES
        if self._config_due:
            return Want.CONFIG
        if now - self._last_sent >= IDLE_SECONDS and self._unanswered_since is None:
            return Want.HEARTBEAT
        return self._next_batches(now)

    def _next_batches(self, now: float) -> Want | None:
        if self._lanes is None or self.pause.active(now):
            return None
        if self._lanes.look(self._fits(now)) is not None:
            return Want.LOOK
        return None if self._picked(now) is None else Want.BATCHES

    def _fits(self, now: float) -> Fits:
        """Whether a batch may go: what can wait does so for the bandwidth, too."""
        if self.bucket.open(now):
            return self._window.room
        return lambda lane, size: (
            self._window.room(lane, size) if lane is Lane.RESULTS else Room.FULL
        )

    def _picked(self, now: float) -> Lane | None:
        return None if self._lanes is None else self._lanes.pick(self._fits(now))

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of batches on their way without an acknowledgement."""
        return self._window.in_flight_bytes

    def sent_hello(self, now: float) -> None:
        """The hello was sent."""
        self._hello_sent = True
        self._last_sent = now

    def begin_batches(self, last_seq: int) -> None:
        """Batches may go.

        Args:
            last_seq: The highest number in the outbox now; all up to it can be read.
        """
        self._lanes = Lanes(last_seq)

    def begin_report(self) -> None:
        """A complete report is about to be read from the journal.

        Changes up to now are in it; those that come while it is read are sent after it.
        """
        self._changes.clear()
        self._report_due = False

    def sent(self, size: int, now: float) -> None:
        """Something other than a batch or a heart-beat was sent, of so many bytes."""
        self._last_sent = now
        self.bucket.take(size, now)

    def take_changes(self) -> list[pb.RunState]:
        """Changes of runs for one message, oldest first; the caller sends them now."""
        taken: list[pb.RunState] = []
        size = 0
        for key in list(self._changes):
            state = self._changes[key]
            size += state.ByteSize()
            if taken and (size > CHANGES_BYTES or len(taken) >= limits.RUNS_PER_MESSAGE):
                break
            taken.append(self._changes.pop(key))
        return taken

    def config_changed(self) -> None:
        """The agent stands otherwise to its configuration; only the newest is told."""
        self._config_due = True

    def begin_config(self) -> None:
        """How it stands is about to be read and sent; what changes from now on is sent after it."""
        self._config_due = False

    def sent_heartbeat(self, now: float) -> None:
        """A heart-beat was sent."""
        self._last_sent = now
        self._unanswered_since = now

    def begin_look(self, now: float) -> Look | None:
        """What is to be read from the outbox; the caller does so now and tells by `found`."""
        look = None if self._lanes is None else self._lanes.look(self._fits(now))
        if look is not None and self._lanes is not None:
            self._lanes.begin(look)
        return look

    def found(self, look: Look, batches: Sequence[Waiting], last_seq: int) -> None:
        """The outbox was read; `last_seq` is the highest number in it by now."""
        if self._lanes is not None:
            self._lanes.fill(look, batches, last_seq)

    def take_batches(self, now: float) -> list[Waiting]:
        """The batches of one message, which the caller sends now; empty: none may go."""
        taken: list[Waiting] = []
        size = 0
        while self._lanes is not None and len(taken) < MESSAGE_BATCHES:
            lane = self._picked(now)
            if lane is None or (taken and size + self._lanes.head(lane).size > MESSAGE_BYTES):
                break
            item = self._lanes.take(lane)
            self._window.sent(item.seq, lane, item.size)
            self.bucket.take(item.size, now)
            size += item.size
            taken.append(item)
        if taken:
            self._last_sent = now
        return taken

    def appended(self) -> None:
        """The outbox has a new batch."""
        if self._lanes is not None:
            self._lanes.appended()

    def changed(self, state: pb.RunState) -> None:
        """A run changed its state; a later change of the same run replaces this one."""
        self._changes[key_of(state.id)] = state

    # What was received.

    def receive(self, command: pb.Command, now: float, wall_nanos: int) -> list[Effect]:
        """Take one message of the server.

        Raises:
            ProtocolError: It came before the hello, or the first one holds no welcome.
        """
        effects: list[Effect] = []
        self._unanswered_since = None  # whatever came, the server is there
        if not self.welcomed:
            if not command.HasField("welcome"):
                raise ProtocolError("the server's first message holds no welcome")
            effects.append(self._welcome(command.welcome, now, wall_nanos))
        elif command.HasField("welcome"):
            self._window.resize(command.welcome.window_bytes)
        effects += self._acknowledge(command.batch_acks)
        for reject in command.batch_rejects:
            effects += self._reject(reject)
        if command.HasField("slow_down"):
            seconds = command.slow_down.millis / 1000
            self.pause.ask(seconds, now)
            effects.append(PauseAsked(seconds, command.slow_down.reason))
        if command.runs:
            effects.append(RunsRequested(list(command.runs)))
        if command.cancels:
            effects.append(CancelsRequested([key_of(run) for run in command.cancels]))
        if command.run_acks:
            effects.append(RunsAcked([key_of(run) for run in command.run_acks]))
        if command.HasField("task"):
            effects.append(TaskRequested(command.task))
        if command.HasField("config"):
            effects.append(ConfigRequested(command.config))
        if command.report_runs:
            self._report_due = True
        if command.HasField("drain"):
            effects.append(self._drain(command.drain, now))
        return effects

    def _welcome(self, welcome: pb.Welcome, now: float, wall_nanos: int) -> Welcomed:
        self.welcomed = True
        self._window = Window(welcome.window_bytes, welcome.window_batches)
        if welcome.expires_unix_nanos:
            left = (welcome.expires_unix_nanos - wall_nanos) / 1e9
            margin = self.rng.uniform(*RENEW_MARGIN_SECONDS)
            # With little time left the token may not have been renewed on disk yet: come back
            # ever closer to the end, and at last let the server end the stream.
            if left > 10:
                self._plan_end(now + max(left - margin, left * RENEW_SHARE), End.RENEW)
        return terms_of(welcome)

    def _acknowledge(self, acks: Iterable[pb.BatchAck]) -> list[Effect]:
        """Only what was sent on this stream counts: a wrong range must not delete anything else."""
        gone: list[int] = []
        for ack in acks:
            if ack.epoch == self.epoch:
                gone += self._window.acknowledged(ack.first, ack.last)
        return [BatchesAcked(self.epoch, tuple(ranges(sorted(gone))))] if gone else []

    def _reject(self, reject: pb.BatchReject) -> list[Effect]:
        size = self._window.refused(reject.seq) if reject.epoch == self.epoch else None
        if size is None:
            return []
        if reject.reason != pb.REJECT_REASON_TOO_LARGE:
            return [BatchRefused(reject.epoch, reject.seq, reject.reason)]
        most = batch_bytes(reject.max_bytes or size // 2)
        return [BatchTooLarge(reject.epoch, reject.seq, most)]

    def _drain(self, drain: pb.Drain, now: float) -> Draining:
        spread = self.rng.uniform(0, drain.spread_millis / 1000)
        self._plan_end(now + spread, End.DRAIN)
        return Draining(drain.reason)

    def _plan_end(self, when: float, why: End) -> None:
        if self._end is None or when < self._end[0]:
            self._end = (when, why)

    # Time.

    def ended(self, now: float) -> End | None:
        """Why the agent should end the stream now, or None."""
        if not self.welcomed:
            return End.NO_WELCOME if now >= self.started + WELCOME_SECONDS else None
        if self._end is not None and now >= self._end[0]:
            return self._end[1]
        if self._unanswered_since is not None and now >= self._unanswered_since + ANSWER_SECONDS:
            return End.NO_ANSWER
        return None

    def wake_at(self) -> float:
        """When `next` or `ended` may answer otherwise by the passing of time alone."""
        if not self.welcomed:
            return self.started + WELCOME_SECONDS
        times = []
        if self._unanswered_since is None:
            times.append(self._last_sent + IDLE_SECONDS)
        else:
            times.append(self._unanswered_since + ANSWER_SECONDS)
        if self._end is not None:
            times.append(self._end[0])
        return min(times)

    def batches_at(self, now: float) -> float | None:
        """When batches may go again by the passing of time alone; None: they may, or none wait."""
        if self._lanes is None:
            return None
        if self.pause.active(now):
            return self.pause.until
        if self._lanes.waiting and not self.bucket.open(now):
            return self.bucket.opens_at(now)
        return None

    @property
    def idle(self) -> bool:
        """Whether every report was handed over; batches may still wait."""
        return self.welcomed and not self._report_due and not self._changes
