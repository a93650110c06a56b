"""All AgentConfigs as they were last seen or written, read into what is decided on.

What stands in an object's status is the only state of a change: it is read from there after each
write, as another leader would. Decides nothing.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from outrider_proto.effective import EffectiveError
from outrider_runtime.backoff import Backoff

from outrider_operator.core.config_objects import attempt_of, content_of, lost_revision, plan_of
from outrider_operator.core.config_plan import Config, Revision
from outrider_operator.core.config_rollout import Rollout, RolloutPhase
from outrider_operator.core.config_status import rollout_of
from outrider_operator.core.model import LabelSelector, Requirement
from outrider_operator.core.ports import ConfigStore, NotFoundError, version_of
from outrider_operator.fleet.config_revisions import Revisions

#: Selects no node at all.
NOBODY: Final = LabelSelector(
    match_expressions=[
        Requirement(key="kubernetes.io/hostname", operator="Exists"),
        Requirement(key="kubernetes.io/hostname", operator="DoesNotExist"),
    ]
)


@dataclass
class Known:
    """An AgentConfig.

    Attributes:
        body: as it was last seen or written.
        config: read from it; None: not yet.
        problem: why its spec cannot be read, empty if it can.
        due: when it may be written again, seconds since the Unix epoch.
        attempt: the annotation as it was when it was last stepped; None: never.
    """

    body: Mapping[str, Any]
    config: Config | None = None
    problem: str = ""
    due: float = 0.0
    attempt: str | None = None
    backoff: Backoff = field(default_factory=lambda: Backoff(1.0, 30.0))

    @property
    def status(self) -> Mapping[str, Any]:
        """The status as it stands."""
        return self.body.get("status") or {}

    @property
    def rollout(self) -> Rollout:
        """The state in it; that of a new AgentConfig where somebody wrote what is none."""
        try:
            return rollout_of(self.status)
        except ValueError:
            return Rollout()

    @property
    def phase(self) -> RolloutPhase:
        """Where its change stands."""
        return self.config.rollout.phase if self.config is not None else self.rollout.phase


class ConfigBook:
    """All AgentConfigs, by name. `store`: the API server; `revisions`: what they asked for."""

    def __init__(self, store: ConfigStore, revisions: Revisions) -> None:
        self._store = store
        self._revisions = revisions
        self.known: dict[str, Known] = {}

    async def read_all(self) -> None:
        """Read all AgentConfigs anew. Raises ClusterError."""
        found = await self._store.list_configs()
        for name in self.known.keys() - {body["metadata"]["name"] for body in found}:
            # One that was made after the list was read is not gone.
            await self.read(name)
        for body in found:
            self.seen(body, gone=False)

    async def read(self, name: str) -> None:
        """Read one. Raises ClusterError."""
        try:
            self.seen(await self._store.get_config(name), gone=False)
        except NotFoundError:
            self.forget(name)

    def seen(self, body: Mapping[str, Any], gone: bool) -> bool:
        """An AgentConfig was seen, or is gone. False where that is not news."""
        name, uid = body["metadata"]["name"], body["metadata"]["uid"]
        known = self.known.get(name)
        if known is not None and known.body["metadata"]["uid"] != uid:
            if version_of(body) < version_of(known.body):
                return False
            self.forget(name)
            known = None
        if gone:
            self.forget(name)
        elif known is None:
            self.known[name] = Known(body)
        elif version_of(body) > version_of(known.body):
            known.body, known.config = body, None
        else:
            return False
        return True

    def forget(self, name: str) -> None:
        """An AgentConfig is gone: it stops counting at once."""
        known = self.known.pop(name, None)
        if known is not None:
            self._revisions.forget(known.body["metadata"]["uid"])

    def configs(self) -> dict[str, Config]:
        """All that there are."""
        return {name: self._config(known) for name, known in self.known.items()}

    def _config(self, known: Known) -> Config:
        if known.config is None or any(r.lost for r in known.config.revisions.values()):
            known.config = self._read(known)
        return known.config

    def _read(self, known: Known) -> Config:
        body, rollout = known.body, known.rollout
        meta, spec = body["metadata"], body.get("spec") or {}
        target: Revision | None = None
        known.problem = ""
        try:
            target = self._revisions.learn(body, content_of(spec))
        except EffectiveError as error:
            known.problem = str(error)
        found = {target.name: target} if target is not None else {}
        selector = target.selector if target is not None else NOBODY
        for name in (rollout.settled, rollout.trial):
            if name and name not in found:
                found[name] = self._revision(body, name, selector)
        return Config(
            name=meta["name"],
            uid=meta["uid"],
            plan=plan_of(spec),
            target=target.name if target is not None else rollout.settled,
            attempt=attempt_of(body),
            rollout=rollout,
            revisions=found,
        )

    def _revision(self, body: Mapping[str, Any], name: str, selector: LabelSelector) -> Revision:
        with contextlib.suppress(EffectiveError):
            found = self._revisions.get(body, name)
            if found is not None:
                return found
        return lost_revision(body["metadata"]["name"], name, selector)
