"""Carries out one accepted run: a program, a script in a file of its own, or a builtin.

Turns a RunCommand into a program or a call, and its output into records. Knows no journal: see
`supervisor`.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

from outrider_proto import limits, records
from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.outcome import Cause, Ending, Outcome, classify, start_failure
from outrider_agent.core.output import Chunk, Output, as_text
from outrider_agent.core.records import RecordClass, RecordSink
from outrider_agent.core.runs import key_of
from outrider_agent.tasks import processes
from outrider_agent.tasks.program import Children, Program, Started, StartError, run_program

#: What programs find in PATH unless the task says otherwise.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Longest time that a builtin may take, whatever the task says, seconds.
BUILTIN_SECONDS = 60.0
#: Begin of the names in the work directory that are ours: it may be one that others use too.
SCRIPT_PREFIX = "outrider-run-"

BuiltinFunction = Callable[[], Awaitable[bytes]]


@dataclass(frozen=True)
class Host:
    """Where runs take place.

    Attributes:
        node: Name of the node.
        work_directory: Where scripts are put.
        grace: Seconds between TERM and KILL.
        builtins: What the agent does itself.
        records: Takes the output.
        threads: For calls that block.
        children: The leaders that are waited for by name.
    """

    node: str
    work_directory: Path
    grace: float
    builtins: Mapping[int, BuiltinFunction]
    records: RecordSink
    threads: Executor
    children: Children = field(default_factory=Children)


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
        on_start: Awaited when it has begun, with its process or None for a builtin.
    """
    output = Output(
        preview_bytes=min(command.preview_bytes, limits.PREVIEW_BYTES),
        max_bytes=min(command.max_output_bytes, limits.OUTPUT_BYTES),
    )

    async def emit(chunk: Chunk) -> None:
        await host.records.put(output_record(command, chunk), RecordClass.RESULT)

    if command.WhichOneof("run") == "builtin":
        return await _builtin(command, host, output, on_start=on_start, emit=emit)
    try:
        with _argv(command, host.work_directory) as argv:
            program = Program(
                argv=argv,
                environment=environment(command, host.node),
                mark=processes.mark_for(key_of(command.id), host.node),
                timeout=command.timeout_seconds,
                grace=host.grace,
            )
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


def environment(command: pb.RunCommand, node: str) -> dict[str, str]:
    """The whole environment of a run; little of it is the agent's, and no secret of its."""
    own = {
        # First: it is looked for in every process that a run may have left.
        processes.MARK: processes.mark_for(key_of(command.id), node),
        "OUTRIDER_NODE": node,
        "OUTRIDER_TASK": f"{command.namespace}/{command.name}",
        "OUTRIDER_ATTEMPT": str(command.id.attempt),
    }
    base = {
        "PATH": DEFAULT_PATH,
        "HOME": os.path.expanduser("~"),  # noqa: PTH111 - a string is wanted
        "LANG": os.environ.get("LANG", "C.UTF-8"),
    }
    return {**own, **base, **command.env, **own}


@contextlib.contextmanager
def _argv(command: pb.RunCommand, work_directory: Path) -> Iterator[Sequence[str]]:
    """The arguments of a run; for a script its file is there meanwhile, readable by us only."""
    if command.WhichOneof("run") == "command":
        yield list(command.command.argv)
        return
    work_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=SCRIPT_PREFIX, dir=work_directory))
    try:
        script = directory / "script"
        fd = os.open(script, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(command.script.source)
        yield [*command.script.interpreter, str(script)]
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def clear_scripts(work_directory: Path) -> None:
    """Remove the scripts that an agent that was killed left behind. Blocks."""
    for left in work_directory.glob(f"{SCRIPT_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


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
    for chunk in [*output.feed(printed), *output.flush(last=True)]:
        await emit(chunk)
    return Result(Outcome(pb.RUN_PHASE_SUCCEEDED), Ending(exit_code=0), output)


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
