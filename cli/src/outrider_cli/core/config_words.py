"""The words after `config`: a node's name may stand where an action does."""

from collections.abc import Sequence
from typing import Final

ACTIONS: Final = ("node", "history", "rollback", "retry", "status")
#: Flags before it that take a word of their own.
_VALUED: Final = frozenset(
    {"--kubeconfig", "--context", "-n", "--namespace", "--request-timeout"}
    | {"-o", "--output", "--server-namespace"}
)


def arranged(words: Sequence[str]) -> list[str]:
    """The words with the action that is meant: `config NODE` is `config node NODE`.

    `config node/NAME` is for nodes that are called as an action is. `--watch=false` becomes
    `--no-watch`.
    """
    made = [{"--watch=false": "--no-watch", "--watch=true": "--watch"}.get(w, w) for w in words]
    command = _next(made, 0)
    if command is None or made[command] != "config":
        return list(words)
    action = _next(made, command + 1)
    if action is not None and made[action] not in ACTIONS:
        made.insert(command + 1, "node")
    return made


def _next(words: Sequence[str], place: int) -> int | None:
    """Where the next word stands that is neither a flag nor a flag's value."""
    while place < len(words):
        if not words[place].startswith("-"):
            return place
        place += 2 if words[place] in _VALUED else 1
    return None
