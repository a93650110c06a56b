"""Files of exported records: JSON Lines and Parquet. A file gets its name once it is whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from outrider_proto.lines import Line

from outrider_cli import terminal
from outrider_cli.core.records import for_programs
from outrider_cli.errors import UsageError

#: Records in a row group of Parquet, and bytes of their content: what is held in memory.
GROUP_RECORDS: Final = 10_000
GROUP_BYTES: Final = 16 * 1024 * 1024
#: Times beyond this have no place in a column of milliseconds, seconds since the epoch.
MAX_SECONDS: Final = (2**63 - 1) // 1000


class Writer(Protocol):
    """Takes records one by one."""

    def write(self, line: Line) -> None:
        """Add a record."""


@contextlib.contextmanager
def writing(form: str, name: str) -> Iterator[Writer]:
    """Write a file of records.

    Args:
        form: jsonl or parquet.
        name: Of the file; "-" is stdout, for jsonl.

    Raises:
        UsageError: It cannot be written, or what writes the form is not installed.
    """
    if name == "-":
        if form != "jsonl":
            raise UsageError(f"--output -: {form} needs a file")
        yield _Stdout()
        return
    path, part = Path(name), Path(f"{name}.part")
    try:
        with _parquet(part) if form == "parquet" else _json_lines(part) as writer:
            yield writer
        part.replace(path)
    except OSError as error:
        raise UsageError(f"--output {name}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


class _Stdout:
    def write(self, line: Line) -> None:
        terminal.write(for_programs(line) + "\n")


@contextlib.contextmanager
def _json_lines(path: Path) -> Iterator[Writer]:
    class Lines:
        def write(self, line: Line) -> None:
            file.write(for_programs(line) + "\n")

    with path.open("w", encoding="utf-8") as file:
        yield Lines()


def check(form: str) -> None:
    """See that what writes the form is installed.

    Raises:
        UsageError: It is not.
    """
    if form == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401 - large, and an extra: only where it is used
        except ImportError:
            raise UsageError(
                "--format parquet needs pyarrow: install outrider-cli with its extra, parquet"
            ) from None


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Writer]:
    check("parquet")
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [
            ("agent", pyarrow.string()),
            ("node", pyarrow.string()),
            ("type", pyarrow.int32()),
            ("timestamp", pyarrow.timestamp("ms", tz="UTC")),
            ("server_time", pyarrow.timestamp("ns", tz="UTC")),
            ("fields", pyarrow.map_(pyarrow.string(), pyarrow.string())),
            ("data", pyarrow.binary()),
        ]
    )
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as file:
        groups = _Groups(lambda rows: file.write(pyarrow.Table.from_pylist(rows, schema)))
        yield groups
        groups.flush()


class _Groups:
    """Gathers rows to groups of bounded size."""

    def __init__(self, write: Any) -> None:
        self._write = write
        self._rows: list[dict[str, Any]] = []
        self._size = 0

    def write(self, line: Line) -> None:
        fields = line.fields
        # A time that no calendar knows is none.
        known = abs(line.timestamp) <= MAX_SECONDS
        self._rows.append(
            {
                "agent": line.agent,
                "node": line.node,
                "type": line.data_type,
                "timestamp": line.timestamp * 1000 if known else None,
                "server_time": line.server_unix_nanos,
                "fields": None if fields is None else list(fields.items()),
                "data": line.data if fields is None else None,
            }
        )
        self._size += len(line.data) + sum(len(k) + len(v) for k, v in (fields or {}).items())
        if len(self._rows) >= GROUP_RECORDS or self._size >= GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._write(self._rows)
        self._rows, self._size = [], 0
