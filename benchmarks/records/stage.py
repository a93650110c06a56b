"""What runs for a measurement: API server, broker, throttle, one server, and processes of load.

Starts and stops; must not know what is measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from cluster.controlplane import ControlPlane
from cluster.kafka import BROKER, HOST, KafkaBroker
from cluster.paths import ROOT
from cluster.programs import SERVER_NAME, Program, Programs
from cluster.supervised import free_port, wait_for
from cluster.throttle import Throttle
from records.load import LoadSettings
from swarm import population
from swarm.agents import Member

TOPIC = "outrider.records"
THROTTLE = "throttle"
#: Agents started a second, all processes together.
STARTS_PER_SECOND = 250
CONNECT_SECONDS = 300.0
READY_SECONDS = 60.0
MIB = 1024 * 1024


class BenchBroker(KafkaBroker):
    """A broker that keeps little, with a second listener behind a throttle at port `front`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.front = free_port(HOST)
        self.behind = free_port(HOST)

    def _properties(self, controller_port: int) -> str:
        controller = f"CONTROLLER://{HOST}:{controller_port}"
        protocols = ("PLAINTEXT:PLAINTEXT", "FRONT:PLAINTEXT", "CONTROLLER:PLAINTEXT")
        more = {
            "listeners": f"PLAINTEXT://{self.bootstrap},FRONT://{HOST}:{self.behind},{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap},FRONT://{HOST}:{self.front}",
            "listener.security.protocol.map": ",".join(protocols),
            # Its clock, which is the agents' as well, says when a message was appended.
            "log.message.timestamp.type": "LogAppendTime",
            # What was counted may go: else a run would fill the disk.
            "log.segment.bytes": str(32 * MIB),
            "log.retention.bytes": str(64 * MIB),
            "log.retention.check.interval.ms": "3000",
            "log.segment.delete.delay.ms": "1000",
        }
        usual = super()._properties(controller_port)
        return usual + "".join(f"{name}={value}\n" for name, value in more.items())


class Stage:
    """Everything but what is measured; ends with the control plane.

    Args:
        plane: a control plane that runs.
        folder: for the broker and the load; must be there.
    """

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        self.plane = plane
        self.processes = plane.processes
        self.folder = folder
        self.broker = BenchBroker(folder / "kafka")
        self.programs = Programs(plane, kafka=self.broker.bootstrap)
        self.tokens: dict[str, Path] = {}
        control = free_port(HOST)
        self.throttle = Throttle(control)
        self._control = control
        self._runs = 0

    def start(self, agents: int, progress: Callable[[int], None]) -> None:
        """Start the broker and make the Nodes, Pods and tokens of so many agents."""
        self.broker.start()
        self.programs.install()
        route = f"{self.broker.front}={HOST}:{self.broker.behind}"
        script = ROOT / "tests" / "cluster" / "throttle.py"
        self.processes.run(THROTTLE, [sys.executable, script, str(self._control), route])
        self.processes.wait_listening(THROTTLE, self._control, READY_SECONDS)
        nodes = population.names(agents)
        self.tokens = population.make(self.plane, nodes, self.programs.folder / "tokens", progress)

    def close(self) -> None:
        """Stop the broker."""
        self.broker.stop()

    def serve(self, name: str, settings: Mapping[str, Any], *, throttled: bool = False) -> Program:
        """Start the one server, ready, with these settings laid over the usual ones."""
        usual: dict[str, Any] = {
            "log": {"level": "warning"},
            "leader": {"enabled": False},
            "gateway": UNLIMITED,
        }
        self.programs.servers.clear()
        self.programs.kafka = f"{HOST}:{self.broker.front}" if throttled else self.broker.bootstrap
        server = self.programs.server(name, merged(usual, settings))
        self.programs.start(server)
        return server

    def end(self, server: Program) -> None:
        """Stop a server."""
        self.processes.stop(server.name, 60)

    def pid(self, name: str) -> int:
        """Of a process by its name."""
        return self.processes.status()[name].pid

    def kafka_pid(self) -> int:
        """Of the broker."""
        return self.broker.processes.status()[BROKER].pid

    def load(self, agents: int, processes: int, pool: int, rate: float = 0.0) -> Load:
        """Prepare load by so many agents; see `records.load.LoadSettings`."""
        self._runs += 1
        tokens = dict(list(self.tokens.items())[:agents])
        return Load(self, f"load-{self._runs}", tokens, processes, pool, rate)


#: Nobody is to be told to slow down where the most that is possible is looked for.
UNLIMITED: dict[str, Any] = {
    "connectRate": 1000,
    "connectBurst": 1000,
    "limits": {"agentRecordsPerSecond": 0, "agentBytesPerSecond": 0},
}


class Load:
    """Agents in processes of their own. As a context manager it ends them.

    Args:
        stage: where they run.
        name: of the files.
        tokens: the token's file of each node.
        processes: how many.
        pool, rate: as in `records.load.LoadSettings`.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        tokens: Mapping[str, Path],
        processes: int,
        pool: int,
        rate: float,
    ) -> None:
        self._stage = stage
        self.size = len(tokens)
        self._folder = stage.folder / name
        self._folder.mkdir()
        self._go = self._folder / "go"
        members = [Member(node=node, token_file=str(file)) for node, file in tokens.items()]
        self._parts = {
            f"{name}-{number}": LoadSettings(
                target=stage.programs.gateways(),
                ca_file=str(stage.programs.folder / "ca.crt"),
                server_name=SERVER_NAME,
                status_file=str(self._folder / f"{number}.status.json"),
                start_seconds=self.size / STARTS_PER_SECOND,
                pool=pool,
                rate=rate,
                go_file=str(self._go),
                seed=number,
                members=members[number::processes],
            )
            for number in range(min(processes, self.size))
        }

    def __enter__(self) -> Load:
        for name, settings in self._parts.items():
            config = self._folder / f"{name}.json"
            config.write_bytes(msgspec.json.encode(settings))
            path = [str(ROOT / "tests"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
            self._stage.processes.run(
                name,
                [sys.executable, "-m", "records.load", config],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            )
        try:
            wait_for(
                f"{self.size} agents are connected",
                lambda: self.status()["connected"] == self.size,
                CONNECT_SECONDS,
                0.25,
            )
        except BaseException:
            self.__exit__()
            raise
        self._go.touch()
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._parts:
            if self._stage.processes.running(name):
                self._stage.processes.kill(name)

    def pids(self) -> list[int]:
        """Of all processes."""
        return [self._stage.pid(name) for name in self._parts]

    def status(self) -> Counter[str]:
        """The sum of all processes' tallies; `at` is their mean."""
        total: Counter[str] = Counter()
        at = []
        for settings in self._parts.values():
            try:
                found = json.loads(Path(settings.status_file).read_text())
            except FileNotFoundError:
                continue
            at.append(found.pop("at"))
            total.update({k: v for k, v in found.items() if isinstance(v, int)})
            self.problems = found.get("problems", {})
        self.at = sum(at) / len(at) if at else 0.0
        return total


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Settings laid over others, by section."""
    found = dict(base)
    for name, value in over.items():
        below = found.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            found[name] = merged(below, value)
        else:
            found[name] = value
    return found
