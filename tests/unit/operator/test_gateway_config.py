"""Configurations on their way through a gateway: down to the agent, and its reports up."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from fakes.gateway import RunningGateway, eventually, open_stream, running_gateway
from outrider_operator.core.identity import Identity, Role
from outrider_operator.gateway.link import MESSAGE_BYTES, LinkOutgoing
from outrider_operator.gateway.outgoing import Outgoing, OutgoingFullError
from outrider_operator.gateway.session import ConfigReported, Opened, Refused, SessionProtocol
from outrider_proto import limits
from outrider_proto.channel import bearer
from outrider_proto.v1.agent_pb2 import (
    CONFIG_PHASE_APPLIED,
    Command,
    ConfigReport,
    EffectiveConfig,
    Hello,
    PackagedData,
    PluginState,
    RunCommand,
    RunId,
)
from outrider_proto.v1.fleet_pb2 import (
    AgentLeft,
    LeaderHello,
    LinkRequest,
    LinkResponse,
    NodeCommand,
    NodeConfigReport,
)

REPORT = ConfigReport(
    hash="a" * 64,
    tried_hash="a" * 64,
    phase=CONFIG_PHASE_APPLIED,
    plugins=[PluginState(name="fim", version="1")],
)


def opened() -> SessionProtocol:
    protocol = SessionProtocol(Identity(Role.AGENT, "outrider/agent", "n", "uid", "p", "pu"))
    hello = PackagedData(hello=Hello(node="n"))
    assert isinstance(protocol.receive(hello.SerializeToString()), Opened)
    return protocol


def test_a_report_within_the_limits_is_passed_on_as_it_is() -> None:
    event = opened().receive(PackagedData(config_report=REPORT).SerializeToString())
    assert isinstance(event, ConfigReported)
    assert ConfigReport.FromString(event.report) == REPORT


@pytest.mark.parametrize(
    "report",
    [
        ConfigReport(hash="a" * 65),
        ConfigReport(tried_hash="a" * 65),
        ConfigReport(message="m" * (limits.CONFIG_MESSAGE_BYTES + 1)),
        ConfigReport(drift=["d"] * 17),
        ConfigReport(drift=["d" * (limits.CONFIG_MESSAGE_BYTES + 1)]),
        ConfigReport(plugins=[PluginState(name=str(n)) for n in range(limits.PLUGINS + 1)]),
        ConfigReport(plugins=[PluginState(name="n" * 129)]),
        ConfigReport(plugins=[PluginState(reason="r" * 129)]),
        ConfigReport(plugins=[PluginState(message="m" * (limits.CONFIG_MESSAGE_BYTES + 1))]),
    ],
)
def test_a_report_beyond_the_limits_is_refused(report: ConfigReport) -> None:
    event = opened().receive(PackagedData(config_report=report).SerializeToString())
    assert isinstance(event, Refused)
    assert event.reason == "BadConfigReport"


def test_many_small_entries_are_refused_before_they_are_parsed() -> None:
    plugins = [PluginState(name="x" * 8)] * 10_000
    message = PackagedData(config_report=ConfigReport(plugins=plugins))
    event = opened().receive(message.SerializeToString())
    assert isinstance(event, Refused)
    assert (event.reason, "20.5" in event.message) == ("TooManyEntries", True)


def test_only_the_newest_configuration_waits_for_an_agent() -> None:
    outgoing = Outgoing()
    run = RunCommand(id=RunId(task_uid="t", attempt=1))
    for number in range(100):
        content = bytes([number]) * limits.CONFIG_BYTES
        config = EffectiveConfig(hash=str(number), content=content)
        outgoing.merge(Command(config=config, runs=[run]))
    first = outgoing.take()
    assert first is not None
    assert (first.config.hash, len(first.runs)) == ("99", 0)
    second = outgoing.take()
    assert second is not None
    assert (second.HasField("config"), len(second.runs)) == (False, 1)
    assert outgoing.take() is None
    assert outgoing._bytes == 0


def test_a_configuration_counts_in_what_waits() -> None:
    outgoing = Outgoing()
    with pytest.raises(OutgoingFullError):
        outgoing.merge(Command(config=EffectiveConfig(content=bytes(9 * limits.MIB))))


def test_the_leader_gets_the_newest_report_of_each_node() -> None:
    outgoing = LinkOutgoing()
    for number in range(3):
        for node in ("a", "b"):
            report = ConfigReport(message=str(number)).SerializeToString()
            outgoing.config_reported(node, 1, report)
    outgoing.left(AgentLeft(node="b", session=1))
    message = outgoing.take()
    assert message is not None
    assert [(r.node, r.report.message) for r in message.config_reports] == [("a", "2")]
    assert outgoing.take() is None


def test_reports_go_in_messages_of_a_bounded_size() -> None:
    outgoing = LinkOutgoing()
    large = ConfigReport(drift=["d" * 1000] * 16).SerializeToString()
    for number in range(300):
        outgoing.config_reported(str(number), 1, large)
    found = []
    while (message := outgoing.take()) is not None:
        assert message.ByteSize() < MESSAGE_BYTES + 64 * limits.KIB
        found += [report.node for report in message.config_reports]
    assert found == [str(number) for number in range(300)]


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[RunningGateway]:
    async with running_gateway(tmp_path) as gateway:
        yield gateway


class RawLeader:
    """The leader's end of the link."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        method: Any = channel.stream_stream("/outrider.v1.FleetService/Link")
        self.call = method(metadata=bearer(token))

    async def send(self, request: LinkRequest) -> None:
        await self.call.write(request.SerializeToString())

    async def report(self) -> NodeConfigReport:
        while True:
            message = LinkResponse.FromString(await self.call.read())
            if message.config_reports:
                (report,) = message.config_reports
                return report


async def test_reports_go_up_and_are_told_again_to_a_new_leader(running: RunningGateway) -> None:
    async with running.connect() as channel:
        agent = await open_stream(channel, running.reviews.agent("a"), "a")
        await agent.send(PackagedData(config_report=ConfigReport(message="before")))
        await eventually(lambda: running.metric("config_reports_total", result="no_leader") == 1)
        leaders = []
        for term, expected in ((1, "before"), (2, "after")):
            leader = RawLeader(channel, running.reviews.server())
            leaders.append(leader)
            await leader.send(LinkRequest(hello=LeaderHello(term=term)))
            told = await leader.report()
            assert (told.node, told.report.message) == ("a", expected)
            assert told.session
            if term == 1:
                await agent.send(PackagedData(config_report=ConfigReport(message="after")))
                assert (await leader.report()).report.message == "after"
        config = EffectiveConfig(hash="h", content=b"{}")
        command = NodeCommand(node="a", command=Command(config=config))
        await leaders[-1].send(LinkRequest(commands=[command]))
        found = await agent.receive()
        while not found.HasField("config"):
            found = await agent.receive()
        assert found.config == config
