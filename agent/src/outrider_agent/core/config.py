"""How the agent stands to its configuration: what is in force, what is tried, what a server hears.

Decides only what is to be tried next and what is told; checks nothing of a configuration's content
and puts nothing into force. One is tried at a time; of those that come meanwhile the newest waits
and the others are dropped. What failed is tried again only when it is asked for again: whoever
asked decides that, not a loop here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from outrider_proto import limits
from outrider_proto.v1 import agent_pb2 as pb

#: Most sentences about what differs in a report.
MOST_DRIFT: Final = 16
#: Characters of a hash; one of a server that is longer is no hash.
HASH_LENGTH: Final = 64
DISABLED: Final = "the setting config.enabled of this node is false: it takes no configuration"


class ConfigError(Exception):
    """A part of a configuration cannot be put into force; the text says which, why, what to do."""


def bounded(text: str) -> str:
    """A text of a report within its bound, limits.CONFIG_MESSAGE_BYTES."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limits.CONFIG_MESSAGE_BYTES:
        return text
    mark = "…"
    return raw[: limits.CONFIG_MESSAGE_BYTES - len(mark.encode())].decode("utf-8", "ignore") + mark


@dataclass
class Standing:
    """What is in force, tried and waiting.

    Attributes:
        enabled: Whether the node takes configurations at all.
        in_force: Hash of the one in force; empty: the agent's own settings only.
        tried: Hash that `phase` and `message` are about.
        phase: How it stands.
        message: Why it failed.
        drift: What differs from what is in force, as last found.
        plugins: How the plug-ins stand.
    """

    enabled: bool = True
    in_force: str = ""
    tried: str = ""
    phase: pb.ConfigPhase.ValueType = pb.CONFIG_PHASE_NONE
    message: str = ""
    drift: tuple[str, ...] = ()
    plugins: tuple[pb.PluginState, ...] = ()
    _trying: pb.EffectiveConfig | None = None
    _waiting: pb.EffectiveConfig | None = None
    _kept: pb.EffectiveConfig | None = field(default=None, repr=False)

    # What comes.

    def start(self, kept: pb.EffectiveConfig) -> None:
        """The last good configuration was on the disk."""
        self._kept = kept
        self._waiting = kept

    def ask(self, config: pb.EffectiveConfig) -> None:
        """A server asks for a configuration."""
        self._kept = None
        if not self.enabled:
            self._settle(config.hash, pb.CONFIG_PHASE_FAILED, DISABLED)
        elif self._trying is not None and self._trying.hash == config.hash:
            self._waiting = None
        else:
            self._waiting = config

    def answered(self) -> None:
        """A server is there: what failed at the start gets another try, unless it asks itself."""
        kept, self._kept = self._kept, None
        failed = self.phase == pb.CONFIG_PHASE_FAILED and self._trying is None
        if kept is not None and failed and self._waiting is None:
            self._waiting = kept

    # What is done.

    @property
    def superseded(self) -> bool:
        """Whether another one waits for the one that is tried."""
        return self._trying is not None and self._waiting is not None

    def begin(self) -> pb.EffectiveConfig | None:
        """The configuration to try now, until `applied`, `failed` or `dropped`; None: none."""
        if self._trying is not None or self._waiting is None:
            return None
        config, self._waiting = self._waiting, None
        if config.hash == self.in_force and not self.drift:
            # As after a roll back of one that failed here: all of it is in force already.
            self._settle(config.hash, pb.CONFIG_PHASE_APPLIED, "")
            return None
        self._trying = config
        self._settle(config.hash, pb.CONFIG_PHASE_APPLYING, "")
        return config

    def applied(self) -> None:
        """What was tried is in force, whole."""
        assert self._trying is not None
        self.in_force, self._trying, self._kept = self._trying.hash, None, None
        self.drift = ()
        self._settle(self.in_force, pb.CONFIG_PHASE_APPLIED, "")

    def failed(self, message: str, *, mixed: bool = False) -> None:
        """It was refused or could not be put into force; what was in force is so still.

        Args:
            message: Why.
            mixed: Whether parts of the agent could not go back: then none is in force whole.
        """
        assert self._trying is not None
        self._trying = None
        if mixed:
            self.in_force = ""
        self._settle(self.tried, pb.CONFIG_PHASE_FAILED, message)

    def went_back(self, in_force: str) -> None:
        """All parts of the agent are again at the one that was in force last."""
        self.in_force = in_force

    def dropped(self) -> None:
        """It was given up for another one before anything of it was in force.

        To give it up takes time: where it was asked for again meanwhile, it is begun again.
        """
        assert self._trying is not None
        given_up, self._trying = self._trying, None
        if self._waiting is None:
            self._waiting = given_up

    def _settle(self, tried: str, phase: pb.ConfigPhase.ValueType, message: str) -> None:
        self.tried, self.phase, self.message = tried[:HASH_LENGTH], phase, bounded(message)

    # What is told.

    def differs(self, drift: Iterable[str]) -> bool:
        """What differs from what is in force; whether that is news."""
        found = tuple(bounded(text) for text in drift)[:MOST_DRIFT]
        before, self.drift = self.drift, found
        return found != before

    def report(self) -> pb.ConfigReport:
        """All of it, for a server."""
        return pb.ConfigReport(
            hash=self.in_force,
            tried_hash=self.tried,
            phase=self.phase,
            message=self.message,
            plugins=self.plugins[: limits.PLUGINS],
            drift=self.drift,
        )
