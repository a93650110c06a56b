"""What it costs an agent to take, batch, compress, store, read back and forget records.

    python -m records.agent_cost [--rates 1000,5000,20000] [--seconds 8] [--profile]

Why it exists: the outbox is what every record goes through twice. Each case runs in a process of
its own, with the agent's own recorder and store on a real disk; a reader in the place of the uplink
takes each batch and acknowledges it. It must not count what is not the outbox's: the records are
made before, from what this host has to tell, and gRPC and TLS are not in it (see agent_program).

Prints a line of JSON for each case; `cpu_seconds_per_1000` is user and system time of the whole
process, threads and the loop that hands records over included, and `cores` the same over the time
that passed. `syncs` are the commits that waited for the disk, of `commits` in all.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from cluster.progress import Steps
from outrider_agent.core.batching import BatchLimits
from outrider_agent.core.records import RecordClass
from outrider_agent.metrics import AgentMetrics
from outrider_agent.store.recorder import Recorder, RecorderOptions
from outrider_agent.store.store import Store, StoreLimits, open_store
from outrider_proto.v1 import agent_pb2 as pb
from prometheus_client import CollectorRegistry
from records.content import Content
from swarm.profiler import Profiler

MIB = 1024 * 1024
RATES = (1000, 5000, 20_000)
DURABILITIES = ("full", "relaxed")
CODECS = {"zstd": pb.CODEC_ZSTD, "lz4": pb.CODEC_LZ4, "none": pb.CODEC_NONE}
#: Different records; they come again after so many.
MADE = 20_000
TICK_SECONDS = 0.01
#: How much is read at a time, as the uplink does.
READ_BYTES = MIB
WARM_SECONDS = 1.0


class Reader:
    """Reads and acknowledges batches as they are stored."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._came = asyncio.Event()
        self.batches = 0
        self.bytes = 0
        store.on_append = self._came.set

    async def run(self) -> None:
        """For ever."""
        last = 0
        while True:
            self._came.clear()
            while found := await self._store.batches_after(last, READ_BYTES, at_least_one=True):
                last = found[-1].seq
                self.batches += len(found)
                self.bytes += sum(item.size for item in found)
                await self._store.ack_batches(self._store.epoch, found[0].seq, last)
            await self._came.wait()


async def load(recorder: Recorder, made: list[pb.EncodedRecord], rate: int, seconds: float) -> int:
    """Hand records over at a rate; how many were refused."""
    source, refused, given, began = itertools.cycle(made), 0, 0, time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        for _ in range(int(passed * rate) - given):
            refused += not recorder.submit(next(source), RecordClass.TELEMETRY)
            given += 1
        await asyncio.sleep(TICK_SECONDS)
    return refused


async def case(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """One case, in this process."""
    content = Content(seed=1)
    made = [content.record() for _ in range(MADE)]
    process, registry = psutil.Process(), CollectorRegistry()
    metrics = AgentMetrics(registry)
    limits = StoreLimits(256 * MIB, 3600, 100, relaxed=args.durability == "relaxed")
    options = RecorderOptions(BatchLimits(0.1, 512 * 1024), CODECS[args.codec])
    async with open_store(directory, limits, metrics) as store:
        recorder, reader = Recorder(store, options, metrics), Reader(store)
        tasks = [asyncio.create_task(recorder.run()), asyncio.create_task(reader.run())]
        idle_rss = process.memory_info().rss
        await load(recorder, made, args.rate, WARM_SECONDS)

        def now() -> dict[str, float]:
            def of(name: str) -> float:
                return registry.get_sample_value(f"outrider_agent_{name}") or 0.0

            times = process.cpu_times()
            return {
                "wall": time.monotonic(),
                "cpu": times.user + times.system,
                "records": registry.get_sample_value(
                    "outrider_agent_records_total", {"class": "telemetry"}
                )
                or 0.0,
                "batches": reader.batches,
                "bytes": reader.bytes,
                "commits": of("store_commit_seconds_count"),
                "syncs": of("store_syncs_total"),
            }

        before = now()
        refused = await load(recorder, made, args.rate, args.seconds)
        after = now()
        rss = process.memory_info().rss
        await recorder.finish()
        await tasks[0]
        tasks[1].cancel()
    spent = {name: after[name] - before[name] for name in after}
    return {
        "rate": args.rate,
        "durability": args.durability,
        "codec": args.codec,
        "records": int(spent["records"]),
        "refused": refused,
        "cpu_seconds_per_1000": round(spent["cpu"] / spent["records"] * 1000, 5),
        "cores": round(spent["cpu"] / spent["wall"], 4),
        "batches_per_second": round(spent["batches"] / spent["wall"], 1),
        "commits_per_second": round(spent["commits"] / spent["wall"], 1),
        "syncs_per_second": round(spent["syncs"] / spent["wall"], 1),
        "mib_stored_per_second": round(spent["bytes"] / spent["wall"] / MIB, 2),
        "rss_mib": round(rss / MIB, 1),
        "rss_grown_mib": round((rss - idle_rss) / MIB, 1),
    }


def run_case(args: argparse.Namespace, rate: int, durability: str, codec: str) -> dict[str, Any]:
    """One case, in a process of its own."""
    words = ["--rate", str(rate), "--durability", durability, "--codec", codec]
    command = [sys.executable, "-m", "records.agent_cost", *words, "--seconds", str(args.seconds)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    if args.profile:
        time.sleep(WARM_SECONDS + 4)  # the records are made first
        with Profiler.ensure(Steps()).sampling({f"{rate} {durability} {codec}": child.pid}) as seen:
            printed, _ = child.communicate()
        for profile in seen.values():
            sys.stderr.write(profile.text() + "\n")
    else:
        printed, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"the case {' '.join(words)} failed with {child.returncode}")
    found: dict[str, Any] = json.loads(printed)
    return found


def main() -> None:
    """All cases, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--rate", type=int, help="one case only, in this process")
    parser.add_argument("--durability", choices=DURABILITIES)
    parser.add_argument("--codec", choices=CODECS)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--directory", type=Path, help="where the outbox is; default: /var/tmp")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if args.rate:
        with tempfile.TemporaryDirectory(dir=args.directory or "/var/tmp") as folder:
            print(json.dumps(asyncio.run(case(args, Path(folder)))))
        return
    for durability in [args.durability] if args.durability else DURABILITIES:
        for codec in [args.codec] if args.codec else CODECS:
            for rate in map(int, args.rates.split(",")):
                print(json.dumps(run_case(args, rate, durability, codec)), flush=True)


if __name__ == "__main__":
    main()
