"""The life of the watches' thread, without an API server."""

import asyncio
import threading
from typing import Any

import kopf
import pytest
from kubernetes.aio.client import Configuration
from outrider_operator.kube.watch import Watches
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
