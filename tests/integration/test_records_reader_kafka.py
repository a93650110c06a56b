"""`python -m outrider_operator.records` beside a real Kafka: both forms, routes, following."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from cluster.kafka import KafkaBroker
from fakes.gateway import eventually
from fakes.kafka_sink import running_sink
from fakes.sink_suite import batch
from outrider_operator.core.sink import Origin
from outrider_operator.settings_kafka import KafkaRoute

Start = Callable[..., Any]


def origin(node: str) -> Origin:
    return Origin(f"uid-{node}", node, time.time_ns())


@pytest.fixture
async def start(kafka: KafkaBroker, tmp_path: Path) -> AsyncIterator[Start]:
    started: list[asyncio.subprocess.Process] = []

    async def begin(topic: str, *words: str, bootstrap: str = "") -> asyncio.subprocess.Process:
        sink = {
            "kind": "kafka",
            "kafka": {
                "bootstrapServers": [bootstrap or kafka.bootstrap],
                "topic": topic,
                "requestTimeoutSeconds": 5,
                "routes": [{"dataTypes": [1001], "topic": f"{topic}.more"}],
            },
        }
        file = tmp_path / f"{topic}.yaml"
        file.write_text(json.dumps({"sink": sink}))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "outrider_operator.records", *words),
            env={**os.environ, "OUTRIDER_CONFIG": str(file)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def told(process: asyncio.subprocess.Process) -> list[dict[str, Any]]:
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return [json.loads(line) for line in out.decode().splitlines()]


def seen(found: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    return sorted((line["node"], line["seq"], line["index"]) for line in found if "type" in line)


@pytest.mark.parametrize("form", ["batch", "record"])
async def test_all_topics_each_record_once(
    kafka: KafkaBroker, kafka_topic: str, start: Start, form: str
) -> None:
    routes = [KafkaRoute(data_types=[1001], topic=f"{kafka_topic}.more")]
    async with running_sink(kafka.bootstrap, kafka_topic, format=form, routes=routes) as case:
        await eventually(lambda: case.health.ready)
        for seq in (1, 2, 2, 3):
            # Types 1000 and 1001: a batch goes to both topics.
            await case.sink.store(origin("n1"), batch(seq))
        await case.sink.store(origin("n2"), batch(1))
    found = await told(await start(kafka_topic))
    assert found[0] == {"begin": True, "sink": "kafka"}
    assert found[-1] == {"end": True, "sink": "kafka"}
    every = [("n1", seq, index) for seq in (1, 2, 3) for index in (0, 1)]
    assert seen(found) == [*every, ("n2", 1, 0), ("n2", 1, 1)]
    found = await told(await start(kafka_topic, "--node", "n2", "--type", "1001", "--last", "60"))
    assert seen(found) == [("n2", 1, 1)]
    later = str(time.time() + 1000)
    assert seen(await told(await start(kafka_topic, "--since", later))) == []


async def test_follows_from_before_there_is_a_topic(
    kafka: KafkaBroker, kafka_topic: str, start: Start
) -> None:
    process = await start(kafka_topic, "--follow", "--last", "0")
    async with asyncio.timeout(60):
        assert json.loads(await process.stdout.readline())["begin"]
        problem = json.loads(await process.stdout.readline())["problem"]
        assert problem.startswith(f"waiting: there is no topic {kafka_topic}")
        async with running_sink(kafka.bootstrap, kafka_topic) as case:
            await eventually(lambda: case.health.ready)
            for seq in (1, 2):
                await case.sink.store(origin("n1"), batch(seq))
                found: list[dict[str, Any]] = []
                while len(seen(found)) < 2:
                    found.append(json.loads(await process.stdout.readline()))
                assert seen(found) == [("n1", seq, 0), ("n1", seq, 1)]


async def test_no_topic_has_no_records_and_is_not_made(kafka_topic: str, start: Start) -> None:
    for _ in range(2):
        assert seen(await told(await start(kafka_topic))) == []


async def test_no_broker_is_an_error_in_words(kafka_topic: str, start: Start) -> None:
    process = await start(kafka_topic, bootstrap="127.0.0.1:9")
    async with asyncio.timeout(60):
        _, err = await process.communicate()
    assert process.returncode == 1
    last = err.decode().strip().splitlines()[-1]
    assert last.startswith("error: the records cannot be read: no Kafka broker answers at 127.0.")
