"""The leader's edge to the real API server: Lease, objects, tokens, watches, and its outages."""

from __future__ import annotations

import asyncio
import gc
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from cluster.controlplane import API_SERVER, ControlPlane
from cluster.paths import ROOT
from outrider_operator.core.identity import ReviewUnavailableError
from outrider_operator.core.nodes import facts, slim
from outrider_operator.core.ports import (
    Change,
    ClusterError,
    ClusterUnavailableError,
    ConflictError,
    NotFoundError,
)
from outrider_operator.core.slices import to_object
from outrider_operator.fleet.tasks import parse_task
from outrider_operator.kube.client import KubeClient, configuration, path
from outrider_operator.kube.lease import Candidate
from outrider_operator.kube.objects import GROUP, ClusterStore
from outrider_operator.kube.tokens import reviewer
from outrider_operator.kube.watch import Watches
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import LeaderSettings
from outrider_runtime.settings import SettingsError
from prometheus_client import CollectorRegistry

NAMESPACE = "default"
FAST = LeaderSettings(
    lease_name="test", lease_duration_seconds=4, renew_deadline_seconds=3, retry_period_seconds=1
)


@pytest.fixture(scope="module")
def plane(
    control_plane_programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """One of this module's own: its API server is taken away."""
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        plane.kubectl("apply", "--server-side", "-f", ROOT / "crds")
        plane.kubectl("wait", "--for=condition=Established", "-f", ROOT / "crds", "--timeout=30s")
        yield plane


@pytest.fixture
async def kube(plane) -> AsyncIterator[KubeClient]:
    client = KubeClient(await configuration(str(plane.kubeconfig)), 5.0)
    yield client
    await client.close()


async def until(check: Callable[[], bool], seconds: float = 20.0) -> float:
    """Wait for a condition; returns how long it took, seconds."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.02)
    return time.monotonic() - began


def task_body(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTask",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"run": {"builtin": "Ping"}},
    }


async def make_task(kube: KubeClient) -> dict[str, Any]:
    target = path(*GROUP, "namespaces", NAMESPACE, "agenttasks")
    return await kube.request("POST", target, task_body(f"task-{uuid.uuid4().hex[:8]}"))


# The Lease.


class Leads:
    """Runs one candidate and notes when it leads."""

    def __init__(self, kube: KubeClient, name: str, lease: str) -> None:
        settings = LeaderSettings(
            lease_name=lease,
            lease_duration_seconds=4,
            renew_deadline_seconds=3,
            retry_period_seconds=1,
        )
        self.candidate = Candidate(kube, settings, NAMESPACE, name)
        self.terms: list[int] = []
        self.now = False
        self.task = asyncio.create_task(self.candidate.campaign(self._lead))

    async def _lead(self, term: int) -> None:
        self.terms.append(term)
        self.now = True
        try:
            await asyncio.Event().wait()
        finally:
            self.now = False

    async def stop(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


async def test_one_leads_and_hands_over_within_moments(kube) -> None:
    lease = f"lease-{uuid.uuid4().hex[:8]}"
    first = Leads(kube, "first", lease)
    await until(lambda: first.now)
    second = Leads(kube, "second", lease)
    await asyncio.sleep(2.5)  # longer than a retry: it must not lead while the other does
    assert first.now
    assert not second.now
    await first.stop()
    assert await until(lambda: second.now) < 2.5
    assert second.terms[0] > first.terms[0]
    await second.stop()


async def test_a_leader_that_was_killed_is_followed_when_its_lease_is_over(kube) -> None:
    lease = f"lease-{uuid.uuid4().hex[:8]}"
    first = Candidate(
        kube, FAST.__class__(**{**_fields(FAST), "lease_name": lease}), NAMESPACE, "first"
    )
    assert await first._try()  # it won, and is never heard of again
    second = Leads(kube, "second", lease)
    took = await until(lambda: second.now)
    assert 2.5 < took < 8
    assert second.terms == [2]
    await second.stop()


def _fields(settings: LeaderSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__struct_fields__}


async def test_a_leader_without_api_server_stops_before_another_may_begin(plane) -> None:
    client = KubeClient(await configuration(str(plane.kubeconfig)), 5.0)
    one = Leads(client, "one", f"lease-{uuid.uuid4().hex[:8]}")
    await until(lambda: one.now)
    host = client.api.configuration.host
    client.api.configuration.host = "https://127.0.0.1:1"
    took = await until(lambda: not one.now)
    assert took < 4, "it led longer than its lease lasts"
    client.api.configuration.host = host
    await until(lambda: one.now)
    await one.stop()
    await client.close()


async def test_a_lease_that_is_deleted_begins_a_higher_term(plane, kube) -> None:
    lease = f"lease-{uuid.uuid4().hex[:8]}"
    both = [Leads(kube, name, lease) for name in ("first", "second")]

    def terms() -> list[int]:
        return sorted(term for one in both for term in one.terms)

    def all_read() -> bool:
        # The one that does not lead has read the Lease as well: either may make it anew.
        return {one.candidate._lock._highest for one in both} == {len(terms())}

    for number in (1, 2, 3):
        await until(lambda: len(terms()) >= number and all_read())  # noqa: B023 - awaited
        assert terms() == [*range(1, number + 1)], "a term was begun twice, or left out"
        if number < 3:
            plane.kubectl("delete", "lease", lease)
    await until(lambda: [one.terms[-1] for one in both if one.now] == [3])
    for one in both:
        await one.stop()


# Objects.


async def test_reports_are_fenced_by_their_version(kube) -> None:
    store = ClusterStore(kube, "test")
    body = await make_task(kube)
    report = to_object(parse_task(body), 0, [])
    made = await store.create_report(report)
    with pytest.raises(ConflictError):
        await store.create_report(report)
    report["metadata"]["resourceVersion"] = made["metadata"]["resourceVersion"]
    report["nodes"] = [{"node": "a", "phase": "Pending"}]
    await store.replace_report(report)
    report["nodes"] = [{"node": "a", "phase": "Dispatched"}]
    with pytest.raises(ConflictError):
        await store.replace_report(report)
    (found,) = await store.list_reports(NAMESPACE, body["metadata"]["name"])
    assert found["task"]["uid"] == body["metadata"]["uid"]


async def test_status_and_finalizer_are_fenced_by_uid_and_version(kube) -> None:
    store = ClusterStore(kube, "test")
    body = await make_task(kube)
    changed = await store.write_status(body, {"phase": "Running", "reason": "InProgress"})
    changed = await store.write_status(changed, {"phase": "Suspended"})
    assert changed["status"] == {"phase": "Suspended"}, "fields that are gone are taken away"
    with pytest.raises(ConflictError):
        await store.set_finalizer(body, True)
    changed = await store.set_finalizer(changed, True)
    assert changed["metadata"]["finalizers"] == ["outrider.dev/end-runs"]
    other = {**changed, "metadata": {**changed["metadata"], "uid": "of-an-earlier-task"}}
    with pytest.raises(ConflictError):
        await store.write_status(other, {"phase": "Failed"})
    with pytest.raises(ConflictError):
        await store.delete_task(other)
    changed = await store.set_finalizer(changed, False)
    await store.delete_task(changed)
    with pytest.raises(NotFoundError):
        await store.get_task(NAMESPACE, body["metadata"]["name"])


async def test_a_status_the_definition_refuses_is_a_final_error(kube) -> None:
    body = await make_task(kube)
    with pytest.raises(ClusterError, match="phase") as caught:
        await ClusterStore(kube, "test").write_status(body, {"phase": "Wrong"})
    assert not isinstance(caught.value, ClusterUnavailableError | ConflictError)


async def test_nodes_come_with_labels_and_page_by_page(plane, kube, monkeypatch) -> None:
    monkeypatch.setattr("outrider_operator.kube.client.PAGE", 2)
    for number in range(5):
        plane.make_node(f"paged-{number}", {"number": str(number)})
    found = {n["metadata"]["name"]: n for n in await ClusterStore(kube, "test").list_nodes()}
    assert found["paged-3"]["metadata"]["labels"]["number"] == "3"
    assert facts(found["paged-3"]).state == ""
    assert facts(found["paged-3"]).created > 0
    plane.kubectl("cordon", "paged-3")
    unready = {"conditions": [{"type": "Ready", "status": "Unknown"}]}
    plane.request("PATCH", "/api/v1/nodes/paged-3/status", {"status": unready})
    found = {n["metadata"]["name"]: n for n in await ClusterStore(kube, "test").list_nodes()}
    assert facts(found["paged-3"]).state == "Cordoned,NotReady"
    whole = json.loads(plane.kubectl("get", "node", "paged-3", "-o", "json"))
    assert found["paged-3"]["metadata"] == slim(whole)["metadata"]
    assert facts(found["paged-3"]) == facts(slim(whole))


async def test_events_are_posted_once_and_not_without_end(plane, kube) -> None:
    results: list[str] = []
    store = ClusterStore(kube, "test", results.append)
    body = await make_task(kube)
    for _ in range(3):
        await store.tell(body, "Warning", "Failed", "for the test")
    name = body["metadata"]["name"]
    shown = plane.kubectl("get", "events", "--field-selector", f"involvedObject.name={name}")
    assert shown.count("for the test") == 1
    for number in range(70):
        await store.tell(body, "Normal", "Flood", str(number))
    assert "dropped" in results


async def test_tokens_are_reviewed_for_the_audience(plane, kube) -> None:
    plane.make_service_account(NAMESPACE, "somebody")
    token = plane.token(NAMESPACE, "somebody")
    review = reviewer(kube)
    good = await review(token, "outrider")
    assert good.authenticated
    assert good.username == f"system:serviceaccount:{NAMESPACE}:somebody"
    assert good.audiences == ("outrider",)
    assert not (await review(token, "another")).authenticated
    assert not (await review("rubbish", "outrider")).authenticated


async def test_an_api_server_that_is_not_there_is_told_apart(plane) -> None:
    config = await configuration(str(plane.kubeconfig))
    config.host = "https://127.0.0.1:1"
    client = KubeClient(config, 1.0)
    with pytest.raises(ClusterUnavailableError):
        await client.request("GET", "/version")
    with pytest.raises(ReviewUnavailableError) as caught:
        await reviewer(client)("the-secret-token", "outrider")
    assert "the-secret-token" not in str(caught.value)
    await client.close()


@pytest.mark.parametrize("content", ["", "{", "apiVersion: v1\nkind: Config\n"])
async def test_a_wrong_kubeconfig_names_the_setting(tmp_path, content) -> None:
    file = tmp_path / "kubeconfig"
    if content:
        file.write_text(content)
    with pytest.raises(SettingsError, match=r"kube\.kubeconfig"):
        await configuration(str(file))


# The watches.


class Seen:
    """Watches that run, and what they showed."""

    def __init__(self, watches_of: Callable[[Callable[[Change], None]], Watches]) -> None:
        self.changes: list[Change] = []
        self.restarts = 0
        self.watches = watches_of(self.changes.append)
        self.task = asyncio.create_task(self.watches.run(self._restarted))

    async def _restarted(self) -> None:
        self.restarts += 1

    def has(self, kind: str, name: str, gone: bool = False) -> bool:
        return any(
            c.kind == kind and c.body["metadata"]["name"] == name and c.gone == gone
            for c in self.changes
        )

    async def stop(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


@pytest.fixture
async def seen(plane) -> AsyncIterator[Seen]:
    config = await configuration(str(plane.kubeconfig))
    metrics = ServerMetrics(CollectorRegistry())
    found = Seen(lambda on_change: Watches(config, on_change, metrics))
    yield found
    await found.stop()


async def test_watches_show_what_is_there_what_comes_and_what_goes(plane, kube, seen) -> None:
    before = await make_task(kube)
    plane.make_node("watched", {"a": "b"})
    await until(lambda: seen.has("AgentTask", before["metadata"]["name"]))
    await until(lambda: seen.has("Node", "watched"))
    after = await make_task(kube)
    await until(lambda: seen.has("AgentTask", after["metadata"]["name"]))
    await ClusterStore(kube, "test").delete_task(after)
    await until(lambda: seen.has("AgentTask", after["metadata"]["name"], gone=True))
    assert seen.watches.problem() is None


async def test_watches_outlive_the_api_server(plane, kube, seen) -> None:
    before = await make_task(kube)
    await until(lambda: seen.has("AgentTask", before["metadata"]["name"]))
    await asyncio.to_thread(plane.restart_part, API_SERVER)
    after = await make_task(kube)
    await until(lambda: seen.has("AgentTask", after["metadata"]["name"]), 60)
    assert not seen.task.done()


async def test_blind_watches_are_begun_anew(kube, seen, monkeypatch) -> None:
    body = await make_task(kube)
    await until(lambda: seen.has("AgentTask", body["metadata"]["name"]))
    listed = await ClusterStore(kube, "test").list_tasks()
    await until(lambda: _shown(seen, listed))
    monkeypatch.setattr("outrider_operator.kube.watch.BLIND_SECONDS", 0.0)
    seen.watches.check(listed)
    await asyncio.sleep(0.05)
    seen.watches.check(listed)
    assert seen.restarts == 0, "all was seen: the watches are not blind"
    newer = {**body, "metadata": {**body["metadata"], "resourceVersion": "999999999"}}
    seen.watches.check([newer])
    await asyncio.sleep(0.05)
    seen.watches.check([newer])
    await until(lambda: seen.restarts == 1)
    later = await make_task(kube)
    await until(lambda: seen.has("AgentTask", later["metadata"]["name"]))


def _shown(seen: Seen, listed: list[dict[str, Any]]) -> bool:
    shown = {
        c.body["metadata"]["uid"]: c.body["metadata"].get("resourceVersion") for c in seen.changes
    }
    return all(
        shown.get(item["metadata"]["uid"]) == item["metadata"]["resourceVersion"] for item in listed
    )


async def test_stopping_leaves_no_thread_behind(plane) -> None:
    import threading

    config = await configuration(str(plane.kubeconfig))
    found = Seen(lambda f: Watches(config, f, ServerMetrics(CollectorRegistry())))
    await until(lambda: any(t.name == "watches" for t in threading.enumerate()))
    await found.stop()
    await until(lambda: not any(t.name == "watches" for t in threading.enumerate()), 5)


async def test_stopping_leaves_no_connection_to_an_api_server_that_hangs(plane, seen) -> None:
    body = {"metadata": {"name": f"hangs-{uuid.uuid4().hex[:8]}"}}
    plane.request("POST", "/api/v1/nodes", body)
    await until(lambda: seen.has("Node", body["metadata"]["name"]))
    port = urlsplit(plane.server).port

    def connections() -> int:
        found = psutil.Process().net_connections("tcp")
        return sum(bool(one.raddr) and one.raddr.port == port for one in found)

    assert connections() > 0
    gc.disable()  # it would close what nobody closed
    plane.processes.freeze(API_SERVER)
    try:
        await seen.stop()
        await until(lambda: connections() == 0, 5)
    finally:
        plane.processes.thaw(API_SERVER)
        gc.enable()
