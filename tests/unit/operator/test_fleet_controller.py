"""What the leader's centre does again, and how soon, when the API server refuses."""

import pytest
from fakes.cluster import MemoryCluster
from fakes.configs import MemoryConfigs
from outrider_operator.core.ports import ClusterUnavailableError, ConflictError, NotFoundError
from outrider_operator.fleet.controller import Controller
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import ServerSettings
from prometheus_client import CollectorRegistry

PING = {"run": {"builtin": "Ping"}}
TRIES = 20


@pytest.mark.parametrize("refusal", [NotFoundError, ConflictError, ClusterUnavailableError])
async def test_what_is_refused_again_and_again_is_tried_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch, refusal: type[Exception]
) -> None:
    cluster = MemoryCluster()
    uid = cluster.add_task("t", PING)["metadata"]["uid"]
    controller = Controller(
        cluster, MemoryConfigs(), ServerSettings(), ServerMetrics(CollectorRegistry())
    )
    await controller.load()

    def fault(request: str) -> None:
        if request in {"create_report", "write_status", "set_finalizer"}:
            raise refusal("as the test wants it")

    cluster.fault = fault
    waits: list[float] = []
    monkeypatch.setattr(controller._queue, "add", lambda key, seconds=0.0: waits.append(seconds))
    for _ in range(TRIES):
        await controller._look_at(uid)
    assert len(waits) == TRIES
    assert max(waits[:1]) <= 1.1
    assert max(waits) > 5, "the waits do not grow"
    cluster.fault = lambda _request: None
    await controller._look_at(uid)
    assert cluster.task("t")["status"]["phase"], "it was given up"


async def test_a_task_that_is_gone_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = MemoryCluster()
    uid = cluster.add_task("t", PING)["metadata"]["uid"]
    controller = Controller(
        cluster, MemoryConfigs(), ServerSettings(), ServerMetrics(CollectorRegistry())
    )
    await controller.load()
    cluster.delete("t")
    waits: list[float] = []
    monkeypatch.setattr(controller._queue, "add", lambda key, seconds=0.0: waits.append(seconds))
    await controller._look_at(uid)
    assert waits == []
