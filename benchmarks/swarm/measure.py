"""What is measured of processes, of the API server and of the machine, and how it is told.

Reads only; starts and decides nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from cluster.controlplane import ControlPlane
from cluster.programs import Program, http
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

KIB = 1024
WRITES = frozenset({"POST", "PUT", "PATCH", "APPLY", "DELETE"})


def pss(pid: int) -> int:
    """Proportional set size of a process, bytes."""
    return int(psutil.Process(pid).memory_full_info().pss)


def rss(pid: int) -> int:
    """Resident set size of a process, bytes."""
    return int(psutil.Process(pid).memory_info().rss)


def cpu(pids: Iterable[int]) -> float:
    """CPU time of processes so far, seconds."""
    total = 0.0
    for pid in pids:
        times = psutil.Process(pid).cpu_times()
        total += times.user + times.system
    return total


def metric(program: Program, name: str) -> float:
    """The sum of a metric's samples; 0 if the program does not answer."""
    families = text_string_to_metric_families(http(program, "/metrics")[1])
    return sum(s.value for f in families for s in f.samples if s.name == name)


def api_writes(plane: ControlPlane, resources: Iterable[str]) -> Counter[str]:
    """Writes of some resources the API server has served so far, as "VERB resource/subresource"."""
    wanted, found = frozenset(resources), Counter[str]()
    text = plane.kubectl("get", "--raw", "/metrics")
    kept = "\n".join(line for line in text.splitlines() if "apiserver_request_total" in line)
    for family in text_string_to_metric_families(kept + "\n"):
        for sample in family.samples:
            labels = sample.labels
            if labels.get("resource") in wanted and labels.get("verb") in WRITES:
                under = f"/{labels['subresource']}" if labels.get("subresource") else ""
                found[f"{labels['verb']} {labels['resource']}{under}"] += int(sample.value)
    return found


@dataclass
class Spent:
    """Wall time and CPU time since it was made, by part; and the machine's own.

    Args:
        parts: process ids by name of the part.
    """

    parts: dict[str, list[int]]
    _cpu: dict[str, float] = field(init=False)
    _machine: Any = field(init=False)
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._cpu = {name: cpu(pids) for name, pids in self.parts.items()}
        self._machine = psutil.cpu_times()
        self._began = time.monotonic()

    def figures(self) -> dict[str, float]:
        """CPU seconds by part, "other" for all else on the machine, and the wall time."""
        seconds = time.monotonic() - self._began
        used = {name: cpu(pids) - self._cpu[name] for name, pids in self.parts.items()}
        now = psutil.cpu_times()
        busy = sum(
            getattr(now, kind) - getattr(self._machine, kind)
            for kind in ("user", "nice", "system", "irq", "softirq", "steal")
        )
        figures = {f"cpu_{name}_seconds": round(value, 2) for name, value in used.items()}
        figures["cpu_other_seconds"] = round(max(0.0, busy - sum(used.values())), 2)
        figures["wall_seconds"] = round(seconds, 2)
        return figures


class Report:
    """Figures as JSON lines as they come, and a table of those with a bound at the end.

    Args:
        file: where the lines go as well; not if None.
        common: fields of every line.
    """

    def __init__(self, file: Path | None, common: dict[str, Any]) -> None:
        self._file = file
        self._common = {**common, "cores": os.cpu_count()}
        self._rows: list[tuple[str, float, str, float | None, float | None]] = []
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")

    def line(self, what: str, **figures: Any) -> None:
        """Tell figures."""
        load = round(os.getloadavg()[0], 2)
        text = json.dumps({"what": what, **self._common, "load1": load, **figures})
        print(text, flush=True)
        if self._file is not None:
            with self._file.open("a") as out:
                out.write(text + "\n")

    def bound(
        self,
        name: str,
        value: float,
        unit: str,
        most: float | None = None,
        least: float | None = None,
    ) -> None:
        """Note a figure for the table, and what it may be at most or at least, if anything."""
        self._rows.append((name, value, unit, most, least))

    def table(self) -> bool:
        """Print the table; True if every figure is within its bound."""
        shown = Table("FIGURE", "VALUE", "BOUND", "", box=None, pad_edge=False, padding=(0, 2))
        good = True
        for name, value, unit, most, least in self._rows:
            kept = (most is None or value <= most) and (least is None or value >= least)
            good = good and kept
            bounds = [] if most is None else [f"at most {most:g} {unit}"]
            bounds += [] if least is None else [f"at least {least:g} {unit}"]
            verdict = ("ok" if kept else "MISSED") if bounds else ""
            shown.add_row(name, f"{value:.4g} {unit}", ", ".join(bounds), verdict)
        Console(highlight=False, width=110).print(shown)
        return good
