"""Runs that agents report and no task is known of: their task was deleted.

After a while, in which a task that is merely new would have been seen, those that ended are
acknowledged, so that agents forget them, and those that run are cancelled. Bounded: what finds no
room is reported by its agent again at its next connection.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from outrider_proto.v1.agent_pb2 import Command, RunId, RunState

from outrider_operator.core.merge import is_final
from outrider_operator.metrics import ServerMetrics

#: How long a task may stay unknown, seconds.
GRACE_SECONDS: Final = 15.0
MAX_RUNS: Final = 50_000


class Orphans:
    """The runs without a task. `send` hands commands for nodes to their gateways."""

    def __init__(
        self,
        send: Callable[[Iterable[tuple[str, Command]]], None],
        metrics: ServerMetrics,
        now: Callable[[], float],
    ) -> None:
        self._send = send
        self._metrics = metrics
        self._now = now
        self._runs: dict[tuple[str, str, int], tuple[float, bool]] = {}

    def add(self, node: str, states: Iterable[RunState]) -> None:
        """An agent reported runs of an unknown task."""
        for state in states:
            key = (node, state.id.task_uid, state.id.attempt)
            if key not in self._runs and len(self._runs) >= MAX_RUNS:
                self._metrics.reports_dropped.inc()
                continue
            since = self._runs.get(key, (self._now(), False))[0]
            self._runs[key] = (since, is_final(state))
        self._metrics.orphans.set(len(self._runs))

    async def run(self) -> None:
        """Settle them in time, for ever."""
        while True:
            await asyncio.sleep(GRACE_SECONDS / 3)
            self.settle()

    def settle(self) -> None:
        """Acknowledge or cancel those whose time is over."""
        due = [k for k, (since, _) in self._runs.items() if self._now() >= since + GRACE_SECONDS]
        commands = []
        for key in due:
            node, uid, attempt = key
            run = RunId(task_uid=uid, attempt=attempt)
            _, ended = self._runs.pop(key)
            commands.append((node, Command(run_acks=[run]) if ended else Command(cancels=[run])))
        self._send(commands)
        self._metrics.orphans.set(len(self._runs))
