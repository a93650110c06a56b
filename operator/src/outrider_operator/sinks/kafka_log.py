"""Keeps librdkafka's log within bounds while brokers are away.

It writes several lines a second then; the sink itself logs each change of its state once.
"""

import logging
import re
import time
from collections.abc import Callable
from typing import Final

from outrider_operator.sinks.kafka_producer import LIBRARY_LOG

#: The same line comes again at most so often, seconds.
REPEAT_SECONDS: Final = 30.0
#: Different lines that are remembered.
MAX_LINES: Final = 64


class BrokerLog(logging.Handler):
    """Passes on what the library logs, repeated lines seldom."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._now = now
        self._shown: dict[str, float] = {}
        self._onward = logging.getLogger("kafka.client")

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging for each line."""
        line, now = record.getMessage(), self._now()
        # Ports, ids and times are what repeated lines differ in.
        alike = re.sub(r"\d+", "0", line)
        if now - self._shown.get(alike, float("-inf")) < REPEAT_SECONDS:
            return
        if len(self._shown) >= MAX_LINES:
            self._shown.clear()
        self._shown[alike] = now
        self._onward.warning("librdkafka: %s", line)

    def install(self) -> None:
        """Take the place of what handled the library's lines before."""
        LIBRARY_LOG.setLevel(logging.WARNING)
        LIBRARY_LOG.propagate = False
        LIBRARY_LOG.handlers[:] = [self]
