"""Prints the full output of a task on one node, from where this server's sink stored it.

    python -m outrider_operator.output --task-uid UID --node NODE [--attempt N] [--since SECONDS]

`kubectl outrider output` runs it in each server Pod: with the file sink each replica has the
batches that its own agents sent. Prints a line of JSON for each piece, then one that tells the
sink and what could not be read; a reader that misses that last line knows that it has not got
all. The sink and its addresses come from the server's settings. Writes nothing, joins no group.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from outrider_proto.output import Piece, Wanted, read_directory, to_line
from outrider_runtime.settings import SettingsError, load

from outrider_operator.core.sink import SinkUnavailableError
from outrider_operator.settings import KafkaSinkSettings, ServerSettings

#: Where the chart puts the server's settings.
SETTINGS_FILE: Final = "/etc/outrider/server.yaml"
#: Problems that are told; more say nothing new.
MAX_PROBLEMS: Final = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 when the records cannot be read at all, 2 for wrong settings or flags."""
    parser = argparse.ArgumentParser(prog="python -m outrider_operator.output", description=__doc__)
    parser.add_argument("--task-uid", required=True, help="UID of the AgentTask")
    parser.add_argument("--node", required=True, help="name of the Node")
    parser.add_argument("--attempt", type=int, default=0, help="which attempt; 0: all of them")
    parser.add_argument(
        "--since", type=float, default=0.0, help="when the task was made, seconds since the epoch"
    )
    arguments, rest = parser.parse_known_args(argv)
    wanted = Wanted(arguments.task_uid, arguments.node, arguments.attempt, arguments.since)
    try:
        return _print(read_settings("outrider_operator.output", rest), wanted)
    except SettingsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (OSError, SinkUnavailableError) as error:
        sys.stderr.write(f"error: the records cannot be read: {error}\n")
        return 1


def read_settings(program: str, argv: Sequence[str]) -> ServerSettings:
    """The settings of the server that runs beside this program.

    Raises:
        SettingsError: They cannot be used.
    """
    environ = dict(os.environ)
    if Path(SETTINGS_FILE).exists():
        environ.setdefault("OUTRIDER_CONFIG", SETTINGS_FILE)
    return load(
        ServerSettings,
        program=program,
        version=version("outrider-operator"),
        argv=argv,
        environ=environ,
    )


def _print(settings: ServerSettings, wanted: Wanted) -> int:
    problems: list[str] = []
    writer = _Writer()
    if settings.sink.kind == "kafka":
        asyncio.run(_print_kafka(settings.sink.kafka, wanted, problems, writer))
    else:
        folder = Path(settings.sink.file.directory)
        # Without it this replica has never stored anything.
        for piece in read_directory(folder, wanted, problems) if folder.is_dir() else ():
            writer.write(piece)
    end = {"end": True, "sink": settings.sink.kind, "problems": problems[:MAX_PROBLEMS]}
    sys.stdout.write(json.dumps(end) + "\n")
    sys.stdout.flush()
    return 0


class _Writer:
    """Prints pieces as they are found, each once: the Pod's memory is the server's."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int, int]] = set()

    def write(self, piece: Piece) -> None:
        name = (piece.attempt, piece.offset, len(piece.data))
        if name not in self._seen:
            self._seen.add(name)
            sys.stdout.write(to_line(piece) + "\n")


async def _print_kafka(
    settings: KafkaSinkSettings, wanted: Wanted, problems: list[str], writer: _Writer
) -> None:
    # Imported here: with the file sink its memory is better left to the server.
    from outrider_operator.sinks.kafka_reader import pieces

    async for piece in pieces(settings, wanted, problems):
        writer.write(piece)


if __name__ == "__main__":
    sys.exit(main())
