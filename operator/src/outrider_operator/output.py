"""Prints the full output of a task on one node, from where this server's sink stored it.

    python -m outrider_operator.output --task-uid UID --node NODE [--attempt N] [--since SECONDS]

`kubectl outrider output` runs it in each server Pod: with the file sink each replica has the
batches that its own agents sent. Prints a line of JSON for each piece, then one that tells the
sink and what could not be read; a reader that misses that last line knows that it has not got
all. The sink and its addresses come from the server's settings. Writes nothing, joins no group.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from outrider_proto import limits
from outrider_proto.output import Piece, Wanted, may_hold_output, pieces_of, read_directory, to_line
from outrider_proto.records import HEADER_NODE, HEADER_TYPES, decode_message
from outrider_runtime.settings import SettingsError, load

from outrider_operator.settings import KafkaSinkSettings, ServerSettings

#: Where the chart puts the server's settings.
SETTINGS_FILE: Final = "/etc/outrider/server.yaml"
#: A broker that sends nothing for so long is given up, seconds.
SILENCE_SECONDS: Final = 20.0
#: Asked of the brokers at a time, bytes: this runs beside a server, in the memory of its Pod.
FETCH_BYTES: Final = 8 * limits.MIB
#: Time between two looks at the partitions, seconds.
POLL_SECONDS: Final = 0.05
#: Problems that are told; more are only counted.
MAX_PROBLEMS: Final = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 when the records cannot be read at all, 2 for wrong settings or flags."""
    parser = argparse.ArgumentParser(prog="python -m outrider_operator.output", description=__doc__)
    parser.add_argument("--task-uid", required=True, help="UID of the AgentTask")
    parser.add_argument("--node", required=True, help="name of the Node")
    parser.add_argument("--attempt", type=int, default=0, help="which attempt; 0: all of them")
    parser.add_argument(
        "--since", type=float, default=0.0, help="when the task was made, seconds since the epoch"
    )
    arguments, rest = parser.parse_known_args(argv)
    wanted = Wanted(arguments.task_uid, arguments.node, arguments.attempt, arguments.since)
    try:
        return _print(_settings(rest), wanted)
    except SettingsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (OSError, KafkaError) as error:
        sys.stderr.write(f"error: the records cannot be read: {error or type(error).__name__}\n")
        return 1


def _settings(argv: Sequence[str]) -> ServerSettings:
    environ = dict(os.environ)
    if Path(SETTINGS_FILE).exists():
        environ.setdefault("OUTRIDER_CONFIG", SETTINGS_FILE)
    return load(
        ServerSettings,
        program="outrider_operator.output",
        version=version("outrider-operator"),
        argv=argv,
        environ=environ,
    )


def _print(settings: ServerSettings, wanted: Wanted) -> int:
    problems: list[str] = []
    writer = _Writer()
    if settings.sink.kind == "kafka":
        asyncio.run(_print_kafka(settings.sink.kafka, wanted, problems, writer))
    else:
        folder = Path(settings.sink.file.directory)
        # Without it this replica has never stored anything.
        for piece in read_directory(folder, wanted, problems) if folder.is_dir() else ():
            writer.write(piece)
    end = {"end": True, "sink": settings.sink.kind, "problems": problems[:MAX_PROBLEMS]}
    sys.stdout.write(json.dumps(end) + "\n")
    sys.stdout.flush()
    return 0


class _Writer:
    """Prints pieces as they are found, each once: the Pod's memory is the server's."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int, int]] = set()

    def write(self, piece: Piece) -> None:
        name = (piece.attempt, piece.offset, len(piece.data))
        if name not in self._seen:
            self._seen.add(name)
            sys.stdout.write(to_line(piece) + "\n")


async def _print_kafka(
    settings: KafkaSinkSettings, wanted: Wanted, problems: list[str], writer: _Writer
) -> None:
    async for piece in _in_kafka(settings, wanted, problems):
        writer.write(piece)


async def _in_kafka(
    settings: KafkaSinkSettings, wanted: Wanted, problems: list[str]
) -> AsyncIterator[Piece]:
    """The pieces in the topic, as far as it is written now."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=list(settings.bootstrap_servers),
        client_id=f"{settings.client_id}-output",
        enable_auto_commit=False,
        fetch_max_bytes=FETCH_BYTES,
        request_timeout_ms=int(settings.request_timeout_seconds * 1000),
    )
    try:
        async with asyncio.timeout(2 * settings.request_timeout_seconds):
            await consumer.start()
            ends = await _seek(consumer, settings.topic, wanted)
        async for message in _messages(consumer, ends):
            for piece in _open(message, wanted, problems):
                yield piece
    finally:
        with contextlib.suppress(KafkaError):
            await consumer.stop()


async def _seek(
    consumer: AIOKafkaConsumer, topic: str, wanted: Wanted
) -> dict[TopicPartition, int]:
    """Go to where the wanted records may begin; returns where each partition ends now.

    All partitions: which one a node's records are in changes with their number.
    """
    if topic not in await consumer.topics():
        return {}
    # Named only now: who asks for a topic that is not there may make it. The caller's time limit
    # ends the wait for its partitions.
    consumer.subscribe([topic])
    while not (partitions := sorted(consumer.assignment())):  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(POLL_SECONDS)
    ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
    starts = await consumer.offsets_for_times(
        dict.fromkeys(partitions, int(wanted.not_before * 1000))
    )
    left = {}
    for partition, end in ends.items():
        start = starts.get(partition)
        # None: nothing was stored there since.
        if start is not None and start.offset < end:
            consumer.seek(partition, start.offset)
            left[partition] = end
    consumer.pause(*(set(partitions) - left.keys()))
    return left


async def _messages(
    consumer: AIOKafkaConsumer, ends: dict[TopicPartition, int]
) -> AsyncIterator[Any]:
    """The messages up to the ends, partition by partition as they come."""
    while left := [p for p, end in ends.items() if await consumer.position(p) < end]:
        async with asyncio.timeout(SILENCE_SECONDS):
            while not (fetched := await consumer.getmany(*left, timeout_ms=500)):
                # Past what retention deleted meanwhile, or a marker, there is nothing to come.
                left = [p for p in left if await consumer.position(p) < ends[p]]
                if not left:
                    return
        for messages in fetched.values():
            for message in messages:
                yield message


def _open(message: Any, wanted: Wanted, problems: list[str]) -> Iterator[Piece]:
    headers = dict(message.headers)
    if headers.get(HEADER_NODE) != wanted.node.encode():
        return
    try:
        # Most batches need not be opened.
        if not may_hold_output(map(int, headers.get(HEADER_TYPES, b"0").split(b","))):
            return
        yield from pieces_of(decode_message(message.headers, message.value), wanted)
    except ValueError as error:  # BatchError is one
        problems.append(f"{message.topic}/{message.partition}/{message.offset}: {error}")


if __name__ == "__main__":
    sys.exit(main())
