"""The AgentTask that the flags of `run` and `ping` ask for.

What a flag leaves open is left out, so that the defaults are those of the resource definition.
The API server checks the rest, and says in words what is wrong.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

API_VERSION: Final = "outrider.dev/v1alpha1"
#: A task made by a command is kept for so long after its end unless asked otherwise, seconds:
#: time to look at its full output.
KEPT_SECONDS: Final = 3600
#: As long as the resource definition allows: ten years.
FOR_EVER_SECONDS: Final = 315_360_000
BUILTINS: Final = ("Ping", "Facts", "Restart", "Shutdown")

_AMOUNT: Final = re.compile(r"\d+%?")
_DURATION: Final = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")

Amount = int | str


@dataclass(frozen=True)
class Request:
    """What is asked for; empty and None mean: as the resource definition has it."""

    name: str
    namespace: str
    run: Mapping[str, Any]
    selector: Mapping[str, Any] = field(default_factory=dict)
    nodes: Sequence[str] = ()
    sample: Amount | None = None
    max_concurrent: Amount | None = None
    max_failures: Amount | None = None
    waves: Sequence[Amount] = ()
    timeout: int | None = None
    deadline: int | None = None
    retries: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    host: bool = False
    preview_bytes: int | None = None
    keep: bool = False


def amount(text: str) -> Amount:
    """A number of nodes, or a percentage such as "25%".

    Raises:
        ValueError: It is neither.
    """
    if not _AMOUNT.fullmatch(text):
        raise ValueError(f"{text!r} is neither a number of nodes nor a percentage such as 25%")
    return text if text.endswith("%") else int(text)


def duration(text: str) -> int:
    """Seconds from "90", "90s", "5m" or "1h30m".

    Raises:
        ValueError: It is none of these, or nothing.
    """
    found = _DURATION.fullmatch(text)
    if not found or not any(found.groups()):
        raise ValueError(f"{text!r} is no time: write 90, 90s, 5m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    total = 3600 * hours + 60 * minutes + seconds
    if total < 1:
        raise ValueError(f"{text!r} is no time: at least one second")
    return total


def script(source: str, interpreter: str = "") -> dict[str, Any]:
    """spec.run of a script: its first line names the interpreter unless it is given.

    Raises:
        ValueError: The first line or the given interpreter cannot be read.
    """
    first = source.partition("\n")[0]
    if not interpreter and first.startswith("#!"):
        interpreter = first[2:].strip()
    made: dict[str, Any] = {"source": source}
    words = shlex.split(interpreter)
    if words:
        made["interpreter"] = words
    return {"script": made}


def task(request: Request) -> dict[str, Any]:
    """The AgentTask."""
    spec: dict[str, Any] = {"run": dict(request.run), "target": _target(request)}
    optional: dict[str, Any] = {
        "rollout": _rollout(request),
        "timeoutSeconds": request.timeout,
        "activeDeadlineSeconds": request.deadline,
        "retries": request.retries,
        "env": dict(request.env),
        "user": request.user,
        "where": "Host" if request.host else None,
        "output": {} if request.preview_bytes is None else {"previewBytes": request.preview_bytes},
    }
    spec.update({key: value for key, value in optional.items() if value not in (None, "", {})})
    spec["ttlSecondsAfterFinished"] = FOR_EVER_SECONDS if request.keep else KEPT_SECONDS
    return {
        "apiVersion": API_VERSION,
        "kind": "AgentTask",
        "metadata": {
            "name": request.name,
            "namespace": request.namespace,
            "labels": {"app.kubernetes.io/created-by": "kubectl-outrider"},
        },
        "spec": spec,
    }


def ping(name: str, namespace: str, target: Request, seconds: int) -> dict[str, Any]:
    """A Ping of all nodes at once that goes on whatever fails.

    Args:
        name: Of the task.
        namespace: Where it is made.
        target: Its selector, nodes and sample are used.
        seconds: How long it may take.
    """
    return task(
        Request(
            name=name,
            namespace=namespace,
            run={"builtin": "Ping"},
            selector=target.selector,
            nodes=target.nodes,
            sample=target.sample,
            max_concurrent="100%",
            max_failures="100%",
            waves=["100%"],
            timeout=seconds,
            deadline=seconds,
            keep=target.keep,
        )
    )


def _target(request: Request) -> dict[str, Any]:
    target: dict[str, Any] = {}
    if request.selector:
        target["nodeSelector"] = dict(request.selector)
    if request.nodes:
        target["nodeNames"] = list(dict.fromkeys(request.nodes))
    if request.sample is not None:
        target["sample"] = request.sample
    return target


def _rollout(request: Request) -> dict[str, Any]:
    rollout: dict[str, Any] = {}
    if request.max_concurrent is not None:
        rollout["maxConcurrent"] = request.max_concurrent
    if request.max_failures is not None:
        rollout["maxFailures"] = request.max_failures
    if request.waves:
        rollout["waves"] = list(request.waves)
    elif request.max_concurrent is not None:
        # Who says how many at a time means so many, from the first node on.
        rollout["waves"] = ["100%"]
    return rollout
