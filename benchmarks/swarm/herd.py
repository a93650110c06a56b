"""The processes that hold the agents: started, counted, and asked how they do.

It must not know what is measured.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from cluster.paths import ROOT
from cluster.programs import SERVER_NAME, Programs
from swarm.agents import Member, SwarmSettings

#: Agents started a second, all processes together.
STARTS_PER_SECOND = 250


class Herd:
    """Agents in processes of their own, which end with the control plane's.

    Args:
        programs: the servers they connect to.
        tokens: the token's file of each node.
        per_process: agents in one process.
        begin_seconds, run_seconds: how long runs take at most.
        config_failures: share of the agents that refuse configurations.
    """

    def __init__(
        self,
        programs: Programs,
        tokens: Mapping[str, Path],
        per_process: int,
        begin_seconds: float = 0.05,
        run_seconds: float = 0.2,
        config_failures: float = 0.0,
    ) -> None:
        self._programs = programs
        self._folder = programs.folder / "swarm"
        self._folder.mkdir(exist_ok=True)
        self.size = len(tokens)
        members = [Member(node=n, token_file=str(file)) for n, file in tokens.items()]
        self._parts: dict[str, SwarmSettings] = {}
        for start in range(0, len(members), per_process):
            name = f"swarm-{start // per_process}"
            self._parts[name] = SwarmSettings(
                target=programs.gateways(),
                ca_file=str(programs.folder / "ca.crt"),
                server_name=SERVER_NAME,
                status_file=str(self._folder / f"{name}.status.json"),
                start_seconds=len(members) / STARTS_PER_SECOND,
                begin_seconds=begin_seconds,
                run_seconds=run_seconds,
                config_failures=config_failures,
                members=members[start : start + per_process],
            )

    def start(self) -> None:
        """Start all processes."""
        for name, settings in self._parts.items():
            config = self._folder / f"{name}.json"
            config.write_bytes(msgspec.json.encode(settings))
            self._programs.plane.processes.run(
                name,
                [sys.executable, "-m", "swarm.agents", config],
                cwd=ROOT / "benchmarks",
            )

    def pids(self) -> list[int]:
        """Of all processes."""
        status = self._programs.plane.processes.status()
        return [status[name].pid for name in self._parts]

    def status(self) -> Counter[str]:
        """The sum of all processes' tallies; see `agents.Tally`."""
        total: Counter[str] = Counter()
        for settings in self._parts.values():
            total.update({k: v for k, v in _read(settings).items() if isinstance(v, int)})
        return total

    def problems(self) -> Counter[str]:
        """Why agents were not connected, and how often."""
        total: Counter[str] = Counter()
        for settings in self._parts.values():
            total.update(_read(settings).get("problems", {}))
        return total


def _read(settings: SwarmSettings) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(Path(settings.status_file).read_text())
    except FileNotFoundError:
        return {}
    return found
