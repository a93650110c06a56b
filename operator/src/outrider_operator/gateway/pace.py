"""How much an agent may send: its window, and the buckets of all agents and of the process.

Counts and answers; tells nobody and waits for nothing. How much is too much is decided in
core/rates.py, what follows from it in transfer.py.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from outrider_proto import limits

from outrider_operator.core.rates import Allowance
from outrider_operator.settings import GatewaySettings, LimitSettings

#: Window of an agent when there are many, bytes: some batches of the usual size.
LEAST_WINDOW_BYTES: Final = 128 * limits.KIB
#: All windows together are such a part of the bound at most, but for that.
UNREAD_PART: Final = 4


def window(settings: GatewaySettings, streams: int) -> int:
    """Bytes that an agent may have on their way, with so many streams open, its own included.

    What an agent has sent and the gateway has no room for yet is in buffers of its connection and
    in the message that is being read, so that many agents get less each.
    """
    fair = settings.max_inflight_bytes // (UNREAD_PART * max(1, streams))
    return min(settings.window_bytes, max(LEAST_WINDOW_BYTES, fair))


class Limiter:
    """What agents have sent, against what they may.

    An agent's bucket outlives its streams: who connects anew has the same debt.

    Args:
        settings: the rates.
        entries: most agents that are remembered; the one that was silent longest goes.
        monotonic: seconds.
    """

    def __init__(
        self,
        settings: LimitSettings,
        entries: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._entries = entries
        self._monotonic = monotonic
        self._process = Allowance(
            settings.records_per_second,
            settings.bytes_per_second,
            settings.burst_seconds,
            monotonic(),
        )
        self._agents: OrderedDict[str, Allowance] = OrderedDict()
        self._per_agent = bool(settings.agent_records_per_second or settings.agent_bytes_per_second)

    def __len__(self) -> int:
        return len(self._agents)

    def spend(self, agent: str, records: int, size: int) -> float:
        """Count what an agent sent; returns the seconds until it may send more, mostly 0."""
        now = self._monotonic()
        debt = self._process.spend(records, size, now)
        if not self._per_agent:
            return debt
        allowance = self._agents.get(agent)
        if allowance is None:
            allowance = self._add(agent, now)
        else:
            self._agents.move_to_end(agent)
        return max(debt, allowance.spend(records, size, now))

    def _add(self, agent: str, now: float) -> Allowance:
        settings = self._settings
        allowance = self._agents[agent] = Allowance(
            settings.agent_records_per_second,
            settings.agent_bytes_per_second,
            settings.burst_seconds,
            now,
        )
        if len(self._agents) > self._entries:
            self._agents.popitem(last=False)
        return allowance
