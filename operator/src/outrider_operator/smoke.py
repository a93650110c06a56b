"""Runs a Ping on all nodes through the whole path and tells the result: what `helm test` calls.

    python -m outrider_operator.smoke [--namespace NAMESPACE] [--timeout SECONDS]

Without flags the namespace is $POD_NAMESPACE and the time $OUTRIDER_SMOKE_TIMEOUT_SECONDS. Speaks
to the API server only, as a user would; takes away the task it makes.
"""

import argparse
import asyncio
import contextlib
import os
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Any

from outrider_runtime.settings import SettingsError

from outrider_operator.core.model import TASK_FINAL, TaskPhase
from outrider_operator.core.ports import ClusterError, ClusterUnavailableError, Object
from outrider_operator.core.slices import API_VERSION, TASK_LABEL
from outrider_operator.kube.client import KubeClient, configuration, path

POLL_SECONDS = 0.5
#: What the server needs to end a task whose time is over, seconds.
END_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the Ping succeeded on every node, 1 when not, 2 for wrong settings."""
    parser = argparse.ArgumentParser(prog="python -m outrider_operator.smoke", description=__doc__)
    parser.add_argument(
        "--namespace",
        default=os.environ.get("POD_NAMESPACE", "default"),
        help="where the AgentTask is made; $POD_NAMESPACE",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        # argparse reads a default that is a text as it reads the flag.
        default=os.environ.get("OUTRIDER_SMOKE_TIMEOUT_SECONDS", "60"),
        help="how long it may take, seconds; $OUTRIDER_SMOKE_TIMEOUT_SECONDS, else 60",
    )
    parser.add_argument("--kubeconfig", default="", help="empty: the Pod's ServiceAccount")
    arguments = parser.parse_args(argv)
    try:
        return asyncio.run(_run(arguments.kubeconfig, arguments.namespace, arguments.timeout))
    except SettingsError as error:
        return _say(f"error: {error}", 2)
    except ClusterError as error:
        return _say(f"error: {error}", 1)


async def _run(kubeconfig: str, namespace: str, timeout: float) -> int:
    kube = KubeClient(await configuration(kubeconfig))
    try:
        return await _ping(kube, namespace, timeout)
    finally:
        await kube.close()


async def _ping(kube: KubeClient, namespace: str, timeout: float) -> int:
    group = ("apis", "outrider.dev", "v1alpha1", "namespaces", namespace)
    name = f"smoke-{secrets.token_hex(4)}"
    body = {
        "apiVersion": API_VERSION,
        "kind": "AgentTask",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "run": {"builtin": "Ping"},
            "rollout": {"maxConcurrent": "100%", "maxFailures": "100%", "waves": ["100%"]},
            "timeoutSeconds": 10,
            "activeDeadlineSeconds": max(1, int(timeout)),
        },
    }
    target = path(*group, "agenttasks", name)
    await kube.request("POST", path(*group, "agenttasks"), body)
    _say(f"AgentTask {namespace}/{name}: Ping on all nodes")
    try:
        status = await _wait(kube, target, timeout)
        reports = await kube.read_all(
            path(*group, "agenttaskreports", labelSelector=f"{TASK_LABEL}={name}")
        )
        _show([row for report in reports for row in report.get("nodes", [])])
    finally:
        with contextlib.suppress(ClusterError):
            await kube.request("DELETE", target)
    return _judge(status, timeout)


async def _wait(kube: KubeClient, target: str, timeout: float) -> Object:
    """The status of the task once it has ended, or when the time is over."""
    deadline = time.monotonic() + timeout + END_SECONDS
    status: Object = {}
    while time.monotonic() < deadline:
        try:
            status = (await kube.request("GET", target)).get("status") or {}
        except ClusterUnavailableError as error:
            _say(f"waiting: {error}")
        if status.get("phase") in TASK_FINAL:
            return status
        await asyncio.sleep(POLL_SECONDS)
    return status


def _show(rows: list[dict[str, Any]]) -> None:
    for row in sorted(rows, key=lambda row: str(row["node"])):
        words = [row["phase"], row.get("reason", ""), row.get("message", "")]
        _say(f"  {row['node']}: {' '.join(word for word in words if word)}")


def _judge(status: Object, timeout: float) -> int:
    phase, counts = status.get("phase", "not begun"), status.get("counts", {})
    told = f"{counts.get('succeeded', 0)} of {counts.get('targeted', 0)} nodes answered"
    if phase == TaskPhase.SUCCEEDED:
        return _say(f"Succeeded: {told}", 0)
    if phase in TASK_FINAL:
        return _say(f"{phase}: {status.get('reason', '')}: {told}", 1)
    return _say(
        f"not ended after {timeout:g} s ({phase}): {told}; "
        "see the logs of the server that leads and `kubectl get agents`",
        1,
    )


def _say(text: str, code: int = 0) -> int:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
