"""What waits to be sent to one agent, merged into as few messages as can be, and bounded.

Without input or output. An agent that reads slowly gets one large message instead of many small
ones; one that does not read at all meets the bound, and its stream is ended by the shell.
"""

from bisect import bisect_right
from typing import Final

from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import (
    REJECT_REASON_TOO_LARGE,
    BatchAck,
    BatchReject,
    Command,
    Drain,
    EffectiveConfig,
    Heartbeat,
    RunCommand,
    RunId,
    SlowDown,
)

#: Most bytes that wait for one agent.
PENDING_BYTES: Final = 8 * limits.MIB
#: Most bytes of runs in one message; one run always fits.
MESSAGE_RUN_BYTES: Final = limits.MIB
#: Most ranges of acknowledged batches that wait for one agent.
ACK_RANGES: Final = 4096
#: What a cancel or an acknowledgement of a run is counted as, bytes.
RUN_ID_BYTES: Final = 64

RunKey = tuple[str, int]


class OutgoingFullError(Exception):
    """More waits for the agent than may: it does not read."""


class AckRanges:
    """Acknowledged batches as ranges; neighbours are merged."""

    __slots__ = ("_count", "_ranges")

    def __init__(self) -> None:
        # By epoch: first and last sequence numbers of ranges, ascending and apart.
        self._ranges: dict[int, list[tuple[int, int]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, epoch: int, seq: int) -> None:
        """Acknowledge one batch; again is harmless."""
        ranges = self._ranges.get(epoch)
        if ranges is None:
            ranges = self._ranges[epoch] = []
        elif ranges[-1][1] == seq - 1:  # as nearly always
            ranges[-1] = (ranges[-1][0], seq)
            return
        at = bisect_right(ranges, (seq, 2**64))
        before = ranges[at - 1] if at else None
        after = ranges[at] if at < len(ranges) else None
        if before and before[1] >= seq:
            return
        first, last = seq, seq
        if before and before[1] == seq - 1:
            at, first = at - 1, before[0]
        if after and after[0] == seq + 1:
            last = after[1]
        merged = (first != seq) + (last != seq)
        ranges[at : at + merged] = [(first, last)]
        self._count += 1 - merged

    def take(self) -> list[BatchAck]:
        """All of them as messages; none is left."""
        acks = [
            BatchAck(epoch=epoch, first=first, last=last)
            for epoch, ranges in self._ranges.items()
            for first, last in ranges
        ]
        self._ranges.clear()
        self._count = 0
        return acks


class Outgoing:
    """The commands that wait for one agent. What comes again replaces what waits."""

    __slots__ = (
        "_acks",
        "_bytes",
        "_cancels",
        "_config",
        "_first",
        "_rejects",
        "_run_acks",
        "_runs",
    )

    def __init__(self) -> None:
        self._first = Command()
        self._acks = AckRanges()
        self._rejects: dict[tuple[int, int], int] = {}
        self._runs: dict[RunKey, tuple[RunCommand, int]] = {}
        self._cancels: dict[RunKey, None] = {}
        self._run_acks: dict[RunKey, None] = {}
        self._config: EffectiveConfig | None = None
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(
            self._acks
            or self._runs
            or self._cancels
            or self._run_acks
            or self._rejects
            or self._config is not None
            or self._first.ByteSize()
        )

    def acknowledge(self, epoch: int, seq: int) -> None:
        """A batch is stored.

        Raises:
            OutgoingFullError: too many ranges wait.
        """
        self._acks.add(epoch, seq)
        if len(self._acks) > ACK_RANGES:
            raise OutgoingFullError

    def reject(self, epoch: int, seq: int, max_bytes: int) -> None:
        """A batch is too large, and is to come again in parts of at most so many bytes.

        Raises:
            OutgoingFullError: too many wait.
        """
        self._rejects[epoch, seq] = max_bytes
        if len(self._rejects) > ACK_RANGES:
            raise OutgoingFullError

    def slow_down(self, millis: int, reason: str) -> None:
        """Ask the agent for no batches for so long; replaces what waits."""
        self._first.slow_down.CopyFrom(SlowDown(millis=millis, reason=reason))

    def answer(self, heartbeat: Heartbeat) -> None:
        """Answer a heart-beat, unless an answer waits already."""
        if not self._first.HasField("heartbeat"):
            self._first.heartbeat.unix_nanos = heartbeat.unix_nanos

    def drain(self, drain: Drain) -> None:
        """Tell the agent to go elsewhere."""
        self._first.drain.CopyFrom(drain)

    def window(self, most_bytes: int) -> None:
        """Give the agent another window; agents that do not know of it keep theirs."""
        self._first.welcome.window_bytes = most_bytes

    def ask_for_runs(self) -> None:
        """Ask for a complete run report."""
        self._first.report_runs = True

    def merge(self, command: Command) -> None:
        """Add the runs, cancels and run_acks of the leader, its wish for a report, its config.

        Of configs only the newest is sent.

        Raises:
            OutgoingFullError: more would wait than may.
        """
        for run in command.runs:
            self._add_run(run)
        for names, waiting in (
            (command.cancels, self._cancels),
            (command.run_acks, self._run_acks),
        ):
            for name in names:
                if _key(name) not in waiting:
                    waiting[_key(name)] = None
                    self._bytes += RUN_ID_BYTES
        if command.report_runs:
            self.ask_for_runs()
        if command.HasField("config"):
            self._set_config(command.config)
        if self._bytes > PENDING_BYTES:
            raise OutgoingFullError

    def take(self) -> Command | None:
        """The next message; None when nothing waits."""
        if not self:
            return None
        command, self._first = self._first, Command()
        command.batch_acks.extend(self._acks.take())
        if self._rejects:
            command.batch_rejects.extend(
                BatchReject(
                    epoch=epoch, seq=seq, reason=REJECT_REASON_TOO_LARGE, max_bytes=max_bytes
                )
                for (epoch, seq), max_bytes in self._rejects.items()
            )
            self._rejects.clear()
        if self._config is not None:
            # Runs wait for the next message: both together may be larger than a message can be.
            command.config.CopyFrom(self._config)
            self._set_config(None)
        else:
            self._take_runs(command)
        for waiting, names in (
            (self._cancels, command.cancels),
            (self._run_acks, command.run_acks),
        ):
            for key in list(waiting)[: limits.RUNS_PER_MESSAGE]:
                del waiting[key]
                self._bytes -= RUN_ID_BYTES
                names.add(task_uid=key[0], attempt=key[1])
        return command

    def _set_config(self, config: EffectiveConfig | None) -> None:
        self._bytes -= len(self._config.content) if self._config is not None else 0
        self._bytes += len(config.content) if config is not None else 0
        self._config = config

    def _add_run(self, run: RunCommand) -> None:
        key, size = _key(run.id), run.ByteSize()
        replaced = self._runs.pop(key, None)
        self._bytes += size - (replaced[1] if replaced else 0)
        self._runs[key] = (run, size)

    def _take_runs(self, command: Command) -> None:
        taken = 0
        for key, (run, size) in list(self._runs.items())[: limits.RUNS_PER_MESSAGE]:
            if taken and taken + size > MESSAGE_RUN_BYTES:
                break
            taken += size
            self._bytes -= size
            del self._runs[key]
            command.runs.append(run)


def _key(name: RunId) -> RunKey:
    return (name.task_uid, name.attempt)
