"""Records as lines of JSON, between the readers beside the servers and the command line.

Which records are wanted, and how one looks on its way; the files of a sink that go on growing.
Knows no broker and no cluster.
"""

import base64
import binascii
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from outrider_proto.batches import BatchError
from outrider_proto.records import Decoded, decode_stored, fields_of
from outrider_proto.stored import Parser, files_in

#: Read from a file at a time, bytes.
CHUNK: Final = 64 * 1024
#: What a server took at a time is in files written then or later; their times are rounded, seconds.
FILE_SLACK_SECONDS: Final = 2.0
_NANOS: Final = 1_000_000_000


@dataclass(frozen=True)
class Wanted:
    """Which records are looked for.

    Attributes:
        nodes: Names of nodes; empty for all.
        data_types: Data types; empty for all.
        since: Only what servers took then or later, seconds since the Unix epoch.
    """

    nodes: frozenset[str] = frozenset()
    data_types: frozenset[int] = frozenset()
    since: float = 0.0

    def may_be_in(self, node: str, data_types: Iterable[int], server_unix_nanos: int) -> bool:
        """Whether a batch may hold some, by what it says; it may name 0, for others, or no type."""
        if self.nodes and node not in self.nodes:
            return False
        # Where each record is a message its time has whole seconds only.
        whole = server_unix_nanos % _NANOS == 0
        if server_unix_nanos < (math.floor(self.since) if whole else self.since) * _NANOS:
            return False
        named = set(data_types)
        return not self.data_types or not named or 0 in named or bool(self.data_types & named)


@dataclass(frozen=True)
class Line:
    """One record with where it came from.

    Attributes:
        agent: UID of the Node.
        node: Name of the Node.
        epoch: With `agent`, `seq` and `index` it names the record, to tell repeats.
        seq: Number of its batch.
        index: Its place in the batch.
        count: Records of the batch; 0 where that is not known.
        data_type: Data type.
        timestamp: When it was made on the host, seconds since the Unix epoch.
        server_unix_nanos: When the server took it, nanoseconds since the Unix epoch.
        fields: Names and values; None where it holds something else.
        data: What it holds then.
    """

    agent: str
    node: str
    epoch: int
    seq: int
    index: int
    count: int
    data_type: int
    timestamp: int
    server_unix_nanos: int
    fields: dict[str, str] | None
    data: bytes = b""


def lines_of(batch: Decoded, wanted: Wanted) -> Iterator[Line]:
    """The wanted records of a batch."""
    if not wanted.may_be_in(batch.node, (), batch.server_unix_nanos):
        return
    for number, record in enumerate(batch.records):
        if wanted.data_types and record.data_type not in wanted.data_types:
            continue
        try:
            fields, data = fields_of(record), b""
        except BatchError:
            fields, data = None, record.data
        yield Line(
            batch.agent_id,
            batch.node,
            batch.epoch,
            batch.seq,
            number if batch.index is None else batch.index,
            batch.count,
            record.data_type,
            record.timestamp,
            batch.server_unix_nanos,
            fields,
            data,
        )


def to_line(line: Line) -> str:
    """A record as a line of JSON, without its end."""
    found: dict[str, object] = {
        "agent": line.agent,
        "node": line.node,
        "epoch": line.epoch,
        "seq": line.seq,
        "index": line.index,
        "count": line.count,
        "type": line.data_type,
        "timestamp": line.timestamp,
        "serverNanos": line.server_unix_nanos,
    }
    if line.fields is not None:
        found["fields"] = line.fields
    else:
        found["data"] = base64.b64encode(line.data).decode("ascii")
    return json.dumps(found, ensure_ascii=False)


def from_json(found: dict[str, object]) -> Line:
    """A record from its line, once that is decoded.

    Raises:
        ValueError: It is something else.
    """
    try:
        fields = found.get("fields")
        if fields is not None and not isinstance(fields, dict):
            raise TypeError("fields")
        numbers = [
            found[name]
            for name in ("epoch", "seq", "index", "count", "type", "timestamp", "serverNanos")
        ]
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("number")
        data = base64.b64decode(str(found.get("data", "")), validate=True)
        epoch, seq, index, count, data_type, timestamp, nanos = map(int, map(str, numbers))
        return Line(
            str(found["agent"]),
            str(found["node"]),
            epoch,
            seq,
            index,
            count,
            data_type,
            timestamp,
            nanos,
            None if fields is None else {str(name): str(text) for name, text in fields.items()},
            data,
        )
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"no record: {error!r}") from error


class Folder:
    """The files of a file sink, read once through and then on as they grow.

    Args:
        path: Where they are.
        wanted: Which records.
    """

    def __init__(self, path: Path, wanted: Wanted) -> None:
        self._path = path
        self._wanted = wanted
        self._done = ""
        self._open: tuple[str, IO[bytes], Parser] | None = None

    def read(self, problems: list[str]) -> Iterator[Line | None]:
        """What there is beyond what was read before; None now and then where nothing is wanted.

        Args:
            problems: What could not be read is added here, a sentence each; the rest is read on.

        Raises:
            OSError: The folder cannot be read.
        """
        paths = [path for path in files_in(self._path) if _key(path) > self._done]
        if self._open is not None and self._open[0] not in {path.name for path in paths}:
            # What is in it can still be read, while it is open here.
            gone, file = self._path / self._open[0], self._open[1]
            if file.tell() < os.fstat(file.fileno()).st_size:
                problems.append(
                    f"{gone.name} was deleted before it was read, to stay within the bound: "
                    "what came after it may be missing"
                )
            try:
                yield from self._read_file(gone, problems, last=False)
            except (OSError, BatchError) as error:
                problems.append(f"{gone.name}: {error}")
            self._finish(gone)
        for path in paths:
            last = path == paths[-1]
            try:
                yield from self._read_file(path, problems, last=last)
            except FileNotFoundError:
                problems.append(f"{path.name} was deleted meanwhile, to stay within the bound")
                self._finish(path)
            except (OSError, BatchError) as error:
                problems.append(f"{path.name}: {error}")
                self._finish(path)
            else:
                # After the last one more may come; before it nothing is written any more.
                if not last:
                    self._finish(path)

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _finish(self, path: Path) -> None:
        self._done = _key(path)
        self.close()

    def _read_file(self, path: Path, problems: list[str], *, last: bool) -> Iterator[Line | None]:
        if self._open is None or self._open[0] != path.name:
            self.close()
            if not last and path.stat().st_mtime < self._wanted.since - FILE_SLACK_SECONDS:
                return
            self._open = (path.name, path.open("rb"), Parser())
        _, file, parser = self._open
        while data := file.read(CHUNK):
            yield None
            for stored in parser.feed(data):
                # Most batches need not be opened.
                types, time = stored.batch.data_types, stored.server_unix_nanos
                if not self._wanted.may_be_in(stored.node, types, time):
                    continue
                try:
                    batch = decode_stored(stored)
                except BatchError as error:
                    name = f"batch {stored.batch.epoch}/{stored.batch.seq} of {stored.node}"
                    problems.append(f"{path.name}: {name}: {error}")
                else:
                    yield from lines_of(batch, self._wanted)


def _key(path: Path) -> str:
    return path.name.partition(".")[0]
