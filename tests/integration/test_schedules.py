"""Schedules with a real API server, and with real servers and an agent.

No test waits for a minute: what is due is decided by the clock the controller is handed, or by a
status that says that the last task was made years ago, as after a long outage.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from cluster.controlplane import ControlPlane
from cluster.programs import Programs
from cluster.supervised import wait_for
from outrider_operator.core.ports import ClusterUnavailableError, ConflictError
from outrider_operator.core.schedule_model import owner_of
from outrider_operator.core.times import seconds, seconds_of
from outrider_operator.fleet.schedules import Schedules
from outrider_operator.kube.client import FencedClient, KubeClient, configuration, path
from outrider_operator.kube.objects import GROUP, ClusterStore
from outrider_operator.kube.schedules import ScheduleObjects
from outrider_operator.metrics import ServerMetrics
from prometheus_client import CollectorRegistry

WAIT = 60.0
TEMPLATE: dict[str, Any] = {"spec": {"run": {"command": ["true"]}, "timeoutSeconds": 60}}
YEARLY = "0 0 1 1 *"


def schedule(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "outrider.dev/v1alpha1",
        "kind": "AgentTaskSchedule",
        "metadata": {"name": name},
        "spec": {"schedule": "*/10 * * * *", "taskTemplate": TEMPLATE, **spec},
    }


class Leader:
    """A leader's schedules, on a clock of the test's own."""

    def __init__(self, kube: KubeClient, namespace: str, now: float) -> None:
        self.now, self.leads, self.namespace = now, True, namespace
        fenced = FencedClient(kube, lambda: self.leads)
        self.store = ScheduleObjects(fenced, ClusterStore(fenced, "test"))
        metrics = ServerMetrics(CollectorRegistry())
        self.schedules = Schedules(self.store, metrics, lambda: self.now)

    async def look(self, uid: str) -> None:
        await self.schedules.resync()
        self.schedules._entries[uid].dirty = True
        await self.schedules._look_at(uid)

    async def tasks(self, body: dict[str, Any]) -> dict[str, dict[str, Any]]:
        found = await self.store.list_tasks_of(body)
        return {task["metadata"]["name"]: task for task in found}


@pytest.fixture
async def kube(control_plane: ControlPlane) -> AsyncIterator[KubeClient]:
    client = KubeClient(await configuration(str(control_plane.kubeconfig)), 10.0)
    yield client
    await client.close()


async def make(kube: KubeClient, namespace: str, body: dict[str, Any]) -> dict[str, Any]:
    return await kube.request(
        "POST", path(*GROUP, "namespaces", namespace, "agenttaskschedules"), body
    )


async def test_one_task_for_a_due_time_whoever_leads(control_plane, kube, namespace) -> None:
    body = await make(kube, namespace, schedule("each"))
    uid = body["metadata"]["uid"]
    now = (time.time() // 600 + 1) * 600 + 0.5
    leaders = [Leader(kube, namespace, now) for _ in range(3)]
    # All at once, as if two did not know that they lead no longer.
    await asyncio.gather(*(leader.look(uid) for leader in leaders))
    await asyncio.gather(*(leader.look(uid) for leader in leaders))
    name = f"each-{int(now) // 60}"
    tasks = await leaders[0].tasks(body)
    assert list(tasks) == [name]
    assert owner_of(tasks[name]) == uid
    assert tasks[name]["spec"]["timeoutSeconds"] == 60
    found = await leaders[0].store.get_schedule(namespace, "each")
    assert found["status"]["lastScheduleTime"] == seconds(now)
    assert found["status"]["active"][0]["uid"] == tasks[name]["metadata"]["uid"]
    (condition,) = found["status"]["conditions"]
    assert (condition["type"], condition["status"]) == ("Ready", "True")
    events = control_plane.kubectl("-n", namespace, "get", "events")
    assert events.count(f"created task {name}") == 1


async def test_a_leader_whose_time_is_over_makes_and_writes_nothing(kube, namespace) -> None:
    body = await make(kube, namespace, schedule("fenced"))
    uid, now = body["metadata"]["uid"], (time.time() // 600 + 1) * 600.0
    old = Leader(kube, namespace, now)
    await old.schedules.resync()
    old.leads = False
    await old.look(uid)
    assert await old.tasks(body) == {}
    with pytest.raises(ClusterUnavailableError, match="leads no longer"):
        await old.store.create_task({"metadata": {"namespace": namespace}})
    # And where it did not notice: its status is one of an earlier version.
    new = Leader(kube, namespace, now + 600)
    await new.look(uid)
    with pytest.raises(ConflictError):
        await new.store.write_schedule_status(body, {"lastScheduleTime": seconds(now)})
    found = await new.store.get_schedule(namespace, "fenced")
    assert seconds_of(found["status"]["lastScheduleTime"]) == now + 600


async def test_replaced_missed_and_kept_tasks(control_plane, kube, namespace) -> None:
    spec = {"concurrencyPolicy": "Replace", "successfulTasksHistoryLimit": 1}
    body = await make(kube, namespace, schedule("life", **spec))
    uid, begin = body["metadata"]["uid"], (time.time() // 600 + 1) * 600.0
    leader = Leader(kube, namespace, begin)
    await leader.look(uid)
    leader.now = begin + 2400
    await leader.look(uid)
    second = f"life-{int(leader.now) // 60}"
    tasks = await leader.tasks(body)
    assert list(tasks) == [second], "the first was replaced"
    for _ in range(2):
        (name,) = [name for name, task in tasks.items() if "status" not in task]
        done = {"phase": "Succeeded", "completionTime": seconds(leader.now + 5)}
        target = path(*GROUP, "namespaces", namespace, "agenttasks", name)
        await kube.merge_patch(target + "/status", {"status": done})
        leader.now += 600
        await leader.look(uid)
        tasks = await leader.tasks(body)
    assert len(tasks) == 2, "one that succeeded, one that is active"
    status = (await leader.store.get_schedule(namespace, "life"))["status"]
    assert seconds_of(status["lastMissedTime"]) == begin + 1800
    assert status["activeCount"] == 1
    told = control_plane.kubectl("-n", namespace, "get", "events", "-o", "json")
    reasons = {item["reason"] for item in json.loads(told)["items"]}
    assert {"SuccessfulCreate", "SuccessfulDelete", "MissSchedule", "SawCompletedTask"} <= reasons


async def test_what_the_definition_cannot_tell_is_a_condition(
    control_plane, kube, namespace
) -> None:
    body = await make(kube, namespace, schedule("wrong", schedule="30-10 * * * *"))
    leader = Leader(kube, namespace, time.time())
    await leader.look(body["metadata"]["uid"])
    wide = control_plane.kubectl("-n", namespace, "get", "ats", "wrong", "-o", "wide")
    assert "UnparseableSchedule" in wide
    described = control_plane.kubectl("-n", namespace, "describe", "ats", "wrong")
    assert "spec.schedule: bad minute in '30-10 * * * *'" in described
    # A template that a task's own rules refuse only together, as a webhook's or a quota would.
    labels = {"metadata": {"labels": {"a": "not a label"}}, **TEMPLATE}
    body = await make(kube, namespace, schedule("refused", taskTemplate=labels))
    leader.now = (time.time() // 600 + 1) * 600.0
    await leader.look(body["metadata"]["uid"])
    status = (await leader.store.get_schedule(namespace, "refused"))["status"]
    (ready,) = status["conditions"]
    assert (ready["status"], ready["reason"]) == ("False", "FailedCreate")
    assert "metadata.labels" in ready["message"]


# Real servers and an agent.


@pytest.fixture(scope="module")
def fleet(
    control_plane_programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Programs]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        programs = Programs(plane)
        programs.install()
        for name in ("server-0", "server-1"):
            programs.server(name)
        for server in programs.servers.values():
            programs.start(server)
        programs.start(programs.agent("alpha"), ready=False)
        programs.wait_agents_ready(1)
        yield programs


def read(fleet: Programs, kind: str, name: str) -> dict[str, Any]:
    text = fleet.plane.kubectl("get", kind, name, "-o", "json", "--ignore-not-found")
    return dict(json.loads(text)) if text else {}


def tasks_of(fleet: Programs, name: str) -> list[dict[str, Any]]:
    label = f"outrider.dev/schedule={name}"
    found: list[dict[str, Any]] = json.loads(
        fleet.plane.kubectl("get", "at", "-l", label, "-o", "json")
    )["items"]
    return found


def long_ago(fleet: Programs, name: str, **spec: Any) -> None:
    """A schedule that is due once a year, suspended, whose last task was made two years ago."""
    body = schedule(name, schedule=YEARLY, suspend=True, **spec)
    fleet.plane.kubectl("apply", "-f", "-", stdin=json.dumps(body))
    was = {"status": {"lastScheduleTime": f"{time.gmtime().tm_year - 2}-06-01T00:00:00Z"}}
    patch = ("--subresource=status", "--type=merge", "-p", json.dumps(was))
    fleet.plane.kubectl("patch", "ats", name, *patch)


def resume(fleet: Programs, name: str) -> None:
    fleet.plane.kubectl("patch", "ats", name, "--type=merge", "-p", '{"spec": {"suspend": false}}')


def holder(fleet: Programs) -> str:
    leases = fleet.plane.kubectl("-n", "outrider", "get", "lease", "-o", "json")
    return str(json.loads(leases)["items"][0]["spec"]["holderIdentity"]).partition("_")[0]


def test_a_task_that_was_missed_runs_on_the_node_and_is_told(fleet) -> None:
    name = f"yearly-{uuid.uuid4().hex[:8]}"
    long_ago(fleet, name)
    suspended = "spec.suspend is set: no task is made"
    wait_for("it is seen", lambda: suspended in str(read(fleet, "ats", name)), WAIT, 0.1)
    assert tasks_of(fleet, name) == []
    resume(fleet, name)

    def succeeded() -> bool:
        return bool(read(fleet, "ats", name).get("status", {}).get("lastSuccessfulTime"))

    wait_for("its task has succeeded", succeeded, WAIT, 0.1)
    (task,) = tasks_of(fleet, name)
    year = time.gmtime().tm_year
    assert task["metadata"]["annotations"]["outrider.dev/scheduled-timestamp"] == (
        f"{year}-01-01T00:00:00Z"
    )
    status = read(fleet, "ats", name)["status"]
    assert status["lastScheduleTime"] == f"{year}-01-01T00:00:00Z"
    assert status["nextScheduleTime"] == f"{year + 1}-01-01T00:00:00Z"
    assert status["lastMissedTime"] == f"{year - 1}-01-01T00:00:00Z"
    assert status["active"] == []
    # The tasks go with the schedule, by the cluster's garbage collector.
    assert (
        task["metadata"]["ownerReferences"][0]["uid"] == read(fleet, "ats", name)["metadata"]["uid"]
    )


def test_a_due_time_has_one_task_when_the_leader_is_killed(fleet) -> None:
    names = [f"killed-{number}-{uuid.uuid4().hex[:6]}" for number in range(12)]
    slow = {"spec": {"run": {"command": ["sleep", "600"]}, "timeoutSeconds": 900}}
    for name in names:
        long_ago(fleet, name, taskTemplate=slow)
    first = holder(fleet)
    for name in names[:6]:
        resume(fleet, name)
    # In the middle of its work: some have a task, some a status, some nothing.
    wait_for("some are made", lambda: any(tasks_of(fleet, name) for name in names), WAIT, 0.02)
    fleet.plane.processes.kill(fleet.servers[first].name)
    for name in names[6:]:
        resume(fleet, name)
    wait_for("the other leads", lambda: holder(fleet) != first, 30, 0.2)
    year = f"{time.gmtime().tm_year}-01-01T00:00:00Z"

    def kept() -> bool:
        found = [read(fleet, "ats", name).get("status", {}) for name in names]
        return all(s.get("lastScheduleTime") == year and s.get("active") for s in found)

    wait_for("all have a task", kept, WAIT, 0.2)
    for name in names:
        (task,) = tasks_of(fleet, name)
        (active,) = read(fleet, "ats", name)["status"]["active"]
        assert active["uid"] == task["metadata"]["uid"]
    fleet.start(fleet.servers[first])
