"""Puts configurations into force: checked and prepared whole, then switched, or not at all.

Owns one loop: it takes the newest configuration that was asked for, has every part of the agent
prepare what can fail, writes the file, has the parts switch, and lets go of what was before. If a
part cannot switch, those that did go back. Looks once a minute at what differs from what is in
force. Knows the parts by `Part` only, and how it stands by core.config.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from outrider_proto import effective
from outrider_proto.effective import Effective, EffectiveError
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.config.lastgood import DamagedError, LastGood
from outrider_agent.core.config import ConfigError, Standing
from outrider_agent.metrics import AgentMetrics

log = get_logger("outrider.config")
T = TypeVar("T")

#: Longest time for what can fail, such as to fetch plug-ins; and for a part to switch, seconds.
PREPARE_SECONDS: Final = 900.0
SWITCH_SECONDS: Final = 120.0
#: Between two looks at what differs, seconds.
CHECK_SECONDS: Final = 60.0
PHASES: Final = {
    pb.CONFIG_PHASE_NONE: "none",
    pb.CONFIG_PHASE_APPLYING: "applying",
    pb.CONFIG_PHASE_APPLIED: "applied",
    pb.CONFIG_PHASE_FAILED: "failed",
}


class Change(Protocol):
    """What a part prepared. One of `switch` and `drop` follows, at most once."""

    async def switch(self) -> None:
        """Put it into force; what was before must be there still. May raise anything."""
        ...

    async def undo(self) -> None:
        """After `switch`, whole or failed: go back to what was before."""
        ...

    async def finish(self) -> None:
        """After `switch` of all parts: let go of what was before."""
        ...

    async def drop(self) -> None:
        """It is not wanted any more."""
        ...


class Part(Protocol):
    """A part of the agent that a configuration changes."""

    @property
    def name(self) -> str:
        """For people: what is named where it fails."""
        ...

    async def prepare(self, wanted: Effective) -> Change:
        """Check and get all that can fail, and touch nothing that runs.

        Raises:
            ConfigError: It cannot be put into force.
        """
        ...

    async def check(self) -> list[str]:
        """Put right what differs from what is in force; what did or does, as sentences."""
        ...


class _SupersededError(Exception):
    """Another configuration came before anything was touched."""


@dataclass
class Applier:
    """Puts into force what servers ask for.

    Attributes:
        parts: In the order in which they switch.
        last_good: The file; None where the node takes no configuration.
        metrics: Count.
        on_change: Called when a server should hear how it stands.
    """

    parts: Sequence[Part]
    last_good: LastGood | None
    metrics: AgentMetrics
    on_change: Callable[[], None] = lambda: None
    check_seconds: float = CHECK_SECONDS
    _standing: Standing = field(init=False)
    #: The one in force, and the one that the file is known to hold.
    _force: pb.EffectiveConfig | None = None
    _stored: pb.EffectiveConfig | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _newer: asyncio.Event = field(default_factory=asyncio.Event)
    _notes: list[str] = field(default_factory=list)
    #: Parts that could not go back to the one in force; tried again at each look.
    _astray: list[Part] = field(default_factory=list)
    _last_told: pb.ConfigReport | None = None

    def __post_init__(self) -> None:
        self._standing = Standing(enabled=self.last_good is not None)
        self._count()

    # For servers; called on the loop.

    def ask(self, config: pb.EffectiveConfig) -> None:
        """A server asks for a configuration."""
        self._standing.ask(config)
        if self._standing.superseded:
            self._newer.set()
        self._last_told = None  # whoever asks is answered, also where nothing changes by it
        self._wake.set()

    def answered(self) -> None:
        """A server took us."""
        self._standing.answered()
        self._wake.set()

    def report(self) -> pb.ConfigReport:
        """How it stands."""
        return self._standing.report()

    @property
    def in_force(self) -> str:
        """Hash of the configuration in force; empty: none."""
        return self._standing.in_force

    def plugins_changed(self, states: Sequence[pb.PluginState]) -> None:
        """Plug-ins stand otherwise."""
        found = tuple(states)
        if found != self._standing.plugins:
            self._standing.plugins = found
            self._told()

    def _told(self) -> None:
        """How it stands may have changed: servers hear of it if it has."""
        now = self.report()
        if now != self._last_told:
            self._last_told = now
            self._count()
            self.on_change()

    def _count(self) -> None:
        standing, metrics = self._standing, self.metrics
        metrics.config_info.clear()
        metrics.config_info.labels(standing.in_force).set(1)
        for phase, name in PHASES.items():
            metrics.config_phase.labels(name).set(phase == standing.phase)
        metrics.config_drift.set(len(standing.drift))

    # The loop.

    async def run(self) -> None:
        """Put the last good one into force, then what is asked for, for ever."""
        await self._begin()
        loop = asyncio.get_running_loop()
        look_at = loop.time() + self.check_seconds
        while True:
            self._wake.clear()
            config = self._standing.begin()
            self._told()
            if config is not None:
                await self._try(config)
                continue
            if loop.time() >= look_at:
                await self._look()
                look_at = loop.time() + self.check_seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(look_at):
                    await self._wake.wait()

    async def _begin(self) -> None:
        """What is on the disk, or the agent's own settings, which are in force at first."""
        kept = None
        if self.last_good is not None:
            kept = await self._kept(self.last_good)
        if kept is not None:
            self._standing.start(kept)
            config = self._standing.begin()
            assert config is not None
            log.info("taking the last good configuration", hash=config.hash)
            self._told()
            if await self._try(config):
                return
        # Of the parts, too: such as a listener that the settings name.
        changes = []
        for part in self.parts:
            try:
                change = await part.prepare(Effective())
                await change.switch()
                changes.append(change)
                self._astray = [other for other in self._astray if other is not part]
            except Exception as error:  # noqa: BLE001 - its check tells and tries again
                log.error("the agent's own settings are not in force", error=_say(part, error))  # noqa: TRY400 - the text says it all
        for change in changes:
            await change.finish()
        await self._look()

    async def _kept(self, last_good: LastGood) -> pb.EffectiveConfig | None:
        try:
            self._stored = await asyncio.to_thread(last_good.read)
            return self._stored
        except DamagedError as error:
            text = f"the last good configuration {last_good.path} was damaged: {error}"
            try:
                where = await asyncio.to_thread(last_good.set_aside)
                text += f"; it is {where} now, and the agent began with its own settings"
            except OSError as problem:
                text += f"; it cannot be set aside: {problem.strerror}"
        except OSError as error:
            text = (
                f"the last good configuration {last_good.path} cannot be read: {error.strerror}; "
                "the agent began with its own settings"
            )
        log.error("no last good configuration", error=text)
        self._notes.append(text)
        return None

    async def _try(self, config: pb.EffectiveConfig) -> bool:
        """Put a configuration into force; whether it is."""
        self._newer.clear()
        result = "failed"
        try:
            try:
                wanted = effective.unpack(config)
            except EffectiveError as error:
                raise ConfigError(f"the configuration is refused: {error}") from None
            await self._apply(config, wanted)
        except _SupersededError:
            result = "superseded"
            self._standing.dropped()
            log.info("a newer configuration came", hash=config.hash)
        except ConfigError as error:
            self._standing.failed(str(error), mixed=bool(self._astray))
            log.error("configuration failed", hash=config.hash, error=str(error))  # noqa: TRY400 - the text says it all
        else:
            result = "applied"
            self._force, self._astray = config, []
            self._standing.applied()
            log.info("configuration in force", hash=config.hash)
        self.metrics.config_applies.labels(result).inc()
        self._told()
        if result == "applied":
            await self._look()
        return result == "applied"

    async def _apply(self, config: pb.EffectiveConfig, wanted: Effective) -> None:
        changes = await self._until_newer(self._prepare(config, wanted))
        switched: list[tuple[Part, Change]] = []
        try:
            for part, change in changes:
                switched.append((part, change))
                await _bounded(part, change.switch(), SWITCH_SECONDS)
            await self._keep(config)
        except ConfigError as error:
            unsaid = await self._go_back(switched)
            await self._drop(changes[len(switched) :])
            raise ConfigError("; ".join([str(error), *unsaid])) from None
        for part, change in changes:
            try:
                await _bounded(part, change.finish(), SWITCH_SECONDS)
            except ConfigError as error:
                log.warning("what was before cannot be ended", error=str(error))

    async def _prepare(
        self, config: pb.EffectiveConfig, wanted: Effective
    ) -> list[tuple[Part, Change]]:
        changes: list[tuple[Part, Change]] = []
        try:
            for part in self.parts:
                changes.append((part, await _bounded(part, part.prepare(wanted), PREPARE_SECONDS)))
            # Not what the file holds: a full disk is no reason not to start with it.
            if self.last_good is not None and config != self._stored:
                try:
                    await asyncio.to_thread(self.last_good.prepare, config)
                except OSError as error:
                    raise ConfigError(_unkept(self.last_good, error)) from None
        except BaseException:
            await self._drop(changes)
            raise
        return changes

    async def _until_newer(
        self, work: Awaitable[list[tuple[Part, Change]]]
    ) -> list[tuple[Part, Change]]:
        """What is prepared, unless something newer comes before that: then nobody waits for it."""
        task = asyncio.ensure_future(work)
        newer = asyncio.ensure_future(self._newer.wait())
        try:
            await asyncio.wait({task, newer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            newer.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if task.cancelled():
            raise _SupersededError
        return task.result()

    async def _keep(self, config: pb.EffectiveConfig) -> None:
        if self.last_good is None or config == self._stored:
            return
        self._stored = None
        try:
            await asyncio.to_thread(self.last_good.commit)
            self._stored = config
        except OSError as error:
            raise ConfigError(_unkept(self.last_good, error)) from None

    async def _drop(self, changes: Sequence[tuple[Part, Change]]) -> None:
        for part, change in changes:
            try:
                await change.drop()
            except Exception as error:  # noqa: BLE001 - the others are dropped all the same
                log.warning("what was prepared cannot be dropped", error=_say(part, error))
        if self.last_good is not None:
            await asyncio.to_thread(self.last_good.discard)

    async def _go_back(self, switched: Sequence[tuple[Part, Change]]) -> list[str]:
        """Undo, the last first; what could not be undone, as sentences."""
        unsaid = []
        for part, change in reversed(switched):
            try:
                await _bounded(part, change.undo(), SWITCH_SECONDS)
            except ConfigError as error:
                unsaid.append(f"and it cannot go back: {error}")
                if part not in self._astray:
                    self._astray.append(part)
        if self.last_good is not None:
            await asyncio.to_thread(self.last_good.discard)
            # The file may be the new one already, if only the folder was not synced.
            unsaid += await self._check_file(self.last_good)
        return unsaid

    # What differs.

    async def _look(self) -> None:
        found = await self._return() if self._astray else []
        for part in self.parts:
            try:
                found += await _bounded(part, part.check(), SWITCH_SECONDS)
            except ConfigError as error:
                found.append(str(error))
        if self.last_good is not None:
            found += await self._check_file(self.last_good)
        if self._force is not None:
            found += self._not_done(effective.unpack(self._force))
        notes, self._notes = self._notes, []
        if self._standing.differs(found + notes):
            if self._standing.drift:
                log.warning("not all is as configured", drift=" | ".join(self._standing.drift))
            self._told()

    async def _return(self) -> list[str]:
        """Try again to go back to the one in force; which parts cannot, as sentences."""
        wanted = Effective() if self._force is None else effective.unpack(self._force)
        left, found = [], []
        for part in self._astray:
            try:
                change = await _bounded(part, part.prepare(wanted), SWITCH_SECONDS)
                await _bounded(part, change.switch(), SWITCH_SECONDS)
                await _bounded(part, change.finish(), SWITCH_SECONDS)
            except ConfigError as error:
                left.append(part)
                found.append(f"neither the old nor the new one is in force: {error}")
        self._astray = left
        if not left:
            self._standing.went_back("" if self._force is None else self._force.hash)
            self._told()
        return found

    async def _check_file(self, last_good: LastGood) -> list[str]:
        """Write the file anew if it is not what is in force."""
        if self._force is None:
            return []
        problem = ""
        try:
            kept = await asyncio.to_thread(last_good.read)
            if kept == self._force:
                return []
            problem = "another one" if kept is not None else "gone"
        except (DamagedError, OSError) as error:
            problem = str(error)
        text = f"the file {last_good.path} was not as it was written ({problem})"
        try:
            await asyncio.to_thread(last_good.prepare, self._force)
            await asyncio.to_thread(last_good.commit)
            self._stored = self._force
        except OSError as error:
            return [f"{text}, and cannot be written: {error.strerror}"]
        return [f"{text}; it was put right"]

    @staticmethod
    def _not_done(wanted: Effective) -> list[str]:
        """What this version of the agent does not do."""
        return [
            f"data set {dataset.name}: this version of the agent keeps no data sets"
            for dataset in wanted.datasets[:1]
        ]


async def _bounded(part: Part, work: Awaitable[T], seconds: float) -> T:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise ConfigError(f"{part.name}: not done within {seconds:.0f} s") from None
    except Exception as error:
        if not isinstance(error, ConfigError):
            log.exception("a fault of ours in a part of the configuration", part=part.name)
        raise ConfigError(_say(part, error)) from None


def _say(part: Part, error: Exception) -> str:
    text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    return f"{part.name}: {text}"


def _unkept(last_good: LastGood, error: OSError) -> str:
    return (
        f"the configuration cannot be written to {last_good.path}: {error.strerror}; "
        "make room on the disk of state.directory"
    )
