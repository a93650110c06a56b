"""The settings of how the agent takes its configuration, and of the listeners that one can open.

A part of `settings`, apart because of its size.
"""

from typing import Annotated

from msgspec import Meta, field
from outrider_runtime.settings import Section


class ConfigSettings(Section, frozen=True):
    """The configuration that servers give, which goes before these settings where it asks."""

    enabled: Annotated[
        bool,
        Meta(description="Whether this node takes any; else these settings are all there is."),
    ] = True
    file: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9][-_.A-Za-z0-9]*$",
            max_length=200,
            description="Name of the file in state.directory that the last good one is kept in.",
        ),
    ] = "last-good-config"


class FramedTcpSettings(Section, frozen=True):
    """The listener for framed messages of programs on this node."""

    address: Annotated[
        str, Meta(description='Where it listens, "IP:port"; empty: only where configured.')
    ] = ""
    allow_remote: Annotated[
        bool,
        Meta(
            description="Whether it may listen elsewhere than on loopback; nothing there proves "
            "who sends."
        ),
    ] = False
    max_connections: Annotated[
        int, Meta(ge=1, le=4096, description="Most connections at once; more are closed.")
    ] = 128
    idle_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=3600,
            description="After so long without a whole message, or without reading an answer, a "
            "connection is closed, seconds.",
        ),
    ] = 120.0


class ListenersSettings(Section, frozen=True):
    """Where programs on this node hand over records."""

    framed_tcp: FramedTcpSettings = field(default_factory=FramedTcpSettings)
