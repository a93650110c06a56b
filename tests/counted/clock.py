"""Run a Python program whose wall clock jumps when told to.

    clock.py FILE MODULE ARGUMENT...

Why it exists: the clock of a node jumps when its time is set, by hours where its battery is empty.
The machine's own cannot be set for a test, and a time namespace has no wall clock. So `time.time`
and `time.time_ns` are those of the machine plus the seconds in FILE. What is not Python's own (TLS
and its certificates, grpc, the file system) keeps the true time, and so do the steady clocks, as
with a real jump. Imports nothing of the project.
"""

from __future__ import annotations

import mmap
import runpy
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

_FORM = struct.Struct("<q")


def set_jump(file: Path, seconds: int) -> None:
    """Let the clocks that look at a file be off by so much from now on."""
    with file.open("r+b" if file.exists() else "w+b") as out:
        out.write(_FORM.pack(seconds))


def jumping(file: Path) -> tuple[Callable[[], float], Callable[[], int]]:
    """`time.time` and `time.time_ns` as they are with the jump in a file."""
    with file.open("rb") as source:
        view = mmap.mmap(source.fileno(), _FORM.size, prot=mmap.PROT_READ)
    true, true_nanos = time.time, time.time_ns

    def seconds() -> float:
        return true() + float(_FORM.unpack_from(view)[0])

    def nanos() -> int:
        return true_nanos() + int(_FORM.unpack_from(view)[0]) * 10**9

    return seconds, nanos


def main() -> None:
    """Run the module."""
    file, module, *arguments = sys.argv[1:]
    time.time, time.time_ns = jumping(Path(file))
    sys.path.pop(0)  # the folder of this script, which the module does not know
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
