"""The gateway over real TLS: who gets in, what is refused, that nothing of it ends the server."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import pytest
from fakes.certificates import SERVER_NAME, Authority, write_pair
from fakes.gateway import (
    RawAgent,
    RunningGateway,
    eventually,
    hello,
    make_batch,
    open_stream,
    running_gateway,
)
from fakes.token_review import make_token, node_uid
from grpc_health.v1 import health_pb2, health_pb2_grpc
from outrider_operator.core.sink import SinkUnavailableError
from outrider_operator.gateway.server import Gateway
from outrider_operator.gateway.transfer import AgentStream
from outrider_operator.settings import KeepaliveSettings
from outrider_proto import limits
from outrider_proto.channel import bearer, connect
from outrider_proto.v1.agent_pb2 import (
    Command,
    EncodedRecord,
    Heartbeat,
    PackagedData,
    PingRequest,
    RunCommand,
    RunId,
    RunReport,
    Script,
)
from outrider_proto.v1.agent_pb2_grpc import AgentServiceStub
from outrider_runtime.settings import SettingsError


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    async with running_gateway(tmp_path / "tls", drain_seconds=1.0) as gateway:
        yield gateway


@pytest.fixture
async def channel(running: RunningGateway) -> AsyncIterator[grpc.aio.Channel]:
    async with running.connect() as channel:
        yield channel


async def ping(channel: grpc.aio.Channel, token: str | None) -> str:
    """Caller as the server names it."""
    metadata = bearer(token) if token is not None else None
    stub = AgentServiceStub(channel)
    answer = await stub.Ping(PingRequest(payload=b"p"), metadata=metadata, timeout=20)
    assert answer.payload == b"p"
    return str(answer.caller)


async def assert_alive(running: RunningGateway) -> None:
    """A good agent is served: nothing that came before has ended the server."""
    async with running.connect() as channel:
        agent = await open_stream(channel, running.reviews.agent("good"), "good")
        await agent.send(PackagedData(batches=[make_batch(1)]))
        assert (await agent.receive()).batch_acks[0].last == 1
        await agent.call.done_writing()
        assert await agent.code() == grpc.StatusCode.OK


async def eventually_alive(running: RunningGateway) -> None:
    """As `assert_alive`, once the connections of before are gone."""

    async def alive() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await assert_alive(running)
            return True
        return False

    await eventually(alive)


async def until(agent: RawAgent, *fields: str) -> Command:
    """The next command that has one of these fields."""
    while True:
        command = await agent.receive()
        if any(field.name in fields for field, _ in command.ListFields()):
            return command


class BlackHole:
    """Passes bytes on to a port on loopback, until it swallows all without closing anything."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: list[asyncio.StreamWriter] = []
        self.port = 0
        self.swallow = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, back]
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if not self.swallow:
                    writer.write(data)


class TestPing:
    async def test_names_agent_and_server(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        assert await ping(channel, running.reviews.agent("node-1")) == "node-1"
        assert await ping(channel, running.reviews.server()) == "outrider/outrider-server"
        assert running.metric("pings_total") == 2

    async def test_too_large(self, running: RunningGateway, channel: grpc.aio.Channel) -> None:
        stub = AgentServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Ping(
                PingRequest(payload=b"x" * 2000), metadata=bearer(running.reviews.agent("n"))
            )
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert running.refused("RESOURCE_EXHAUSTED", "TooLarge") == 1

    async def test_rubbish(self, running: RunningGateway, channel: grpc.aio.Channel) -> None:
        call: Any = channel.unary_unary("/outrider.v1.AgentService/Ping")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(b"\xff\xff\xff", metadata=bearer(running.reviews.agent("n")))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert running.refused("INVALID_ARGUMENT", "Unparsable") == 1


class TestAuthentication:
    @pytest.mark.parametrize(
        ("token", "reason"),
        [
            (None, "NoToken"),
            ("rubbish", "NotAuthenticated"),
            (make_token(1.0), "NotAuthenticated"),
            ("two words", "MalformedToken"),
        ],
    )
    async def test_wrong_token(
        self, running: RunningGateway, channel: grpc.aio.Channel, token: str | None, reason: str
    ) -> None:
        agent = RawAgent(channel, token)
        assert await agent.code() == grpc.StatusCode.UNAUTHENTICATED
        assert running.refused("UNAUTHENTICATED", reason) == 1
        await assert_alive(running)

    async def test_token_is_reviewed_before_any_message_is_read(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        agent = RawAgent(channel, "rubbish")  # sends nothing
        assert await agent.code() == grpc.StatusCode.UNAUTHENTICATED

    async def test_other_service_account(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        agent = RawAgent(channel, running.reviews.other("default:default"))
        assert await agent.code() == grpc.StatusCode.PERMISSION_DENIED
        assert running.refused("PERMISSION_DENIED", "ServiceAccountNotAllowed") == 1

    @pytest.mark.parametrize(
        ("role", "method"),
        [
            ("server", "/outrider.v1.AgentService/Transfer"),
            ("agent", "/outrider.v1.FleetService/Link"),
        ],
    )
    async def test_wrong_role(
        self, running: RunningGateway, channel: grpc.aio.Channel, role: str, method: str
    ) -> None:
        token = running.reviews.agent("n") if role == "agent" else running.reviews.server()
        call: Any = channel.stream_stream(method)(metadata=bearer(token))
        assert await call.code() == grpc.StatusCode.PERMISSION_DENIED
        assert running.refused("PERMISSION_DENIED", "WrongRole") == 1

    @pytest.mark.parametrize("method", ["/outrider.v1.AgentService/Other", "/x.Y/Z"])
    async def test_method_not_on_the_list(
        self, running: RunningGateway, channel: grpc.aio.Channel, method: str
    ) -> None:
        call: Any = channel.unary_unary(method)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(b"", metadata=bearer(running.reviews.agent("n")))
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert running.refused("UNIMPLEMENTED", "UnknownMethod") == 1
        assert running.reviews.asked == []

    async def test_api_server_away(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        known = running.reviews.agent("known")
        assert await ping(channel, known) == "known"
        running.reviews.away = True
        assert await ping(channel, known) == "known"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ping(channel, running.reviews.agent("fresh"))
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        assert running.refused("UNAVAILABLE", "ReviewUnavailable") == 1

    async def test_health_is_for_anybody_and_follows_readiness(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        stub: Any = health_pb2_grpc.HealthStub(channel)

        async def serving() -> bool:
            answer = await stub.Check(health_pb2.HealthCheckRequest())
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        await eventually(serving)
        running.health.set("sink", False, "away")

        async def not_serving() -> bool:
            return not await serving()

        await eventually(not_serving)
        assert running.reviews.asked == []


class TestHello:
    async def test_welcome(self, running: RunningGateway, channel: grpc.aio.Channel) -> None:
        agent = RawAgent(channel, running.reviews.agent("node-1"))
        await agent.send(hello("node-1"))
        welcome = (await agent.receive()).welcome
        assert (welcome.server, welcome.agent_id) == ("gateway-0", node_uid("node-1"))
        assert welcome.window_bytes == limits.MIB
        assert running.metric("streams") == 1

    async def test_other_node(self, running: RunningGateway, channel: grpc.aio.Channel) -> None:
        agent = RawAgent(channel, running.reviews.agent("node-1"))
        await agent.send(hello("node-2"))
        assert await agent.code() == grpc.StatusCode.PERMISSION_DENIED
        assert running.refused("PERMISSION_DENIED", "ForeignNode") == 1
        assert running.metric("streams") == 0
        await assert_alive(running)

    async def test_none_in_time(self, tmp_path: Path) -> None:
        async with (
            running_gateway(tmp_path, hello_timeout_seconds=0.05) as running,
            running.connect() as channel,
        ):
            agent = RawAgent(channel, running.reviews.agent("node-1"))
            assert await agent.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert running.refused("DEADLINE_EXCEEDED", "HelloTimeout") == 1

    async def test_closed_without(self, running: RunningGateway, channel: grpc.aio.Channel) -> None:
        agent = RawAgent(channel, running.reviews.agent("node-1"))
        await agent.call.done_writing()
        assert await agent.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert running.refused("INVALID_ARGUMENT", "NoHello") == 1


class TestBadMessages:
    @pytest.mark.parametrize(
        ("message", "code", "reason"),
        [
            (b"\xff\xff\xff\xff", "INVALID_ARGUMENT", "Unparsable"),
            (b"", "INVALID_ARGUMENT", "Empty"),
            (hello("node-1"), "INVALID_ARGUMENT", "SecondHello"),
            (PackagedData(records=[EncodedRecord()]), "INVALID_ARGUMENT", "PlainRecords"),
            (b"\x0a" + b"x" * limits.MESSAGE_BYTES, "RESOURCE_EXHAUSTED", "TooLarge"),
        ],
    )
    async def test_ends_the_stream_only(
        self, tmp_path: Path, message: bytes | PackagedData, code: str, reason: str
    ) -> None:
        async with running_gateway(tmp_path) as running:
            # The client would refuse what is too large by itself.
            options = [("grpc.max_send_message_length", -1)]
            credentials = grpc.ssl_channel_credentials(running.authority.pem)
            async with grpc.aio.secure_channel(running.address, credentials, options) as channel:
                agent = await open_stream(channel, running.reviews.agent("node-1"), "node-1")
                await agent.send(message)
                assert (await agent.code()).name == code
            assert running.refused(code, reason) == 1
            await eventually(lambda: running.metric("streams") == 0)
            await assert_alive(running)

    async def test_far_too_large_is_refused_by_grpc(self, running: RunningGateway) -> None:
        options = [("grpc.max_send_message_length", -1)]
        credentials = grpc.ssl_channel_credentials(running.authority.pem)
        async with grpc.aio.secure_channel(running.address, credentials, options) as channel:
            agent = await open_stream(channel, running.reviews.agent("node-1"), "node-1")
            await agent.send(b"x" * (3 * limits.MESSAGE_BYTES))
            assert await agent.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await eventually(lambda: running.metric("streams") == 0)
        await assert_alive(running)


class TestStreams:
    async def test_batches_are_acknowledged_when_stored(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        agent = await open_stream(channel, running.reviews.agent("node-1"), "node-1")
        running.sink.open.clear()
        for seq in (1, 2, 3):
            await agent.send(PackagedData(batches=[make_batch(seq)]))
        await eventually(lambda: running.sink.waiting == 3)
        # An answer to something sent later, and no acknowledgement with it.
        await agent.send(PackagedData(heartbeat=Heartbeat(unix_nanos=5)))
        answer = await agent.receive()
        assert answer.heartbeat.unix_nanos == 5
        assert not answer.batch_acks
        assert running.metric("batches_inflight_bytes") > 0
        running.sink.open.set()
        acknowledged: set[int] = set()
        while acknowledged != {1, 2, 3}:
            for ack in (await agent.receive()).batch_acks:
                assert ack.epoch == 7
                acknowledged.update(range(ack.first, ack.last + 1))
        assert sorted(running.sink.names) == [(node_uid("node-1"), 7, seq) for seq in (1, 2, 3)]
        assert running.metric("records_total") == 3
        await eventually(lambda: running.metric("batches_inflight_bytes") == 0)

    async def test_second_stream_takes_the_firsts_place(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        token = running.reviews.agent("node-1")
        first = await open_stream(channel, token, "node-1")
        second = await open_stream(channel, token, "node-1")
        assert await first.code() == grpc.StatusCode.ABORTED
        assert running.metric("streams") == 1
        await second.send(PackagedData(batches=[make_batch(1)]))
        assert (await second.receive()).batch_acks
        await eventually(lambda: running.metric("stream_ends_total", reason="Replaced") == 1)

    async def test_ends_with_the_token(self, tmp_path: Path) -> None:
        async with (
            running_gateway(tmp_path, auth={"expiry_grace_seconds": 0.0}) as running,
            running.connect() as channel,
        ):
            token = running.reviews.agent("node-1", seconds=1.0)
            agent = await open_stream(channel, token, "node-1")
            assert await agent.code() == grpc.StatusCode.UNAUTHENTICATED
            await eventually(
                lambda: running.metric("stream_ends_total", reason="TokenExpired") == 1
            )

    async def test_a_peer_that_vanishes_leaves_no_stream(self, running: RunningGateway) -> None:
        async with running.connect() as channel:
            await open_stream(channel, running.reviews.agent("node-1"), "node-1")
            assert running.metric("streams") == 1
        await eventually(lambda: running.metric("streams") == 0)
        # A connection that closes ends the stream with a reset, or with its end, which comes first.
        ends = ("PeerGone", "Closed")
        await eventually(
            lambda: sum(running.metric("stream_ends_total", reason=end) for end in ends) == 1
        )

    async def test_slow_reader_is_ended(self, tmp_path: Path) -> None:
        async with (
            running_gateway(tmp_path, write_timeout_seconds=0.2) as running,
            running.connect() as channel,
        ):
            agent = await open_stream(channel, running.reviews.agent("node-1"), "node-1")
            (stream,) = running.gateway.hub.streams()
            assert isinstance(stream, AgentStream)
            script = Script(source="x" * limits.SCRIPT_BYTES)
            run = RunCommand(id=RunId(task_uid="t", attempt=1), script=script)

            def push_until_ended() -> bool:
                if not stream.waits:  # never more than one waits: the write is to time out
                    stream.push(Command(runs=[run]))
                return running.metric("stream_ends_total", reason="TooSlow") == 1

            await eventually(push_until_ended)
            assert running.metric("streams") == 0
            await assert_alive(running)
            assert await agent.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    async def test_agent_for_which_too_much_waits_is_ended(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        agent = await open_stream(channel, running.reviews.agent("node-1"), "node-1")
        (stream,) = running.gateway.hub.streams()
        script = Script(source="x" * limits.SCRIPT_BYTES)
        runs = [RunCommand(id=RunId(task_uid="t", attempt=n), script=script) for n in range(64)]
        stream.push(Command(runs=runs))
        assert await agent.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await eventually(lambda: running.metric("stream_ends_total", reason="TooSlow") == 1)

    async def test_reader_gets_all_that_was_merged(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        agent = await open_stream(channel, running.reviews.agent("node-1"), "node-1")
        sent = [RunId(task_uid="t", attempt=number) for number in range(1, 2501)]
        running.gateway.hub.send("node-1", Command(run_acks=sent))
        found: set[int] = set()
        while len(found) < len(sent):
            found.update(name.attempt for name in (await agent.receive()).run_acks)
        assert found == {name.attempt for name in sent}


class TestSinkAway:
    async def test_reports_pass_and_agents_are_told_to_send_again(self, tmp_path: Path) -> None:
        limit = 6 * limits.MIB  # room for four of the batches below, and one that waits
        async with (
            running_gateway(tmp_path, max_inflight_bytes=limit) as running,
            running.connect() as channel,
        ):
            running.gateway._shared.intake.patience = 0.1
            running.sink.open.clear()
            agents = []
            for number in range(8):
                node = f"node-{number}"
                agents.append(await open_stream(channel, running.reviews.agent(node), node))
                batch = make_batch(1, size=limits.RECORD_BYTES - 16 * limits.KIB)
                await agents[-1].send(PackagedData(batches=[batch]))
            await eventually(lambda: running.metric("batches_total", result="let_go") == 4)
            assert 0 < running.metric("batches_inflight_bytes") <= limit
            # What is not records gets through meanwhile.
            for agent in agents:
                await agent.send(PackagedData(run_report=RunReport(complete=True)))
            await eventually(lambda: running.metric("run_reports_total", result="no_leader") == 8)
            running.sink.open.set()
            answers = [await until(agent, "batch_acks", "drain") for agent in agents]
            assert sum(len(answer.batch_acks) for answer in answers) == 4
            assert sum(answer.HasField("drain") for answer in answers) == 4
            assert len(running.sink.stored) == 4

    async def test_one_that_fails_for_a_while_is_tried_again(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        running.sink.error = SinkUnavailableError("full")
        agent = await open_stream(channel, running.reviews.agent("n"), "n")
        await agent.send(PackagedData(batches=[make_batch(1)]))
        await eventually(lambda: running.metric("batches_total", result="unavailable") >= 2)
        running.sink.error = None
        assert (await agent.receive()).batch_acks[0].last == 1

    async def test_a_stream_that_ends_gives_its_room_back_once_the_sink_is_done(
        self, running: RunningGateway
    ) -> None:
        running.sink.open.clear()
        async with running.connect() as channel:
            agent = await open_stream(channel, running.reviews.agent("n"), "n")
            await agent.send(PackagedData(batches=[make_batch(1)]))
            await eventually(lambda: running.metric("batches_inflight_bytes") > 0)
        await eventually(lambda: running.metric("streams") == 0)
        assert running.metric("batches_inflight_bytes") > 0  # the sink has it in memory still
        running.sink.open.set()
        await eventually(lambda: running.metric("batches_inflight_bytes") == 0)

    async def test_nothing_is_tried_again_for_a_stream_that_has_ended(
        self, running: RunningGateway
    ) -> None:
        running.sink.error = SinkUnavailableError("away")
        async with running.connect() as channel:
            agent = await open_stream(channel, running.reviews.agent("n"), "n")
            await agent.send(PackagedData(batches=[make_batch(1), make_batch(2)]))
            await eventually(lambda: running.metric("batches_retrying") > 0)
        await eventually(lambda: running.metric("batches_inflight_bytes") == 0)
        assert running.metric("batches_retrying") == 0
        assert running.metric("batches_total", result="dropped") == 2


class TestLateHello:
    async def test_a_stream_opened_before_the_newest_does_not_take_its_place(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        token = running.reviews.agent("n")
        late = RawAgent(channel, token)
        # Its handler has begun: it is older than the stream that follows.
        await eventually(lambda: running.metric("token_cache_entries") == 1)
        await asyncio.sleep(0)
        newest = await open_stream(channel, token, "n")
        await late.send(hello("n"))
        assert await late.code() == grpc.StatusCode.ABORTED
        await newest.send(PackagedData(heartbeat=Heartbeat(unix_nanos=5)))
        assert (await newest.receive()).heartbeat.unix_nanos == 5

    async def test_a_hello_during_the_drain_is_sent_away(self, tmp_path: Path) -> None:
        async with (
            running_gateway(tmp_path, drain_seconds=60.0) as running,
            running.connect() as channel,
        ):
            stays = await open_stream(channel, running.reviews.agent("stays"), "stays")
            late = RawAgent(channel, running.reviews.agent("late"))
            await eventually(lambda: running.metric("token_cache_entries") == 2)
            running.stop.set()
            assert (await stays.receive()).HasField("drain")
            await late.send(hello("late"))
            assert await late.code() == grpc.StatusCode.UNAVAILABLE
            assert not running.task.done()
            stays.call.cancel()


class TestDrain:
    async def test_agents_are_told_and_then_ended(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        polite = await open_stream(channel, running.reviews.agent("polite"), "polite")
        deaf = await open_stream(channel, running.reviews.agent("deaf"), "deaf")
        running.stop.set()
        assert (await polite.receive()).HasField("drain")
        await polite.call.done_writing()
        assert await polite.code() == grpc.StatusCode.OK
        assert await deaf.code() == grpc.StatusCode.UNAVAILABLE
        await running.task

    async def test_ends_at_once_when_all_have_left(self, tmp_path: Path) -> None:
        async with (
            running_gateway(tmp_path, drain_seconds=300.0) as running,
            running.connect() as channel,
        ):
            agent = await open_stream(channel, running.reviews.agent("n"), "n")
            running.stop.set()
            assert (await agent.receive()).HasField("drain")
            late = RawAgent(channel, running.reviews.agent("late"))
            assert await late.code() == grpc.StatusCode.UNAVAILABLE
            await agent.call.done_writing()
            await asyncio.wait_for(running.task, 20)

    async def test_stored_batches_are_acknowledged_before_the_stream_closes(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        agent = await open_stream(channel, running.reviews.agent("n"), "n")
        running.sink.open.clear()
        await agent.send(PackagedData(batches=[make_batch(1)]))
        await agent.call.done_writing()
        await eventually(lambda: running.sink.waiting == 1)
        for _ in range(3):  # on the same connection: the server has seen the end by then
            await ping(channel, running.reviews.agent("other"))
        running.sink.open.set()
        assert (await agent.receive()).batch_acks[0].last == 1
        assert await agent.code() == grpc.StatusCode.OK


class TestSockets:
    async def test_silent_socket_is_closed(self, tmp_path: Path) -> None:
        keepalive = KeepaliveSettings(handshake_seconds=0.2)
        async with running_gateway(tmp_path, keepalive=keepalive) as running:
            host, port = running.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()
            await assert_alive(running)

    async def test_half_open_connection_is_freed(self, tmp_path: Path) -> None:
        keepalive = KeepaliveSettings(time_seconds=1.0, timeout_seconds=1.0)
        async with running_gateway(tmp_path, keepalive=keepalive) as running:
            async with BlackHole(running.gateway.port) as hole:
                credentials = grpc.ssl_channel_credentials(running.authority.pem)
                address = f"127.0.0.1:{hole.port}"
                async with grpc.aio.secure_channel(address, credentials) as channel:
                    await open_stream(channel, running.reviews.agent("n"), "n")
                    hole.swallow = True
                    began = time.monotonic()
                    await eventually(lambda: running.metric("streams") == 0)
                    # Without the ping timeout it would be a minute.
                    assert time.monotonic() - began < 1.0 + 1.0 + 1.0
            await assert_alive(running)

    async def test_connections_are_bounded(self, tmp_path: Path) -> None:
        async with running_gateway(tmp_path, max_connections=2) as running:
            async with running.connect() as first, running.connect() as second:
                await ping(first, running.reviews.agent("a"))
                await ping(second, running.reviews.agent("b"))
                async with running.connect() as third:
                    with pytest.raises(grpc.aio.AioRpcError) as error:
                        await ping(third, running.reviews.agent("c"))
                    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
                await ping(first, running.reviews.agent("a"))
            await eventually_alive(running)

    async def test_pings_too_often_are_sent_away(self, tmp_path: Path) -> None:
        keepalive = KeepaliveSettings(min_interval_seconds=60.0)
        async with running_gateway(tmp_path, keepalive=keepalive) as running:
            options = [
                ("grpc.keepalive_time_ms", 20),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
            credentials = grpc.ssl_channel_credentials(running.authority.pem)
            async with grpc.aio.secure_channel(running.address, credentials, options) as channel:
                agent = await open_stream(channel, running.reviews.agent("n"), "n")
                assert await agent.code() == grpc.StatusCode.UNAVAILABLE
                assert "many" in await agent.details()  # "Too many pings"

    async def test_plain_text_is_not_served(self, running: RunningGateway) -> None:
        async with grpc.aio.insecure_channel(running.address) as channel:
            call: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"", timeout=5)
        await assert_alive(running)

    async def test_address_in_use_names_the_setting(
        self, running: RunningGateway, tmp_path: Path
    ) -> None:
        with pytest.raises(SettingsError, match=r"gateway\.address"):
            async with running_gateway(tmp_path / "other", address=running.address):
                pass

    async def test_stop_frees_the_port(self, tmp_path: Path) -> None:
        async with running_gateway(tmp_path) as running:
            address = running.address
        host, port = address.split(":")
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind((host, int(port)))
            again.listen()


class TestCertificate:
    async def test_changed_files_are_used_without_a_restart(
        self, running: RunningGateway, channel: grpc.aio.Channel
    ) -> None:
        old = await open_stream(channel, running.reviews.agent("old"), "old")
        fresh = Authority()
        write_pair(running.tls_folder, fresh.issue())
        async with connect(running.address, ca=fresh.pem, server_name=SERVER_NAME) as other:
            assert await ping(other, running.reviews.agent("n")) == "n"
        await old.send(PackagedData(batches=[make_batch(1)]))
        assert (await old.receive()).batch_acks
        assert running.metric("tls_certificate_loads_total", result="loaded") == 1

    async def test_a_pair_that_does_not_fit_is_not_used(self, running: RunningGateway) -> None:
        certificate, _ = running.authority.issue()
        _, key = running.authority.issue()
        write_pair(running.tls_folder, (certificate, key))
        await eventually(
            lambda: running.metric("tls_certificate_loads_total", result="failed") == 1
        )
        await assert_alive(running)
        before = running.metric("tls_certificate_expiry_timestamp_seconds")
        write_pair(running.tls_folder, running.authority.issue(days=60))
        await eventually(
            lambda: running.metric("tls_certificate_expiry_timestamp_seconds") > before
        )
        await assert_alive(running)

    async def test_an_ended_certificate_makes_the_server_unready(
        self, running: RunningGateway
    ) -> None:
        await eventually(lambda: running.health.ready)
        write_pair(running.tls_folder, running.authority.issue(days=0))
        await eventually(lambda: not running.health.ready)
        (condition,) = running.health.readiness()
        assert (condition.name, "renew it" in condition.reason) == ("tls", True)

    async def test_unusable_files_at_start_name_the_setting(self, tmp_path: Path) -> None:
        async with running_gateway(tmp_path / "good") as running:
            settings = running.gateway._settings
        for pair, name in (
            ((b"rubbish", b"rubbish"), r"gateway\.tls\.certFile"),
            ((Authority().issue()[0], b"rubbish"), r"gateway\.tls\.keyFile"),
            ((Authority().issue()[0], Authority().issue()[1]), "does not belong"),
        ):
            write_pair(tmp_path / "good", pair)
            with pytest.raises(SettingsError, match=name):
                Gateway(
                    settings,
                    running.gateway._shared.auth,
                    sink=running.sink,
                    review=running.reviews,
                    metrics=running.gateway._metrics,
                    health=running.health,
                    replica="r",
                    version="v",
                )
