"""The leader's links: one stream to the gateway of every replica, its own included.

Finds the gateways anew every few seconds, keeps a link to each, and hands what they say to a
listener. Says nothing by itself about tasks. What is to be sent is bounded: past the bound commands
are dropped and counted, for whoever sends them notices silence and sends again.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn, Protocol

import grpc
import grpc.aio
from outrider_proto import channel
from outrider_proto.v1.agent_pb2 import Command
from outrider_proto.v1.fleet_pb2 import LeaderHello, LinkRequest, LinkResponse, NodeCommand
from outrider_proto.v1.fleet_pb2_grpc import FleetServiceStub
from outrider_runtime.backoff import Backoff
from outrider_runtime.discovery import Address, DiscoveryError, resolve
from outrider_runtime.logs import get_logger
from outrider_runtime.settings import SettingsError, readable

from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import FleetSettings

#: A gateway must answer the leader's hello within this, seconds.
HELLO_SECONDS: Final = 10.0
#: A gateway that takes no message for so long is left, seconds.
WRITE_SECONDS: Final = 20.0
#: An address that leads to a gateway which is linked by another one is left alone so long, and as
#: long as that link holds: a gateway keeps one link only, and they would take turns, seconds.
ALIAS_SECONDS: Final = 10.0
#: Most bytes of commands that wait for one gateway.
PENDING_BYTES: Final = 64 * 1024 * 1024
#: One message to a gateway holds commands up to about this size, bytes.
MESSAGE_BYTES: Final = 1024 * 1024


class Listener(Protocol):
    """Who is told what gateways say. All calls are short and on the event loop."""

    def linked(self, gateway: str, hello: LinkResponse) -> None:
        """A link opened; `hello` has the gateway's name and all its sessions."""

    def received(self, gateway: str, message: LinkResponse) -> None:
        """A gateway said something."""

    def unlinked(self, gateway: str) -> None:
        """A link ended; it may come back."""


class LinkError(Exception):
    """A link could not be opened or ended; the text says why."""


@dataclass
class _Link:
    """One open link and what waits to be sent over it."""

    replica: str
    pending: deque[NodeCommand] = field(default_factory=deque)
    pending_bytes: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Links:
    """Links to all gateways while this replica leads.

    Args:
        settings: the section `fleet`.
        replica: name of this replica.
        term: fencing term of the Lease.
        listener: told what gateways say.
        metrics: the server's.
    """

    def __init__(
        self,
        settings: FleetSettings,
        replica: str,
        term: int,
        listener: Listener,
        metrics: ServerMetrics,
        find: Callable[[str], Awaitable[list[Address]]] | None = None,
    ) -> None:
        self._settings = settings
        self._hello = LeaderHello(replica=replica, term=term)
        self._token = channel.TokenFile(settings.token_file)
        self._listener = listener
        self._metrics = metrics
        self._find = find or self._resolve
        self._wanted: set[str] = set()
        self._kept: set[str] = set()
        self._links: dict[str, _Link] = {}
        #: Addresses of gateways that are linked by another address, and until when that is taken
        #: for granted, by the loop's clock.
        self._aliases: dict[str, tuple[str, float]] = {}
        self._log = get_logger("outrider.links", term=term)

    async def _resolve(self, target: str) -> list[Address]:
        return await resolve(target, limit=self._settings.max_gateways)

    async def run(self) -> None:
        """Keep links to all gateways, for ever."""
        complained = False
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    found = await self._find(self._settings.gateways)
                    self._wanted = {str(address) for address in found}
                    complained = False
                except DiscoveryError as error:
                    # Those that are known may well be there still.
                    if not complained:
                        self._log.warning("gateways not found", error=str(error))
                    complained = True
                for address in self._wanted - self._kept:
                    self._kept.add(address)
                    group.create_task(self._keep(address), name=f"link to {address}")
                await asyncio.sleep(self._settings.resolve_seconds)

    def send(self, gateway: str, commands: Sequence[tuple[str, Command]]) -> None:
        """Hand commands to a gateway; without a link to it, or past the bound, they are dropped."""
        link = self._links.get(gateway)
        for node, command in commands:
            message = NodeCommand(node=node, command=command)
            size = message.ByteSize()
            if link is None or link.pending_bytes + size > PENDING_BYTES:
                self._metrics.leader_commands.labels("dropped").inc()
                continue
            link.pending.append(message)
            link.pending_bytes += size
            link.wake.set()

    async def _keep(self, address: str) -> None:
        """Link to one address again and again, until it is not among the gateways any more."""
        backoff = Backoff(0.2, self._settings.resolve_seconds)
        try:
            while address in self._wanted:
                if self._is_alias(address):
                    await asyncio.sleep(self._settings.resolve_seconds)
                    continue
                try:
                    await self._link(address, backoff)
                except LinkError as error:
                    # A TaskGroup forgets that it was cancelled when one of its tasks fails in the
                    # same moment (until Python 3.13).
                    if _cancelled():
                        raise asyncio.CancelledError from error
                    if backoff.failures == 0:
                        self._log.warning("link ended", gateway=address, error=str(error))
                await asyncio.sleep(backoff.next())
        finally:
            self._kept.discard(address)
            self._aliases.pop(address, None)

    def _is_alias(self, address: str) -> bool:
        other, until = self._aliases.get(address, ("", 0.0))
        return other in self._links or asyncio.get_running_loop().time() < until

    async def _link(self, address: str, backoff: Backoff) -> None:
        try:
            token = self._token.read()
        except (OSError, ValueError) as error:
            raise LinkError(f"fleet.tokenFile: {error}") from None
        try:
            # Anew for each link, as the gateways' certificates may come from another issuer by now.
            ca = readable(self._settings.ca_file, setting="fleet.caFile")
        except SettingsError as error:
            raise LinkError(str(error)) from None
        connection = channel.connect(address, ca=ca, server_name=self._settings.server_name)
        try:
            stub = FleetServiceStub(connection)
            call = stub.Link(metadata=channel.bearer(token))
            try:
                await self._converse(address, call, backoff)
            finally:
                call.cancel()
        except grpc.aio.AioRpcError as error:
            raise LinkError(f"{error.code().name}: {error.details()}") from None
        finally:
            await connection.close()

    async def _converse(
        self,
        address: str,
        call: "grpc.aio.StreamStreamCall[LinkRequest, LinkResponse]",
        backoff: Backoff,
    ) -> None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                await call.write(LinkRequest(hello=self._hello))
                first = await call.read()
        except TimeoutError:
            raise LinkError(f"no answer to hello within {HELLO_SECONDS:g} s") from None
        if not isinstance(first, LinkResponse) or not first.HasField("hello"):
            await self._fail(call, "the gateway ended the link at once")
        replica = first.hello.replica
        for other, known in self._links.items():
            if known.replica == replica:
                until = asyncio.get_running_loop().time() + ALIAS_SECONDS
                self._aliases[address] = (other, until)
                raise LinkError(f"{replica} is linked by {other} already")
        link = self._links[address] = _Link(replica)
        self._metrics.leader_links.set(len(self._links))
        self._log.info("linked", gateway=address, replica=replica, agents=len(first.joined))
        backoff.reset()
        try:
            self._listener.linked(address, first)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(call, link), name=f"send to {address}")
                await self._read(address, call)
        except* (LinkError, grpc.aio.AioRpcError) as errors:
            raise errors.exceptions[0] from None
        finally:
            del self._links[address]
            self._metrics.leader_links.set(len(self._links))
            self._listener.unlinked(address)

    async def _read(
        self, address: str, call: "grpc.aio.StreamStreamCall[LinkRequest, LinkResponse]"
    ) -> None:
        while True:
            message = await call.read()
            if not isinstance(message, LinkResponse):
                await self._fail(call, "the gateway ended the link")
            self._listener.received(address, message)

    async def _fail(
        self, call: "grpc.aio.StreamStreamCall[LinkRequest, LinkResponse]", text: str
    ) -> NoReturn:
        code = await call.code()
        raise LinkError(f"{text}: {code.name}: {await call.details()}")

    async def _write(
        self, call: "grpc.aio.StreamStreamCall[LinkRequest, LinkResponse]", link: _Link
    ) -> None:
        while True:
            await link.wake.wait()
            link.wake.clear()
            while link.pending:
                message = LinkRequest()
                size = 0
                while link.pending and size < MESSAGE_BYTES:
                    command = link.pending.popleft()
                    size += command.ByteSize()
                    message.commands.append(command)
                link.pending_bytes -= size
                try:
                    async with asyncio.timeout(WRITE_SECONDS):
                        await call.write(message)
                except TimeoutError:
                    text = f"the gateway took no message within {WRITE_SECONDS:g} s"
                    raise LinkError(text) from None
                self._metrics.leader_commands.labels("sent").inc(len(message.commands))


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
