"""The power goes, or the agent is killed, at any moment of a load: nothing that was stored is lost.

Every record has an id of its own and is counted. Which moments, and which sectors of what was not
synced reached the disk, is chosen at random; a failure names the seed.
"""

import asyncio
import random
import shutil
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from fakes.agent_parts import batch_of, store_in
from fakes.power_loss import Disk, Entry, record
from outrider_proto import batches

MOMENTS = 8
#: Most that `relaxed` may lose, seconds.
LATE = 1.0
#: A process that got no processor for so long could not have synced anything, seconds.
STALL = 0.25


@pytest.fixture
def scratch() -> Iterator[Path]:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def calm(log: list[Entry], moment: int) -> bool:
    """Whether the process ran without a stall before that moment."""
    times = [entry.time for entry in log[: moment + 1]]
    recent = times[bisect(times, times[-1] - 2 * LATE) :]
    return all(later - earlier < STALL for earlier, later in pairwise(recent))


class Found:
    """What is in the files at some moment."""

    def __init__(self, directory: Path) -> None:
        self.ids, self.next_seq = asyncio.run(self._read(directory))

    async def _read(self, directory: Path) -> tuple[Counter[int], int]:
        ids: Counter[int] = Counter()
        async with store_in(directory) as store:
            assert store.damaged is None
            for waiting in await store.batches_after(0, 10**9):
                ids.update(r.timestamp for r in batches.decode(waiting.batch))
            return ids, (await store.append_batch(batch_of("next"))).seq


def expected(log: list[Entry], moment: int, late: float) -> set[int]:
    """Ids of what had been stored, but for the last seconds of it, and was not acknowledged."""
    now, ids = log[moment].time, set[int]()
    for entry in log[: moment + 1]:
        if entry.kind == b"A" and entry.time <= now - late:
            ids.update(entry.numbers[1:])
        elif entry.kind == b"K":
            ids.difference_update(entry.numbers[1:])
    return ids


def check(found: Found, log: list[Entry], moment: int, late: float) -> None:
    wanted = expected(log, moment, late)
    assert wanted - set(found.ids) == set(), "stored records are missing"
    assert max(found.ids.values(), default=1) == 1, "records are there twice"
    given = [e.numbers[0] for e in log[: moment + 1] if e.kind == b"A"]
    assert found.next_seq > max(given, default=0), "the number of a batch is given twice"


# The second load is slow enough for the log not to be moved into the file, which syncs it, all the
# time: what syncs it within a second is looked for.
@pytest.mark.parametrize(
    ("durability", "seconds", "pause"), [("full", 1.5, 0.002), ("relaxed", 4.0, 0.03)]
)
def test_any_moment(scratch: Path, durability: str, seconds: float, pause: float) -> None:
    seed = random.randrange(10**9)
    rng = random.Random(seed)
    log = record(scratch, durability, seconds, pause)
    begun = next(n for n, entry in enumerate(log) if entry.kind == b"A")
    # The checkpoint and the reuse of the log are the delicate parts: they have to be in it.
    assert any(e.kind == b"s" and e.file == b"d" for e in log[begun:])
    late = LATE if durability == "relaxed" else 0.0
    power_cuts = 0
    moments = sorted(rng.sample(range(begun, len(log)), MOMENTS))
    disk, place = Disk(), 0
    for moment in moments:
        for entry in log[place : moment + 1]:
            disk.take(entry)
        place = moment + 1
        folder = scratch / "after"
        disk.killed(folder)
        check(Found(folder), log, moment, 0.0)
        shutil.rmtree(folder)
        if late and not calm(log, moment):
            continue
        power_cuts += 1
        for cut in (disk.without_power, disk.cut_short):
            cut(folder, rng)
            try:
                check(Found(folder), log, moment, late)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, moment {moment}: {error}") from error
            shutil.rmtree(folder)
    assert power_cuts, "the machine was too busy for any moment to say something"
