"""Plain records of other agents, with or without gRPC's own gzip, under either name of the call."""

import asyncio
import gc
import gzip
import os
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fakes.gateway import (
    TRANSFER,
    RunningGateway,
    eventually,
    hello,
    make_batch,
    open_stream,
    running_gateway,
)
from fakes.token_review import node_uid
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.sink import SinkRejectedError, SinkUnavailableError
from outrider_operator.gateway.hub import TOKEN_EXPIRED
from outrider_operator.gateway.plain import groups
from outrider_operator.gateway.session import PlainCame
from outrider_operator.gateway.stream import CLOSE_SECONDS
from outrider_operator.settings import LimitSettings
from outrider_proto import batches, limits
from outrider_proto.channel import bearer
from outrider_proto.v1.agent_pb2 import CODEC_NONE, CODEC_ZSTD, EncodedRecord, PackagedData

SEED = "/grpc.Transfer/Transfer"


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    async with running_gateway(tmp_path, accept_plain_records=True) as gateway:
        yield gateway


def plain(first: int, count: int, size: int = 20) -> bytes:
    """A message as such an agent writes it."""
    records = [
        EncodedRecord(data_type=59, timestamp=n, data=str(n).encode().ljust(size, b"."))
        for n in range(first, first + count)
    ]
    return PackagedData(
        records=records,
        intranet_ipv4=["10.0.0.7", "10.0.0.8"],
        hostname="host-7",
        version="1.7",
        product="other-agent",
    ).SerializeToString()


def call(
    channel: grpc.aio.Channel, token: str, method: str, compression: grpc.Compression | None
) -> Any:
    return channel.stream_stream(method)(metadata=bearer(token), compression=compression)


def received(running: RunningGateway) -> list[bytes]:
    stored = [record for _, batch in running.sink.stored for record in batches.decode(batch)]
    return [record.data.rstrip(b".") for record in stored]


@pytest.mark.parametrize("method", [TRANSFER, SEED])
@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
async def test_records_reach_the_sink(
    running: RunningGateway, method: str, compression: grpc.Compression | None
) -> None:
    async with running.connect() as channel:
        stream = call(channel, running.reviews.agent("n"), method, compression)
        for number in range(3):
            await stream.write(plain(100 * number, 100))
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF  # no acknowledgements in that protocol
        assert await stream.code() == grpc.StatusCode.OK
    assert received(running) == [str(n).encode() for n in range(300)]
    origin, batch = running.sink.stored[0]
    assert (origin.agent_id, origin.node) == (node_uid("n"), "n")
    assert origin.envelope.intranet_ipv4 == "10.0.0.7,10.0.0.8"
    assert (origin.envelope.hostname, origin.envelope.product) == ("host-7", "other-agent")
    assert list(batch.data_types) == [59]
    assert batch.codec == CODEC_ZSTD
    assert [batch.seq for _, batch in running.sink.stored] == [1, 2, 3]
    assert running.metric("plain_records_total") == 300
    await eventually(lambda: running.metric("plain_streams") == 0)
    assert running.metric("batches_inflight_bytes") == 0


async def test_each_stream_has_an_epoch_of_its_own(running: RunningGateway) -> None:
    async with running.connect() as channel:
        for _ in range(2):
            stream = call(channel, running.reviews.agent("n"), SEED, None)
            await stream.write(plain(0, 1))
            await stream.done_writing()
            assert await stream.code() == grpc.StatusCode.OK
    (_, one), (_, other) = running.sink.stored
    assert one.epoch != other.epoch
    assert one.codec == CODEC_NONE  # too small to be worth it


async def test_not_there_unless_it_is_set(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as running, running.connect() as channel:
        stream = call(channel, running.reviews.agent("n"), SEED, None)
        assert await stream.code() == grpc.StatusCode.UNIMPLEMENTED
        stream = call(channel, running.reviews.agent("n"), TRANSFER, None)
        await stream.write(plain(0, 1))
        assert await stream.code() == grpc.StatusCode.INVALID_ARGUMENT
        # Nor is what grpc has compressed unpacked for anybody.
        stream = call(channel, running.reviews.agent("n"), TRANSFER, grpc.Compression.Gzip)
        await stream.write(hello("n" * 5000).SerializeToString())
        assert await stream.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert running.sink.stored == []


async def test_our_own_agents_are_served_beside_them(running: RunningGateway) -> None:
    async with running.connect() as channel:
        agent = await open_stream(channel, running.reviews.agent("n"), "n")
        await agent.send(PackagedData(batches=[make_batch(1)]))
        assert (await agent.receive()).batch_acks
        await agent.send(plain(0, 1))
        assert await agent.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_token_is_needed(running: RunningGateway) -> None:
    async with running.connect() as channel:
        assert await call(channel, "rubbish", SEED, None).code() == grpc.StatusCode.UNAUTHENTICATED
        server = call(channel, running.reviews.server(), SEED, None)
        assert await server.code() == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (gzip.compress(bytes(40 * limits.MIB)), "RESOURCE_EXHAUSTED"),
        (gzip.compress(b"x" * 100)[:-9], "INVALID_ARGUMENT"),
        (gzip.compress(b"") + gzip.compress(b""), "INVALID_ARGUMENT"),
        (b"\x1f\x8b rubbish", "INVALID_ARGUMENT"),
        (b"\xff\xff\xff", "INVALID_ARGUMENT"),
    ],
)
async def test_what_makes_no_sense_is_refused(
    running: RunningGateway, data: bytes, code: str
) -> None:
    async with running.connect() as channel:
        stream = call(channel, running.reviews.agent("n"), SEED, None)
        await stream.write(plain(0, 1))
        await eventually(lambda: len(running.sink.stored) == 1)
        tracemalloc.start()
        await stream.write(data)
        assert (await stream.code()).name == code
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * limits.MESSAGE_BYTES


async def test_flow_control_holds_back_and_nothing_is_let_go(tmp_path: Path) -> None:
    async with (
        running_gateway(
            tmp_path, accept_plain_records=True, max_inflight_bytes=limits.BATCH_BYTES
        ) as running,
        running.connect() as channel,
    ):
        running.gateway._shared.intake.patience = 0.01
        running.sink.open.clear()
        stream = call(channel, running.reviews.agent("n"), SEED, None)
        sent = 0
        for _ in range(4):
            await stream.write(plain(sent, 1000, 1000))
            sent += 1000
        await eventually(lambda: running.sink.waiting > 0)
        await stream.done_writing()
        running.sink.open.set()
        assert await stream.code() == grpc.StatusCode.OK
        assert len(received(running)) == sent
        assert running.metric("batches_total", result="let_go") == 0


async def test_what_was_taken_is_stored_after_the_peer_has_gone(running: RunningGateway) -> None:
    running.sink.error = SinkUnavailableError("away")
    async with running.connect() as channel:
        stream = call(channel, running.reviews.agent("n"), SEED, None)
        await stream.write(plain(0, 10))
        await eventually(lambda: running.metric("batches_retrying") > 0)
        stream.cancel()
        await eventually(lambda: running.metric("plain_streams") == 0)
    running.sink.error = None
    await eventually(lambda: len(received(running)) == 10)


def large(count: int, size: int = 500_000) -> bytes:
    """A message of records that do not get smaller, so that its batches fill the window."""
    return PackagedData(
        records=[
            EncodedRecord(data_type=59, timestamp=n, data=os.urandom(size)) for n in range(count)
        ]
    ).SerializeToString()


def stored(running: RunningGateway) -> int:
    return sum(batch.count for _, batch in running.sink.stored)


async def test_what_was_read_is_stored_before_an_expired_stream_ends(
    running: RunningGateway,
) -> None:
    running.sink.open.clear()
    async with running.connect() as channel:
        stream = call(channel, running.reviews.agent("n"), SEED, None)
        await stream.write(large(8))
        await eventually(lambda: running.sink.waiting >= 1)
        (one,) = running.gateway._shared.calls
        one.end(TOKEN_EXPIRED)
        one.end(TOKEN_EXPIRED)
        running.sink.open.set()
        assert await stream.code() == grpc.StatusCode.UNAUTHENTICATED
    assert stored(running) == 8
    assert running.metric("plain_lost_total") == 0
    assert running.metric("plain_held_bytes") == 0


async def test_an_expired_stream_that_has_nothing_to_do_ends_at_once(
    running: RunningGateway,
) -> None:
    async with running.connect() as channel:
        stream = call(channel, running.reviews.agent("n"), SEED, None)
        await stream.write(plain(0, 1))
        await eventually(lambda: stored(running) == 1)
        (one,) = running.gateway._shared.calls
        one.end(TOKEN_EXPIRED)
        async with asyncio.timeout(CLOSE_SECONDS / 2):
            assert await stream.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_stream_ends_in_time_and_counts_what_is_lost(
    running: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outrider_operator.gateway.plain.CLOSE_SECONDS", 0.1)
    running.sink.open.clear()
    async with running.connect() as channel:
        stream = call(channel, running.reviews.agent("n"), SEED, None)
        await stream.write(large(8))
        await eventually(lambda: running.sink.waiting == 2)  # the window is full
        (one,) = running.gateway._shared.calls
        one.end(TOKEN_EXPIRED)
        assert await stream.code() == grpc.StatusCode.UNAUTHENTICATED
    running.sink.open.set()
    await eventually(lambda: stored(running) == 2)
    assert running.metric("plain_lost_total") == 6
    assert running.metric("plain_held_bytes") == 0


async def test_a_server_that_leaves_stores_what_it_has_read(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, accept_plain_records=True) as running:
        running.sink.error = SinkUnavailableError("away")
        async with running.connect() as channel:
            gone = call(channel, running.reviews.agent("gone"), SEED, None)
            await gone.write(plain(0, 10))
            await eventually(lambda: running.metric("batches_retrying") > 0)
            gone.cancel()
            await eventually(lambda: running.metric("plain_streams") == 0)
            stream = call(channel, running.reviews.agent("n"), SEED, None)
            await stream.write(large(8))
            await eventually(lambda: running.metric("batches_retrying") > 1)
            running.stop.set()
            await eventually(lambda: running.gateway._draining)
            running.sink.error = None
            assert await stream.code() == grpc.StatusCode.UNAVAILABLE
        await running.task
        assert stored(running) == 18
        assert running.metric("plain_lost_total") == 0


async def test_what_a_server_cannot_store_before_it_leaves_is_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_gateway(tmp_path, accept_plain_records=True, drain_seconds=0.3) as running:
        running.sink.error = SinkUnavailableError("away")
        async with running.connect() as channel:
            stream = call(channel, running.reviews.agent("n"), SEED, None)
            await stream.write(plain(0, 10))
            await eventually(lambda: running.metric("batches_retrying") > 0)
            stream.cancel()
            await eventually(lambda: running.metric("plain_streams") == 0)
        running.stop.set()
        await running.task
        assert running.metric("plain_lost_total") == 10
        assert running.metric("batches_inflight_bytes") == 0
    assert "plain records were not stored" in capsys.readouterr().out


async def test_few_messages_are_open_at_once(tmp_path: Path) -> None:
    async with running_gateway(
        tmp_path, accept_plain_records=True, max_inflight_bytes=4 * limits.BATCH_BYTES
    ) as running:
        running.sink.open.clear()
        data = large(2)
        async with running.connect() as channel, running.connect() as other:
            streams = []
            for number in range(20):
                through = channel if number % 2 else other
                stream = call(through, running.reviews.agent(f"n-{number}"), SEED, None)
                await stream.write(data)
                streams.append(stream)
            await eventually(lambda: running.metric("plain_streams") == 20)
            await eventually(lambda: running.metric("plain_held_bytes") > 0)
            room = max(running.gateway._shared.plain._budget._limit, 2 * len(data))
            assert running.metric("plain_held_bytes") <= room
            assert running.metric("batches_inflight_bytes") <= 4 * limits.BATCH_BYTES + room
            opened = sum(len(records) for records in open_records())
            assert opened * 500_000 * 2 <= room
            running.sink.open.set()
            for stream in streams:
                await stream.done_writing()
                assert await stream.code() == grpc.StatusCode.OK
        assert stored(running) == 40
        assert running.metric("plain_held_bytes") == 0


def open_records() -> list[list[EncodedRecord]]:
    """The lists of records that messages hold which are open."""
    return [each.records for each in gc.get_objects() if isinstance(each, PlainCame)]


async def test_what_is_too_large_is_set_aside(running: RunningGateway) -> None:
    running.sink.error = SinkRejectedError("too large", max_bytes=5)
    async with running.connect() as channel:
        stream = call(channel, running.reviews.agent("n"), SEED, None)
        await stream.write(plain(0, 10))
        await eventually(lambda: len(running.sink.aside) == 1)
        await stream.done_writing()
        assert await stream.code() == grpc.StatusCode.OK


async def test_a_loud_one_is_read_at_its_rate(tmp_path: Path) -> None:
    few = LimitSettings(agent_records_per_second=1000.0, burst_seconds=0.1)
    async with (
        running_gateway(tmp_path, accept_plain_records=True, limits=few) as running,
        running.connect() as channel,
    ):
        began = time.monotonic()
        stream = call(channel, running.reviews.agent("n"), SEED, None)
        for number in range(12):
            await stream.write(plain(100 * number, 100))
        await stream.done_writing()
        assert await stream.code() == grpc.StatusCode.OK
        assert time.monotonic() - began > 0.9  # 1,200 records, 100 of them saved up
        assert len(received(running)) == 1200


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(50, 1000))
def test_groups_keep_order_and_size(sizes: list[int], most: int) -> None:
    records = [EncodedRecord(timestamp=n, data=bytes(size)) for n, size in enumerate(sizes)]
    cut = list(groups(records, most))
    assert [record for group in cut for record in group] == records
    assert all(len(group) == 1 or sum(r.ByteSize() for r in group) <= most for group in cut)
    assert all(cut)
