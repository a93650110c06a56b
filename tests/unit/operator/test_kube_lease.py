"""When a candidate may take the Lease of another: by the steady clock, whatever the time of day."""

from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.aio.leaderelection import leaderelection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from outrider_operator.kube import lease
from outrider_operator.kube.lease import Candidate
from outrider_operator.settings import LeaderSettings

HOUR = 3600.0


class Clocks:
    """The time of day and the steady clock, both to be set."""

    def __init__(self) -> None:
        self.day, self.steady = 1_800_000_000.0, 1000.0

    def time(self) -> float:
        return self.day

    def monotonic(self) -> float:
        return self.steady

    def pass_by(self, seconds: float) -> None:
        self.day += seconds
        self.steady += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(lease, "time", made)
    monkeypatch.setattr(leaderelection, "time", made)
    return made


@pytest.fixture
def candidate(monkeypatch: pytest.MonkeyPatch) -> Candidate:
    """One that sees a Lease of another, who renewed it once and is not heard of again."""
    kube: Any = SimpleNamespace(api=SimpleNamespace())
    made = Candidate(kube, LeaderSettings(lease_duration_seconds=15), "outrider", "second")

    async def get(name: str, namespace: str) -> tuple[bool, LeaderElectionRecord]:
        return True, LeaderElectionRecord("first", "15", "then", "then")

    async def update(name: str, namespace: str, record: LeaderElectionRecord) -> bool:
        return True

    monkeypatch.setattr(made._lock, "get", get)
    monkeypatch.setattr(made._lock, "update", update)
    return made


async def test_a_lease_is_taken_when_its_time_is_over(clocks: Clocks, candidate: Candidate) -> None:
    for _ in range(15):
        assert not await candidate._try()
        clocks.pass_by(1.0)
    clocks.pass_by(0.1)
    assert await candidate._try()


async def test_a_clock_set_forward_takes_nothing_from_a_leader(
    clocks: Clocks, candidate: Candidate
) -> None:
    assert not await candidate._try()
    clocks.day += HOUR
    assert not await candidate._try()


async def test_a_clock_set_back_keeps_nobody_from_leading(
    clocks: Clocks, candidate: Candidate
) -> None:
    assert not await candidate._try()
    clocks.day -= HOUR
    clocks.pass_by(15.1)
    assert await candidate._try()
