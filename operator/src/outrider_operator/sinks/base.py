"""What both sinks share: how a sink lives, and how it says whether it takes batches.

The contract of storing itself is in core/sink.py.
"""

import asyncio
from typing import Protocol

from outrider_runtime.health import Health
from outrider_runtime.logs import get_logger

from outrider_operator.core.sink import Sink
from outrider_operator.metrics import ServerMetrics

log = get_logger(__name__)


class RunnableSink(Sink, Protocol):
    """A sink with a life of its own."""

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the sink going until `stop` is set, then store what was handed over and return.

        Raises:
            SettingsError: a setting can never work.
        """


class SinkState:
    """Whether a sink takes batches: readiness condition "sink", metric, and a line on change."""

    def __init__(self, kind: str, metrics: ServerMetrics, health: Health) -> None:
        self._metrics = metrics
        self._health = health
        self._log = log.bind(kind=kind)
        self._ok: bool | None = None
        self.reason = ""
        self._set(False, "still opening")

    @property
    def ok(self) -> bool:
        """True while batches are taken."""
        return bool(self._ok)

    def well(self) -> None:
        """It takes batches."""
        if not self._ok:
            self._log.info("sink ready")
        self._set(True, "")

    def unwell(self, reason: str) -> None:
        """It takes none, and why: what happened, to what, and what to do."""
        if self._ok is not False or reason != self.reason:
            self._log.error("sink not ready", reason=reason)
        self._set(False, reason)

    def _set(self, ok: bool, reason: str) -> None:
        self._ok, self.reason = ok, reason
        self._metrics.sink_ready.set(int(ok))
        self._health.set("sink", ok, reason)
