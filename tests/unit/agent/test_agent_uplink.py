"""The uplink against a real gRPC server over TLS: order, loss, refusal, and finding another one."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from fakes.agent_parts import batch_of, run_state, value
from fakes.certificates import Authority
from fakes.gateway_server import TOKEN, FakeGateway, listen, serving
from fakes.uplink_bench import uplink_to
from outrider_agent.core import session as protocol
from outrider_agent.core.runs import RunKey
from outrider_agent.uplink import stream as stream_module
from outrider_agent.uplink import uplink as module
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.discovery import DiscoveryError


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


async def test_hello_report_and_batches_in_order(tmp_path: Path, authority: Authority) -> None:
    async with (
        serving(authority) as server,
        uplink_to(server.address, tmp_path, authority) as bench,
    ):
        bench.runs.known = [run_state("a", pb.RUN_PHASE_FAILED)]
        await bench.store.append_batch(batch_of("one"))
        stream = await server.gateway.stream()
        await server.gateway.until(lambda: len(stream.batches) == 1)
        await bench.until(lambda: bench.store.backlog.batches == 0)
        assert stream.kinds == ["hello", "complete", "batch"]
        assert stream.token == TOKEN
        assert stream.hello.hello.node == "node-a"
        assert stream.hello.hello.net_mode == bench.uplink.net_mode == "sd"
        assert stream.hello.product == "agent"
        assert stream.complete_reports[0].runs[0].id.task_uid == "a"
        assert bench.connected[-1] == (True, "")
        assert value(bench.registry, "outrider_agent_connected") == 1


async def test_requests_reach_the_runs_and_changes_come_back(
    tmp_path: Path, authority: Authority
) -> None:
    run = pb.RunCommand(id=pb.RunId(task_uid="a", attempt=1))
    async with (
        serving(authority) as server,
        uplink_to(server.address, tmp_path, authority) as bench,
    ):
        stream = await server.gateway.stream()
        stream.send(pb.Command(runs=[run], cancels=[run.id], run_acks=[run.id]))
        await bench.until(lambda: bench.runs.acknowledged)
        assert bench.runs.submitted == [run]
        assert bench.runs.cancelled == bench.runs.acknowledged == [RunKey("a", 1)]
        bench.uplink.run_changed(run_state("a", pb.RUN_PHASE_FAILED))
        await server.gateway.final("a")
        assert await bench.uplink.settle(5)
        stream.send(pb.Command(report_runs=True))
        await server.gateway.until(lambda: len(stream.complete_reports) == 2)


async def test_batches_stay_until_they_are_acknowledged_and_are_sent_again(
    tmp_path: Path, authority: Authority
) -> None:
    gateway = FakeGateway()
    gateway.acknowledge = False
    async with (
        serving(authority, gateway) as server,
        uplink_to(server.address, tmp_path, authority) as bench,
    ):
        for text in "abc":
            await bench.store.append_batch(batch_of(text))
        stream = await gateway.stream()
        await gateway.until(lambda: len(stream.batches) == 3)
        gateway.acknowledge = True
        stream.close()
        again = await gateway.stream(1)
        await gateway.until(lambda: len(again.batches) == 3)
        await bench.until(lambda: bench.store.backlog.batches == 0)
        assert [b.seq for b in again.batches] == [1, 2, 3]
        assert again.kinds[:2] == ["hello", "complete"]


async def test_no_more_than_the_window_is_sent(tmp_path: Path, authority: Authority) -> None:
    gateway = FakeGateway()
    gateway.acknowledge = False
    gateway.window_bytes = 6_000
    async with (
        serving(authority, gateway) as server,
        uplink_to(server.address, tmp_path, authority) as bench,
    ):
        for _ in range(10):
            await bench.store.append_batch(batch_of("x" * 2000))
        stream = await gateway.stream()
        await gateway.until(lambda: len(stream.batches) == 2)
        bench.uplink.run_changed(run_state("a", pb.RUN_PHASE_FAILED))  # not held up by batches
        await gateway.final("a")
        assert len(stream.batches) == 2
        stream.send(pb.Command(batch_acks=[pb.BatchAck(epoch=bench.store.epoch, first=1, last=1)]))
        await gateway.until(lambda: len(stream.batches) == 3)


async def test_many_batches_all_arrive_once(tmp_path: Path, authority: Authority) -> None:
    async with (
        serving(authority) as server,
        uplink_to(server.address, tmp_path, authority) as bench,
    ):
        await asyncio.gather(*(bench.store.append_batch(batch_of(str(n))) for n in range(300)))
        await server.gateway.until(lambda: len(server.gateway.all_batches) == 300)
        await bench.until(lambda: bench.store.backlog.batches == 0)
        assert server.gateway.repeats == 0


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "does not accept our token"),
        (grpc.StatusCode.PERMISSION_DENIED, "does not let our token speak for this node"),
    ],
)
async def test_a_refusal_is_told_clearly_and_the_token_is_read_anew(
    tmp_path: Path, authority: Authority, code: grpc.StatusCode, text: str
) -> None:
    gateway = FakeGateway()
    gateway.refuse = (code, "no")
    async with (
        serving(authority, gateway) as server,
        uplink_to(server.address, tmp_path, authority) as bench,
    ):
        await gateway.until(lambda: gateway.attempts >= 2)
        assert text in bench.connected[-1][1]
        assert TOKEN not in bench.connected[-1][1]
        name = "outrider_agent_connects_total"
        assert value(bench.registry, name, net_mode="sd", result="refused") >= 1
        (tmp_path / "token").write_text("fresh")
        # One try may be under way with the old token; the one after it is not.
        before = gateway.attempts
        await gateway.until(lambda: gateway.attempts >= before + 2)
        gateway.refuse = None
        stream = await gateway.stream()
        assert stream.token == "fresh"


async def test_a_server_that_dies_is_waited_for(tmp_path: Path, authority: Authority) -> None:
    first = await listen(FakeGateway(), authority)
    async with uplink_to(first.address, tmp_path, authority) as bench:
        await first.gateway.stream()
        await bench.until(lambda: bench.connected[-1][0])
        await first.server.stop(0)
        await bench.until(lambda: not bench.connected[-1][0])
        async with serving(authority, port=first.port) as second:
            await second.gateway.stream()
            await bench.until(lambda: bench.connected[-1][0])


async def test_a_server_that_dies_while_the_disk_is_slow_is_waited_for(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader is held up then, and the writer alone notices, in its own words."""
    monkeypatch.setattr(stream_module, "CLOSE_SECONDS", 0.1)
    first = await listen(FakeGateway(), authority)
    async with uplink_to(first.address, tmp_path, authority) as bench:
        entered = asyncio.Event()

        async def slow(commands: Any) -> None:
            entered.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(bench.runs, "submit", slow)
        stream = await first.gateway.stream()
        stream.send(pb.Command(runs=[pb.RunCommand()]))
        await entered.wait()
        await first.server.stop(0)
        await asyncio.sleep(0)
        await bench.store.append_batch(batch_of("one"))
        async with serving(authority, port=first.port) as second:
            await second.gateway.stream()


async def test_a_server_with_another_certificate_is_not_talked_to(
    tmp_path: Path, authority: Authority
) -> None:
    async with (
        serving(Authority()) as server,
        uplink_to(server.address, tmp_path, authority) as bench,
    ):
        await bench.until(lambda: "certificate" in bench.connected[-1][1])
        assert server.gateway.attempts == 0


async def test_private_and_public_addresses_are_tried_after_discovery(
    tmp_path: Path, authority: Authority
) -> None:
    async with (
        serving(authority) as server,
        uplink_to(
            "127.0.0.1:1",
            tmp_path,
            authority,
            region="eu",
            private={"eu": "127.0.0.1:2", "us": "127.0.0.1:3"},
            public={"eu": server.address},
        ) as bench,
    ):
        stream = await server.gateway.stream()
        assert stream.hello.hello.net_mode == "public"
        await bench.until(lambda: bench.connected[-1][0])


async def test_the_private_address_is_that_of_the_region(
    tmp_path: Path, authority: Authority
) -> None:
    async with (
        serving(authority) as server,
        uplink_to(
            "",
            tmp_path,
            authority,
            region="eu",
            private={"us": "127.0.0.1:1", "eu": server.address},
            public={"eu": "127.0.0.1:1"},
        ),
    ):
        stream = await server.gateway.stream()
        assert stream.hello.hello.net_mode == "private"


async def test_each_drain_leads_to_the_other_server(tmp_path: Path, authority: Authority) -> None:
    """Addresses are shuffled: one drain alone would lead there by chance."""
    async with serving(authority) as one, serving(authority) as two:
        target = f"{one.address},{two.address}"
        async with uplink_to(target, tmp_path, authority) as bench:
            await bench.until(lambda: bench.connected[-1][0])
            here, there = (one, two) if one.gateway.streams else (two, one)
            for _ in range(8):
                stream, count = here.gateway.streams[-1], len(there.gateway.streams)
                stream.send(pb.Command(drain=pb.Drain(reason="leaving", spread_millis=50)))
                await there.gateway.stream(count)
                await here.gateway.until(partial(getattr, stream, "half_closed"))
                here, there = there, here


async def test_a_token_about_to_expire_renews_the_stream(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "RENEW_MARGIN_SECONDS", (598.0, 599.0))
    monkeypatch.setattr(protocol, "RENEW_SHARE", 0.0)
    gateway = FakeGateway()
    async with (
        serving(authority, gateway) as server,
        uplink_to(server.address, tmp_path, authority) as bench,
    ):
        stream = await gateway.stream()
        (tmp_path / "token").write_text("fresh")
        renewed = await gateway.stream(1)
        assert renewed.token == "fresh"
        assert stream.half_closed
        # It was planned: readiness did not flap.
        await bench.until(lambda: len(bench.connected) == 3)
        assert [ok for ok, _ in bench.connected] == [False, True, True]


async def test_a_silent_server_is_left(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "IDLE_SECONDS", 0.1)
    monkeypatch.setattr(protocol, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "WELCOME_SECONDS", 0.5)
    gateway = FakeGateway()
    gateway.answer_heartbeats = False
    async with (
        serving(authority, gateway) as server,
        uplink_to(server.address, tmp_path, authority) as bench,
    ):
        await gateway.stream(1)
        assert "no answer" in bench.connected[-1][1] or bench.connected[-1][0]
        gateway.welcome = False
        await bench.until(lambda: "no welcome" in bench.connected[-1][1])


async def test_a_stream_that_ends_at_once_is_not_opened_in_a_loop(
    tmp_path: Path, authority: Authority
) -> None:
    gateway = FakeGateway()
    async with (
        serving(authority, gateway) as server,
        uplink_to(
            server.address, tmp_path, authority, backoff_base_seconds=1e9, backoff_cap_seconds=1e9
        ),
    ):
        stream = await gateway.stream()
        stream.send(pb.Command(drain=pb.Drain(reason="go", spread_millis=0)))
        await gateway.until(lambda: stream.half_closed)
        await asyncio.sleep(0.3)
        assert gateway.attempts == 1


async def test_no_dns_answer_is_a_reason_not_to_be_ready(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object, **__: object) -> list[object]:
        raise DiscoveryError("dns:x: no such name")

    monkeypatch.setattr(module, "resolve", nothing)
    async with uplink_to("dns:x:1", tmp_path, authority) as bench:
        await bench.until(lambda: "no such name" in bench.connected[-1][1])
        assert value(bench.registry, "outrider_agent_discovery_failures_total") >= 1


async def test_each_problem_is_logged_once_until_connected(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    class Log:
        def warning(self, _event: str, *, reason: str, failures: int) -> None:
            lines.append(reason)

        def debug(self, *_: object, **__: object) -> None:
            pass

    monkeypatch.setattr(module, "log", Log())
    async with uplink_to("127.0.0.1:1,127.0.0.1:2", tmp_path, authority) as bench:
        await bench.until(lambda: len(bench.connected) > 20)
    assert len(lines) == len(set(lines)) == 2
