"""Merges what several AgentConfigs ask of an agent, field by field, the highest priority first.

Pure and total: what was accepted by `read` always merges, in whatever order it comes. The leader
and the command line share it. Knows neither nodes' objects nor how a change reaches an agent.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import msgspec

from outrider_proto import limits
from outrider_proto.effective import Effective, EffectiveError, without_empty

Path = tuple[str, ...]
"""Where a value stands: ("collectors", "host", "enabled"), or ("plugins", "fim") for all of it."""

#: Lists whose items are merged by name, each as a whole.
NAMED: Final = ("plugins", "datasets")
#: The rest of a spec that is merged; what else is there says for whom and how.
FIELDS: Final = ("collectors", "listeners", "agent")
#: Most items of each named list.
MOST: Final = {"plugins": limits.PLUGINS, "datasets": 64}

_UNITS: Final = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    **{unit: Decimal(1000) ** n for n, unit in enumerate(("k", "M", "G", "T", "P", "E"), 1)},
    **{unit + "i": Decimal(1024) ** n for n, unit in enumerate("KMGTPE", 1)},
}


_QUANTITY: Final = re.compile(
    r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([eE][+-]?\d{1,4})|([numkMGTPE]|[KMGTPE]i)?)", re.ASCII
)
#: Fields that are quantities in a spec: name and scale of the number in a configuration.
_RESOURCES: Final = {"cpu": ("cpuMillis", 1000), "memory": ("memoryBytes", 1)}
_AGENT: Final = {**_RESOURCES, "maxBytesPerSecond": ("maxBytesPerSecond", 1)}


@dataclass(frozen=True)
class Asked:
    """What one AgentConfig asks for.

    Attributes:
        name: of the AgentConfig.
        priority: the higher one is heard; among equals the name that sorts first.
        values: by their paths, as JSON has them.
    """

    name: str
    priority: int
    values: Mapping[Path, Any]


@dataclass(frozen=True)
class Conflict:
    """Several AgentConfigs of one priority ask for different things.

    Attributes:
        path: of the field.
        heard: name of the one that is heard.
        unheard: names of the others, sorted.
    """

    path: Path
    heard: str
    unheard: tuple[str, ...]


@dataclass(frozen=True)
class Merged:
    """What comes of it.

    Attributes:
        effective: the configuration.
        origins: name of the AgentConfig that each value comes from.
        conflicts: what was asked for differently at one priority, by path.
        left_out: items beyond the bound of their list, by path.
    """

    effective: Effective
    origins: Mapping[Path, str]
    conflicts: Sequence[Conflict] = ()
    left_out: Sequence[Path] = ()


@dataclass
class _Value:
    asked: Asked
    value: Any
    unheard: list[str] = field(default_factory=list)


def read(name: str, spec: Mapping[str, Any]) -> Asked:
    """What the spec of an AgentConfig asks for.

    Args:
        name: of the AgentConfig.
        spec: as the API server gives it.

    Raises:
        EffectiveError: A value is not one that an agent could use; the text names it.
    """
    part = {key: spec[key] for key in (*FIELDS, *NAMED) if spec.get(key)}
    if "plugins" in part:
        part["plugins"] = [_plugin(plugin) for plugin in part["plugins"]]
    if "agent" in part:
        part["agent"] = _with_numbers(part["agent"], _AGENT, "spec.agent")
    try:
        asked = msgspec.convert(part, Effective)
    except msgspec.ValidationError as error:
        raise EffectiveError(f"spec: {error}") from None
    values: dict[Path, Any] = {}
    for key, content in without_empty(msgspec.to_builtins(asked)).items():
        if key in NAMED:
            values.update({(key, item["name"]): item for item in content})
        else:
            values.update(_flat((key,), content))
    priority = spec.get("priority")
    return Asked(name, 100 if priority is None else int(priority), values)


def merge(asked: Iterable[Asked]) -> Merged:
    """Merge what several AgentConfigs ask of one agent; their order does not count."""
    found: dict[Path, _Value] = {}
    for one in sorted(asked, key=lambda a: (-a.priority, a.name)):
        for path, value in one.values.items():
            known = found.get(path)
            if known is None:
                found[path] = _Value(one, value)
            elif known.asked.priority == one.priority and known.value != value:
                known.unheard.append(one.name)
    left_out = [path for key in NAMED for path in _beyond(found, key)]
    for path in left_out:
        del found[path]
    return Merged(
        effective=_assemble(found),
        origins={path: value.asked.name for path, value in sorted(found.items())},
        conflicts=[
            Conflict(path, value.asked.name, tuple(sorted(value.unheard)))
            for path, value in sorted(found.items())
            if value.unheard
        ],
        left_out=left_out,
    )


def _beyond(found: Mapping[Path, _Value], key: str) -> list[Path]:
    """Items of a named list that have no place in it: those of the lowest priority."""
    items = [(-v.asked.priority, path) for path, v in found.items() if path[0] == key]
    return sorted(path for _, path in sorted(items)[MOST[key] :])


def _assemble(found: Mapping[Path, _Value]) -> Effective:
    tree: dict[str, Any] = {}
    for path, value in sorted(found.items()):
        if path[0] in NAMED:
            tree.setdefault(path[0], []).append(value.value)
            continue
        place = tree
        for step in path[:-1]:
            place = place.setdefault(step, {})
        place[path[-1]] = value.value
    return msgspec.convert(tree, Effective)


def _flat(path: Path, content: Mapping[str, Any]) -> dict[Path, Any]:
    """The single values of nested objects."""
    values: dict[Path, Any] = {}
    for key, value in content.items():
        here = (*path, key)
        values.update(_flat(here, value) if isinstance(value, dict) else {here: value})
    return values


def _plugin(plugin: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(plugin)
    resources = made.pop("resources", None) or {}
    where = f"spec.plugins[{plugin.get('name')!r}].resources"
    unknown = sorted(set(resources) - set(_RESOURCES))
    if unknown:
        raise EffectiveError(f"{where} has no field {unknown[0]!r}")
    if resources:
        made["resources"] = _with_numbers(resources, _RESOURCES, where)
    return made


def _with_numbers(
    content: Mapping[str, Any], fields: Mapping[str, tuple[str, int]], where: str
) -> dict[str, Any]:
    """An object whose quantities, such as 100m and 64Mi, are numbers."""
    made = dict(content)
    for name, _ in fields.values():
        if name in made and name not in fields:
            raise EffectiveError(f"{where} has no field {name!r}")
    for key, (name, scale) in fields.items():
        if key in content:
            made.pop(key)
            made[name] = int(quantity(content[key], f"{where}.{key}") * scale)
    return made


def quantity(value: object, where: str) -> Decimal:
    """The number of a Kubernetes quantity, such as 100m or 64Mi.

    Raises:
        EffectiveError: It is none.
    """
    words = str(value)
    found = _QUANTITY.fullmatch(words) if len(words) <= 32 else None
    if found is not None and isinstance(value, int | str):
        number = Decimal(found[1] + (found[2] or "")) * _UNITS[found[3] or ""]
        if abs(number) < Decimal(2**63):
            return number
    raise EffectiveError(f"{where}: {words[:40]!r} is no quantity, such as 100m or 64Mi")
