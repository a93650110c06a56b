"""The throttle is what the tests of faults take it for: silent without closing, and healed."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from cluster import throttle
from cluster.supervised import free_port
from cluster.throttle import HOST, Throttle

WAIT = 10.0


@dataclass
class Setup:
    """A throttle in front of a server that says back what it hears."""

    port: int
    throttle: Throttle

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(HOST, self.port)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def link() -> AsyncIterator[Setup]:
    control, port, target = free_port(HOST), free_port(HOST), free_port(HOST)
    server = await asyncio.start_server(_echo, HOST, target)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        throttle.__file__,
        str(control),
        f"{port}={HOST}:{target}",
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(WAIT):
        assert await process.stdout.readline() == b"listening\n"
    yield Setup(port, Throttle(control))
    process.kill()
    await process.wait()
    server.close()


async def ask(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], data: bytes
) -> bytes | None:
    """What comes back; None: nothing within half a second, b"": it was closed."""
    reader, writer = connection
    writer.write(data)
    try:
        async with asyncio.timeout(0.5):
            return await reader.read(len(data))
    except TimeoutError:
        return None


async def test_silence_closes_nothing_and_heals(link: Setup) -> None:
    old = await link.connect()
    assert await ask(old, b"one") == b"one"
    await asyncio.to_thread(link.throttle.silence, link.port)
    assert await ask(old, b"two") is None
    new = await link.connect()  # as SYN and ACK would be: nobody is behind it yet
    assert await ask(new, b"three") is None
    await asyncio.to_thread(link.throttle.heal, link.port)
    async with asyncio.timeout(WAIT):
        assert await old[0].readexactly(3) == b"two"
        assert await new[0].readexactly(5) == b"three"
    for _, writer in (old, new):
        writer.close()


async def test_old_connections_may_stay_dead(link: Setup) -> None:
    old = await link.connect()
    assert await ask(old, b"one") == b"one"
    await asyncio.to_thread(link.throttle.silence, link.port)
    await asyncio.to_thread(lambda: link.throttle.heal(link.port, forget=True))
    assert await ask(old, b"two") is None
    new = await link.connect()
    assert await ask(new, b"three") == b"three"
    for _, writer in (old, new):
        writer.close()


async def test_a_rate_is_kept(link: Setup) -> None:
    reader, writer = await link.connect()
    await asyncio.to_thread(lambda: link.throttle.slow(link.port, up=100_000))
    began = time.monotonic()
    writer.write(bytes(100_000))
    async with asyncio.timeout(WAIT):
        await reader.readexactly(100_000)
    assert time.monotonic() - began > 0.8
    writer.close()
