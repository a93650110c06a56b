"""What the agent's parts are given, made from its settings and from the system it runs on.

Here and not in `main`, which only wires, starts and stops.
"""

import asyncio
import os
import platform
import secrets
import socket
from collections.abc import Mapping
from importlib.metadata import version as package_version
from pathlib import Path

from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.collectors import hostinfo
from outrider_agent.collectors.facts import facts
from outrider_agent.collectors.hostinfo import HostPaths
from outrider_agent.core import accounts
from outrider_agent.core.batching import BatchLimits
from outrider_agent.core.policy import Policy
from outrider_agent.plugins.manager import PluginsOptions
from outrider_agent.settings import AgentSettings
from outrider_agent.store.recorder import RecorderOptions
from outrider_agent.tasks import lookup
from outrider_agent.tasks.execution import BuiltinFunction
from outrider_agent.tasks.placing import Place
from outrider_agent.uplink.uplink import Identity, Uplink

PROGRAM = "outrider-agent"
VERSION = package_version(PROGRAM)


_CODECS: Mapping[str, pb.Codec.ValueType] = {
    "zstd": pb.CODEC_ZSTD,
    "lz4": pb.CODEC_LZ4,
    "none": pb.CODEC_NONE,
}


def place(settings: AgentSettings) -> Place:
    """Where runs take place, and what this node allows them."""
    tasks, state = settings.tasks, Path(settings.state.directory)
    own = accounts.find(str(os.geteuid()), passwd=lookup.text_of("/etc/passwd", ""), group="")
    return Place(
        node=settings.node.name,
        work_directory=Path(tasks.work_directory or (state / "runs").absolute()),
        grace=tasks.termination_grace_seconds,
        policy=Policy(
            kinds=tasks.allowed_kinds,
            executables=tasks.allowed_executables,
            users=tasks.allowed_users,
            own={str(os.geteuid()), own.name} if own else {str(os.geteuid())},
            host=tasks.allow_host,
        ),
    )


def plugins_options(settings: AgentSettings, where: Place) -> PluginsOptions:
    """What this node says of plug-ins."""
    directory = settings.plugins.directory or f"{settings.state.directory}/plugins"
    return PluginsOptions(
        settings.plugins,
        settings.node.name,
        Path(directory).absolute(),
        tuple(where.policy.own),
    )


def recorder_options(settings: AgentSettings) -> RecorderOptions:
    """How records become batches."""
    batch = settings.batch
    return RecorderOptions(
        BatchLimits(batch.max_delay_millis / 1000, batch.max_bytes),
        _CODECS[batch.codec],
        batch.max_queue_bytes,
    )


def builtins(
    settings: AgentSettings, paths: HostPaths, uplink: Uplink
) -> dict[int, BuiltinFunction]:
    """What the agent does itself for a run, by the number of the builtin."""

    async def ping() -> bytes:
        return b"pong\n"

    async def print_facts() -> bytes:
        config = "" if uplink.config is None else uplink.config.report().hash
        return await asyncio.to_thread(
            facts, paths, node=settings.node.name, version=VERSION, config=config
        )

    return {pb.BUILTIN_PING: ping, pb.BUILTIN_FACTS: print_facts}


def identity(settings: AgentSettings, started: float) -> Identity:
    """What the agent says of itself; `started` in seconds since the Unix epoch."""
    addresses = hostinfo.addresses()
    envelope = pb.PackagedData(
        intranet_ipv4=addresses.intranet_ipv4,
        extranet_ipv4=addresses.extranet_ipv4,
        intranet_ipv6=addresses.intranet_ipv6,
        extranet_ipv6=addresses.extranet_ipv6,
        hostname=socket.gethostname(),
        version=VERSION,
        product=PROGRAM,
    )
    hello = pb.Hello(
        node=settings.node.name,
        version=VERSION,
        instance=secrets.token_hex(8),
        started_unix=int(started),
        platform=f"linux/{_ARCHITECTURES.get(platform.machine(), platform.machine())}",
        kernel=platform.release(),
        run_kinds=settings.tasks.allowed_kinds,
    )
    return Identity(hello, envelope)


#: Names as in the label kubernetes.io/arch.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
