"""What the agent's parts need to know of plug-ins, and what this node's settings allow.

Decides only; starts, fetches and reads nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from outrider_proto.effective import Plugin

from outrider_agent.core.policy import EVERY_USER


class PluginError(Exception):
    """Something with a plug-in; the text names it, says what happened and what to do.

    Attributes:
        name: The plug-in.
        reason: A word for why, in CamelCase.
        text: The sentence without the name.
    """

    def __init__(self, name: str, reason: str, text: str) -> None:
        super().__init__(f"plug-in {name}: {text}")
        self.name = name
        self.reason = reason
        self.text = text


class PluginTasks(Protocol):
    """Who hands tasks to plug-ins."""

    async def ask(self, name: str, data_type: int, data: str, timeout: float) -> Mapping[str, str]:
        """Hand a task to a plug-in; the fields of its answer.

        Raises:
            PluginError: UnknownPlugin, PluginNotRunning, PluginFull, PluginEnded, or NoAnswer
                after `timeout` seconds.
        """
        ...


@dataclass(frozen=True)
class PluginPolicy:
    """What this node allows, whatever a configuration says.

    Attributes:
        enabled: Whether there may be plug-ins at all.
        names: Patterns of their names.
        users: Users they may be of, EVERY_USER for all; the agent's own is always one.
        own: Name and number of the agent's own user.
        most: Most plug-ins.
    """

    enabled: bool
    names: Sequence[str]
    users: Sequence[str]
    own: Sequence[str]
    most: int


def refuse(wanted: Sequence[Plugin], policy: PluginPolicy) -> PluginError | None:
    """Why these plug-ins may not run here, or None if they may; the text names the setting."""
    for place, plugin in enumerate(wanted):
        text = _against(plugin, policy)
        if text is None and place >= policy.most:
            text = f"it is beyond plugins.maxPlugins of this node, {policy.most}; raise that"
        if text is not None:
            return PluginError(plugin.name, "NotAllowed", text)
    return None


def _against(plugin: Plugin, policy: PluginPolicy) -> str | None:
    if not policy.enabled:
        return "the setting plugins.enabled of this node is false; set it, or select other nodes"
    if not any(fnmatchcase(plugin.name, pattern) for pattern in policy.names):
        return "no pattern in the setting plugins.allowedNames of this node fits it; add one"
    user = plugin.user
    if user and user not in (*policy.own, *policy.users) and EVERY_USER not in policy.users:
        return f"the setting plugins.allowedUsers of this node lacks {user}; add it"
    return None


_LINE_END = re.compile(rb"[\r\n]+")


class Lines:
    """What a plug-in prints, as lines of bounded length; the rest of a longer one is thrown away.

    Args:
        max_bytes: Longest line, bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = b""

    def feed(self, data: bytes) -> list[str]:
        """Take what was read; returns the lines that are whole now."""
        *whole, rest = _LINE_END.split(self._held + data)
        self._held = rest[: self._max_bytes]
        return [self._text(line) for line in whole if line]

    def flush(self) -> list[str]:
        """The last line, which no line end follows."""
        held, self._held = self._held, b""
        return [self._text(held)] if held else []

    def _text(self, line: bytes) -> str:
        return line[: self._max_bytes].decode("utf-8", "replace")
