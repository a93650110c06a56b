"""What a disk holds after the power went, made of what a process wrote to it.

A library that is preloaded notes each write, truncation and completed sync of the agent's file and
of its log, and the load notes what it was told to be stored. From that any moment can be made
again: with everything that was written (the process was killed), or with what was synced and any
part of the rest, by sectors and in no order (the power went).
"""

import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: kind, file, time, offset, size; as in power/disklog.c.
HEAD = struct.Struct("<ccdQQ")
SECTOR = 512
SOURCE = Path(__file__).parent / "power" / "disklog.c"
NAMES = {b"d": "agent.db", b"w": "agent.db-wal"}


@dataclass(frozen=True)
class Entry:
    """One line of the log: w write, t truncate, s sync; A accepted, K to be acknowledged."""

    kind: bytes
    file: bytes
    time: float
    at: int
    data: bytes

    @property
    def numbers(self) -> list[int]:
        """Of A and K: the batch's number, then the ids of its records."""
        return list(struct.unpack(f"<{len(self.data) // 8}Q", self.data))


def record(scratch: Path, durability: str, seconds: float, pause: float) -> list[Entry]:
    """Run a load and note what it writes.

    Args:
        scratch: Where.
        durability: As the setting.
        seconds: How long.
        pause: Between two batches of each of three writers, seconds.

    Raises:
        subprocess.CalledProcessError: There is no C compiler, or the load failed.
    """
    library, log = scratch / "disklog.so", scratch / "log"
    compiler = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run(compiler, check=True)
    environ = {**os.environ, "LD_PRELOAD": str(library), "DISK_LOG": str(log)}
    words = [
        "-m",
        "fakes.power_load",
        str(scratch / "state"),
        str(log),
        durability,
        str(seconds),
        str(pause),
    ]
    subprocess.run([sys.executable, *words], check=True, env=environ, cwd=Path(__file__).parents[1])
    return list(_read(log.read_bytes()))


def _read(raw: bytes) -> Iterator[Entry]:
    place = 0
    while place < len(raw):
        kind, file, time, at, size = HEAD.unpack_from(raw, place)
        place += HEAD.size
        data = raw[place : place + size] if kind in b"wAK" else b""
        place += len(data)
        yield Entry(kind, file, time, at, data)


@dataclass
class _File:
    synced: bytearray = field(default_factory=bytearray)
    pending: list[Entry] = field(default_factory=list)


@dataclass
class Disk:
    """The two files, as far as they are synced, and what was written since."""

    files: dict[bytes, _File] = field(default_factory=lambda: {name: _File() for name in NAMES})

    def take(self, entry: Entry) -> None:
        """Go on by one line of the log."""
        if entry.kind in b"wt":
            self.files[entry.file].pending.append(entry)
        elif entry.kind == b"s":
            file = self.files[entry.file]
            for one in file.pending:
                _apply(file.synced, one)
            file.pending.clear()

    def killed(self, directory: Path) -> None:
        """Write the files as they are for who comes after a killed process."""
        self._write(directory, lambda _: True)

    def without_power(self, directory: Path, rng: random.Random) -> None:
        """Write the files as they may be after the power went: any sectors that were not synced."""
        share = rng.choice([0.0, 0.1, 0.5, 0.9])
        self._write(directory, lambda _: rng.random() < share)

    def cut_short(self, directory: Path, rng: random.Random) -> None:
        """The same, but all up to any sector of what was written, and nothing after it."""
        total = sum(_sectors(e) for file in self.files.values() for e in file.pending)
        left = rng.randint(0, total)

        def kept(_: Entry) -> bool:
            nonlocal left
            left -= 1
            return left >= 0

        self._write(directory, kept)

    def _write(self, directory: Path, kept: Callable[[Entry], bool]) -> None:
        directory.mkdir(mode=0o700)
        for name, file in self.files.items():
            content = bytearray(file.synced)
            for entry in file.pending:
                if entry.kind == b"t":
                    if kept(entry):
                        _apply(content, entry)
                    continue
                for start in range(0, len(entry.data), SECTOR):
                    if kept(entry):
                        piece = entry.data[start : start + SECTOR]
                        _apply(content, Entry(b"w", name, 0, entry.at + start, piece))
            if content or name == b"d":
                (directory / NAMES[name]).write_bytes(content)


def _sectors(entry: Entry) -> int:
    return 1 if entry.kind == b"t" else -(-len(entry.data) // SECTOR)


def _apply(content: bytearray, entry: Entry) -> None:
    if entry.kind == b"t":
        del content[entry.at :]
        return
    if len(content) < entry.at:
        content.extend(bytes(entry.at - len(content)))
    content[entry.at : entry.at + len(entry.data)] = entry.data
