"""The revisions of an AgentConfig, in the forms that -o names."""

from collections.abc import Sequence

from outrider_cli.core.configs import Config, Revision, asked_for, state
from outrider_cli.core.render import structured
from outrider_cli.core.text import age, columns, time_of


def history(config: Config, revisions: Sequence[Revision], form: str, now: float) -> str:
    """The revisions of an AgentConfig, the oldest first.

    Args:
        config: the AgentConfig.
        revisions: its revisions.
        form: table, yaml, json or name.
        now: seconds since the Unix epoch.
    """
    if form == "name":
        return "".join(f"{revision.name}\n" for revision in revisions)
    if form in ("yaml", "json"):
        value = [
            {
                "revision": r.name,
                "time": r.time,
                "result": r.result,
                "state": state(r, config),
                "generation": r.generation,
                "spec": None if r.spec is None else dict(r.spec),
            }
            for r in revisions
        ]
        return structured(value, form)
    return columns(
        ["REVISION", "AGE", "RESULT", "STATE"],
        [[r.name, _age(r.time, now), r.result, _state(r, config)] for r in revisions],
    )


def _state(revision: Revision, config: Config) -> str:
    parts = [state(revision, config), "" if revision.spec is not None else "content not kept"]
    return ", ".join(part for part in parts if part)


def _age(time: str, now: float) -> str:
    since = time_of(time)
    return "" if since is None else age(now - since)


def content(revision: Revision, form: str) -> str:
    """What a revision asks for, as JSON or else YAML."""
    return structured(asked_for(revision.spec or {}), "json" if form == "json" else "yaml")
