"""Read what the agents' records in the cluster's Kafka are, with a plain consumer.

    python -m cluster.records      prints all of them as JSON lines

Reads the topic from its beginning to where it ended at the start; commits nothing, joins no group.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer
from cluster import addons
from outrider_proto.records import Decoded, as_json, decode_message

TOPIC = "outrider.records"
READ_SECONDS = 20.0


@dataclass(frozen=True)
class Message:
    """One message of the topic.

    Attributes:
        key: the agent's id.
        headers: as they stand in the message.
        decoded: its batch, opened.
    """

    key: bytes
    headers: dict[str, bytes]
    decoded: Decoded


async def read_topic(bootstrap: str, topic: str = TOPIC) -> list[Message]:
    """All messages that are in the topic now; none if there is no such topic.

    Raises:
        TimeoutError: the broker does not answer within READ_SECONDS.
        BatchError: a message is not one of the server's.
    """
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    async with asyncio.timeout(READ_SECONDS):
        await consumer.start()
        try:
            return await _read(consumer, topic)
        finally:
            await consumer.stop()


async def _read(consumer: AIOKafkaConsumer, topic: str) -> list[Message]:
    if topic not in await consumer.topics():
        return []
    # Named only now: a consumer of a topic that is not there would make it.
    consumer.subscribe([topic])
    while not (partitions := sorted(consumer.assignment())):
        await asyncio.sleep(0.05)  # the caller's time limit ends it
    ends = await consumer.end_offsets(partitions)
    await consumer.seek_to_beginning(*partitions)
    found: list[Message] = []
    while True:
        left = [p for p in partitions if await consumer.position(p) < ends[p]]
        if not left:
            return found
        for messages in (await consumer.getmany(*left, timeout_ms=500)).values():
            for message in messages:
                decoded = decode_message(message.headers, message.value)
                found.append(Message(message.key, dict(message.headers), decoded))


def main() -> None:
    """Print every record in the cluster's Kafka as a line of JSON."""
    messages = asyncio.run(read_topic(addons.KAFKA_HERE))
    with contextlib.suppress(BrokenPipeError):  # the reader, say `head`, has seen enough
        for message in messages:
            for line in as_json(message.decoded):
                print(line, flush=True)


if __name__ == "__main__":
    main()
