"""The classes of records, and what the agent's parts need of the one who takes records.

A class says what may be given up first when there is no room: telemetry, then logs, then results.
"""

from enum import IntEnum
from typing import Protocol

from outrider_proto.v1 import agent_pb2 as pb


class RecordClass(IntEnum):
    """Worth of a record; the lowest goes first. Stored in the outbox: numbers never change."""

    TELEMETRY = 0
    LOG = 1
    RESULT = 2


class RecordSink(Protocol):
    """Who takes records."""

    def submit(self, record: pb.EncodedRecord, record_class: RecordClass) -> bool:
        """Take a record at once; False, and counted, when there is no room."""
        ...

    async def put(self, record: pb.EncodedRecord, record_class: RecordClass) -> None:
        """Take a record; wait while there is no room."""
        ...
