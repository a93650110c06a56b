"""Carries out one accepted run: a program, a script, a builtin or a task for a plug-in.

Turns a RunCommand into a program or a call, and its output into records. Knows no journal: see
`supervisor`.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from outrider_proto import limits, records
from outrider_proto.v1 import agent_pb2 as pb
from outrider_runtime.logs import get_logger

from outrider_agent.core.outcome import Cause, Ending, Outcome, classify, ended, start_failure
from outrider_agent.core.output import Chunk, Output, as_text
from outrider_agent.core.plugins import PluginError, PluginTasks
from outrider_agent.core.records import RecordClass, RecordSink
from outrider_agent.core.runs import key_of
from outrider_agent.tasks.placing import Place, placed
from outrider_agent.tasks.program import Children, Started, StartError, run_program

log = get_logger("outrider.tasks")

#: How long a run's end waits for its output to be on disk, seconds.
DURABLE_SECONDS = 5.0
#: Longest time that a builtin may take, whatever the task says, seconds.
BUILTIN_SECONDS = 60.0

BuiltinFunction = Callable[[], Awaitable[bytes]]


@dataclass(frozen=True)
class Host:
    """Where runs take place.

    Attributes:
        place: What programs are made with.
        builtins: What the agent does itself.
        records: Takes the output.
        threads: For calls that block.
        children: The leaders that are waited for by name.
        plugins: Who hands tasks to plug-ins; None: there are none.
    """

    place: Place
    builtins: Mapping[int, BuiltinFunction]
    records: RecordSink
    threads: Executor
    children: Children = field(default_factory=Children)
    plugins: PluginTasks | None = None


@dataclass(frozen=True)
class Result:
    """How a run went.

    Attributes:
        outcome: The final word.
        ending: How its process ended; None if there was none, or for a builtin.
        output: What it printed.
    """

    outcome: Outcome
    ending: Ending | None
    output: Output


async def execute(
    command: pb.RunCommand,
    host: Host,
    *,
    stop: asyncio.Future[Cause],
    on_start: Callable[[Started | None], Awaitable[None]],
) -> Result:
    """Carry out a run to its end.

    Args:
        command: An accepted one.
        host: Where.
        stop: Done when it is to be ended early, with the cause.
        on_start: Awaited when it has begun, with its process or None where it has none.

    Returns:
        How it went. Its output is on disk then, or could not be put there in DURABLE_SECONDS.
    """
    result = await _execute(command, host, stop=stop, on_start=on_start)
    if result.output.handed_on:
        # The result tells the server that there is output: it must not be lost by then.
        try:
            async with asyncio.timeout(DURABLE_SECONDS):
                await host.records.flush(RecordClass.RESULT)
        except TimeoutError:
            log.warning("a run's output is not on disk yet", run=str(key_of(command.id)))
    return result


async def _execute(
    command: pb.RunCommand,
    host: Host,
    *,
    stop: asyncio.Future[Cause],
    on_start: Callable[[Started | None], Awaitable[None]],
) -> Result:
    output = Output(
        preview_bytes=min(command.preview_bytes, limits.PREVIEW_BYTES),
        max_bytes=min(command.max_output_bytes, limits.OUTPUT_BYTES),
    )

    async def emit(chunk: Chunk) -> None:
        await host.records.put(output_record(command, chunk), RecordClass.RESULT)

    if command.WhichOneof("run") == "builtin":
        return await _builtin(command, host, output, on_start=on_start, emit=emit)
    if command.WhichOneof("run") == "plugin":
        return await _plugin(command, host, output, stop=stop, on_start=on_start, emit=emit)
    try:
        with placed(command, host.place) as program:
            ending = await run_program(
                program,
                output,
                stop=stop,
                children=host.children,
                threads=host.threads,
                on_start=on_start,
                emit=emit,
            )
    except StartError as error:
        return Result(error.outcome, None, output)
    except OSError as error:  # the script's file
        text = f"{error.strerror or error} ({error.filename})"
        return Result(start_failure("script", None, text), None, output)
    return Result(classify(ending, timeout_seconds=command.timeout_seconds), ending, output)


async def _builtin(
    command: pb.RunCommand,
    host: Host,
    output: Output,
    *,
    on_start: Callable[[Started | None], Awaitable[None]],
    emit: Callable[[Chunk], Awaitable[None]],
) -> Result:
    await on_start(None)
    try:
        async with asyncio.timeout(min(command.timeout_seconds, BUILTIN_SECONDS)):
            printed = await host.builtins[command.builtin]()
    except TimeoutError:
        ending = Ending(cause=Cause.TIMEOUT)
        return Result(classify(ending, timeout_seconds=command.timeout_seconds), None, output)
    except OSError as error:
        outcome = Outcome(pb.RUN_PHASE_FAILED, "BuiltinFailed", str(error))
        return Result(outcome, None, output)
    await _print(printed, output, emit)
    return Result(Outcome(pb.RUN_PHASE_SUCCEEDED), Ending(exit_code=0), output)


async def _print(printed: bytes, output: Output, emit: Callable[[Chunk], Awaitable[None]]) -> None:
    for chunk in [*output.feed(printed), *output.flush(last=True)]:
        await emit(chunk)
        output.handed_on += len(chunk.data)


async def _plugin(
    command: pb.RunCommand,
    host: Host,
    output: Output,
    *,
    stop: asyncio.Future[Cause],
    on_start: Callable[[Started | None], Awaitable[None]],
    emit: Callable[[Chunk], Awaitable[None]],
) -> Result:
    """Hand a task to a plug-in; the fields of its answer are the output, as JSON."""
    await on_start(None)
    task = command.plugin
    if host.plugins is None:
        outcome = Outcome(pb.RUN_PHASE_FAILED, "UnknownPlugin", "this agent has no plug-ins")
        return Result(outcome, None, output)
    asking = asyncio.ensure_future(
        host.plugins.ask(task.name, task.data_type, task.data, float(command.timeout_seconds))
    )
    try:
        ends: set[asyncio.Future[Any]] = {asking, stop}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            ending = Ending(cause=stop.result())
            return Result(classify(ending, timeout_seconds=command.timeout_seconds), None, output)
        answer = await asking
    except PluginError as error:
        late = error.reason == "NoAnswer"
        phase = pb.RUN_PHASE_TIMED_OUT if late else pb.RUN_PHASE_FAILED
        reason = "DeadlineExceeded" if late else error.reason
        return Result(Outcome(phase, reason, str(error)), None, output)
    finally:
        asking.cancel()
    text = json.dumps(answer, ensure_ascii=False, sort_keys=True) + "\n"
    await _print(text.encode("utf-8", "replace"), output, emit)
    return Result(Outcome(pb.RUN_PHASE_SUCCEEDED), Ending(exit_code=0), output)


def with_result(state: pb.RunState, result: Result) -> pb.RunState:
    """A run's final state."""
    after = ended(state, result.outcome, time.time_ns())
    after.preview = result.output.preview
    after.output_bytes = result.output.total
    after.output_truncated = result.output.truncated
    if result.ending is not None:
        if result.ending.exit_code is not None:
            after.exit_code = result.ending.exit_code
        after.signal = result.ending.signal
    return after


def output_record(command: pb.RunCommand, chunk: Chunk) -> pb.EncodedRecord:
    """A piece of a run's output as a record."""
    text, encoding = as_text(chunk.data)
    return records.payload(
        records.TASK_OUTPUT,
        int(time.time()),
        {
            "task_uid": command.id.task_uid,
            "namespace": command.namespace,
            "task": command.name,
            "attempt": str(command.id.attempt),
            "offset": str(chunk.offset),
            "encoding": encoding,
            "output": text,
        },
    )
