"""The life of the watches' thread, without an API server."""

import asyncio
import copy
import threading
from typing import Any

import kopf
import pytest
from kubernetes.aio.client import Configuration
from outrider_operator.core.ports import Change
from outrider_operator.kube.watch import Kind, Watches
from outrider_operator.metrics import ServerMetrics
from outrider_runtime.metrics import new_registry


async def test_a_stop_that_comes_before_the_watches_began_ends_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = threading.Event()
    begin, request_stop = Watches._thread, Watches._request_stop

    async def operator(*, stop_flag: asyncio.Event, **_: Any) -> None:
        async with asyncio.timeout(30):
            await stop_flag.wait()

    def late(watches: Watches, ended: asyncio.Event) -> None:
        assert asked.wait(10)
        begin(watches, ended)

    def ask(watches: Watches) -> None:
        request_stop(watches)
        asked.set()

    async def nothing() -> None:
        pass

    monkeypatch.setattr(kopf, "operator", operator)
    monkeypatch.setattr(Watches, "_thread", late)
    monkeypatch.setattr(Watches, "_request_stop", ask)
    watches = Watches(Configuration(), lambda _change: None, ServerMetrics(new_registry()))
    running = asyncio.create_task(watches.run(nothing))
    await asyncio.sleep(0)
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=5)
    assert done, "the watches do not end"
    assert running.cancelled()


@pytest.mark.parametrize("kind", ["Agent", "AgentTask", "Node"])
async def test_what_is_handed_over_is_whole_and_kopf_keeps_little_of_it(kind: Kind) -> None:
    seen: dict[str, Any] = {
        "kind": kind,
        "metadata": {
            "name": "a",
            "uid": "1",
            "resourceVersion": "7",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"zone": "west"},
            "finalizers": ["outrider.dev/end-runs"],
            "managedFields": [{"manager": "somebody"}],
        },
        "spec": {"unschedulable": True},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
    whole = copy.deepcopy(seen)
    told: asyncio.Queue[Change] = asyncio.Queue()
    watches = Watches(Configuration(), told.put_nowait, ServerMetrics(new_registry()))
    await watches._handler(kind)(event={"type": "MODIFIED", "object": seen})
    change = await asyncio.wait_for(told.get(), 5)
    assert (change.kind, change.gone) == (kind, False)
    assert change.body["spec"] == whole["spec"]
    assert change.body["status"] == whole["status"]
    assert change.body["metadata"]["labels"] == whole["metadata"]["labels"]
    if kind != "Node":
        assert change.body == whole
    del whole["metadata"]["managedFields"], whole["spec"], whole["status"]
    assert seen == whole
