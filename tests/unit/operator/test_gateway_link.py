"""The leader's link, over real TLS: one leader, its terms, rosters, reports and commands."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from fakes.gateway import (
    RunningGateway,
    eventually,
    open_stream,
    running_gateway,
)
from outrider_operator.gateway.link import PENDING_REPORT_BYTES
from outrider_proto import limits
from outrider_proto.channel import bearer
from outrider_proto.v1.agent_pb2 import (
    Command,
    Drain,
    Heartbeat,
    PackagedData,
    RunId,
    RunReport,
    RunState,
)
from outrider_proto.v1.fleet_pb2 import LeaderHello, LinkRequest, LinkResponse, NodeCommand


class RawLeader:
    """The leader's end of the link."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        method: Any = channel.stream_stream("/outrider.v1.FleetService/Link")
        self.call = method(metadata=bearer(token))

    async def send(self, request: LinkRequest | bytes) -> None:
        await self.call.write(
            request if isinstance(request, bytes) else request.SerializeToString()
        )

    async def receive(self) -> LinkResponse:
        async with asyncio.timeout(20):
            data = await self.call.read()
        if data is grpc.aio.EOF:
            raise EOFError
        return LinkResponse.FromString(data)

    async def code(self) -> grpc.StatusCode:
        async with asyncio.timeout(20):
            with contextlib.suppress(grpc.aio.AioRpcError, EOFError):
                while True:
                    await self.receive()
            code: grpc.StatusCode = await self.call.code()
            return code


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    async with running_gateway(tmp_path, drain_seconds=1.0) as gateway:
        yield gateway


@pytest.fixture
async def channel(running: RunningGateway) -> AsyncIterator[grpc.aio.Channel]:
    async with running.connect() as channel:
        yield channel


async def link(
    running: RunningGateway, channel: grpc.aio.Channel, term: int
) -> tuple[RawLeader, LinkResponse]:
    leader = RawLeader(channel, running.reviews.server())
    await leader.send(LinkRequest(hello=LeaderHello(replica=f"leader-{term}", term=term)))
    return leader, await leader.receive()


async def test_first_message_is_the_hello_with_the_whole_roster(
    running: RunningGateway, channel: grpc.aio.Channel
) -> None:
    for node in ("a", "b"):
        await open_stream(channel, running.reviews.agent(node), node)
    _, first = await link(running, channel, 1)
    assert first.hello.replica == "gateway-0"
    assert {session.node for session in first.joined} == {"a", "b"}
    assert {session.pod for session in first.joined} == {"agent-a", "agent-b"}
    assert all(session.address.startswith("127.0.0.1:") for session in first.joined)
    assert all(session.hello.net_mode == "sd" for session in first.joined)


async def test_changes_follow(running: RunningGateway, channel: grpc.aio.Channel) -> None:
    leader, first = await link(running, channel, 1)
    assert not first.joined
    token = running.reviews.agent("a")
    old = await open_stream(channel, token, "a")
    (joined,) = (await leader.receive()).joined
    await open_stream(channel, token, "a")
    (replaced,) = (await leader.receive()).joined
    assert replaced.session > joined.session
    assert await old.code() == grpc.StatusCode.ABORTED
    other = await open_stream(channel, running.reviews.agent("b"), "b")
    # What is told at once and what in two messages is a matter of moments.
    while not any(joined.node == "b" for joined in (await leader.receive()).joined):
        pass
    other.call.cancel()
    while not (left := [left for left in (await leader.receive()).left if left.node == "b"]):
        pass
    # A call that is cancelled ends its stream with a reset, or with its end, which comes first.
    assert [item.reason for item in left] in (["PeerGone"], ["Closed"])


async def test_reports_up_and_commands_down(
    running: RunningGateway, channel: grpc.aio.Channel
) -> None:
    agent = await open_stream(channel, running.reviews.agent("a"), "a")
    leader, first = await link(running, channel, 1)
    assert (await agent.receive()).report_runs  # a new leader knows nothing
    state = RunState(id=RunId(task_uid="t", attempt=1))
    await agent.send(PackagedData(run_report=RunReport(runs=[state], complete=True)))
    (report,) = (await leader.receive()).run_reports
    assert (report.node, report.session) == ("a", first.joined[0].session)
    assert report.report.runs[0] == state
    acks = Command(run_acks=[state.id], drain=Drain(reason="not the leader's to say"))
    await leader.send(
        LinkRequest(
            commands=[
                NodeCommand(node="a", command=acks),
                NodeCommand(node="nowhere", command=acks),
            ]
        )
    )
    command = await agent.receive()
    assert list(command.run_acks) == [state.id]
    assert not command.HasField("drain")
    await eventually(lambda: running.metric("commands_total", result="no_stream") == 1)


async def test_commands_in_the_first_message_count(
    running: RunningGateway, channel: grpc.aio.Channel
) -> None:
    agent = await open_stream(channel, running.reviews.agent("a"), "a")
    leader = RawLeader(channel, running.reviews.server())
    name = RunId(task_uid="t", attempt=1)
    command = NodeCommand(node="a", command=Command(cancels=[name]))
    await leader.send(LinkRequest(hello=LeaderHello(term=1), commands=[command]))
    found = await agent.receive()
    while not found.cancels:
        found = await agent.receive()
    assert list(found.cancels) == [name]


async def test_higher_term_takes_over_and_lower_is_refused(
    running: RunningGateway, channel: grpc.aio.Channel
) -> None:
    old, _ = await link(running, channel, 5)
    new, _ = await link(running, channel, 6)
    assert await old.code() == grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await link(running, channel, 5)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    await open_stream(channel, running.reviews.agent("a"), "a")
    assert (await new.receive()).joined
    assert running.metric("links") == 1
    # It stays so when the newer one has gone.
    new.call.cancel()
    await eventually(lambda: running.metric("links") == 0)
    with pytest.raises(grpc.aio.AioRpcError):
        await link(running, channel, 5)


async def test_same_term_links_again(running: RunningGateway, channel: grpc.aio.Channel) -> None:
    old, _ = await link(running, channel, 5)
    await link(running, channel, 5)
    assert await old.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_term_is_forgotten_after_long_without_a_leader(
    running: RunningGateway, channel: grpc.aio.Channel
) -> None:
    leader, _ = await link(running, channel, 5)
    leader.call.cancel()
    await eventually(lambda: running.metric("links") == 0)
    running.gateway.links._last_seen -= 3600
    await link(running, channel, 0)  # the Lease was deleted, and counts anew


@pytest.mark.parametrize("first", [b"\xff\xff", LinkRequest()])
async def test_no_hello(
    running: RunningGateway, channel: grpc.aio.Channel, first: LinkRequest | bytes
) -> None:
    leader = RawLeader(channel, running.reviews.server())
    await leader.send(first)
    assert await leader.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert running.metric("links") == 0


async def test_rubbish_later(running: RunningGateway, channel: grpc.aio.Channel) -> None:
    leader, _ = await link(running, channel, 1)
    await leader.send(b"\xff\xff\xff")
    assert await leader.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert running.refused("INVALID_ARGUMENT", "Unparsable") == 1


async def test_clean_close(running: RunningGateway, channel: grpc.aio.Channel) -> None:
    leader, _ = await link(running, channel, 1)
    await leader.call.done_writing()
    assert await leader.code() == grpc.StatusCode.OK
    await eventually(lambda: running.metric("link_ends_total", reason="Closed") == 1)


async def test_link_ends_with_its_token(tmp_path: Path) -> None:
    auth = {"expiry_grace_seconds": 0.0}
    async with running_gateway(tmp_path, auth=auth) as running, running.connect() as channel:
        leader = RawLeader(channel, running.reviews.server(seconds=1.0))
        await leader.send(LinkRequest(hello=LeaderHello(replica="leader", term=1)))
        await leader.receive()
        assert await leader.code() == grpc.StatusCode.UNAUTHENTICATED
        assert running.metric("link_ends_total", reason="TokenExpired") == 1


async def test_leader_that_does_not_read_is_ended(
    running: RunningGateway, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outrider_operator.gateway.link.PENDING_REPORT_BYTES", 100_000)
    agent = await open_stream(channel, running.reviews.agent("a"), "a")
    leader, _ = await link(running, channel, 1)
    states = [RunState(id=RunId(task_uid="t", attempt=1), preview=b"x" * 8000)] * 100
    report = PackagedData(run_report=RunReport(runs=states))

    async def reported_until_ended() -> bool:
        await agent.send(report)
        return running.metric("link_ends_total", reason="TooSlow") == 1

    await eventually(reported_until_ended)
    assert await leader.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_drain_keeps_the_link_until_agents_have_left(
    running: RunningGateway, channel: grpc.aio.Channel
) -> None:
    agent = await open_stream(channel, running.reviews.agent("a"), "a")
    leader, _ = await link(running, channel, 1)
    running.stop.set()
    while not (await agent.receive()).HasField("drain"):
        pass
    state = RunState(id=RunId(task_uid="t", attempt=1))
    await agent.send(PackagedData(run_report=RunReport(runs=[state])))
    assert (await leader.receive()).run_reports
    await agent.call.done_writing()
    assert (await leader.receive()).left[0].node == "a"
    assert await leader.code() == grpc.StatusCode.UNAVAILABLE


async def test_no_agent_can_break_the_link_by_the_number_of_its_reports(
    running: RunningGateway, channel: grpc.aio.Channel
) -> None:
    leader, _ = await link(running, channel, 1)
    async with running.connect() as own:
        agent = await open_stream(own, running.reviews.agent("a"), "a")
        assert (await leader.receive()).joined
        state = RunState(id=RunId(task_uid="t", attempt=1), preview=bytes(limits.PREVIEW_BYTES))
        message = PackagedData(run_report=RunReport(runs=[state] * 1000)).SerializeToString()
        number = 1 + 3 * PENDING_REPORT_BYTES // (2 * len(message))

        async def flood() -> None:
            for _ in range(number):
                await agent.send(message)

        flooding = asyncio.create_task(flood())
        await eventually(lambda: running.metric("link_pending_bytes") > 0)
        for _ in range(number):
            # A leader that takes its time: more comes from the agent than it takes.
            await asyncio.sleep(0.2)
            assert (await leader.receive()).run_reports
        await flooding
    assert running.metric("link_ends_total", reason="TooSlow") == 0


async def test_an_agent_that_waits_for_the_leader_goes_on_when_the_link_ends(
    running: RunningGateway, channel: grpc.aio.Channel
) -> None:
    async with running.connect() as own:
        leader, _ = await link(running, own, 1)
        agent = await open_stream(channel, running.reviews.agent("a"), "a")
        state = RunState(id=RunId(task_uid="t", attempt=1), preview=bytes(limits.PREVIEW_BYTES))
        report = PackagedData(run_report=RunReport(runs=[state] * 1000))
        for _ in range(2):
            await agent.send(report)
        await eventually(lambda: running.metric("run_reports_total", result="forwarded") >= 2)
        await agent.send(PackagedData(heartbeat=Heartbeat(unix_nanos=5)))
        leader.call.cancel()
        assert (await agent.receive()).heartbeat.unix_nanos == 5


async def test_no_agent_can_break_the_link_by_the_size_of_what_it_says(
    running: RunningGateway, channel: grpc.aio.Channel
) -> None:
    leader, _ = await link(running, channel, 1)
    node = "large-" + "x" * 200
    agent = await open_stream(channel, running.reviews.agent(node), node)
    # All of it keeps the limits of its parts, but the link's message around it would not.
    state = RunState(id=RunId(task_uid="t", attempt=1), preview=bytes(limits.PREVIEW_BYTES))
    state.message = "\u20ac" * 1000
    message = PackagedData(run_report=RunReport(runs=[state] * 1000))
    while message.ByteSize() > limits.MESSAGE_BYTES:
        del message.run_report.runs[-1]
    while (spare := limits.MESSAGE_BYTES - message.ByteSize()) > 100:
        rest = bytes(min(spare - 50, limits.PREVIEW_BYTES))
        message.run_report.runs.add(id=state.id, preview=rest)
    assert limits.MESSAGE_BYTES - 100 < message.ByteSize() <= limits.MESSAGE_BYTES
    await agent.send(message)
    assert await agent.code() == grpc.StatusCode.INVALID_ARGUMENT
    await open_stream(channel, running.reviews.agent("good"), "good")
    seen: set[str] = set()
    while "good" not in seen:
        seen.update(session.node for session in (await leader.receive()).joined)
