"""Floods and stalls over real TLS: who is loud, deaf or slow harms nobody but itself."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fakes.gateway import (
    RawAgent,
    RunningGateway,
    eventually,
    hello,
    make_batch,
    open_stream,
    running_gateway,
)
from fakes.memory_sink import MemorySink
from grpc_health.v1 import health_pb2
from outrider_operator.core.sink import Origin, SinkRejectedError
from outrider_operator.gateway.intake import BATCH_COST_BYTES
from outrider_operator.gateway.pace import LEAST_WINDOW_BYTES
from outrider_operator.gateway.stream import STREAM_BATCHES
from outrider_operator.settings import LimitSettings
from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import (
    REJECT_REASON_TOO_LARGE,
    Heartbeat,
    PackagedData,
    RecordBatch,
    RunReport,
)

PUSHBACK = "grpc-retry-pushback-ms"


def message(first: int, count: int, size: int = 10) -> PackagedData:
    return PackagedData(batches=[make_batch(seq, size=size) for seq in range(first, first + count)])


async def acknowledged(agent: RawAgent, last: int) -> None:
    """Wait until the batches 1 to `last` are acknowledged."""
    waiting = set(range(1, last + 1))
    while waiting:
        for ack in (await agent.receive()).batch_acks:
            waiting -= set(range(ack.first, ack.last + 1))


async def answered(agent: RawAgent, nanos: int) -> None:
    """Send a heart-beat and wait for its answer."""
    await agent.send(PackagedData(heartbeat=Heartbeat(unix_nanos=nanos)))
    while (await agent.receive()).heartbeat.unix_nanos != nanos:
        pass


class SlowSink(MemorySink):
    """Takes so many bytes a second, and is never ahead of it."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.open.clear()
        self._rate = rate

    async def run(self) -> None:
        credit, last = 0.0, time.monotonic()
        while True:
            await asyncio.sleep(0.005)
            now = time.monotonic()
            credit, last = min(self._rate / 10, credit + (now - last) * self._rate), now
            while self._inside and credit > 0:
                credit -= len(self._inside[0][1].records)
                self.release(1)


class CountingSink(MemorySink):
    """Keeps no batches, only how many."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def _pass(self, origin: Origin, batch: RecordBatch, future: "asyncio.Future[None]") -> None:
        self.count += 1
        future.set_result(None)


class TestWelcome:
    async def test_says_what_the_server_takes(self, tmp_path: Path) -> None:
        sink = MemorySink()
        sink.max_batch_bytes, sink.separate = 12_345, [[5100], [1, 2]]
        async with running_gateway(tmp_path, sink=sink) as running, running.connect() as channel:
            agent = RawAgent(channel, running.reviews.agent("n"))
            await agent.send(hello("n"))
            welcome = (await agent.receive()).welcome
        assert welcome.max_batch_bytes == 12_345
        assert [list(group.data_types) for group in welcome.separate] == [[5100], [1, 2]]
        assert welcome.window_batches == STREAM_BATCHES

    async def test_the_envelope_is_of_the_first_message_and_cut(self, tmp_path: Path) -> None:
        async with running_gateway(tmp_path) as running, running.connect() as channel:
            agent = RawAgent(channel, running.reviews.agent("n"))
            first = hello("n")
            first.intranet_ipv4.extend(f"10.0.{n}.1" for n in range(64))
            first.extranet_ipv6.extend(["x" * 600, "y" * 600])
            first.hostname, first.version, first.product = "h" * 5000, "1", "outrider-agent"
            await agent.send(first)
            await agent.receive()
            await agent.send(message(1, 2))
            await acknowledged(agent, 2)
            (one, _), (other, _) = running.sink.stored
        assert one.envelope is other.envelope
        assert one.envelope.intranet_ipv4.count(",") == 63
        assert one.envelope.extranet_ipv6 == "x" * 600
        assert len(one.envelope.hostname) == 253
        assert one.envelope.product == "outrider-agent"

    async def test_many_agents_get_smaller_windows_and_larger_ones_again(
        self, tmp_path: Path
    ) -> None:
        async with contextlib.AsyncExitStack() as stack:
            running = await stack.enter_async_context(
                running_gateway(tmp_path, max_inflight_bytes=4 * limits.MIB)
            )
            channel = await stack.enter_async_context(running.connect())
            first = RawAgent(channel, running.reviews.agent("first"))
            await first.send(hello("first"))
            assert (await first.receive()).welcome.window_bytes == limits.MIB
            others = await stack.enter_async_context(running.connect())
            for number in range(7):
                await open_stream(others, running.reviews.agent(f"n-{number}"), f"n-{number}")
            while (await first.receive()).welcome.window_bytes > LEAST_WINDOW_BYTES:
                pass  # they did not all come between two looks
            await others.close()
            while (await first.receive()).welcome.window_bytes < limits.MIB:
                pass


class TestAcknowledgements:
    async def test_a_large_batch_with_nothing_behind_it_does_not_wait(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("outrider_operator.gateway.transfer.GATHER_SECONDS", 60.0)
        async with running_gateway(tmp_path) as running, running.connect() as channel:
            agent = await open_stream(channel, running.reviews.agent("n"), "n")
            for seq in range(1, 6):
                await agent.send(PackagedData(batches=[make_batch(seq, size=500 * limits.KIB)]))
                assert (await agent.receive(5)).batch_acks[0].last == seq

    async def test_it_does_not_wait_either_once_the_others_are_stored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("outrider_operator.gateway.transfer.GATHER_SECONDS", 60.0)
        async with running_gateway(tmp_path) as running, running.connect() as channel:
            agent = await open_stream(channel, running.reviews.agent("n"), "n")
            running.sink.open.clear()
            await agent.send(message(1, 2))
            await eventually(lambda: running.sink.waiting == 2)
            running.sink.release(1)
            await answered(agent, 5)
            running.sink.open.set()
            assert (await agent.receive(5)).batch_acks[0].last == 2


class TestRejected:
    async def test_too_large_goes_back_to_its_agent(self, tmp_path: Path) -> None:
        async with running_gateway(tmp_path) as running, running.connect() as channel:
            running.sink.error = SinkRejectedError("too large", max_bytes=99)
            agent = await open_stream(channel, running.reviews.agent("n"), "n")
            batch = make_batch(1)
            batch.count = 2
            await agent.send(PackagedData(batches=[batch]))
            (reject,) = (await agent.receive()).batch_rejects
            assert (reject.epoch, reject.seq) == (7, 1)
            assert (reject.reason, reject.max_bytes) == (REJECT_REASON_TOO_LARGE, 99)
            running.sink.error = None
            await agent.send(message(2, 1))
            assert (await agent.receive()).batch_acks[0].last == 2

    async def test_poison_is_set_aside_and_acknowledged(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        async with running_gateway(tmp_path) as running, running.connect() as channel:
            running.sink.error = SinkRejectedError("bad")
            agent = await open_stream(channel, running.reviews.agent("n"), "n")
            await agent.send(message(1, 100))
            await acknowledged(agent, 100)
            assert len(running.sink.aside) == 100
        assert capsys.readouterr().out.count("sink rejects batch") == 5


class TestPauses:
    async def test_who_sends_too_much_is_told_and_nothing_else_is_held_up(
        self, tmp_path: Path
    ) -> None:
        few = LimitSettings(agent_records_per_second=10.0, burst_seconds=1.0)
        async with (
            running_gateway(tmp_path, limits=few) as running,
            running.connect() as channel,
        ):
            agent = await open_stream(channel, running.reviews.agent("n"), "n")
            await agent.send(message(1, 200))
            answer = await agent.receive()
            while not answer.HasField("slow_down"):
                answer = await agent.receive()
            assert 15_000 < answer.slow_down.millis <= 19_000
            assert "share" in answer.slow_down.reason
            assert len(running.sink.stored) == 200  # what came is taken all the same
            await agent.send(PackagedData(run_report=RunReport(complete=True)))
            await answered(agent, 5)
            assert running.metric("run_reports_total", result="no_leader") == 1
            assert running.metric("slow_downs_total", reason="limit") == 1
            assert running.metric("held_reads_total") == 0

    async def test_who_does_not_listen_is_not_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("outrider_operator.core.rates.GRACE_SECONDS", 0.05)
        few = LimitSettings(agent_records_per_second=200.0, burst_seconds=0.1)
        first, second, third = message(1, 200), message(201, 200), message(401, 1)
        async with (
            running_gateway(tmp_path, limits=few) as running,
            running.connect() as channel,
        ):
            agent = await open_stream(channel, running.reviews.agent("n"), "n")
            await agent.send(first)  # a debt of 0.9 s
            await eventually(lambda: running.metric("slow_downs_total", reason="limit") > 0)
            told = time.monotonic()
            await eventually(lambda: time.monotonic() - told > 0.1)
            await agent.send(second)
            await agent.send(third)
            await eventually(lambda: running.metric("held_reads_total") == 1)
            # The others are read meanwhile.
            other = await open_stream(channel, running.reviews.agent("other"), "other")
            await other.send(message(1, 1))
            await acknowledged(other, 1)
            assert len(running.sink.stored) == 401
            await eventually(lambda: len(running.sink.stored) == 402)
            assert time.monotonic() - told > 1.7

    async def test_a_slow_sink_asks_for_a_pause(self, tmp_path: Path) -> None:
        limit = limits.BATCH_BYTES
        async with (
            running_gateway(tmp_path, max_inflight_bytes=limit, window_bytes=limit) as running,
            running.connect() as channel,
        ):
            running.sink.open.clear()
            agent = await open_stream(channel, running.reviews.agent("n"), "n")
            for number in range(4):
                await agent.send(message(1 + number, 1, size=900_000))
            answer = await agent.receive()
            assert 1500 <= answer.slow_down.millis <= 3000  # nothing is stored at all
            assert running.metric("slow_downs_total", reason="sink") == 1
            await answered(agent, 5)


class TestFairness:
    async def test_a_flood_leaves_the_others_their_share(self, tmp_path: Path) -> None:
        """21 agents want more than a slow sink has; one of them floods without any window."""
        sink = SlowSink(4_000_000)
        free = LimitSettings(agent_records_per_second=0.0, agent_bytes_per_second=0.0)
        others = 20
        async with running_gateway(
            tmp_path, sink=sink, limits=free, max_inflight_bytes=8 * limits.MIB
        ) as running:
            pump = asyncio.create_task(sink.run())
            loud = asyncio.create_task(_flood(running))
            await eventually(lambda: sink.waiting > 20)
            waits = await asyncio.gather(*(_modest(running, n) for n in range(others)))
            pump.cancel()
            loud.cancel()
            await asyncio.gather(pump, loud, return_exceptions=True)
        worst = max(max(one) for one in waits)
        # The flood has a window of 1 MiB before them, 0.26 s of this sink; and so its turn again.
        assert worst < 1.5, sorted(max(one) for one in waits)

    async def test_a_reader_that_does_not_read_harms_itself_only(self, tmp_path: Path) -> None:
        sink = CountingSink()
        free = LimitSettings(agent_records_per_second=0.0, agent_bytes_per_second=0.0)
        async with (
            running_gateway(tmp_path, sink=sink, limits=free) as running,
            running.connect() as deaf_channel,
            running.connect() as channel,
        ):
            deaf = await open_stream(deaf_channel, running.reviews.agent("deaf"), "deaf")
            good = await open_stream(channel, running.reviews.agent("good"), "good")
            seq = 1
            for _ in range(20):  # acknowledgements of gaps cannot be merged
                batches = [make_batch(seq + 2 * n) for n in range(200)]
                seq += 400
                await deaf.send(PackagedData(batches=batches))
            for number in range(1, 20):
                await good.send(message(number, 1))
                await asyncio.wait_for(answered(good, number), 5)
            await eventually(lambda: sink.count >= 20 * 200 + 19)
            await eventually(lambda: running.metric("batches_inflight_bytes") == 0)


class TestStalledSink:
    async def test_what_is_held_stays_within_the_bound(self, tmp_path: Path) -> None:
        limit = 6 * limits.MIB
        most = 0
        async with running_gateway(
            tmp_path, max_inflight_bytes=limit, window_bytes=limits.MIB
        ) as running:
            running.sink.open.clear()
            floods = [asyncio.create_task(_flood(running, f"flood-{n}")) for n in range(12)]
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                inside = [batch for _, batch, _ in running.sink._inside]
                held = sum(batch.ByteSize() + BATCH_COST_BYTES for batch in inside)
                assert held <= running.metric("batches_inflight_bytes") <= limit
                most = max(most, held)
                await asyncio.sleep(0.01)
            assert most > limit / 2
            for flood in floods:
                flood.cancel()
            await asyncio.gather(*floods, return_exceptions=True)
            running.sink.open.set()
            await eventually(lambda: running.metric("batches_inflight_bytes") == 0)


async def _flood(running: RunningGateway, node: str = "loud") -> None:
    """Sends as fast as the connection takes it, whatever it is told."""
    async with running.connect() as channel:
        agent = await open_stream(channel, running.reviews.agent(node), node)

        async def read() -> None:
            with contextlib.suppress(EOFError):
                while True:
                    await agent.receive()

        reader = asyncio.create_task(read())
        data = message(1, 8, size=30_000).SerializeToString()
        try:
            while True:
                await agent.send(data)
        finally:
            reader.cancel()


async def _modest(running: RunningGateway, number: int) -> list[float]:
    """Sends a batch, waits for its acknowledgement, and so on; the waits in seconds."""
    node, waits = f"modest-{number}", []
    async with running.connect() as channel:
        agent = await open_stream(channel, running.reviews.agent(node), node)
        for seq in range(1, 6):
            began = time.monotonic()
            await agent.send(message(seq, 1, size=1000))
            while not (await agent.receive()).batch_acks:
                pass
            waits.append(time.monotonic() - began)
    return waits


class TestAdmission:
    async def test_too_many_connects_are_given_slots(self, tmp_path: Path) -> None:
        async with (
            running_gateway(tmp_path, connect_rate=2.0, connect_burst=1) as running,
            running.connect() as channel,
        ):

            async def try_one(number: int) -> float:
                """0 for one that is let in, else when it is to come back, milliseconds."""
                agent = RawAgent(channel, running.reviews.agent(f"n{number}"))
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await agent.send(hello(f"n{number}"))
                    assert (await agent.receive()).HasField("welcome")
                    return 0.0
                assert await agent.code() == grpc.StatusCode.UNAVAILABLE
                return float(dict(await agent.call.trailing_metadata())[PUSHBACK])

            answers = sorted(await asyncio.gather(*(try_one(number) for number in range(12))))
            slots = [answer for answer in answers if answer]
            assert len(slots) == 9  # three may come within the first second
            assert len(set(slots)) == 9
            assert slots[0] > 1000
            assert 3000 < slots[-1] < 10_000
            # Refused before any work on their tokens.
            assert len(running.reviews.asked) == 3
            assert running.metric("connects_total", result="sent_back") == 9
            assert running.refused("UNAVAILABLE", "TooManyConnects") == 9

    async def test_nobody_is_let_in_to_wait_for_a_slow_api_server(self, tmp_path: Path) -> None:
        async with (
            running_gateway(tmp_path, auth={"max_reviews": 2}) as running,
            running.connect() as channel,
        ):
            running.reviews.slow = 0.3

            async def try_one(number: int) -> bool:
                agent = RawAgent(channel, running.reviews.agent(f"n{number}"))
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await agent.send(hello(f"n{number}"))
                    return (await agent.receive()).HasField("welcome")
                assert "the API server has time for" in (await agent.call.details())
                assert int(dict(await agent.call.trailing_metadata())[PUSHBACK]) > 1000
                return False

            answers = await asyncio.gather(*(try_one(number) for number in range(12)))
            # Four reviews may wait for each of the two under way.
            assert answers.count(True) == len(running.reviews.asked) == 8
            running.reviews.slow = 0.0
            assert await try_one(41)


class TestHealthCheck:
    async def test_anybody_may_ask_and_nothing_of_it_is_read(self, tmp_path: Path) -> None:
        async with running_gateway(tmp_path) as running:
            options = [("grpc.max_send_message_length", -1)]
            credentials = grpc.ssl_channel_credentials(running.authority.pem)
            async with grpc.aio.secure_channel(running.address, credentials, options) as channel:
                check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
                for data in (b"", b"\xff\xff", bytes(100 * limits.MIB)):
                    answer = health_pb2.HealthCheckResponse.FromString(await check(data))
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
