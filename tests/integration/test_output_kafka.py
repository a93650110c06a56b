"""The full output of a run read back from a real Kafka, beside other traffic."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
from cluster.kafka import KafkaBroker
from fakes.gateway import eventually
from fakes.kafka_sink import running_sink
from fakes.sink_suite import batch
from outrider_operator.core.sink import Origin
from outrider_proto import batches, records
from outrider_proto.output import Piece, from_line, join
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD, RecordBatch

WHOLE = b"".join(b"line %d\n" % number for number in range(5000))
STEP = 4000


def output_batch(seq: int, offset: int, uid: str = "uid", attempt: int = 1) -> RecordBatch:
    fields = {
        "task_uid": uid,
        "attempt": str(attempt),
        "offset": str(offset),
        "output": WHOLE[offset : offset + STEP].decode(),
        "encoding": "utf-8",
    }
    made = [records.payload(records.TASK_OUTPUT, int(time.time()), fields)]
    return batches.encode(made, epoch=1, seq=seq, codec=CODEC_ZSTD, created_unix_nanos=1)


def read(kafka: KafkaBroker, topic: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outrider_operator.output", "--task-uid", "uid"]
    environ = {
        **os.environ,
        "OUTRIDER_SINK_KIND": "kafka",
        "OUTRIDER_SINK_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
        "OUTRIDER_SINK_KAFKA_TOPIC": topic,
        "OUTRIDER_SINK_KAFKA_REQUEST_TIMEOUT_SECONDS": "5",
    }
    return subprocess.run(
        [*command, *words], env=environ, capture_output=True, text=True, timeout=60, check=False
    )


def pieces(done: subprocess.CompletedProcess[str]) -> tuple[list[Piece], dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    *lines, end = done.stdout.splitlines()
    return [from_line(line) for line in lines], json.loads(end)


@pytest.fixture
async def filled(kafka: KafkaBroker, kafka_topic: str) -> str:
    """A topic with the output in pieces out of order and twice, among records of others."""
    offsets = list(range(0, len(WHOLE), STEP))
    mine = Origin("agent-1", "node-1", time.time_ns())
    other = Origin("agent-2", "node-2", time.time_ns())
    async with running_sink(kafka.bootstrap, kafka_topic) as case:
        await eventually(lambda: case.health.ready)
        for seq, offset in enumerate([*reversed(offsets), *offsets[:3]], start=1):
            await case.sink.store(mine, output_batch(seq, offset))
            await case.sink.store(other, output_batch(seq, offset))
            await case.sink.store(other, batch(1000 + seq))
        await case.sink.store(mine, output_batch(100, 0, uid="another"))
        await case.sink.store(mine, output_batch(101, 0, attempt=2))
    return kafka_topic


async def test_it_is_whole_and_nothing_else(kafka, filled) -> None:
    done = await asyncio.to_thread(read, kafka, filled, "--node", "node-1", "--attempt", "1")
    found, end = pieces(done)
    assert join(found).data == WHOLE
    assert len({piece.offset for piece in found}) == len(found)
    assert end == {"end": True, "sink": "kafka", "problems": []}


async def test_what_was_stored_before_the_task_is_not_read(kafka, filled) -> None:
    words = ["--node", "node-1", "--attempt", "1", "--since"]
    later = str(time.time() + 10_000)
    found, _ = pieces(await asyncio.to_thread(read, kafka, filled, *words, later))
    assert found == []
    now = str(time.time())
    found, _ = pieces(await asyncio.to_thread(read, kafka, filled, *words, now))
    assert join(found).data == WHOLE


async def test_a_topic_that_is_not_there_has_no_output_and_is_not_made(kafka, kafka_topic) -> None:
    for _ in range(2):
        found, end = pieces(await asyncio.to_thread(read, kafka, kafka_topic, "--node", "n"))
        assert (found, end["problems"]) == ([], [])


async def test_no_broker_is_an_error_in_words(kafka, filled) -> None:
    away = read_away(filled)
    assert away.returncode == 1
    (line,) = away.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: the records cannot be read: ")
    assert away.stdout == ""


def read_away(topic: str) -> subprocess.CompletedProcess[str]:
    class Nowhere:
        bootstrap = "127.0.0.1:9"

    return read(Nowhere, topic, "--node", "node-1")  # type: ignore[arg-type] # its one field
