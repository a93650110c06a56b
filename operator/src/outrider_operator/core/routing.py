"""Which topics a batch goes to, by the data types it names; a batch is never opened for it.

Pure: knows no sink and no broker.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from outrider_proto import limits
from outrider_proto.records import TASK_OUTPUT

#: In a batch's data types: there are others.
AND_OTHERS: Final = 0
#: Combinations of types whose topics are remembered: agents use few.
MAX_REMEMBERED: Final = 4096


class Routes:
    """Topics by data type.

    A batch goes to each topic that one of its types names; so with several topics, a topic may
    hold records of other types as well. Agents are told to keep types apart (`separate`), after
    which that is the exception.

    Args:
        rules: types and their topic; a type may be in several.
        default: topic of all types that no rule names. Output of tasks always goes there too:
            it is where results are read back from.

    Attributes:
        topics: all of them, the default first.
        separate: groups of types that agents keep in batches of their own.
    """

    def __init__(self, rules: Iterable[tuple[Sequence[int], str]], default: str) -> None:
        self._default = default
        by_type: dict[int, list[str]] = {}
        for types, topic in rules:
            for data_type in types:
                topics = by_type.setdefault(data_type, [])
                if topic not in topics:
                    topics.append(topic)
        if TASK_OUTPUT in by_type and default not in by_type[TASK_OUTPUT]:
            by_type[TASK_OUTPUT].insert(0, default)
        self._by_type = {data_type: tuple(topics) for data_type, topics in by_type.items()}
        self._remembered: dict[tuple[int, ...], tuple[str, ...]] = {}
        named = [topic for topics in self._by_type.values() for topic in topics]
        self.topics: tuple[str, ...] = tuple(dict.fromkeys((default, *named)))
        self.separate: tuple[tuple[int, ...], ...] = self._groups()

    def of(self, data_types: Sequence[int]) -> tuple[str, ...]:
        """The topics of a batch that names these types; at least one, each once.

        A batch that does not name all of its types goes everywhere: any may be inside.
        """
        if len(self.topics) == 1:
            return self.topics
        key = tuple(data_types)
        found = self._remembered.get(key)
        if found is None:
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            found = self._remembered[key] = self._find(key)
        return found

    def of_type(self, data_type: int) -> tuple[str, ...]:
        """The topics of one record."""
        return self._by_type.get(data_type, (self._default,))

    def _find(self, data_types: tuple[int, ...]) -> tuple[str, ...]:
        if not data_types or AND_OTHERS in data_types:
            return self.topics
        wanted = {topic for data_type in data_types for topic in self.of_type(data_type)}
        return tuple(topic for topic in self.topics if topic in wanted)

    def _groups(self) -> tuple[tuple[int, ...], ...]:
        """Types with the same topics, other than the default alone, within the wire's bounds."""
        groups: dict[frozenset[str], list[int]] = {}
        for data_type, topics in sorted(self._by_type.items()):
            if topics != (self._default,):
                groups.setdefault(frozenset(topics), []).append(data_type)
        size = limits.BATCH_DATA_TYPES
        pieces = [
            tuple(types[start : start + size])
            for types in groups.values()
            for start in range(0, len(types), size)
        ]
        return tuple(pieces[: limits.DATA_TYPE_GROUPS])
