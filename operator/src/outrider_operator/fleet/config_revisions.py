"""The revisions of AgentConfigs: kept as objects before they are tried, ten of each.

Holds in memory what rollouts need (settled, trial, target), so that an object somebody deleted is
made anew. Decides nothing about rollouts.
"""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from outrider_runtime.logs import get_logger

from outrider_operator.core.config_objects import (
    CONFIG_LABEL,
    Content,
    name_of,
    object_name,
    owner_of,
    revision_of,
    to_object,
)
from outrider_operator.core.config_plan import Revision
from outrider_operator.core.ports import ClusterError, ConfigStore, ConflictError, NotFoundError

#: Revisions of each AgentConfig that are kept, besides those in use.
KEPT: Final = 10


class Revisions:
    """The revisions of all AgentConfigs. `store`: the API server."""

    def __init__(self, store: ConfigStore) -> None:
        self._store = store
        #: By the AgentConfig's UID and the revision's name; those in use only.
        self._contents: dict[tuple[str, str], Content] = {}
        self._read: dict[tuple[str, str], Revision] = {}
        #: Numbers of the objects there are, by the AgentConfig's UID and the revision's name.
        self._numbers: dict[str, dict[str, int]] = {}
        self._log = get_logger("outrider.configs")

    async def load(self) -> None:
        """Read all revisions there are. Raises ClusterError."""
        for item in await self._store.list_revisions():
            content, uid = item.get("data") or {}, owner_of(item)
            name = name_of(content)
            config = (item["metadata"].get("labels") or {}).get(CONFIG_LABEL, "")
            if uid and item["metadata"]["name"] == object_name(config, name):
                self._numbers.setdefault(uid, {})[name] = int(item.get("revision") or 0)
                self._contents[uid, name] = content

    def get(self, body: Mapping[str, Any], name: str) -> Revision | None:
        """A revision of an AgentConfig; None where nobody knows it.

        Raises:
            EffectiveError: It cannot be used by this version.
        """
        key = (body["metadata"]["uid"], name)
        made = self._read.get(key)
        if made is None and key in self._contents:
            made = self._read[key] = revision_of(body["metadata"]["name"], self._contents[key])
        return made

    def learn(self, body: Mapping[str, Any], content: Content) -> Revision:
        """Take what a spec asks for; it has no object yet. Raises EffectiveError."""
        made = revision_of(body["metadata"]["name"], content)
        key = (body["metadata"]["uid"], made.name)
        self._contents[key], self._read[key] = content, made
        return made

    def kept(self, body: Mapping[str, Any], name: str) -> bool:
        """Whether there is an object of a revision, as far as is known."""
        return name in self._numbers.get(body["metadata"]["uid"], {})

    async def keep(self, body: Mapping[str, Any], name: str) -> None:
        """See that a revision that is to be tried has its object, and the highest number.

        Raises:
            ClusterError: It could not be made.
        """
        meta = body["metadata"]
        numbers = self._numbers.setdefault(meta["uid"], {})
        highest = max(numbers.values(), default=0)
        if name in numbers and numbers[name] == highest:
            return
        if name in numbers:
            try:
                await self._store.number_revision(object_name(meta["name"], name), highest + 1)
                numbers[name] = highest + 1
                return
            except NotFoundError:
                del numbers[name]  # somebody deleted it just now
        await self._create(body, name, highest + 1)
        numbers[name] = highest + 1

    async def _create(self, body: Mapping[str, Any], name: str, number: int) -> None:
        meta = body["metadata"]
        made = to_object(body, self._contents[meta["uid"], name], number)
        target = made["metadata"]["name"]
        try:
            await self._store.create_revision(made)
            return
        except ConflictError:
            found = await self._store.get_revision(target)
        if owner_of(found) == meta["uid"] and name_of(found.get("data") or {}) == name:
            await self._store.number_revision(target, number)
            return
        # Of an AgentConfig of the same name that is gone, and would be collected soon.
        with contextlib.suppress(NotFoundError):
            await self._store.delete_revision(target)
        await self._store.create_revision(made)

    async def tidy(self, body: Mapping[str, Any], in_use: Iterable[str]) -> None:
        """Delete the oldest objects beyond those that are kept; what cannot be is left."""
        meta, used = body["metadata"], set(in_use)
        numbers = self._numbers.get(meta["uid"], {})
        newest = sorted(numbers, key=lambda name: -numbers[name])
        for name in newest[KEPT:]:
            if name in used:
                continue
            try:
                await self._store.delete_revision(object_name(meta["name"], name))
            except NotFoundError:
                pass
            except ClusterError as error:
                self._log.warning("old revision not deleted", config=meta["name"], error=str(error))
                return
            del numbers[name]
        self._drop(meta["uid"], used)

    def _drop(self, uid: str, used: set[str]) -> None:
        for known in (self._contents, self._read):
            for key in [key for key in known if key[0] == uid and key[1] not in used]:
                del known[key]

    def forget(self, uid: str) -> None:
        """An AgentConfig is gone; the cluster deletes its revisions."""
        self._numbers.pop(uid, None)
        self._drop(uid, set())

    async def restore(self, in_use: Iterable[tuple[Mapping[str, Any], Iterable[str]]]) -> None:
        """Make the objects anew that somebody deleted, as far as they are in use.

        Args:
            in_use: AgentConfigs, and the names of their revisions that are.

        Raises:
            ClusterError: The API server could not be asked.
        """
        there = set(await self._store.list_revision_names())
        for body, names in in_use:
            meta = body["metadata"]
            numbers = self._numbers.setdefault(meta["uid"], {})
            for name in [n for n in numbers if object_name(meta["name"], n) not in there]:
                del numbers[name]
            for name in names:
                if name not in numbers and (meta["uid"], name) in self._contents:
                    await self.keep(body, name)
                    self._log.warning("revision made anew", config=meta["name"], revision=name)
