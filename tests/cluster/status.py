"""What the cluster's processes use: a table of count, CPU and memory by program."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from cluster import api, cgroups, network


@dataclass
class Usage:
    """What one program's processes use together: CPU in clock ticks, memory in KiB."""

    count: int = 0
    ticks: int = 0
    resident: int = 0
    proportional: int = 0


def _sample() -> dict[int, tuple[str, int, int, int]]:
    """Of each process its program, clock ticks so far, resident and proportional KiB."""
    found = {}
    for pid in cgroups.processes():
        process = Path(f"/proc/{pid}")
        try:
            stat = (process / "stat").read_text().rsplit(")", 1)[1].split()
            name = (process / "comm").read_text().strip()
            sizes = re.findall(
                r"^Rss(?:Anon|File|Shmem):\s+(\d+)", (process / "status").read_text(), re.MULTILINE
            )
            rollup = (process / "smaps_rollup").read_text()
        except OSError:
            continue
        share = re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)
        ticks = int(stat[11]) + int(stat[12])
        proportional = int(share[1]) if share else 0
        found[pid] = (name, ticks, sum(map(int, sizes)), proportional)
    return found


def show(seconds: float) -> None:
    """Print what is used over some seconds, the nodes' readiness and the partitions."""
    before = _sample()
    time.sleep(seconds)
    rows: defaultdict[str, Usage] = defaultdict(Usage)
    for pid, (name, ticks, resident, proportional) in _sample().items():
        for row in (rows[name], rows["total"]):
            row.count += 1
            row.ticks += ticks - before.get(pid, ("", ticks, 0, 0))[1]
            row.resident += resident
            row.proportional += proportional
    print(f"{'program':20}{'count':>6}{'CPU %':>8}{'RSS MiB':>9}{'PSS MiB':>9}")
    per_second = os.sysconf("SC_CLK_TCK")
    for name, row in sorted(rows.items(), key=lambda r: (r[0] == "total", -r[1].resident)):
        cpu = row.ticks / per_second / seconds * 100
        memory = f"{row.resident / 1024:9.0f}{row.proportional / 1024:9.0f}"
        print(f"{name:20}{row.count:6}{cpu:8.1f}{memory}")
    print("nodes ready:", api.ready_nodes())
    print("cut off:", network.partitions())
