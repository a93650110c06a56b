"""The broker is away for five minutes with fifty agents; every accepted record is counted.

Not among the tests of every change: what it adds to a minute with a dozen agents is time, for
back-offs to reach their ends, tokens of requests to run out, and a backlog that takes a while.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from counted.fleet import QUICK, Fleet, Size, running_fleet

pytestmark = pytest.mark.timeout(1200)

AGENTS = 50
AWAY_SECONDS = 300.0
DRAIN_SECONDS = 300.0


@pytest.fixture
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    size = Size(agents=AGENTS, processes=5, servers=2, rate=20.0)
    with running_fleet(tmp_path_factory, size, QUICK) as running:
        yield running


def test_broker_away_for_five_minutes_with_fifty_agents(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.begin()
    fleet.broker.kill()
    before = fleet.accepted()
    fleet.go_on(AWAY_SECONDS)
    assert fleet.accepted() > before
    fleet.broker.resume()
    found = fleet.finish("broker away for five minutes", DRAIN_SECONDS)
    with capsys.disabled():
        print(f"\n  {found.line}")
    found.check()
    assert found.accepted > AGENTS * AWAY_SECONDS * 20 * 0.8, "agents went on all the time"
