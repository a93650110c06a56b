"""A run's full output, put together again from the records it travelled in.

Used where the records are read: beside the file sink and by people's tools. Knows no broker and no
cluster. Records may come twice and in any order; the offsets in them say where they belong.
"""

import base64
import binascii
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from outrider_proto import batches
from outrider_proto.records import TASK_OUTPUT, Decoded, decode_stored, fields_of
from outrider_proto.stored import files_in, read_stored

#: A file that was last written so long before a run began holds nothing of it, seconds: more than
#: the clocks of two machines differ by.
CLOCK_SLACK_SECONDS: Final = 900.0


@dataclass(frozen=True)
class Wanted:
    """Which output is looked for.

    Attributes:
        task_uid: UID of the task.
        node: Name of the node.
        attempt: Number of the attempt; 0 for every attempt.
        since: When the task was made, seconds since the Unix epoch; 0 to look through everything.
    """

    task_uid: str
    node: str
    attempt: int = 0
    since: float = 0.0

    @property
    def not_before(self) -> float:
        """What was stored before this time is of no interest, seconds since the Unix epoch."""
        return max(0.0, self.since - CLOCK_SLACK_SECONDS) if self.since else 0.0


@dataclass(frozen=True, order=True)
class Piece:
    """A part of the output of an attempt; `offset` in bytes."""

    attempt: int
    offset: int
    data: bytes

    @property
    def end(self) -> int:
        """The offset after its last byte."""
        return self.offset + len(self.data)


@dataclass(frozen=True)
class Joined:
    """Output as far as it is there.

    Attributes:
        parts: What follows one another, as (offset, bytes); more than one only with gaps between.
    """

    parts: tuple[tuple[int, bytes], ...]

    @property
    def data(self) -> bytes:
        """All that is there, gaps left out."""
        return b"".join(data for _, data in self.parts)

    def missing(self, total: int) -> list[tuple[int, int]]:
        """The ranges [from, to) of the first `total` bytes that are not there."""
        gaps, at = [], 0
        for offset, data in self.parts:
            if offset > at:
                gaps.append((at, min(offset, max(total, at))))
            at = offset + len(data)
        if at < total:
            gaps.append((at, total))
        return [gap for gap in gaps if gap[0] < gap[1]]


def join(pieces: Iterable[Piece]) -> Joined:
    """Put pieces of one attempt in order; repeats and overlaps count once."""
    parts: list[tuple[int, bytearray]] = []
    at = 0
    for piece in sorted(pieces, key=lambda piece: (piece.offset, -len(piece.data))):
        if not piece.data or (parts and piece.end <= at):
            continue
        if not parts or piece.offset > at:
            parts.append((piece.offset, bytearray(piece.data)))
        else:
            parts[-1][1].extend(piece.data[at - piece.offset :])
        at = piece.end
    return Joined(tuple((offset, bytes(data)) for offset, data in parts))


def may_hold_output(data_types: Iterable[int]) -> bool:
    """Whether a batch that names these data types may hold output; 0 stands for unnamed ones."""
    return not {0, TASK_OUTPUT}.isdisjoint(data_types)


def pieces_of(batch: Decoded, wanted: Wanted) -> Iterator[Piece]:
    """The pieces of the wanted output in a batch.

    Raises:
        batches.BatchError: A record of an output is damaged.
    """
    if batch.node != wanted.node:
        return
    for record in batch.records:
        if record.data_type != TASK_OUTPUT:
            continue
        fields = fields_of(record)
        if fields.get("task_uid") != wanted.task_uid:
            continue
        piece = _piece(fields)
        if wanted.attempt in (0, piece.attempt):
            yield piece


def _piece(fields: dict[str, str]) -> Piece:
    try:
        text = fields["output"]
        plain = fields.get("encoding", "utf-8") == "utf-8"
        data = text.encode() if plain else base64.b64decode(text, validate=True)
        return Piece(int(fields["attempt"]), int(fields["offset"]), data)
    except (KeyError, ValueError, binascii.Error) as error:
        raise batches.BatchError(f"a record of an output is damaged: {error!r}") from None


def to_line(piece: Piece) -> str:
    """A piece as a line of JSON, without its end."""
    data = base64.b64encode(piece.data).decode("ascii")
    return json.dumps({"attempt": piece.attempt, "offset": piece.offset, "data": data})


def from_line(line: str) -> Piece:
    """A piece from its line of JSON.

    Raises:
        ValueError: It is something else.
    """
    try:
        found = json.loads(line)
        data = base64.b64decode(found["data"], validate=True)
        return Piece(int(found["attempt"]), int(found["offset"]), data)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no piece of an output: {line[:80]!r}") from error


def read_directory(folder: Path, wanted: Wanted, problems: list[str]) -> Iterator[Piece]:
    """The pieces of the wanted output in the files of a file sink, oldest file first.

    Args:
        folder: Where its files are.
        wanted: Which output.
        problems: What could not be read is added here, a sentence each; the rest is read on.

    Raises:
        OSError: The folder cannot be read.
    """
    for path in files_in(folder):
        try:
            if path.stat().st_mtime >= wanted.not_before:
                yield from _read_file(path, wanted)
        except FileNotFoundError:
            problems.append(f"{path.name} was deleted meanwhile, to stay within the bound")
        except (OSError, batches.BatchError) as error:
            problems.append(f"{path.name}: {error}")


def _read_file(path: Path, wanted: Wanted) -> Iterator[Piece]:
    with path.open("rb") as file:
        for stored in read_stored(file):
            # Most batches need not be opened.
            if stored.node == wanted.node and may_hold_output(stored.batch.data_types):
                yield from pieces_of(decode_stored(stored), wanted)
