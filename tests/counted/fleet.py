"""All of it on one machine: API server, Kafka, servers, agents that count, and links to cut.

Why it exists: the tests of faults share it, for its start takes longer than most faults. Between
agents and servers, and between servers and Kafka, stands a throttle. It must not judge: that is the
ledger's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cluster.controlplane import ControlPlane
from cluster.kafka import BROKER, HOST, KafkaBroker
from cluster.paths import ROOT
from cluster.programs import SERVER_NAME, Program, Programs, http
from cluster.supervised import free_port, wait_for
from cluster.throttle import Throttle
from counted import clock, ledger
from counted.agents import TICK_SECONDS, Member, Settings
from counted.ledger import Account

TOPIC = "outrider.records"
DEAD_LETTERS = f"{TOPIC}.dead-letter"
WAIT = 60.0
#: For what waits to be sent when a fault is over.
DRAIN_SECONDS = 120.0
REPORTS = ROOT / "dist" / "records-faults.jsonl"
THROTTLE = "throttle"
CLOCK = clock.__file__
#: Folder of the broker's log.
LOG = "broker-log"
#: Settings of servers that notice soon what happens.
QUICK = {
    "gateway": {"drainSeconds": 5, "drainSpreadSeconds": 0.5},
    "sink": {
        "kafka": {
            "partitions": 3,
            "replicationFactor": 1,
            "requestTimeoutSeconds": 3,
            "retryCapSeconds": 1,
        }
    },
}


class FrontedBroker(KafkaBroker):
    """A broker with a second listener behind a throttle, and its log in a folder of our choice.

    Args:
        folder: as of any broker.
        data: for the log; empty.
        front: port of the throttle that clients of the second listener are told to use.
    """

    def __init__(self, folder: Path, data: Path, front: int) -> None:
        super().__init__(folder)
        self._data = data
        self.front = front
        self.behind = free_port(HOST)

    def _properties(self, controller_port: int) -> str:
        usual = super()._properties(controller_port)
        controller = f"CONTROLLER://{HOST}:{controller_port}"
        protocols = ("PLAINTEXT:PLAINTEXT", "FRONT:PLAINTEXT", "CONTROLLER:PLAINTEXT")
        more = {
            "listeners": f"PLAINTEXT://{self.bootstrap},FRONT://{HOST}:{self.behind},{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap},FRONT://{HOST}:{self.front}",
            "listener.security.protocol.map": ",".join(protocols),
            "log.dirs": str(self._data),
            # Its log is on a small file system; clean.
            "log.segment.bytes": str(8 * 1024 * 1024),
        }
        return usual + "".join(f"{name}={value}\n" for name, value in more.items())


@dataclass(frozen=True)
class Size:
    """How large a fleet is."""

    agents: int = 12
    processes: int = 3
    servers: int = 2
    rate: float = 50.0


class Fleet:
    """The parts that run.

    Args:
        plane: a control plane that runs.
        folder: for the agents' files and the broker's.
        data: where the broker keeps its log.
        size: how many of each.
        server: settings of the servers, laid over the usual ones.
        agents_module: what runs the agents; another one where a test breaks them on purpose.
    """

    def __init__(
        self,
        plane: ControlPlane,
        folder: Path,
        data: Path,
        size: Size,
        server: Mapping[str, Any] | None = None,
        agents_module: str = "counted.agents",
    ) -> None:
        self.plane = plane
        self.processes = plane.processes
        self.folder = folder
        self.size = size
        self._module = agents_module
        self._control = free_port(HOST)
        self.broker = FrontedBroker(folder / "kafka", data, free_port(HOST))
        self.programs = Programs(plane, kafka=f"{HOST}:{self.broker.front}")
        self.throttle = Throttle(self._control)
        self.clock = folder / "clock"
        self.jump(0)
        self._server = dict(server or {})
        self._load = folder / "load"
        self.links: dict[str, int] = {}
        self._agents: dict[str, Settings] = {}
        self._begun: tuple[ledger.Offsets, dict[Path, int]] = ({}, {})

    # ---------------------------------------------------------------- life

    def start(self) -> None:
        """Start everything and wait until every agent is connected.

        Raises:
            ClusterError: something did not start.
        """
        self.broker.start()
        self.programs.install()
        for number in range(self.size.servers):
            name = f"server-{number}"
            self.programs.server(name, {"leader": {"enabled": False}, **self._server})
            self.links[name] = free_port(HOST)
        self._start_throttle()
        for name in self.links:
            self.start_server(name, ready=False)
        for name in self.links:
            self.programs.wait_ready(self.server(name), WAIT)
        self._prepare_agents()
        for name in self._agents:
            self.start_agents(name)
        self.wait_connected()

    def stop(self) -> None:
        """Stop the broker; all else ends with the control plane."""
        self.broker.stop()

    def mend(self) -> None:
        """After a test: everything runs, no link is cut, no load, clocks are right."""
        self._load.unlink(missing_ok=True)
        self.jump(0)
        for port in self.ports():
            self.throttle.slow(port)
            self.throttle.heal(port)
        if not self.broker.processes.running(BROKER):
            self.broker.resume()
        for name in self.links:
            if not self.processes.running(self.server(name).name):
                self.start_server(name, ready=False)
        for name in self._agents:
            if not self.processes.running(name):
                self.start_agents(name)

    def ports(self) -> list[int]:
        """Of all links: the servers', then Kafka's."""
        return [*self.links.values(), self.broker.front]

    def _start_throttle(self) -> None:
        routes = [
            f"{port}={HOST}:{self.server(name).grpc_port}" for name, port in self.links.items()
        ]
        routes.append(f"{self.broker.front}={HOST}:{self.broker.behind}")
        script = ROOT / "tests" / "cluster" / "throttle.py"
        self.processes.run(THROTTLE, [sys.executable, script, str(self._control), *routes])
        self.processes.wait_listening(THROTTLE, self._control, WAIT)

    def jump(self, seconds: int) -> None:
        """Let the wall clocks of servers and agents be off by so much."""
        clock.set_jump(self.clock, seconds)

    # ---------------------------------------------------------------- servers

    def server(self, name: str) -> Program:
        """One of the servers."""
        return self.programs.servers[name]

    def start_server(self, name: str, *, ready: bool = True) -> None:
        """Start a server, with the clock that jumps."""
        self.programs.start(self.server(name), ready=ready, through=[CLOCK, str(self.clock)])

    def kill_server(self, name: str) -> None:
        """End a server with SIGKILL."""
        self.processes.kill(self.server(name).name)

    def servers_ready(self) -> bool:
        """Whether every server says that it is ready."""
        return all(http(self.server(name), "/readyz")[0] == 200 for name in self.links)

    # ---------------------------------------------------------------- agents

    def _prepare_agents(self) -> None:
        members = []
        for number in range(self.size.agents):
            program = self.programs.agent(f"node-{number:03}")
            node = program.settings["node"]["name"]
            members.append(
                Member(
                    node=node,
                    state=str(self.folder / "agents" / node),
                    token_file=program.settings["server"]["tokenFile"],
                )
            )
        for number in range(self.size.processes):
            name = f"agents-{number}"
            self._agents[name] = Settings(
                target=",".join(f"{HOST}:{port}" for port in self.links.values()),
                ca_file=str(self.programs.folder / "ca.crt"),
                server_name=SERVER_NAME,
                load_file=str(self._load),
                accepted_file=str(self.folder / f"{name}.accepted"),
                status_file=str(self.folder / f"{name}.status.json"),
                rate=self.size.rate,
                relaxed=number == 0,
                members=members[number :: self.size.processes],
            )

    @property
    def agents(self) -> Sequence[str]:
        """Names of the processes of agents."""
        return list(self._agents)

    def start_agents(self, name: str) -> None:
        """Start one process of agents on the files they have."""
        settings = self._agents[name]
        Path(settings.status_file).unlink(missing_ok=True)
        file = self.folder / f"{name}.json"
        file.write_bytes(msgspec.json.encode(settings))
        path = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        self.processes.run(
            name,
            [sys.executable, CLOCK, self.clock, self._module, file],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        )

    def status(self) -> dict[str, int]:
        """Sums over all processes of agents that have said how they do; see `counted.agents`."""
        total = dict.fromkeys(
            ("made", "accepted", "waiting", "connected", "agents", "loaded", "processes"), 0
        )
        for settings in self._agents.values():
            try:
                found = json.loads(Path(settings.status_file).read_text())
            except FileNotFoundError:
                continue
            total["processes"] += 1
            for name in total.keys() & found.keys():
                total[name] += int(found[name])
        return total

    def connected(self) -> bool:
        """Whether every agent is connected."""
        return self.status()["connected"] == self.size.agents

    def wait_connected(self, seconds: float = WAIT) -> None:
        """Wait until every agent is connected."""
        wait_for(f"{self.size.agents} agents are connected", self.connected, seconds, 0.1)

    def wait_waiting(self, batches: int, seconds: float = WAIT) -> None:
        """Wait until at least so many batches wait in the outboxes."""
        self.wait(f"{batches} batches wait", lambda: self.status()["waiting"] >= batches, seconds)

    def wait(self, what: str, check: Callable[[], bool], seconds: float = WAIT) -> None:
        """Wait for anything, looking ten times a second."""
        wait_for(what, check, seconds, 0.1)

    # ---------------------------------------------------------------- counting

    def begin(self) -> None:
        """Begin to count, and let the agents make records."""
        files = [Path(s.accepted_file) for s in self._agents.values()]
        topics = [TOPIC, DEAD_LETTERS]
        self._begun = (
            ledger.ends(self.broker.bootstrap, topics),
            {file: file.stat().st_size for file in files if file.exists()},
        )
        before = self.accepted()
        self._load.touch()
        self.wait("records are accepted", lambda: self.accepted() > before + self.size.agents)

    def accepted(self, *names: str) -> int:
        """What was accepted so far, as bytes of ids; of these processes of agents, or of all."""
        files = [Path(self._agents[name].accepted_file) for name in names or self._agents]
        return sum(file.stat().st_size for file in files if file.exists())

    def has_accepted(self, name: str, least: int) -> bool:
        """Whether one process of agents has accepted so much."""
        return self.accepted(name) >= least

    def go_on(self, seconds: float) -> None:
        """Leave everything as it is for a while."""
        end = time.monotonic() + seconds
        wait_for("time passes", lambda: time.monotonic() >= end, seconds + 5, 0.1)

    def finish(self, what: str, seconds: float = DRAIN_SECONDS) -> Account:
        """End the load, wait until the outboxes are empty, and count.

        Raises:
            ClusterError: they are not in time.
        """
        self._load.unlink(missing_ok=True)
        self.wait("all agents look again", self._unloaded)
        # Three looks: between two of them a record may be on its way from one place to the next.
        for _ in range(3):
            self.wait("the outboxes are empty", self._drained, seconds)
            self.go_on(2 * TICK_SECONDS)
        offsets, files = self._begun
        bootstrap = self.broker.bootstrap
        accepted = ledger.accepted_ids(
            [Path(s.accepted_file) for s in self._agents.values()], files
        )
        arrived = ledger.read(bootstrap, [TOPIC], offsets)
        aside = ledger.read(bootstrap, [DEAD_LETTERS], offsets)
        found = ledger.account(accepted, arrived, aside)
        ledger.tell(what, found, REPORTS)
        return found

    def _unloaded(self) -> bool:
        status = self.status()
        return status["processes"] == self.size.processes and not status["loaded"]

    def _drained(self) -> bool:
        status = self.status()
        return (
            status["agents"] == self.size.agents
            and status["made"] == status["accepted"]
            and not status["waiting"]
        )


@contextmanager
def running_fleet(
    folders: pytest.TempPathFactory, size: Size, server: Mapping[str, Any], log_mib: int = 0
) -> Iterator[Fleet]:
    """A fleet with a control plane of its own, under no load.

    Args:
        folders: where its files go.
        size: how large it is.
        server: settings of its servers, laid over the usual ones.
        log_mib: above 0, and for root: the broker's log has a file system of that size.
    """
    folder = folders.mktemp("fleet")
    data = folder / LOG
    data.mkdir()
    mounted = log_mib > 0 and os.geteuid() == 0
    if mounted:
        small_file_system(data, log_mib)
    try:
        with ControlPlane(folders.mktemp("plane")) as plane:
            fleet = Fleet(plane, folder, data, size, server)
            try:
                fleet.start()
                yield fleet
            finally:
                fleet.stop()
    finally:
        if mounted:
            unmount(data)


def small_file_system(folder: Path, mib: int) -> None:
    """Mount a file system of so many MiB at a folder (root only)."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "tmpfs", str(folder)], check=True
    )


def unmount(folder: Path) -> None:
    """Take it away, also while something still looks at it."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
