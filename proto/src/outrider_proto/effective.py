"""The configuration of one agent, merged from all that ask for something: its shape and its hash.

Server and agent share it, so that what one makes the other can check. What nobody asks for is
absent: the agent's own settings hold there. Merges nothing and applies nothing.
"""

import hashlib
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, field

from outrider_proto import limits
from outrider_proto.v1.agent_pb2 import EffectiveConfig

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$", max_length=63)]
"""Name of a plug-in or data set; it is also a folder's name on the agent."""

Interval = Annotated[int, Meta(ge=1, le=86_400)]
"""Seconds."""

Text = Annotated[str, Meta(max_length=4096, pattern=r"^[^\x00]*$")]
"""A short text, without NUL."""


class Part(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
    rename="camel",
):
    """A part of the configuration; in JSON its fields are in camelCase, absent where not set."""


class Collector(Part, frozen=True):
    """Something the agent gathers: whether, and how often in seconds."""

    enabled: bool | None = None
    interval_seconds: Interval | None = None


class Collectors(Part, frozen=True):
    """What the agent gathers by itself."""

    host: Collector = field(default_factory=Collector)
    inventory: Collector = field(default_factory=Collector)
    heartbeat: Collector = field(default_factory=Collector)


class Source(Part, frozen=True):
    """Where a plug-in comes from.

    Attributes:
        urls: tried in this order; https only.
        sha256: of what is fetched, hex digits.
        signature: Ed25519 signature of what is fetched, base64; empty: none.
        format: how it is packed: the executable itself, or a tar.gz with it.
        executable: path of the executable inside a tar.gz; empty: the plug-in's name.
    """

    urls: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^https://[^/ ]+/", max_length=2048)], ...],
        Meta(min_length=1, max_length=10),
    ]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    signature: Annotated[str, Meta(max_length=4096)] = ""
    format: Literal["plain", "tar.gz"] = "plain"
    executable: Annotated[str, Meta(max_length=1024, pattern=r"^[^\x00]*$")] = ""


class Resources(Part, frozen=True):
    """What a plug-in may use at most: thousandths of a core, bytes of memory."""

    cpu_millis: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    memory_bytes: Annotated[int, Meta(ge=1024 * 1024, le=2**44)] | None = None


class Plugin(Part, frozen=True):
    """A program that runs beside the agent.

    Attributes:
        user: name or number of the user it runs as; empty: the agent's own.
        detail: its settings, handed over in the environment variable DETAIL.
    """

    name: Name
    version: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00]*$")]
    source: Source
    args: Annotated[tuple[Text, ...], Meta(max_length=256)] = ()
    env: Annotated[
        dict[
            Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$")],
            Annotated[str, Meta(max_length=32_768, pattern=r"^[^\x00]*$")],
        ],
        Meta(max_length=256),
    ] = {}
    detail: Annotated[str, Meta(max_length=65_536, pattern=r"^[^\x00]*$")] = ""
    resources: Resources = field(default_factory=Resources)
    user: Annotated[str, Meta(max_length=limits.USER_BYTES)] = ""


class FramedTcp(Part, frozen=True):
    """A listener for length-prefixed messages; the address is IP:port."""

    address: Annotated[str, Meta(min_length=1, max_length=256)]


class Listeners(Part, frozen=True):
    """Where the agent takes records from programs on its node."""

    framed_tcp: FramedTcp | None = None


class Dataset(Part, frozen=True):
    """A set of data the agent keeps a copy of."""

    name: Name


class Agent(Part, frozen=True):
    """The agent itself.

    Attributes:
        log_level: least important messages that are logged.
        max_bytes_per_second: of records to the server; 0: no limit.
        cpu_millis: hard limit of the agent's own processor time, thousandths of a core.
        memory_bytes: hard limit of the agent's own memory.
    """

    log_level: Literal["debug", "info", "warning", "error"] | None = None
    max_bytes_per_second: Annotated[int, Meta(ge=0, le=2**40)] | None = None
    cpu_millis: Annotated[int, Meta(ge=10, le=1_000_000)] | None = None
    memory_bytes: Annotated[int, Meta(ge=32 * 1024 * 1024, le=2**44)] | None = None


class Effective(Part, frozen=True):
    """All that is asked of one agent. Plug-ins and data sets are in the order of their names."""

    collectors: Collectors = field(default_factory=Collectors)
    plugins: Annotated[tuple[Plugin, ...], Meta(max_length=limits.PLUGINS)] = ()
    listeners: Listeners = field(default_factory=Listeners)
    datasets: Annotated[tuple[Dataset, ...], Meta(max_length=64)] = ()
    agent: Agent = field(default_factory=Agent)


class EffectiveError(ValueError):
    """A configuration that is not one, and why."""


_ENCODER: Final = msgspec.json.Encoder(order="deterministic")
_DECODER: Final = msgspec.json.Decoder(Effective)


def without_empty(value: Any) -> Any:
    """A configuration as JSON has it, without the parts that nobody asks anything of.

    So a part that comes with a later version changes no hash.
    """
    # Once for each agent and change, so it is written for speed.
    if isinstance(value, list | tuple):
        return [without_empty(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        if isinstance(item, dict | list | tuple):
            inner = without_empty(item)
            if inner != {}:
                kept[key] = inner
        else:
            kept[key] = item
    return kept


def digest(content: bytes) -> str:
    """The hash of a configuration: SHA-256 of its one form, hex digits."""
    return hashlib.sha256(content).hexdigest()


def pack(effective: Effective) -> EffectiveConfig:
    """The one form of a configuration on the wire and on disk: equal ones have equal hashes.

    Raises:
        EffectiveError: It is larger than limits.CONFIG_BYTES.
    """
    content = _ENCODER.encode(without_empty(msgspec.to_builtins(effective)))
    if len(content) > limits.CONFIG_BYTES:
        raise EffectiveError(f"{len(content)} bytes; at most {limits.CONFIG_BYTES}")
    return EffectiveConfig(hash=digest(content), content=content)


def unpack(packed: EffectiveConfig) -> Effective:
    """Open and check a configuration.

    Raises:
        EffectiveError: Its hash does not match, it is no JSON, or a field is not as it has to be.
    """
    if len(packed.content) > limits.CONFIG_BYTES:
        raise EffectiveError(f"{len(packed.content)} bytes; at most {limits.CONFIG_BYTES}")
    if digest(packed.content) != packed.hash:
        raise EffectiveError("its hash does not match its content")
    try:
        effective = _DECODER.decode(packed.content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EffectiveError(str(error)) from None
    for what, names in (
        ("plug-in", [plugin.name for plugin in effective.plugins]),
        ("data set", [dataset.name for dataset in effective.datasets]),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise EffectiveError(f"the {what} {twice[0]!r} is named twice")
    return effective
