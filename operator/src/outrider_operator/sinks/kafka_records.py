"""Writes each record of a batch as a message of its own, for `format: record`.

Opens batches one after the other, so that each agent's order stays, and never keeps the loop for
long: large ones are opened in a thread, and messages are handed over in slices.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from outrider_proto import batches, limits
from outrider_proto.v1.agent_pb2 import EncodedRecord, RecordBatch

from outrider_operator.core.batch import Batch, message_of
from outrider_operator.core.routing import Routes
from outrider_operator.core.sink import Origin, SinkRejectedError
from outrider_operator.sinks.kafka_messages import Headers, one_by_one
from outrider_operator.sinks.kafka_sending import Sending

#: Batches that are larger when opened are opened in a thread, bytes.
THREAD_BYTES: Final = 128 * limits.KIB
#: Messages that are handed over before others have their turn.
SLICE: Final = 200
#: What a message takes besides its value, bytes: headers, key and what surrounds them.
MESSAGE_COST_BYTES: Final = 512

Produce = Callable[[str, bytes, bytes, Headers, Sending], None]


def cost_of(batch: Batch) -> int:
    """What a batch takes while its messages wait, bytes."""
    opened = max(len(batch.records), batch.decompressed_bytes)
    return opened + batch.count * MESSAGE_COST_BYTES


class RecordWriter:
    """Opens batches and hands over their records.

    Args:
        routes: where records go.
        produce: hands a message over.
        room: largest value that a topic takes, bytes.
    """

    def __init__(self, routes: Routes, produce: Produce, room: Callable[[str], int]) -> None:
        self._routes = routes
        self._produce = produce
        self._room = room
        # Bounded by the sink, which counts what it lets in here.
        self._waiting: deque[tuple[Sending, Origin, Batch]] = deque()
        self._some = asyncio.Event()
        # Messages handed over in this turn of the loop, whichever batches they are of.
        self._turn = 0

    def put(self, sending: Sending, origin: Origin, batch: Batch) -> None:
        """Have a batch written; `sending` must count one message, which stands for the opening."""
        self._waiting.append((sending, origin, batch))
        self._some.set()

    async def run(self) -> None:
        """Write what is put until cancelled."""
        while True:
            await self._some.wait()
            while self._waiting:
                await self._write(*self._waiting.popleft())
            self._some.clear()

    async def _write(self, sending: Sending, origin: Origin, batch: Batch) -> None:
        if sending.left <= 0:
            return
        message = message_of(batch)
        try:
            opened = await _open(message)
        except batches.BatchError as error:
            sending.fail(SinkRejectedError(f"the batch cannot be opened: {error}"))
            return
        key = origin.agent_id.encode()
        made = one_by_one(origin, message, opened)
        for number, (data_type, headers, value) in enumerate(made, 1):
            for topic in self._routes.of_type(data_type):
                if len(value) > self._room(topic):
                    sending.fail(_too_large(topic, number - 1, len(value)))
                    return
                if sending.left <= 0:
                    return  # given up meanwhile: what is still to come would only be repeats
                sending.left += 1
                self._produce(topic, key, value, headers, sending)
            self._turn += 1
            if self._turn >= SLICE:
                self._turn = 0
                await asyncio.sleep(0)
        if sending.left > 0:
            sending(None, None)


async def _open(batch: RecordBatch) -> list[EncodedRecord]:
    if batch.decompressed_bytes > THREAD_BYTES:
        return await asyncio.to_thread(batches.decode, batch)
    return batches.decode(batch)


def _too_large(topic: str, index: int, size: int) -> SinkRejectedError:
    return SinkRejectedError(
        f"record {index} has {size} bytes, more than the topic {topic!r} takes: raise its "
        "max.message.bytes"
    )
