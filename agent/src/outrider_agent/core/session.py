"""One stream to a server, as a protocol without input or output.

The shell asks `next` what to send, tells what it sent, and feeds what it received to `receive`,
which answers with effects. The order is always: hello, the server's welcome, a complete report of
runs, then changes of runs, signs of life, and batches within the server's window. Nothing here
reads a clock: `now` is seconds of a steady clock, `wall_nanos` the time of day.
"""

import random
from dataclasses import dataclass, field
from enum import Enum

from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.runs import RunKey, key_of

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
#: The window where the server names none, bytes.
DEFAULT_WINDOW_BYTES = 4 * limits.MIB
#: Most bytes of batches that are fetched from the outbox at once.
READ_BYTES = limits.BATCH_BYTES
#: Largest sum of states in one message of changes, bytes.
CHANGES_BYTES = 4 * limits.MIB


class ProtocolError(Exception):
    """The server did what it must not; the stream is of no use any more."""


class Want(Enum):
    """What is to be sent next."""

    HELLO = "hello"
    REPORT = "report"
    CHANGES = "changes"
    HEARTBEAT = "heartbeat"
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


@dataclass(frozen=True)
class Welcomed:
    """The server took the stream."""

    server: str
    version: str
    agent_id: str


@dataclass(frozen=True)
class BatchesAcked:
    """The outbox may forget these batches."""

    epoch: int
    first: int
    last: int


@dataclass(frozen=True)
class RunsRequested:
    """Attempts to run."""

    commands: list[pb.RunCommand]


@dataclass(frozen=True)
class CancelsRequested:
    """Attempts to end."""

    keys: list[RunKey]


@dataclass(frozen=True)
class RunsAcked:
    """Results that the journal may forget."""

    keys: list[RunKey]


@dataclass(frozen=True)
class TaskRequested:
    """A task in the form of other servers."""

    task: pb.Task


@dataclass(frozen=True)
class Draining:
    """The server asked the agent to leave."""

    reason: str


Effect = (
    Welcomed
    | BatchesAcked
    | RunsRequested
    | CancelsRequested
    | RunsAcked
    | TaskRequested
    | Draining
)


@dataclass
class Session:
    """The agent's side of one stream.

    Attributes:
        epoch: Life of the outbox file; acknowledgements of others are ignored.
        rng: Where the spread of renewals and drains comes from.
        started: When the stream was opened.
    """

    epoch: int
    rng: random.Random
    started: float
    welcomed: bool = False
    _hello_sent: bool = False
    _report_due: bool = True
    _changes: dict[RunKey, pb.RunState] = field(default_factory=dict)
    _window: int = DEFAULT_WINDOW_BYTES
    _in_flight: dict[int, int] = field(default_factory=dict)
    _in_flight_bytes: int = 0
    _cursor: int = 0
    _maybe_more: bool = True
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
        if now - self._last_sent >= IDLE_SECONDS and self._unanswered_since is None:
            return Want.HEARTBEAT
        if self._maybe_more and self.budget > 0:
            return Want.BATCHES
        return None

    @property
    def cursor(self) -> int:
        """Sequence number of the last batch sent on this stream; 0 before the first."""
        return self._cursor

    @property
    def nothing_in_flight(self) -> bool:
        """Whether every batch sent was acknowledged: then one may go whatever its size."""
        return not self._in_flight

    @property
    def budget(self) -> int:
        """Bytes of batches that may be sent now; with nothing in flight always at least one."""
        if not self._in_flight:
            return max(1, min(self._window, READ_BYTES))
        return min(self._window - self._in_flight_bytes, READ_BYTES)

    def sent_hello(self, now: float) -> None:
        """The hello was sent."""
        self._hello_sent = True
        self._last_sent = now

    def begin_report(self) -> None:
        """A complete report is about to be read from the journal.

        Changes up to now are in it; those that come while it is read are sent after it.
        """
        self._changes.clear()
        self._report_due = False

    def sent(self, now: float) -> None:
        """Something other than a batch or a heart-beat was sent."""
        self._last_sent = now

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

    def sent_heartbeat(self, now: float) -> None:
        """A heart-beat was sent."""
        self._last_sent = now
        self._unanswered_since = now

    def sent_batch(self, seq: int, size: int, now: float) -> None:
        """A batch was sent.

        Args:
            seq: Its sequence number, above that of the one before.
            size: Its size, bytes.
            now: When.
        """
        if seq <= self._cursor:
            raise ValueError(f"batch {seq} after batch {self._cursor}: out of order")
        self._cursor = seq
        self._maybe_more = True
        self._in_flight[seq] = size
        self._in_flight_bytes += size
        self._last_sent = now

    def begin_read(self) -> None:
        """The outbox is about to be read.

        If nothing is sent of it, it is not read again before it has more, or the window has more
        room; what happens while it is read counts.
        """
        self._maybe_more = False

    def appended(self) -> None:
        """The outbox has a new batch."""
        self._maybe_more = True

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
        for ack in command.batch_acks:
            effects += self._acknowledge(ack)
        if command.runs:
            effects.append(RunsRequested(list(command.runs)))
        if command.cancels:
            effects.append(CancelsRequested([key_of(run) for run in command.cancels]))
        if command.run_acks:
            effects.append(RunsAcked([key_of(run) for run in command.run_acks]))
        if command.HasField("task"):
            effects.append(TaskRequested(command.task))
        if command.report_runs:
            self._report_due = True
        if command.HasField("drain"):
            effects.append(self._drain(command.drain, now))
        return effects

    def _welcome(self, welcome: pb.Welcome, now: float, wall_nanos: int) -> Welcomed:
        self.welcomed = True
        self._window = welcome.window_bytes or DEFAULT_WINDOW_BYTES
        if welcome.expires_unix_nanos:
            left = (welcome.expires_unix_nanos - wall_nanos) / 1e9
            margin = self.rng.uniform(*RENEW_MARGIN_SECONDS)
            # With little time left the token may not have been renewed on disk yet: come back
            # ever closer to the end, and at last let the server end the stream.
            if left > 10:
                self._plan_end(now + max(left - margin, left * RENEW_SHARE), End.RENEW)
        return Welcomed(welcome.server, welcome.version, welcome.agent_id)

    def _acknowledge(self, ack: pb.BatchAck) -> list[Effect]:
        """Only what was sent on this stream counts: a wrong range must not delete anything else."""
        if ack.epoch != self.epoch:
            return []
        acked = sorted(seq for seq in self._in_flight if ack.first <= seq <= ack.last)
        if not acked:
            return []
        for seq in acked:
            self._in_flight_bytes -= self._in_flight.pop(seq)
        self._maybe_more = True
        return [BatchesAcked(ack.epoch, acked[0], acked[-1])]

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

    @property
    def idle(self) -> bool:
        """Whether every report was handed over; batches may still wait."""
        return self.welcomed and not self._report_due and not self._changes
