"""How batches flow over a real stream: lanes, window, bandwidth, and what servers ask for."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes.agent_parts import run_state, store_in, value
from fakes.certificates import Authority
from fakes.gateway_server import FakeGateway, FakeStream, serving
from fakes.memory_outbox import MemoryOutbox
from fakes.silent_proxy import silent_proxy
from fakes.uplink_bench import uplink_of
from outrider_agent import main
from outrider_agent.core.batching import BatchLimits
from outrider_agent.core.effects import Welcomed
from outrider_agent.core.records import RecordClass
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store.recorder import Recorder, RecorderOptions
from outrider_agent.uplink import stream as stream_module
from outrider_agent.uplink import uplink as uplink_module
from outrider_agent.uplink.messages import open_transfer
from outrider_proto import channel, records
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry

KIB, MIB = 1024, 1024 * 1024
RESULT = RecordClass.RESULT


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def seqs(stream: FakeStream) -> list[int]:
    return [batch.seq for batch in stream.batches]


class Lines:
    """What is logged."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def __getattr__(self, level: str) -> Any:
        return lambda event, **fields: self.lines.append((level, event, fields))

    def of(self, *levels: str) -> list[str]:
        return [event for level, event, _ in self.lines if level in levels]


async def test_fresh_records_and_results_go_at_once_while_a_long_backlog_drains(
    tmp_path: Path, authority: Authority
) -> None:
    """100 MiB of it; a fresh batch goes within the next turn, whatever is left."""
    gateway = FakeGateway()
    gateway.window_bytes = 4 * MIB
    outbox = MemoryOutbox()
    content = b"x" * (100 * KIB)
    for _ in range(1024):
        outbox.add(content=content)
    start = outbox.last_seq
    async with (
        serving(authority, gateway) as server,
        uplink_of(outbox, server.address, tmp_path, authority) as bench,
    ):
        stream = await gateway.stream()
        ahead: list[int] = []
        for number in range(20):
            await gateway.until(lambda n=number: len(stream.batches) > 20 * (n + 1))  # type: ignore[misc] # a default makes the lambda's type unknown
            before = len(stream.batches)
            fresh = outbox.add(1000, RESULT if number % 2 else RecordClass.TELEMETRY)
            await gateway.until(lambda seq=fresh: seq in seqs(stream))  # type: ignore[misc] # as above
            ahead.append(seqs(stream).index(fresh) - before)
        assert len(stream.batches) < 900, "the backlog was gone before the end of the test"
        # What had left already, in the buffers of both ends: no more than the window.
        assert max(ahead) <= 41, ahead
        await gateway.until(lambda: len(gateway.all_batches) == outbox.last_seq, 60)
        await bench.until(lambda: not outbox.held)
        assert gateway.repeats == 0
        order = seqs(stream)
        backlog = [seq for seq in order if seq <= start]
        assert backlog == sorted(backlog)
        assert stream.most_unacknowledged <= gateway.window_bytes


async def test_a_server_that_acknowledges_slowly_is_not_full_of_old_records(
    tmp_path: Path, authority: Authority
) -> None:
    gateway = FakeGateway()
    gateway.acknowledge = False
    gateway.window_bytes = 1 * MIB
    outbox = MemoryOutbox()
    for _ in range(100):
        outbox.add(50_000)
    async with (
        serving(authority, gateway) as server,
        uplink_of(outbox, server.address, tmp_path, authority),
    ):
        stream = await gateway.stream()
        await gateway.until(lambda: len(stream.batches) == 15)
        fresh = outbox.add(10_000)
        result = outbox.add(10_000, RESULT)
        await gateway.until(lambda: {fresh, result} <= set(seqs(stream)))
        while stream.unacknowledged < gateway.window_bytes * 7 / 8 - 50_000:
            outbox.add(50_000)
            await gateway.until(lambda: outbox.last_seq in seqs(stream))
        outbox.add(50_000)
        late = outbox.add(50_000, RESULT)
        await gateway.until(lambda: late in seqs(stream))
        assert late - 1 not in seqs(stream)
        assert stream.most_unacknowledged <= gateway.window_bytes


async def test_batches_that_wait_go_together_and_one_alone_goes_at_once(
    tmp_path: Path, authority: Authority
) -> None:
    outbox = MemoryOutbox()
    for _ in range(500):
        outbox.add(1000)
    async with (
        serving(authority) as server,
        uplink_of(outbox, server.address, tmp_path, authority) as bench,
    ):
        stream = await server.gateway.stream()
        await bench.until(lambda: not outbox.held)
        assert max(stream.messages) == 64
        assert len(stream.messages) <= 12
        count = len(stream.messages)
        began = time.monotonic()
        outbox.add(1000)
        await server.gateway.until(lambda: len(stream.messages) == count + 1)
        assert time.monotonic() - began < 1


async def test_the_disk_does_not_hold_up_the_stream(tmp_path: Path, authority: Authority) -> None:
    outbox = MemoryOutbox()
    outbox.disk_takes.clear()
    async with (
        serving(authority) as server,
        uplink_of(outbox, server.address, tmp_path, authority) as bench,
    ):
        stream = await server.gateway.stream()
        for number in range(20):
            outbox.add()
            await server.gateway.until(lambda n=number: len(stream.batches) > n)  # type: ignore[misc] # a default makes the lambda's type unknown
        stream.send(pb.Command(runs=[pb.RunCommand()]))
        await bench.until(lambda: bench.runs.submitted)
        outbox.disk_takes.set()
        await bench.until(lambda: not outbox.held)
        # What came while the disk was busy went as one range.
        assert len(outbox.acks) <= 3


async def test_what_was_acknowledged_before_a_stream_ended_is_not_sent_again(
    tmp_path: Path, authority: Authority
) -> None:
    gateway = FakeGateway()
    outbox = MemoryOutbox()
    async with (
        serving(authority, gateway) as server,
        uplink_of(outbox, server.address, tmp_path, authority) as bench,
    ):
        stream = await gateway.stream()
        outbox.disk_takes.clear()
        for _ in range(10):
            outbox.add()
        await gateway.until(lambda: len(stream.batches) == 10)
        await bench.until(lambda: value(bench.registry, "outrider_agent_in_flight_bytes") == 0)
        asyncio.get_running_loop().call_later(0.2, outbox.disk_takes.set)
        stream.close()
        await gateway.stream(1)
        outbox.add()
        await bench.until(lambda: not outbox.held)
        assert gateway.repeats == 0


async def test_a_disk_that_fails_ends_the_stream_and_the_agent_comes_back(
    tmp_path: Path, authority: Authority
) -> None:
    gateway = FakeGateway()
    outbox = MemoryOutbox()
    async with (
        serving(authority, gateway) as server,
        uplink_of(outbox, server.address, tmp_path, authority) as bench,
    ):
        await gateway.stream()
        outbox.fails = True
        outbox.add()
        await bench.until(lambda: "the disk is full" in bench.connected[-1][1])
        outbox.fails = False
        await bench.until(lambda: not outbox.held)


async def test_the_bandwidth_holds_back_the_backlog_and_not_results(
    tmp_path: Path, authority: Authority
) -> None:
    outbox = MemoryOutbox()
    for _ in range(60):
        outbox.add(10_000)
    async with (
        serving(authority) as server,
        uplink_of(outbox, server.address, tmp_path, authority, max_bytes_per_second=100_000),
    ):
        stream = await server.gateway.stream()
        began = time.monotonic()
        await server.gateway.until(lambda: len(stream.batches) >= 10)
        result = outbox.add(10_000, RESULT)
        await server.gateway.until(lambda: result in seqs(stream))
        assert time.monotonic() - began < 1.5
        await server.gateway.until(lambda: len(stream.batches) >= 35)
        # 350 kB less the burst of 100 kB and one batch.
        assert time.monotonic() - began >= 2.3


async def test_a_server_that_asks_for_a_pause_gets_everything_but_batches(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines()
    monkeypatch.setattr(stream_module, "log", lines)
    outbox = MemoryOutbox()
    async with (
        serving(authority) as server,
        uplink_of(outbox, server.address, tmp_path, authority) as bench,
    ):
        stream = await server.gateway.stream()
        outbox.add()
        await server.gateway.until(lambda: len(stream.batches) == 1)
        for _ in range(5):
            stream.send(pb.Command(slow_down=pb.SlowDown(millis=600_000, reason="too many")))
        await bench.until(lambda: lines.of("warning"))
        outbox.add()
        bench.uplink.run_changed(run_state("a", pb.RUN_PHASE_FAILED))
        await server.gateway.final("a")
        assert len(stream.batches) == 1
        stream.send(pb.Command(slow_down=pb.SlowDown(millis=300)))
        await server.gateway.until(lambda: len(stream.batches) == 2)
        assert lines.of("warning") == [
            "the server asks for no records for a while; they wait in the outbox"
        ]
        assert lines.lines[0][2]["reason"] == "too many"
        assert value(bench.registry, "outrider_agent_slowed_seconds_total") >= 0.3


async def test_a_batch_that_is_too_large_comes_again_as_smaller_ones(
    tmp_path: Path, authority: Authority
) -> None:
    gateway = FakeGateway()
    gateway.max_batch_bytes = 3000
    outbox = MemoryOutbox()
    text = bytes(range(250)) * 40
    outbox.add(content=text, count=10)
    outbox.add(content=b"small")
    outbox.add(content=b"y" * 5000)  # of one record: taken, or the server sets it aside
    async with (
        serving(authority, gateway) as server,
        uplink_of(outbox, server.address, tmp_path, authority) as bench,
    ):
        await bench.until(lambda: not outbox.held)
        parts = [batch for (_, seq), batch in sorted(gateway.all_batches.items()) if seq > 3]
        assert b"".join(batch.records for batch in parts) == text
        assert all(len(batch.records) <= 3000 for batch in parts)
        assert (7, 1) not in gateway.all_batches
        name = "outrider_agent_rejected_batches_total"
        assert value(bench.registry, name, reason="too_large") == 1
        assert value(bench.registry, "outrider_agent_in_flight_bytes") == 0


async def test_a_batch_that_is_refused_for_an_unknown_reason_is_kept_for_another_stream(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines()
    monkeypatch.setattr(stream_module, "log", lines)
    gateway = FakeGateway()
    gateway.refuse_batches = {1, 2}
    outbox = MemoryOutbox()
    for _ in range(4):
        outbox.add()
    async with (
        serving(authority, gateway) as server,
        uplink_of(outbox, server.address, tmp_path, authority) as bench,
    ):
        stream = await gateway.stream()
        await bench.until(lambda: list(outbox.held) == [1, 2])
        assert sorted(seqs(stream)) == [1, 2, 3, 4]
        assert len(lines.of("warning")) == 1
        assert value(bench.registry, "outrider_agent_rejected_batches_total", reason="other") == 2
        gateway.refuse_batches.clear()
        stream.close()
        await bench.until(lambda: not outbox.held)


async def test_the_terms_of_a_server_are_handed_on(tmp_path: Path, authority: Authority) -> None:
    gateway = FakeGateway()
    gateway.terms = {
        "max_batch_bytes": 900_000,
        "separate": [pb.DataTypes(data_types=[5100]), pb.DataTypes(data_types=[1000, 1001])],
    }
    found: list[Welcomed] = []
    async with (
        serving(authority, gateway) as server,
        uplink_of(MemoryOutbox(), server.address, tmp_path, authority) as bench,
    ):
        bench.uplink.on_welcome = found.append
        await bench.until(lambda: found)
        assert found[0].max_batch_bytes == 900_000
        assert found[0].groups == (frozenset({5100}), frozenset({1000, 1001}))


async def test_the_agent_makes_batches_by_the_terms_of_its_server(tmp_path: Path) -> None:
    metrics = AgentMetrics(CollectorRegistry())
    async with store_in(tmp_path) as store:
        options = RecorderOptions(BatchLimits(0.05, MIB), pb.CODEC_NONE)
        recorder = Recorder(store, options, metrics)
        terms = Welcomed("s", "1", "u", 40_000, (frozenset({records.TASK_OUTPUT}),))
        main.take_terms(recorder, terms)
        task = asyncio.create_task(recorder.run())
        for number in range(10):
            data_type = records.TASK_OUTPUT if number % 2 else records.AGENT_LOG
            record = records.payload(data_type, 1, {"text": "x" * 20_000})
            assert recorder.submit(record, RESULT)
        await recorder.finish()
        await task
        made = [item.batch for item in await store.batches_after(0, 10 * MIB)]
        assert {tuple(b.data_types) for b in made} == {(records.TASK_OUTPUT,), (records.AGENT_LOG,)}
        assert sum(batch.count for batch in made) == 10
        assert all(len(batch.records) <= 45_000 for batch in made)


async def test_a_server_that_asks_us_to_come_later_is_come_back_to_then(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines()
    monkeypatch.setattr(uplink_module, "log", lines)
    gateway = FakeGateway()
    gateway.refuse = (grpc.StatusCode.UNAVAILABLE, "too many at once")
    gateway.pushback = "400"
    async with (
        serving(authority, gateway) as server,
        serving(authority) as other,
        uplink_of(
            MemoryOutbox(),
            server.address,
            tmp_path,
            authority,
            public={"": other.address},
            backoff_base_seconds=60.0,
            backoff_cap_seconds=60.0,
        ) as bench,
    ):
        await gateway.until(lambda: gateway.attempts >= 4)
        pauses = [b - a for a, b in zip(gateway.tried_at, gateway.tried_at[1:], strict=False)]
        assert all(0.4 <= pause < 2 for pause in pauses), pauses
        assert other.gateway.attempts == 0
        assert len(lines.of("warning")) == 1
        assert "come later" in bench.connected[-1][1]
        name = "outrider_agent_connects_total"
        assert value(bench.registry, name, net_mode="sd", result="pushed_back") >= 3
        gateway.refuse = None
        await gateway.stream()
        await bench.until(lambda: bench.connected[-1][0])


class UnreadCall:
    """A call that the server ended while its first message was on its way."""

    async def write(self, _: pb.PackagedData) -> None:
        nothing = grpc.aio.Metadata()
        code, details = uplink_module._UNREAD
        raise grpc.aio.AioRpcError(code, nothing, nothing, details)

    async def read(self) -> object:
        await asyncio.Event().wait()
        raise AssertionError

    def cancel(self) -> bool:
        return True


async def test_a_refusal_that_was_lost_is_come_back_to_soon(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = open_transfer, 0

    def opened(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return UnreadCall() if calls <= 3 else real(*arguments)

    monkeypatch.setattr(uplink_module, "open_transfer", opened)
    monkeypatch.setattr(uplink_module, "UNREAD_SECONDS", (0.05, 0.1))
    gateway = FakeGateway()
    async with (
        serving(authority, gateway) as server,
        uplink_of(
            MemoryOutbox(),
            server.address,
            tmp_path,
            authority,
            backoff_base_seconds=60.0,
            backoff_cap_seconds=60.0,
        ) as bench,
    ):
        await bench.until(lambda: bench.connected[-1][0])
        assert calls == 4


async def test_a_partition_without_a_word_is_noticed_and_healed(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the keepalive of grpc in seconds; as it is, 30 s take the place of 2."""
    monkeypatch.setattr(channel, "KEEPALIVE_SECONDS", 1)
    monkeypatch.setattr(channel, "KEEPALIVE_TIMEOUT_SECONDS", 1)
    gateway = FakeGateway()
    outbox = MemoryOutbox()
    async with (
        serving(authority, gateway) as server,
        silent_proxy(server.port) as proxy,
        uplink_of(outbox, proxy.address, tmp_path, authority) as bench,
    ):
        stream = await gateway.stream()
        await bench.until(lambda: bench.connected[-1][0])
        proxy.passing.clear()
        outbox.add()
        began = time.monotonic()
        await bench.until(lambda: not bench.connected[-1][0])
        assert time.monotonic() - began < 5
        proxy.passing.set()
        await gateway.stream(1)
        await bench.until(lambda: not outbox.held)
        assert not stream.batches
