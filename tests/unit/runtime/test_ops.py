"""The ops listener, over real sockets."""

import asyncio
import socket
import urllib.error
import urllib.request

import pytest
from outrider_runtime.health import Health
from outrider_runtime.metrics import new_registry
from outrider_runtime.ops import MAX_CONNECTIONS, OpsServer
from outrider_runtime.settings import SettingsError
from prometheus_client import Counter


async def get(port: int, path: str) -> tuple[int, str, str]:
    def call() -> tuple[int, str, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.headers["content-type"], answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["content-type"], error.read().decode()

    return await asyncio.to_thread(call)


async def test_metrics_and_health() -> None:
    registry, health = new_registry(), Health()
    Counter("things", "Things.", registry=registry).inc(3)
    sick: list[str] = []
    health.live("loop", lambda: sick[0] if sick else None)
    async with OpsServer("127.0.0.1:0", registry, health) as ops:
        status, kind, text = await get(ops.port, "/metrics")
        assert (status, "things_total 3.0" in text) == (200, True)
        assert kind.startswith("text/plain")
        assert (await get(ops.port, "/readyz"))[0] == 503
        health.set("sink", False, "Kafka is away")
        assert await get(ops.port, "/readyz?verbose") == (
            503,
            "text/plain; charset=utf-8",
            "[-]sink failed: Kafka is away\nnot ready\n",
        )
        health.set("sink", True)
        assert (await get(ops.port, "/readyz"))[2] == "[+]sink ok\nready\n"
        assert (await get(ops.port, "/healthz"))[0] == 200
        sick.append("stuck")
        assert (await get(ops.port, "/healthz"))[0] == 503
        assert (await get(ops.port, "/"))[0] == 404


async def raw(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    got = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    await writer.wait_closed()
    return got


async def test_bad_requests_harm_nobody() -> None:
    async with OpsServer("127.0.0.1:0", new_registry(), Health(), idle_seconds=0.3) as ops:
        assert b" 400 " in await raw(ops.port, b"\x00\x01rubbish\r\n\r\n")
        assert b" 405 " in await raw(
            ops.port, b"DELETE /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        )
        assert b" 431 " in await raw(ops.port, b"GET / HTTP/1.1\r\nx: " + b"y" * 40_000)
        assert await raw(ops.port, b"GET / HTTP/1.1\r\n") == b""  # silent: closed when idle
        assert (await get(ops.port, "/healthz"))[0] == 200


async def test_connections_are_bounded_and_silent_ones_keep_no_probe_out() -> None:
    async with OpsServer("127.0.0.1:0", new_registry(), Health()) as ops:
        held = [
            await asyncio.open_connection("127.0.0.1", ops.port) for _ in range(MAX_CONNECTIONS)
        ]
        for reader, writer in held:  # each of them was really accepted
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
            assert b"200" in await asyncio.wait_for(reader.readline(), 10)
        assert (await get(ops.port, "/healthz"))[0] == 200
        # The oldest went for it, and no other one.
        first, *others = [reader for reader, _ in held]
        await asyncio.wait_for(first.read(), 10)
        assert first.at_eof()
        assert not any(reader.at_eof() for reader in others)
        for _reader, writer in held:
            writer.close()


async def test_address_in_use_names_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match='"ops.address": cannot listen on 127.0.0.1'):
            async with OpsServer(f"127.0.0.1:{port}", new_registry(), Health()):
                pass


async def test_port_is_free_after_the_end() -> None:
    async with OpsServer("127.0.0.1:0", new_registry(), Health()) as ops:
        port = ops.port
        await get(port, "/healthz")
    async with OpsServer(f"127.0.0.1:{port}", new_registry(), Health()):
        pass


def test_watchers_hear_only_changes() -> None:
    health = Health()
    heard: list[bool] = []
    health.watch(heard.append)
    health.set("a", True)
    health.set("b", False, "no")
    health.set("b", False, "still no")
    health.set("b", True)
    assert heard == [True, False, True]
