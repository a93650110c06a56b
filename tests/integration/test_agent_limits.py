"""The kernel holds the agent to the limits of its own use, and not what it starts for others."""

import contextlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from outrider_agent.config.limits import LEAF, OwnLimits

MIB = 1024 * 1024


def writable() -> bool:
    """Whether control groups can be made here, tried by a process of its own."""
    text = "from outrider_agent.config.limits import OwnLimits\n"
    text += "limits = OwnLimits(); limits.set(1000, None); raise SystemExit(bool(limits.unheld))"
    return subprocess.run([sys.executable, "-c", text], check=False).returncode == 0


pytestmark = pytest.mark.skipif(not writable(), reason="no control group can be made here")


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    yield
    for name in ("cpu", "memory", ""):
        for left in Path("/sys/fs/cgroup", name).glob(f"{LEAF}*"):
            with contextlib.suppress(OSError):
                left.rmdir()


def limited(cpu_millis: int | None, memory_bytes: int | None, then: str) -> tuple[int, str]:
    """Exit code and output of a program that runs within limits."""
    text = f"""
        from outrider_agent.config.limits import OwnLimits
        limits = OwnLimits()
        limits.set({cpu_millis}, {memory_bytes})
        assert not limits.unheld, limits.unheld
    """
    program = textwrap.dedent(text) + textwrap.dedent(then)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


BUSY = """
import time
end = time.monotonic() + 2
while time.monotonic() < end:
    pass
print(time.process_time())
"""


def test_processor_time_is_bounded() -> None:
    code, text = limited(100, None, "import time\nbefore = time.process_time()\n" + BUSY)
    assert code == 0, text
    # What it took to begin is in it.
    assert float(text) < 0.2 + 0.5


def test_memory_is_bounded() -> None:
    code, _ = limited(
        None, 48 * MIB, "held = bytearray(100 * 1024 * 1024); held[::4096] = b'x' * 25600"
    )
    assert code == -signal.SIGKILL


def test_what_it_starts_is_let_go() -> None:
    code, text = limited(
        100,
        48 * MIB,
        f"""
        import subprocess, sys
        child = subprocess.Popen(
            [sys.executable, "-c", "input()\\n" + {BUSY!r}],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        limits.release(child.pid)
        print(child.communicate("go\\n")[0])
        """,
    )
    assert code == 0, text
    assert float(text) > 0.7


def test_it_can_be_taken_back() -> None:
    limits = OwnLimits()
    limits.set(None, None)
    assert limits.unheld == {}
