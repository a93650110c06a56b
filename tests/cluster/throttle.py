"""Stand between clients and a server on loopback: slow, silent, and healed again, when told to.

    throttle.py CONTROL_PORT LISTEN_PORT=HOST:PORT...

Why it exists: a network that loses everything does not close connections. So a silent link keeps
both ends open, reads nothing, and takes new connections without an answer: no FIN, no RST. Healed,
it carries on with what waited, as TCP would; or, told so, the old connections stay dead for ever,
as behind a firewall that has forgotten them, and only new ones get through. Imports nothing of the
project: it is started as a script of its own. It must not look at what it carries.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from dataclasses import dataclass, field

HOST = "127.0.0.1"
PIECE = 64 * 1024
SMALLEST = 1024
#: Pieces in a second where the rate is bounded: small steps, so that the flow is even.
STEPS = 20
#: Longest wait for the server, seconds.
CONNECT_SECONDS = 5.0
ASK_SECONDS = 10.0


@dataclass
class Direction:
    """One way through a link: bytes a second for all connections together."""

    rate: float | None = None
    carried: int = 0
    _free_at: float = 0.0

    @property
    def piece(self) -> int:
        """Most bytes to be read at once."""
        if self.rate is None:
            return PIECE
        return int(min(PIECE, max(SMALLEST, self.rate / STEPS)))

    async def pay(self, size: int) -> None:
        """Wait until so many bytes may pass."""
        self.carried += size
        if self.rate is None:
            return
        now = time.monotonic()
        self._free_at = max(now, self._free_at) + size / self.rate
        await asyncio.sleep(self._free_at - now)


@dataclass
class Link:
    """A listening port, and where it leads.

    Attributes:
        target: host and port of the server.
        open: cleared while the link is silent.
        generation: connections of an earlier one are dead for ever.
        up, down: from clients to the server, and back.
    """

    target: tuple[str, int]
    open: asyncio.Event = field(default_factory=asyncio.Event)
    generation: int = 0
    connections: int = 0
    up: Direction = field(default_factory=Direction)
    down: Direction = field(default_factory=Direction)

    async def passes(self, generation: int) -> None:
        """Wait until a connection may carry; for ever if it is a dead one."""
        while True:
            await self.open.wait()
            if generation == self.generation:
                return
            await asyncio.Event().wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection, to its end."""
        generation = self.generation
        self.connections += 1
        try:
            await self.passes(generation)
            async with asyncio.timeout(CONNECT_SECONDS):
                there, back = await asyncio.open_connection(*self.target, limit=PIECE)
        except (OSError, TimeoutError):
            writer.transport.abort()
            self.connections -= 1
            return
        for end in (writer, back):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways = (
            asyncio.create_task(self._pump(reader, back, self.up, generation)),
            asyncio.create_task(self._pump(there, writer, self.down, generation)),
        )
        # Either end may go on after the other has said all it has to say.
        await asyncio.wait(ways)
        for end in (writer, back):
            end.transport.abort()
        self.connections -= 1

    async def _pump(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        way: Direction,
        generation: int,
    ) -> None:
        try:
            while True:
                await self.passes(generation)
                data = await source.read(way.piece)
                # What was under way when the link fell silent gets there when it is healed.
                await self.passes(generation)
                if not data:
                    break
                await way.pay(len(data))
                target.write(data)
                await target.drain()
            if target.can_write_eof():
                target.write_eof()
        except OSError:
            target.transport.abort()  # a reset on one side is one on the other


def command(links: dict[str, Link], words: dict[str, object]) -> dict[str, object]:
    """Do what was asked for; the state of the link.

    Raises:
        KeyError: there is no such link.
    """
    link = links[str(words["link"])]
    for way, name in ((link.up, "up"), (link.down, "down")):
        if name in words:
            rate = words[name]
            way.rate = float(rate) if isinstance(rate, int | float) else None
    if words.get("forget"):
        link.generation += 1
    if "silent" in words:
        link.open.clear() if words["silent"] else link.open.set()
    return {
        "connections": link.connections,
        "up": link.up.carried,
        "down": link.down.carried,
    }


async def main(control: int, routes: list[str]) -> None:
    """Listen for ever.

    Raises:
        OSError: a port is taken.
    """
    links: dict[str, Link] = {}

    async def obey(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):
            answer = command(links, json.loads(await reader.readline()))
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    for route in routes:
        port, _, target = route.partition("=")
        host, _, there = target.rpartition(":")
        link = links[port] = Link((host, int(there)))
        link.open.set()
        await asyncio.start_server(link.serve, HOST, int(port), limit=PIECE, backlog=1024)
    async with await asyncio.start_server(obey, HOST, control) as server:
        print("listening", flush=True)
        await server.serve_forever()


class Throttle:
    """Talks to a running throttle.

    Args:
        control: its control port.
    """

    def __init__(self, control: int) -> None:
        self._control = control

    def slow(self, port: int, *, up: float | None = None, down: float | None = None) -> None:
        """Bound a link to so many bytes a second each way; None: no bound."""
        self._ask(link=str(port), up=up, down=down)

    def silence(self, port: int) -> None:
        """Let nothing through any more, and close nothing."""
        self._ask(link=str(port), silent=True)

    def heal(self, port: int, *, forget: bool = False) -> None:
        """Let traffic through again; with `forget` only that of new connections."""
        self._ask(link=str(port), silent=False, forget=forget)

    def state(self, port: int) -> dict[str, int]:
        """Connections, and bytes carried up and down, of a link."""
        return self._ask(link=str(port))

    def _ask(self, **words: object) -> dict[str, int]:
        with socket.create_connection((HOST, self._control), ASK_SECONDS) as connection:
            connection.sendall(json.dumps(words).encode() + b"\n")
            with connection.makefile("rb") as file:
                line = file.readline()
        if not line:
            raise ValueError(f"the throttle does not know {words}")
        found: dict[str, int] = json.loads(line)
        return found


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
