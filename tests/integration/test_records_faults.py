"""Faults on the way of records to Kafka; each test counts every record that was accepted.

Real stores, recorders and uplinks of a dozen agents under load, two real servers, a real broker.
Each test ends with a line that says how many records were accepted, arrived and were lost, and how
many batches came more than once; dist/records-faults.jsonl has them all.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator

import pytest
from cluster.kafka import BROKER
from counted.fleet import LOG, QUICK, Fleet, Size, running_fleet
from counted.ledger import Account

#: Each waits for processes that start anew, should the machine be busy.
pytestmark = pytest.mark.timeout(400)

#: Of the file system with the broker's log.
LOG_MIB = 384
HOUR = 3600
Finish = Callable[[], Account]


@pytest.fixture(scope="module")
def shared(
    control_plane_programs: None, kafka_jars_folder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    with running_fleet(tmp_path_factory, Size(), QUICK, LOG_MIB) as fleet:
        yield fleet


@pytest.fixture
def fleet(shared: Fleet) -> Iterator[Fleet]:
    """The fleet under load, and everything of it running again afterwards."""
    shared.wait_connected()
    shared.begin()
    yield shared
    shared.mend()


@pytest.fixture
def count(fleet: Fleet, request, capsys) -> Finish:
    """Ends the load, counts, says the numbers and checks them."""

    def finish() -> Account:
        found = fleet.finish(request.node.name)
        with capsys.disabled():
            print(f"\n  {request.node.name}: {found.line}")
        found.check()
        return found

    return finish


def test_broker_killed_and_back(fleet: Fleet, count: Finish) -> None:
    for _ in range(2):
        fleet.broker.kill()
        fleet.wait_waiting(fleet.size.agents)
        fleet.broker.resume()
        fleet.go_on(3)
    count()


def test_broker_away_for_a_minute(fleet: Fleet, count: Finish) -> None:
    fleet.broker.kill()
    before = fleet.accepted()
    fleet.go_on(60)
    assert fleet.accepted() > before, "agents go on while there is no broker"
    assert not fleet.servers_ready()
    fleet.broker.resume()
    count()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_disk_of_the_broker_full(fleet: Fleet, count: Finish) -> None:
    ballast = fleet.folder / LOG / "ballast"
    with ballast.open("wb") as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(1024 * 1024))
            file.flush()
    # Its only log is on that disk: a broker that cannot write there ends by itself.
    fleet.wait("the broker gives up", lambda: not fleet.broker.processes.running(BROKER), 120)
    fleet.wait_waiting(fleet.size.agents)
    ballast.unlink()
    fleet.broker.resume()
    count()


def test_gateways_killed_in_a_loop(fleet: Fleet, count: Finish) -> None:
    for number in range(6):
        name = f"server-{number % 2}"
        # With batches in its hands that no broker has: they go with it.
        fleet.throttle.silence(fleet.broker.front)
        fleet.go_on(1)
        fleet.kill_server(name)
        fleet.throttle.heal(fleet.broker.front)
        fleet.start_server(name, ready=False)
        fleet.go_on(1.5)
    fleet.wait("the servers are ready", fleet.servers_ready)
    count()


def test_agents_killed_in_a_loop(fleet: Fleet, count: Finish) -> None:
    for number in range(9):
        name = fleet.agents[number % len(fleet.agents)]
        fleet.processes.kill(name)
        before = fleet.accepted(name)
        fleet.start_agents(name)
        # Until it is at work again: the next kill should find it there, too.
        fleet.wait(f"{name} accepts", functools.partial(fleet.has_accepted, name, before + 1000))
    fleet.wait_connected()
    count()


def test_partition_that_closes_nothing(fleet: Fleet, count: Finish) -> None:
    for port in fleet.links.values():
        fleet.throttle.silence(port)
    fleet.wait_waiting(5 * fleet.size.agents)
    first, second = fleet.links.values()
    # One link goes on where it was; the other has forgotten its connections.
    fleet.throttle.heal(first)
    fleet.throttle.heal(second, forget=True)
    before = fleet.accepted()
    fleet.go_on(2)
    assert fleet.accepted() > before
    count()


def test_partition_between_servers_and_kafka(fleet: Fleet, count: Finish) -> None:
    fleet.throttle.silence(fleet.broker.front)
    fleet.wait("a server says so", lambda: not fleet.servers_ready())
    fleet.wait_waiting(5 * fleet.size.agents)
    fleet.throttle.heal(fleet.broker.front, forget=True)
    count()


def test_slow_readers(fleet: Fleet, count: Finish) -> None:
    """Kafka that takes less than comes, servers whose agents do not read, and agents that stop."""
    fleet.throttle.slow(fleet.broker.front, up=20_000)
    for port in fleet.links.values():
        fleet.throttle.slow(port, down=2_000)
    fleet.wait_waiting(5 * fleet.size.agents)
    frozen = fleet.agents[0]
    fleet.processes.freeze(frozen)
    try:
        fleet.go_on(5)
    finally:
        fleet.processes.thaw(frozen)
    for port in fleet.ports():
        fleet.throttle.slow(port)
    count()


def test_clocks_that_jump_by_hours(fleet: Fleet, count: Finish) -> None:
    for hours in (5, -7, 0, 30, -3):
        fleet.jump(hours * HOUR)
        before = fleet.accepted()
        fleet.go_on(2)
        assert fleet.accepted() > before, f"accepts records with its clock off by {hours} h"
    # Streams that begin while clocks are wrong.
    for name in fleet.links:
        fleet.kill_server(name)
        fleet.start_server(name)
    fleet.wait_connected()
    fleet.go_on(1)
    fleet.jump(0)
    count()


def test_rolling_upgrade_of_two_servers(fleet: Fleet, count: Finish) -> None:
    # Kafka takes less than comes, so that there is always something on its way.
    fleet.throttle.slow(fleet.broker.front, up=60_000)
    for name in fleet.links:
        began = time.monotonic()
        code = fleet.processes.stop(fleet.server(name).name, 40)
        assert code == 0, fleet.processes.log(fleet.server(name).name)[-3000:]
        assert time.monotonic() - began < 30
        fleet.start_server(name)
        fleet.wait_connected()
    fleet.throttle.slow(fleet.broker.front)
    count()
