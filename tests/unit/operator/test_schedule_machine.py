"""Schedules kept through crashes, lost answers, clocks that jump, and people who change their mind.

A machine of random steps drives the real controller against an API server in memory, with the
clock in its hand. The judge of when a task is due is arithmetic, not the code.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from fakes.schedules import MemorySchedules
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from outrider_operator.core.model import TASK_FINAL
from outrider_operator.core.ports import Change, ClusterError, ClusterUnavailableError
from outrider_operator.core.times import seconds_of
from outrider_operator.fleet.schedules import Schedules
from outrider_operator.metrics import ServerMetrics
from prometheus_client import CollectorRegistry

PERIOD = 600.0
BEGIN = 1_800_000_000.0  # due itself
UID = "uid-of-s"


class Crash(BaseException):
    """The leader was killed."""


def latest_due(now: float) -> float:
    return now // PERIOD * PERIOD


def due_of(name: str) -> float:
    return int(name.rpartition("-")[2]) * 60.0


class Kept(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.cluster = MemorySchedules()
        self.now = BEGIN
        self.highest_status = 0.0
        self.judged = 0
        self.lead()

    def teardown(self) -> None:
        self.cluster.fault = lambda _: None
        try:
            self.settle()
        finally:
            self.runner.close()

    @initialize(
        policy=st.sampled_from(["Allow", "Forbid", "Replace"]),
        deadline=st.none() | st.sampled_from([30, 300, 900, 3600]),
        created=st.floats(BEGIN - 1300, BEGIN),
    )
    def make(self, policy: str, deadline: int | None, created: float) -> None:
        spec: dict[str, Any] = {"schedule": "*/10 * * * *", "concurrencyPolicy": policy}
        if deadline is not None:
            spec["startingDeadlineSeconds"] = deadline
        self.created = float(int(created))
        self.cluster.add_schedule("s", self.created, **spec)
        self.runner.run(self.schedules.resync())

    @property
    def body(self) -> Any:
        return self.cluster.schedules["default", "s"]

    def active(self) -> list[str]:
        found = self.cluster.tasks.values()
        return [
            t["metadata"]["name"]
            for t in found
            if t.get("status", {}).get("phase") not in TASK_FINAL
        ]

    # What happens in the world.

    @rule(step=st.sampled_from([1.0, 29.5, 60.0, 599.0, 600.0, 1900.0, 90_000.0]))
    def time_goes_by(self, step: float) -> None:
        self.now += step

    @rule(step=st.sampled_from([1.0, 400.0, 5000.0]))
    def the_clock_is_set_back(self, step: float) -> None:
        self.now -= step

    @precondition(lambda self: self.active())
    @rule(data=st.data(), phase=st.sampled_from(["Succeeded", "Failed", "Cancelled"]))
    def a_task_ends(self, data: Any, phase: str) -> None:
        name = data.draw(st.sampled_from(self.active()))
        body = self.cluster.end_task(name, phase, self.now)
        self.schedules.changed(Change("AgentTask", False, body))

    @rule(data=st.data())
    def somebody_deletes_a_task(self, data: Any) -> None:
        # One whose making no leader has written down yet would be made again.
        known = seconds_of(self.body.get("status", {}).get("lastScheduleTime")) or 0.0
        names = [name for _, name in self.cluster.tasks if due_of(name) <= known]
        if names:
            body = self.cluster.tasks["default", data.draw(st.sampled_from(names))]
            self.cluster.tasks.pop(("default", body["metadata"]["name"]))
            self.schedules.changed(Change("AgentTask", True, body))

    @rule(suspend=st.booleans())
    def somebody_suspends_or_resumes(self, suspend: bool) -> None:
        self.schedules.changed(
            Change("AgentTaskSchedule", False, self.cluster.change_schedule("s", suspend=suspend))
        )

    @rule(policy=st.sampled_from(["Allow", "Forbid", "Replace"]))
    def somebody_changes_the_policy(self, policy: str) -> None:
        # The watch is late: the leader learns of it by a conflict.
        self.cluster.change_schedule("s", concurrencyPolicy=policy)
        self.runner.run(self.schedules.resync())

    # What the leader does.

    def lead(self) -> None:
        async def begin() -> Schedules:
            metrics = ServerMetrics(CollectorRegistry())
            made = Schedules(self.cluster, metrics, lambda: self.now)
            await made.resync()
            return made

        self.schedules = self.runner.run(begin())

    @rule()
    def another_leads(self) -> None:
        self.lead()

    def look(self, fault: Callable[[str], None] = lambda _: None) -> None:
        before = set(self.cluster.made)
        self.was_active, self.cluster.fault = self.active(), fault
        try:
            self.runner.run(self.schedules._look_at(UID))
        finally:
            self.cluster.fault = lambda _: None
            self.judge([name for name in self.cluster.made if name not in before])

    @rule()
    def it_looks(self) -> None:
        self.look()

    @rule(
        at=st.integers(1, 8), error=st.sampled_from([ClusterUnavailableError, ClusterError, Crash])
    )
    def it_looks_and_something_breaks(self, at: int, error: type[BaseException]) -> None:
        left = at

        def fault(_: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise error("broken")

        try:
            self.look(fault)
        except Crash:
            self.lead()

    # What must hold.

    def judge(self, made: list[str]) -> None:
        spec = self.body["spec"]
        assert len(self.cluster.made) == len(set(self.cluster.made)), "a due time had two tasks"
        assert len(made) <= 1
        for name in made:
            due = due_of(name)
            assert due == latest_due(self.now), "only the latest due time is made up for"
            assert due > self.created
            assert self.now - due <= spec.get("startingDeadlineSeconds", float("inf"))
            assert not spec.get("suspend")
            assert spec["concurrencyPolicy"] != "Forbid" or not self.was_active
        last = seconds_of(self.body.get("status", {}).get("lastScheduleTime")) or 0.0
        assert last >= self.highest_status, "lastScheduleTime went back"
        self.highest_status = last

    def settle(self) -> None:
        if not self.cluster.schedules:
            return
        self.lead()
        for _ in range(3):
            self.look()
        status, spec = self.body["status"], self.body["spec"]
        assert {item["name"] for item in status["active"]} == set(self.active())
        phases = [t.get("status", {}).get("phase") for t in self.cluster.tasks.values()]
        assert phases.count("Succeeded") <= 3
        assert phases.count("Failed") + phases.count("Cancelled") <= 1
        due = latest_due(self.now)
        last = seconds_of(status.get("lastScheduleTime")) or self.created
        late = self.now - due > spec.get("startingDeadlineSeconds", float("inf"))
        blocked = spec["concurrencyPolicy"] == "Forbid" and self.active()
        if due > last and not spec.get("suspend") and not blocked:
            assert late, "nothing was in the way, and no task was made"
            # Later, if the clock was set back after a later one was missed.
            missed = seconds_of(status["lastMissedTime"])
            assert missed is not None
            assert missed >= due
        for name in self.active():
            assert due_of(name) <= last
        before = list(self.cluster.requests)
        self.look()
        assert self.cluster.requests == before, "with nothing to do, nothing is asked"


Kept.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestKept = Kept.TestCase


@pytest.fixture
async def kept() -> tuple[MemorySchedules, Schedules, list[float]]:
    cluster, clock = MemorySchedules(), [BEGIN - 5]
    metrics = ServerMetrics(CollectorRegistry())
    return cluster, Schedules(cluster, metrics, lambda: clock[0]), clock


def reasons(cluster: MemorySchedules) -> list[str]:
    return [reason for _, reason, _ in cluster.events]


async def test_the_life_of_a_due_time(kept) -> None:
    cluster, schedules, clock = kept
    cluster.add_schedule("s", BEGIN - 100, schedule="*/10 * * * *", concurrencyPolicy="Replace")
    await schedules.resync()
    await schedules._look_at(UID)
    assert cluster.made == []
    clock[0] = BEGIN + 0.2
    await schedules._look_at(UID)
    first = f"s-{int(BEGIN) // 60}"
    assert cluster.made == [first]
    assert cluster.schedules["default", "s"]["status"]["active"][0]["name"] == first
    clock[0] += PERIOD
    await schedules._look_at(UID)
    second = f"s-{int(BEGIN + PERIOD) // 60}"
    assert list(cluster.tasks) == [("default", second)], "the first was replaced"
    assert reasons(cluster) == ["SuccessfulCreate", "SuccessfulDelete", "SuccessfulCreate"]
    body = cluster.end_task(second, "Succeeded", clock[0])
    schedules.changed(Change("AgentTask", False, body))
    await schedules._look_at(UID)
    assert reasons(cluster)[3:] == ["SawCompletedTask"]
    status = cluster.schedules["default", "s"]["status"]
    assert status["active"] == []
    assert seconds_of(status["lastSuccessfulTime"]) == int(clock[0])


async def test_a_task_that_is_refused_is_told_and_tried_again(kept) -> None:
    cluster, schedules, clock = kept
    cluster.add_schedule("s", BEGIN - 100, schedule="*/10 * * * *")
    await schedules.resync()
    cluster.refuse = ClusterError("POST agenttasks: 403: exceeded quota")
    clock[0] = BEGIN + 1
    for _ in range(3):
        await schedules._look_at(UID)
    status = cluster.schedules["default", "s"]["status"]
    (ready,) = status["conditions"]
    assert (ready["status"], ready["reason"]) == ("False", "FailedCreate")
    assert "exceeded quota" in ready["message"]
    assert "lastScheduleTime" not in status
    assert reasons(cluster) == ["FailedCreate"], "the same is told once"
    cluster.refuse = None
    await schedules._look_at(UID)
    (ready,) = cluster.schedules["default", "s"]["status"]["conditions"]
    assert ready["status"] == "True"
    assert len(cluster.made) == 1


async def test_a_name_that_is_taken_by_somebodys_task_is_told(kept) -> None:
    cluster, schedules, clock = kept
    cluster.add_schedule("s", BEGIN - 100, schedule="*/10 * * * *")
    cluster.add_task(f"s-{int(BEGIN) // 60}", {"run": {"builtin": "Ping"}})
    await schedules.resync()
    clock[0] = BEGIN + 1
    await schedules._look_at(UID)
    (ready,) = cluster.schedules["default", "s"]["status"]["conditions"]
    assert "that this schedule did not make: delete that" in ready["message"]


async def test_it_wakes_by_itself_and_sees_a_clock_that_was_set(kept) -> None:
    cluster, _, clock = kept
    metrics = ServerMetrics(CollectorRegistry())
    schedules = Schedules(cluster, metrics, lambda: clock[0], recheck=0.05)
    cluster.add_schedule("s", BEGIN - 100, schedule="*/10 * * * *")
    await schedules.resync()
    task = asyncio.create_task(schedules.run())
    async with asyncio.timeout(10):
        for step in (PERIOD, 86_400.0):
            clock[0] += step
            expected = f"s-{int(latest_due(clock[0])) // 60}"
            while expected not in cluster.made:
                await asyncio.sleep(0.01)
        cluster.schedules.clear()
        await schedules.resync()
        assert schedules._entries == {}
    task.cancel()
    await asyncio.wait([task])
