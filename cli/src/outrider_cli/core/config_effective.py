"""What a node is to run, and whether its agent does: made as the leader makes it.

The same code merges here and there, so that a hash tells whether both mean the same. Changes
nothing; what cannot be known is said rather than guessed.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from outrider_proto.effective import EffectiveError, pack
from outrider_proto.merging import NAMED, Asked, Conflict, Path, merge, read

from outrider_cli.core.config_diff import unified
from outrider_cli.core.config_report import Part, Report, short

#: Combinations of kept revisions that are tried to find out what an agent runs.
TRIED: Final = 2000


@dataclass(frozen=True)
class Value:
    """One value of a configuration.

    Attributes:
        path: where it stands; a plug-in or data set is one value.
        value: as JSON has it.
        origin: the revision it comes from.
        priority: of that.
        unheard: AgentConfigs of the same priority that ask for something else.
    """

    path: Path
    value: Any
    origin: Part
    priority: int
    unheard: Sequence[str] = ()


@dataclass(frozen=True)
class Wanted:
    """A configuration, and where it comes from.

    Attributes:
        content: as JSON has it.
        left_out: items beyond the bound of their list.
        problem: why it could not be made; the content is then empty.
    """

    parts: tuple[Part, ...]
    content: Mapping[str, Any]
    hash: str
    values: Sequence[Value] = ()
    conflicts: Sequence[Conflict] = ()
    left_out: Sequence[Path] = ()
    problem: str = ""


def wanted(parts: Iterable[Part], specs: Mapping[Part, Mapping[str, Any]]) -> Wanted:
    """What these revisions make together.

    Raises:
        EffectiveError: One of them cannot be read by this version of the command.
    """
    chosen = tuple(sorted(parts))
    asked = {name: read(name, specs[name, revision]) for name, revision in chosen}
    merged = merge(asked.values())
    problem = ""
    try:
        packed = pack(merged.effective)
    except EffectiveError as error:
        problem, packed = str(error), pack(merge(()).effective)
    content = json.loads(packed.content)
    if problem:
        return Wanted(chosen, content, packed.hash, problem=problem)
    unheard = {conflict.path: conflict.unheard for conflict in merged.conflicts}
    revisions = dict(chosen)
    values = [
        Value(
            path,
            _at(content, path),
            (name, revisions[name]),
            asked[name].priority,
            unheard.get(path, ()),
        )
        for path, name in merged.origins.items()
    ]
    return Wanted(chosen, content, packed.hash, values, merged.conflicts, merged.left_out)


def _at(content: Mapping[str, Any], path: Path) -> Any:
    if path[0] in NAMED:
        return next(item for item in content[path[0]] if item["name"] == path[1])
    found: Any = content
    for step in path:
        found = found[step]
    return found


def runs(report: Report, desired: Wanted) -> bool:
    """Whether the agent runs what it is to; one that never had any need not be told nothing."""
    if not report.hash:
        return not desired.content
    return report.hash == desired.hash


def standing(report: Report, desired: Wanted) -> str:
    """How the agent stands to what it is to run: a sentence."""
    if not report.known or (not report.phase and not report.hash):
        return "its agent never reported a configuration"
    same = runs(report, desired)
    if report.phase == "Failed":
        kept = "what it ran before stays in force" if report.hash else "it runs its own settings"
        return f"its agent refused the configuration, {kept}: {report.message or 'no reason given'}"
    if report.phase == "Applying":
        return "its agent is applying the configuration"
    if same:
        return f"its agent runs it (hash {short(desired.hash)})"
    return (
        f"its agent runs {short(report.hash) or 'nothing'}, and is to run {short(desired.hash)}: "
        "it was not told yet, has not answered, or what it reported is not written down yet"
    )


def name_of(parts: Sequence[Part]) -> str:
    """The revisions of a configuration as one text."""
    return ", ".join(f"{name}@{revision}" for name, revision in parts) or "nothing"


@dataclass
class _Search:
    """Revisions by AgentConfig, the newest first, and what each asks for."""

    known: Mapping[str, Sequence[str]]
    specs: Mapping[Part, Mapping[str, Any]]
    asked: dict[Part, Asked | None] = field(default_factory=dict)

    def hash(self, parts: tuple[Part, ...]) -> str:
        """The hash of what they make; "" if they make nothing."""
        for part in parts:
            if part not in self.asked:
                try:
                    self.asked[part] = read(part[0], self.specs[part])
                except EffectiveError:
                    self.asked[part] = None
        found = [self.asked[part] for part in parts]
        try:
            return pack(merge(one for one in found if one).effective).hash if all(found) else ""
        except EffectiveError:
            return ""

    def near(self, parts: tuple[Part, ...]) -> Iterator[tuple[Part, ...]]:
        """Combinations, those that differ least from the given ones first."""
        now = dict(parts)
        for changed in range(len(self.known) + 1):
            for names in itertools.combinations(self.known, changed):
                others = [[r for r in ("", *self.known[n]) if r != now.get(n, "")] for n in names]
                for choice in itertools.product(*others):
                    made = {**now, **dict(zip(names, choice, strict=True))}
                    yield tuple(sorted((n, r) for n, r in made.items() if r))


def found_by_hash(
    digest: str,
    desired: Wanted,
    known: Mapping[str, Sequence[str]],
    specs: Mapping[Part, Mapping[str, Any]],
) -> Wanted | None:
    """The configuration with this hash, from kept revisions; None if those tried do not make it.

    Args:
        digest: of what an agent runs.
        desired: what it is to run: what it runs most often differs by one revision.
        known: kept revisions by AgentConfig, the newest first.
        specs: what each asks for.
    """
    search = _Search(known, specs)
    for parts in itertools.islice(search.near(desired.parts), TRIED):
        if search.hash(parts) == digest:
            return wanted(parts, specs)
    return None


def difference(node: str, running: Wanted, desired: Wanted) -> str:
    """A unified diff from what the agent runs to what it is to run; "" if there is none."""
    return unified(
        running.content,
        desired.content,
        f"{node} runs {short(running.hash)} ({name_of(running.parts)})",
        f"{node} is to run {short(desired.hash)} ({name_of(desired.parts)})",
    )
