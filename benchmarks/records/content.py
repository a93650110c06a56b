"""Records made of what this very host has to tell: processes, packages, sockets, disks, logs.

Why it exists: one record repeated compresses to nothing, and random bytes not at all; neither says
what a real fleet costs. It must not be the same twice: ids, times, counters and the place where a
text is cut differ in every record.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from outrider_proto import batches
from outrider_proto.v1 import agent_pb2 as pb

#: Size of a record's data on the average, bytes.
RECORD_BYTES = 800
RECORDS = 100
#: Data types as agents of the Elkeid family number them: process, socket, package, log, metrics.
PROCESS, SOCKET, PACKAGE, LINE, METRIC = 59, 42, 5054, 1010, 20000
_MOST_FILES = 400
_MOST_BYTES = 64 * 1024


def _read(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(_MOST_BYTES).decode("utf-8", "replace").replace("\0", " ")
    return ""


def _all(pattern: str) -> Iterator[str]:
    for number, path in enumerate(sorted(Path("/").glob(pattern))):
        if number == _MOST_FILES:
            return
        if text := _read(path):
            yield text


@dataclass(frozen=True)
class Host:
    """What was read of this host, once.

    Attributes:
        processes: status, command line and limits of each process.
        packages: paragraphs of dpkg's status.
        lines: lines of logs.
        sockets: lines of /proc/net.
        metrics: counters of CPUs, memory, disks, networks, file systems.
    """

    processes: list[str]
    packages: list[str]
    lines: list[str]
    sockets: list[str]
    metrics: list[str]

    @classmethod
    def read(cls) -> Host:
        """Read it."""
        processes = [
            f"{_read(folder / 'cmdline')}\n{_read(folder / 'status')}{_read(folder / 'stat')}"
            for folder in sorted(Path("/proc").glob("[0-9]*"))[:_MOST_FILES]
        ]
        lines = [line for log in ("var/log/*.log", "var/log/apt/*.log") for line in _lines(log)]
        return cls(
            processes=[text for text in processes if len(text) > 100],
            packages=[p for text in _all("var/lib/dpkg/status") for p in text.split("\n\n")]
            or list(_all("etc/*.conf")),
            lines=lines or list(_lines("etc/*")),
            sockets=list(_lines("proc/net/*")),
            metrics=list(_all("proc/[a-z]*stat*")) + list(_all("proc/*info")),
        )


def _lines(pattern: str) -> Iterator[str]:
    for text in _all(pattern):
        yield from text.splitlines()


class Content:
    """Makes records and batches, each one different.

    Args:
        seed: the same records, but for what the host tells, for the same number.
        host: what they are made of.
    """

    def __init__(self, seed: int, host: Host | None = None) -> None:
        self._random = random.Random(seed)
        self._host = host or Host.read()
        self._count = 0
        self._kinds: list[tuple[int, Callable[[], dict[str, str]]]] = [
            *[(PROCESS, self._process)] * 4,
            *[(LINE, self._line)] * 3,
            (SOCKET, self._socket),
            (PACKAGE, self._package),
            (METRIC, self._metric),
        ]

    def record(self) -> pb.EncodedRecord:
        """One record."""
        self._count += 1
        data_type, make = self._random.choice(self._kinds)
        fields = {
            "id": f"{self._random.getrandbits(64):016x}",
            "number": str(self._count),
            **make(),
        }
        return pb.EncodedRecord(
            data_type=data_type,
            timestamp=int(time.time()),
            data=pb.Payload(fields=fields).SerializeToString(),
        )

    def batch(self, count: int = RECORDS) -> pb.RecordBatch:
        """A batch with the number 1 of epoch 1."""
        made = [self.record() for _ in range(count)]
        return batches.encode(
            made, epoch=1, seq=1, codec=pb.CODEC_ZSTD, created_unix_nanos=time.time_ns()
        )

    def _piece(self, texts: list[str], size: int) -> str:
        """So much of one text or of several, cut anywhere."""
        text = self._random.choice(texts)
        while len(text) < size:
            text += "\n" + self._random.choice(texts)
        start = self._random.randrange(len(text) - size + 1)
        return text[start : start + size]

    def _size(self, usual: int) -> int:
        return self._random.randrange(usual // 2, usual * 3 // 2)

    def _process(self) -> dict[str, str]:
        rng = self._random
        text = rng.choice(self._host.processes)
        command, _, state = text.partition("\n")
        return {
            "pid": str(rng.randrange(2, 4_194_304)),
            "ppid": str(rng.randrange(1, 4_194_304)),
            "uid": str(rng.choice([0, 0, 0, 33, 101, 1000, 65534])),
            "comm": command.split("/")[-1].split(" ")[0][:15],
            "argv": command[:400],
            "start_time": str(int(time.time()) - rng.randrange(10**6)),
            "session": str(rng.randrange(4_194_304)),
            "socket_argv": str(rng.getrandbits(32)),
            "nodename": "worker-17.example.internal",
            "state": state[: self._size(420)],
        }

    def _line(self) -> dict[str, str]:
        rng = self._random
        now = time.time() - rng.random() * 60
        stamp = (
            time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{rng.randrange(10**6):06}Z"
        )
        return {
            "source": "/var/log/messages",
            "level": rng.choice(["info", "info", "info", "warning", "error"]),
            "pid": str(rng.randrange(4_194_304)),
            "msg": f"{stamp} request {rng.getrandbits(48):012x} took {rng.randrange(9000)} ms: "
            + self._piece(self._host.lines, self._size(580)),
        }

    def _socket(self) -> dict[str, str]:
        rng = self._random
        return {
            "sip": f"10.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}",
            "sport": str(rng.randrange(1024, 65536)),
            "dport": str(rng.choice([22, 53, 80, 443, 2379, 6443, 9092, 10250])),
            "inode": str(rng.getrandbits(28)),
            "detail": self._piece(self._host.sockets, self._size(620)),
        }

    def _package(self) -> dict[str, str]:
        return {"type": "dpkg", "detail": self._piece(self._host.packages, self._size(700))}

    def _metric(self) -> dict[str, str]:
        rng = self._random
        counters = {f"counter_{n}": str(rng.getrandbits(40)) for n in range(6)}
        return {**counters, "detail": self._piece(self._host.metrics, self._size(520))}
