"""The life of a program: event loop, signals, exit code.

A program is one coroutine that owns all its parts in a TaskGroup. It is handed a `Stop` event and
returns once it has stopped in order; the first error in it ends all, and its cause is the last
line of the log.
"""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import structlog
import uvloop

from outrider_runtime.settings import SettingsError

#: Exit codes, as of most command-line programs.
OK, FAILURE, USAGE = 0, 1, 2


class Stop(asyncio.Event):
    """Set when the program is asked to stop; `reason` names the signal."""

    reason: str = ""

    def request(self, reason: str) -> None:
        """Ask the program to stop."""
        if not self.is_set():
            self.reason = reason
            self.set()


def first_cause(error: BaseException) -> BaseException:
    """The first error inside nested exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def run(program: Callable[[Stop], Awaitable[None]], log: structlog.stdlib.BoundLogger) -> int:
    """Run a program until it ends or is told to by SIGTERM or SIGINT.

    The first signal sets the program's `Stop`; a second one cancels it.

    Returns:
        The exit code: 0 after an orderly end, 2 for wrong settings, 1 for any other error.
    """
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_supervise(program, log))
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the end of the program
        return _report(error, log)
    log.info("stopped")
    return OK


async def _supervise(
    program: Callable[[Stop], Awaitable[None]], log: structlog.stdlib.BoundLogger
) -> None:
    stop = Stop()
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(program(stop))

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("stopping at once", signal=number.name)
            task.cancel()
        else:
            log.info("stopping", signal=number.name)
            stop.request(number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await task


def _report(error: BaseException, log: structlog.stdlib.BoundLogger) -> int:
    cause = first_cause(error)
    if isinstance(cause, SettingsError):
        log.error("wrong settings", error=str(cause))
        return USAGE
    if isinstance(cause, asyncio.CancelledError):
        log.error("stopped before everything was in order")
        return FAILURE
    log.debug("traceback of the failure", exc_info=cause)
    log.error("failed", error=f"{type(cause).__name__}: {cause}")
    return FAILURE
