"""The classes of records, and what the agent's parts need of the one who takes records.

A class says what may be given up first when there is no room: telemetry, then logs; results never.
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
    """Who takes records: collectors, listeners, plug-ins and tasks know nothing else of storage.

    A record that was taken is in memory, and on disk within the delay of its batch; `flush` waits
    for that.
    """

    def submit(self, record: pb.EncodedRecord, record_class: RecordClass) -> bool:
        """Take a record at once; False, and counted, when there is no room."""
        ...

    async def put(self, record: pb.EncodedRecord, record_class: RecordClass) -> None:
        """Take a record; wait while there is no room."""
        ...

    async def flush(self, record_class: RecordClass) -> None:
        """Store what was taken of a class so far without waiting for its delay; then return."""
        ...
