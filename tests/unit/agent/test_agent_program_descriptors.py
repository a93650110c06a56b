"""Programs end while other threads open files: nobody's descriptor is closed but our own.

On uvloop, which the agent runs on: it closes the descriptor of a read pipe twice.
"""

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import uvloop
from outrider_agent.core.output import Chunk, Output
from outrider_agent.tasks import processes
from outrider_agent.tasks.program import Children, Program, Started, run_program

ROUNDS, AT_ONCE = 40, 8


@contextmanager
def busy_threads() -> Iterator[list[OSError]]:
    """Threads that open and close files all the time, and the errors that this gave."""
    stop = threading.Event()
    errors: list[OSError] = []

    def work() -> None:
        while not stop.is_set():
            for fd in [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]:
                try:
                    os.close(fd)
                except OSError as error:
                    errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield errors
    finally:
        stop.set()
        for thread in threads:
            thread.join()


async def run_many() -> None:
    children = Children()

    async def on_start(started: Started) -> None: ...

    async def emit(chunk: Chunk) -> None: ...

    async def one(mark: str, threads: ThreadPoolExecutor) -> None:
        environment = {"PATH": os.environ["PATH"], processes.MARK: mark}
        ending = await run_program(
            Program(["true"], environment, mark, 10, 0.1),
            Output(preview_bytes=10, max_bytes=10),
            stop=asyncio.get_running_loop().create_future(),
            children=children,
            threads=threads,
            on_start=on_start,
            emit=emit,
        )
        assert ending.exit_code == 0

    with ThreadPoolExecutor(4) as threads:
        for number in range(ROUNDS):
            await asyncio.gather(*(one(f"{number}-{n}@x", threads) for n in range(AT_ONCE)))


def test_no_descriptor_of_another_thread_is_closed() -> None:
    with busy_threads() as errors, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run_many())
    assert errors == []
