"""Where the time of a running process goes: py-spy, kept outside the locked environment.

Why it exists: a sampling profiler slows what it looks at by a few percent only. It must not be
needed for anything but profiles.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cluster import paths
from cluster.progress import Steps

VERSION = "0.4.3"
RATE = 200
SHOWN = 25


@dataclass
class Profile:
    """Samples of one process: of a function itself, and of it with all it calls.

    Only samples in which the process held the interpreter lock count.
    """

    part: str
    samples: int = 0
    own: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)

    def add(self, stack: list[str], count: int) -> None:
        """Take in a stack, the innermost function last."""
        names = [frame.rpartition(":")[0] or frame for frame in stack]
        self.samples += count
        self.own[names[-1]] += count
        for name in set(names):
            self.total[name] += count

    def figures(self) -> dict[str, Any]:
        """Percent of the samples, by function."""
        return {
            "samples": self.samples,
            "own_percent": self._percent(self.own),
            "total_percent": self._percent(self.total),
        }

    def _percent(self, counts: Counter[str]) -> dict[str, float]:
        return {
            name: round(100 * count / self.samples, 1) for name, count in counts.most_common(SHOWN)
        }

    def text(self) -> str:
        """Both tables, side by side."""
        lines = [f"{self.part}: {self.samples} samples with the lock at {RATE}/s"]
        pairs = zip(self.own.most_common(SHOWN), self.total.most_common(SHOWN), strict=False)
        for (own, a), (total, b) in pairs:
            first = f"{100 * a / self.samples:5.1f} % {own[:62]:62}"
            lines.append(f"{first} | {100 * b / self.samples:5.1f} % {total[:62]}")
        return "\n".join(lines)


class Profiler:
    """py-spy, at `program`."""

    def __init__(self, program: Path) -> None:
        self._program = program

    @classmethod
    def ensure(cls, steps: Steps) -> Self:
        """Install it if need be. Raises CalledProcessError where that fails."""
        folder = paths.cache() / "bench" / f"py-spy-{VERSION}"
        with steps.step(f"py-spy {VERSION}"):
            make_environment(folder, f"py-spy=={VERSION}")
        return cls(folder / "bin" / "py-spy")

    @contextlib.contextmanager
    def sampling(self, pids: Mapping[str, int]) -> Iterator[dict[str, Profile]]:
        """Sample processes during the block; the profiles are filled at its end."""
        profiles = {part: Profile(part) for part in pids}
        with tempfile.TemporaryDirectory() as scratch:
            running = {part: self._start(pid, Path(scratch) / part) for part, pid in pids.items()}
            try:
                yield profiles
            finally:
                for process in running.values():
                    process.send_signal(signal.SIGINT)
                for process in running.values():
                    process.communicate(timeout=60)
            for part, profile in profiles.items():
                _read(Path(scratch) / part, profile)

    def _start(self, pid: int, file: Path) -> subprocess.Popen[bytes]:
        words = [
            "record",
            "--gil",
            "--pid",
            str(pid),
            "--rate",
            str(RATE),
            "--duration",
            "unlimited",
        ]
        return subprocess.Popen(
            [self._program, *words, "--format", "raw", "--output", file],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def _read(file: Path, profile: Profile) -> None:
    for line in file.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        profile.add(stack.split(";"), int(count))


def make_environment(folder: Path, *requirements: str) -> None:
    """Make a virtual environment with some packages; whole or not at all.

    Raises:
        subprocess.CalledProcessError: A package could not be installed.
    """
    with paths.locked(folder.with_suffix(".lock")):
        if (folder / "complete").exists():
            return
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements], check=True, stdout=sys.stderr)
        (folder / "complete").touch()
