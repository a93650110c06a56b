"""Prints records from where this server's sink stored them, and goes on as they come.

    python -m outrider_operator.records [--node NAME] [--type N] [--since T | --last S] [--follow]

`kubectl outrider records` runs it in server Pods: with the file sink each replica has what its own
agents sent. Prints lines of JSON: first one that tells the sink, then one for each record, repeats
left out, with others between that tell problems or that it is still there; at the end one that
says so, without which a reader knows that it has not got all. Ends when nobody reads. Writes
nothing, joins no group; its memory and its turns on the processor are the server's, so it takes
little of the one and waits with the other.
"""

import argparse
import asyncio
import contextlib
import json
import os
import select
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from outrider_proto.lines import Folder, Line, Wanted, to_line
from outrider_proto.repeats import Repeats
from outrider_runtime.settings import SettingsError

from outrider_operator.core.sink import SinkUnavailableError
from outrider_operator.output import read_settings
from outrider_operator.settings import ServerSettings

#: A folder is looked at again so often, seconds.
POLL_SECONDS: Final = 0.3
#: A line comes at least so often, seconds: a reader knows that this one is there.
ALIVE_SECONDS: Final = 5.0
#: Problems that are told in so many lines at most; more say nothing new.
MAX_PROBLEMS: Final = 100
#: The same problem is told again after this time, seconds.
AGAIN_SECONDS: Final = 60.0
#: Lines are handed on at once, or so many together while there are more, bytes.
BLOCK_BYTES: Final = 64 * 1024
#: Lives of agents whose repeats are known: those of a few thousand nodes.
MAX_LIVES: Final = 10_000


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 when records cannot be read at all, 2 for wrong settings or flags."""
    parser = argparse.ArgumentParser(
        prog="python -m outrider_operator.records", description=__doc__
    )
    parser.add_argument("--node", action="append", default=[], help="only of this Node; repeatable")
    parser.add_argument(
        "--type", action="append", default=[], type=int, help="only of this data type; repeatable"
    )
    parser.add_argument(
        "--since", type=float, default=0.0, help="only taken since then, seconds since the epoch"
    )
    parser.add_argument("--last", type=float, help="only taken in the last so many seconds")
    parser.add_argument("--follow", action="store_true", help="go on as records come")
    arguments, rest = parser.parse_known_args(argv)
    since = arguments.since if arguments.last is None else time.time() - arguments.last
    wanted = Wanted(frozenset(arguments.node), frozenset(arguments.type), since)
    with contextlib.suppress(OSError):
        os.nice(5)  # the server comes first
    try:
        settings = read_settings("outrider_operator.records", rest)
        return asyncio.run(_Printer(settings, follow=arguments.follow).run(wanted))
    except SettingsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (BrokenPipeError, KeyboardInterrupt):
        # Nobody reads any more. What Python would still flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, SinkUnavailableError) as error:
        sys.stderr.write(f"error: the records cannot be read: {error}\n")
        return 1


class _Printer:
    """Prints what one source has."""

    def __init__(self, settings: ServerSettings, *, follow: bool) -> None:
        self._settings = settings
        self._follow = follow
        self._problems: list[str] = []
        self._told = 0
        self._problem, self._problem_at = "", 0.0
        self._repeats = Repeats(MAX_LIVES)
        self._waiting: list[str] = []
        self._size = 0
        self._said_at = time.monotonic()
        self._poll = select.poll()
        self._poll.register(sys.stdout.fileno(), 0)

    async def run(self, wanted: Wanted) -> int:
        """Print all of it; returns the exit code.

        Raises:
            BrokenPipeError: Nobody reads.
            OSError: The folder cannot be read.
            SinkUnavailableError: Kafka cannot be read.
        """
        kind = self._settings.sink.kind
        self._say(json.dumps({"begin": True, "sink": kind}))
        self._flush()
        if kind == "kafka":
            # Imported here: with the file sink its memory is better left to the server.
            from outrider_operator.sinks import kafka_tail

            settings = self._settings.sink.kafka
            source = kafka_tail.lines(settings, wanted, self._problems, follow=self._follow)
        else:
            source = self._files(wanted)
        async for line in source:
            self._take(line)
        self._tell_problems()
        self._say(json.dumps({"end": True, "sink": kind}))
        self._flush()
        return 0

    async def _files(self, wanted: Wanted) -> AsyncIterator[Line | None]:
        path = Path(self._settings.sink.file.directory)
        folder = Folder(path, wanted)
        while True:
            # Without the folder this replica has never stored anything.
            with contextlib.suppress(FileNotFoundError):
                for line in folder.read(self._problems):
                    yield line
            if not self._follow:
                return
            yield None
            await asyncio.sleep(POLL_SECONDS)

    def _take(self, line: Line | None) -> None:
        self._tell_problems()
        if line is None:
            if time.monotonic() - self._said_at >= ALIVE_SECONDS:
                self._say(json.dumps({"alive": True}))
            self._flush()
            if self._poll.poll(0):
                raise BrokenPipeError
            return
        new = self._repeats.is_new(line.agent, line.epoch, line.seq, line.index, line.count)
        if new:
            self._say(to_line(line))
            if self._size >= BLOCK_BYTES:
                self._flush()

    def _tell_problems(self) -> None:
        for problem in self._problems:
            again = problem == self._problem and time.monotonic() < self._problem_at + AGAIN_SECONDS
            if self._told < MAX_PROBLEMS and not again:
                self._told += 1
                self._problem, self._problem_at = problem, time.monotonic()
                self._say(json.dumps({"problem": problem}))
        self._problems.clear()

    def _say(self, text: str) -> None:
        self._waiting.append(text + "\n")
        self._size += len(text)
        self._said_at = time.monotonic()

    def _flush(self) -> None:
        sys.stdout.write("".join(self._waiting))
        sys.stdout.flush()
        self._waiting.clear()
        self._size = 0


if __name__ == "__main__":
    sys.exit(main())
