"""AgentConfigs, their revisions and agents' reports: between objects and what is decided on.

A revision is the spec without `rollout`, as canonical JSON, named by its hash; the selector and the
priority are in it. Pure: reads and writes nothing.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec
from outrider_proto import limits
from outrider_proto.effective import EffectiveError
from outrider_proto.merging import Asked, read
from outrider_proto.v1 import agent_pb2 as pb

from outrider_operator.core.config_plan import PluginView, Report, Revision
from outrider_operator.core.config_rollout import Plan
from outrider_operator.core.model import LabelSelector
from outrider_operator.core.slices import API_VERSION

KIND: Final = "AgentConfig"
#: On each ControllerRevision: the name of the AgentConfig.
CONFIG_LABEL: Final = "outrider.dev/agentconfig"
#: On an AgentConfig: another value has the same revision tried again.
RETRY: Final = "outrider.dev/retry"
#: Characters of a revision's name, and most of the annotation that are looked at.
NAME_LENGTH: Final = 10
ATTEMPT_LENGTH: Final = 256
OPERATORS: Final = frozenset({"In", "NotIn", "Exists", "DoesNotExist"})

Content = Mapping[str, Any]
"""What a revision asks for: a spec without `rollout`."""


def content_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a spec that a revision keeps."""
    return {key: value for key, value in spec.items() if key != "rollout"}


def name_of(content: Content) -> str:
    """The name of a revision: the first hex digits of the hash of its content."""
    text = msgspec.json.encode(content, order="sorted")
    return hashlib.sha256(text).hexdigest()[:NAME_LENGTH]


def revision_of(config: str, content: Content) -> Revision:
    """A revision as it is decided on.

    Args:
        config: name of the AgentConfig.
        content: what it asks for.

    Raises:
        EffectiveError: No agent could use it; the text names the field.
    """
    asked = read(config, content)
    try:
        selector = msgspec.convert(content.get("selector") or {}, LabelSelector)
    except msgspec.ValidationError as error:
        raise EffectiveError(f"spec.selector: {error}") from None
    for requirement in selector.match_expressions:
        if requirement.operator not in OPERATORS:
            raise EffectiveError(f"spec.selector: unknown operator {requirement.operator!r}")
    return Revision(name_of(content), asked, selector)


def lost_revision(config: str, name: str, selector: LabelSelector) -> Revision:
    """In the place of a revision whose object is gone.

    Its nodes are taken to be those of `selector`, and left as they are.
    """
    text = f"revision {name} of AgentConfig {config} is gone: somebody deleted its object"
    return Revision(name, Asked(config, 0, {}), selector, lost=text)


def plan_of(spec: Mapping[str, Any]) -> Plan:
    """How a change is to be made."""
    rollout = spec.get("rollout") or {}
    canary = rollout.get("canary") or {}
    usual = Plan()
    return Plan(
        max_unavailable=rollout.get("maxUnavailable", usual.max_unavailable),
        canary_nodes=canary.get("nodes", usual.canary_nodes),
        soak_seconds=canary.get("soakSeconds", usual.soak_seconds),
        rollback=rollout.get("onFailure", "Rollback") == "Rollback",
        progress_seconds=rollout.get("progressDeadlineSeconds", usual.progress_seconds),
    )


def attempt_of(body: Mapping[str, Any]) -> str:
    """What tells a second try from the first."""
    annotations = body["metadata"].get("annotations") or {}
    return str(annotations.get(RETRY, ""))[:ATTEMPT_LENGTH]


def to_object(body: Mapping[str, Any], content: Content, number: int) -> dict[str, Any]:
    """A revision as a ControllerRevision, without its namespace.

    Args:
        body: the AgentConfig.
        content: what the revision asks for.
        number: the higher one was asked for later.
    """
    meta = body["metadata"]
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": object_name(meta["name"], name_of(content)),
            "labels": {CONFIG_LABEL: meta["name"]},
            "ownerReferences": [{**owner, "controller": True}],
        },
        "data": dict(content),
        "revision": number,
    }


def object_name(config: str, revision: str) -> str:
    """Name of a revision's ControllerRevision."""
    return f"{config}-{revision}"


def owner_of(revision: Mapping[str, Any]) -> str:
    """UID of the AgentConfig that a ControllerRevision is of; empty: of none."""
    for owner in revision["metadata"].get("ownerReferences") or []:
        if owner.get("kind") == KIND:
            return str(owner.get("uid", ""))
    return ""


def report_of(told: pb.ConfigReport, before: Report | None, now: float) -> Report:
    """A report of an agent; one that stands as it did before keeps its time."""
    shown = told.plugins[: limits.PLUGINS]
    made = Report(
        hash=told.hash,
        tried=told.tried_hash,
        applied=told.phase == pb.CONFIG_PHASE_APPLIED,
        refused=told.phase == pb.CONFIG_PHASE_FAILED,
        message=told.message[: limits.CONFIG_MESSAGE_BYTES],
        plugins={
            plugin.name: PluginView(
                healthy=plugin.healthy,
                failed=plugin.phase == pb.PLUGIN_PHASE_FAILED,
                reason=(plugin.message or plugin.reason)[: limits.CONFIG_MESSAGE_BYTES],
            )
            for plugin in shown
        },
        at=now,
    )
    # One that refuses again was asked again: that is news.
    if before is not None and not made.refused and _stands(before) == _stands(made):
        return replace(made, at=before.at)
    return made


def _stands(report: Report) -> tuple[Any, ...]:
    well = all(plugin.healthy for plugin in report.plugins.values())
    return (report.hash, report.tried, report.applied, report.refused, well)
