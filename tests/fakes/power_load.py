"""A store under load, in a process of its own whose writes are noted; see fakes.power_loss.

python -m fakes.power_load DIRECTORY LOG full|relaxed SECONDS PAUSE
"""

import asyncio
import itertools
import os
import random
import struct
import sys
import time
from pathlib import Path

from fakes.agent_parts import new_batch, store_in
from fakes.power_loss import HEAD
from outrider_agent.core.records import RecordClass
from outrider_agent.store.store import StoreLimits
from outrider_proto.v1 import agent_pb2 as pb

#: A batch is acknowledged when so many came after it: the log is reused, the file's pages too.
KEPT = 200


async def main(directory: Path, log: Path, durability: str, seconds: float, pause: float) -> None:
    sink = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    numbers = itertools.count(1)
    accepted: list[tuple[int, list[int]]] = []

    def note(kind: bytes, values: list[int]) -> None:
        body = struct.pack(f"<{len(values)}Q", *values)
        os.write(sink, HEAD.pack(kind, b"-", time.monotonic(), 0, len(body)) + body)

    limits = StoreLimits(10**9, 3600, 100, relaxed=durability == "relaxed")
    async with store_in(directory, limits) as store:
        end = time.monotonic() + seconds

        async def write() -> None:
            while time.monotonic() < end:
                ids = [next(numbers) for _ in range(random.randint(1, 20))]
                made = [
                    pb.EncodedRecord(data_type=1, timestamp=n, data=random.randbytes(400))
                    for n in ids
                ]
                done = await store.append_batch(new_batch(made, RecordClass.RESULT))
                note(b"A", [done.seq, *ids])
                accepted.append((done.seq, ids))
                await asyncio.sleep(pause)

        async def acknowledge() -> None:
            while time.monotonic() < end:
                while len(accepted) > KEPT:
                    seq, ids = accepted.pop(0)
                    note(b"K", [seq, *ids])
                    await store.ack_batches(store.epoch, seq, seq)
                await asyncio.sleep(0.01)

        await asyncio.gather(write(), write(), write(), acknowledge())


if __name__ == "__main__":
    numbers = [float(word) for word in sys.argv[4:]]
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *numbers))
