"""Runs a collector again and again, in a thread of its own, without ever overlapping itself.

A collection that hangs (a dead network file system) costs one thread and its own records, nothing
else.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from outrider_proto import records
from outrider_runtime.logs import get_logger

from outrider_agent.core.records import RecordClass, RecordSink
from outrider_agent.metrics import AgentMetrics

log = get_logger("outrider.collectors")

#: A collection that takes longer is told; it goes on, and the next one waits for it, seconds.
SLOW_SECONDS = 10.0


async def collect_forever(
    name: str,
    data_type: int,
    interval: float,
    collect: Callable[[], dict[str, str]],
    sink: RecordSink,
    metrics: AgentMetrics,
) -> None:
    """Make a record of what `collect` returns now and after each interval.

    Args:
        name: For metrics and logs; a constant.
        data_type: Type of the records.
        interval: Seconds from one begin to the next.
        collect: Gathers; may block.
        sink: Takes the records.
        metrics: Count.
    """
    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    failing = False
    try:
        while True:
            began = time.monotonic()
            work = loop.run_in_executor(threads, collect)
            try:
                done, _ = await asyncio.wait({work}, timeout=SLOW_SECONDS)
                if not done:
                    log.warning("collector is slow", collector=name, seconds=SLOW_SECONDS)
                fields = await work
            except Exception as error:  # noqa: BLE001 - hosts differ: one reading less, told once
                metrics.collection_failures.labels(name).inc()
                if not failing:
                    log.warning("collector failed", collector=name, error=repr(error))
                failing = True
            else:
                failing = False
                metrics.collections.labels(name).observe(time.monotonic() - began)
                record = records.payload(data_type, int(time.time()), fields)
                sink.submit(record, RecordClass.TELEMETRY)
            await asyncio.sleep(max(0.0, began + interval - time.monotonic()))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
