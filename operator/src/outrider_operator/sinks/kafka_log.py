"""Keeps aiokafka's log within bounds while brokers are away, and its last word as the reason.

It writes several lines a second then; the sink itself logs each change of its state once.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

#: The same line comes again at most so often, seconds.
REPEAT_SECONDS: Final = 30.0
#: Different lines that are remembered.
MAX_LINES: Final = 64


class BrokerLog(logging.Handler):
    """Passes on what aiokafka logs, repeated lines seldom; remembers the last warning."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._now = now
        self._shown: dict[str, float] = {}
        self._onward = logging.getLogger("kafka.client")
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging for each line."""
        template, now = str(record.msg), self._now()
        self.last = record.getMessage()
        if now - self._shown.get(template, float("-inf")) < REPEAT_SECONDS:
            return
        if len(self._shown) >= MAX_LINES:
            self._shown.clear()
        self._shown[template] = now
        self._onward.warning("aiokafka: %s", self.last)

    def install(self) -> None:
        """Take the place of what handled aiokafka's lines before."""
        logger = logging.getLogger("aiokafka")
        # Below WARNING it writes the content of messages.
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.handlers[:] = [self]
