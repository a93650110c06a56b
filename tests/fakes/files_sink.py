"""A file sink that runs, and what is in its files."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fakes.gateway import eventually
from fakes.sink_suite import SinkCase
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import FileSinkSettings
from outrider_operator.sinks.files import FileSink
from outrider_proto import stored
from outrider_proto.records import Decoded, decode_stored
from outrider_runtime.health import Health
from prometheus_client import CollectorRegistry


def read(folder: Path) -> list[Decoded]:
    """All batches in a folder, oldest first."""
    found: list[Decoded] = []
    for path in stored.files_in(folder):
        found.extend(read_file(path))
    return found


def read_file(path: Path) -> list[Decoded]:
    """All batches in a file."""
    with path.open("rb") as file:
        return [decode_stored(item) for item in stored.read_stored(file)]


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[SinkCase]:
    """A sink with its files in a folder; stopped at the end unless it was cancelled."""
    health, stop = Health(), asyncio.Event()
    sink = FileSink(
        FileSinkSettings(directory=str(folder), **settings),
        ServerMetrics(CollectorRegistry()),
        health,
    )

    async def read_all() -> list[Decoded]:
        return read(folder)

    async def read_aside() -> list[Decoded]:
        return [item for path in sorted(folder.glob("*.dead-letter")) for item in read_file(path)]

    task = asyncio.create_task(sink.run(stop))
    await eventually(lambda: health.ready or task.done())
    try:
        yield SinkCase(sink, health, read_all, stop, task, read_aside)
    finally:
        stop.set()
        with suppress(asyncio.CancelledError):
            await task
