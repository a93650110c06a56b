"""The agent as a process of its own, against a fake gateway."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fakes.certificates import SERVER_NAME, Authority
from fakes.gateway_server import credentials


@dataclass
class AgentProcess:
    """A running agent; its log is in `log`."""

    process: asyncio.subprocess.Process
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    async def ops_port(self) -> int:
        """The port it serves metrics and health on."""
        async with asyncio.timeout(20):
            while not (match := re.search(r"msg=listening .*port=(\d+)", self.text)):
                assert self.process.returncode is None, self.text
                await asyncio.sleep(0.02)
        return int(match[1])

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body of one of its pages."""
        reader, writer = await asyncio.open_connection("127.0.0.1", await self.ops_port())
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        return int(head.split()[1]), body

    async def kill(self) -> None:
        """As kill -9 does."""
        self.process.kill()
        await self.process.wait()

    async def terminate(self, seconds: float = 20) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(seconds):
            return await self.process.wait()


async def start_agent(
    folder: Path,
    target: str,
    authority: Authority,
    *flags: str,
    name: str = "agent",
    program: Sequence[str] = ("-m", "outrider_agent"),
) -> AgentProcess:
    """Start an agent with its state and files in a folder."""
    folder.mkdir(exist_ok=True)
    ca, token = credentials(folder, authority)
    log = folder / f"{name}.log"
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *program,
            "--node.name=node-a",
            f"--server.target={target}",
            f"--server.ca-file={ca}",
            f"--server.token-file={token}",
            f"--server.server-name={SERVER_NAME}",
            "--server.backoff-base-seconds=0.05",
            "--server.backoff-cap-seconds=0.5",
            f"--state.directory={folder}/state",
            "--ops.address=127.0.0.1:0",
            *flags,
            stderr=file,
            env={"PATH": os.environ["PATH"]},
        )
    return AgentProcess(process, log)


@contextlib.asynccontextmanager
async def agent_in(
    folder: Path, target: str, authority: Authority, *flags: str
) -> AsyncIterator[AgentProcess]:
    """A running agent for the time of a test."""
    agent = await start_agent(folder, target, authority, *flags)
    try:
        yield agent
    finally:
        if agent.process.returncode is None:
            await agent.kill()
