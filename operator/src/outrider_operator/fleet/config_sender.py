"""Sends agents the configuration they are to have, where what they report is another one.

Paced, so that thousands of configurations neither block the loop nor overflow the links; what is
not answered is sent again. Decides only who is to be sent something now, from what it is given.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from outrider_proto.v1.agent_pb2 import Command

from outrider_operator.core.config_plan import Desired, NodeState, has, refused
from outrider_operator.core.registry import Session
from outrider_operator.metrics import ServerMetrics

#: An agent that does not answer is sent its configuration again after so long, seconds.
AGAIN_SECONDS: Final = 30.0
#: An agent that has not told what it runs so long after it came is sent it all the same, seconds.
SILENT_SECONDS: Final = 5.0
#: The loop does something else after so many bytes, and rests a little after so many.
TURN_BYTES: Final = 256 * 1024
BURST_BYTES: Final = 8 * 1024 * 1024
REST_SECONDS: Final = 0.1
#: One round of sending takes no longer; the rest is sent in the next, seconds.
ROUND_SECONDS: Final = 1.0
#: What a command costs besides its content, bytes.
OVERHEAD_BYTES: Final = 256

Send = Callable[[list[tuple[str, Command]]], None]


@dataclass(frozen=True)
class _Sent:
    hash: str
    session: int
    at: float
    told: float


class ConfigSender:
    """Remembers what was sent to whom.

    Args:
        sessions: who is connected, by node.
        send: takes commands by node.
        now: seconds since the Unix epoch.
    """

    def __init__(
        self,
        sessions: Mapping[str, Session],
        send: Send,
        metrics: ServerMetrics,
        now: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._send = send
        self._metrics = metrics
        self._now = now
        self._sent: dict[str, _Sent] = {}

    def forget(self, node: str) -> None:
        """A node is gone."""
        self._sent.pop(node, None)

    async def deliver(self, wanted: Mapping[str, Desired], nodes: Mapping[str, NodeState]) -> bool:
        """Send what is due.

        Args:
            wanted: what each node is to have; its change is written already.
            nodes: how each node stands.

        Returns:
            Whether some of it is left for another round.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + ROUND_SECONDS
        batch: list[tuple[str, Command]] = []
        turn = burst = 0
        commands: dict[str, Command] = {}
        for node in list(self._sessions):
            desired, state = wanted.get(node), nodes.get(node)
            if desired is None or state is None or not self._due(node, desired, state):
                continue
            key = desired.packed.hash
            if key not in commands:
                commands[key] = Command(config=desired.packed)
            batch.append((node, commands[key]))
            turn += len(desired.packed.content) + OVERHEAD_BYTES
            if turn >= TURN_BYTES:
                self._send(batch)
                burst += turn
                batch, turn = [], 0
                await asyncio.sleep(REST_SECONDS if burst >= BURST_BYTES else 0)
                burst %= BURST_BYTES
                if loop.time() > end:
                    return True
        self._send(batch)
        return False

    def _due(self, node: str, desired: Desired, state: NodeState) -> bool:
        session = self._sessions.get(node)
        if session is None or desired.problem:
            return False
        report, now = state.report, self._now()
        if report is None:
            # It tells right after it came, unless it cannot; then it is asked.
            if now - session.since < SILENT_SECONDS or desired.packed.content == b"{}":
                return False
        elif has(report, desired) or refused(state, desired):
            return False
        elif report.tried == desired.packed.hash and not (report.applied or report.refused):
            return False  # it is at it
        last = self._sent.get(node)
        known = (desired.packed.hash, session.session, state.told)
        same = last is not None and (last.hash, last.session, last.told) == known
        if last is not None and same and now - last.at < AGAIN_SECONDS:
            return False
        self._metrics.config_sends.labels("again" if same else "first").inc()
        self._sent[node] = _Sent(desired.packed.hash, session.session, now, state.told)
        return True
