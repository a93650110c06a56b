"""Signals, exit codes and log lines, seen from outside: a small program as a process."""

import json
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, sys
from outrider_runtime import life, logs
from outrider_runtime.settings import SettingsError

logs.configure("info", sys.argv[2])
log = logs.get_logger("thing", replica="a b")

async def program(stop):
    log.info("begun", number=1, text='x "y"', none=None)
    print("ready", flush=True)
    async def part():
        if sys.argv[1] == "fails":
            raise ValueError("the cause")
        if sys.argv[1] == "settings":
            raise SettingsError('setting "a.b": expected c')
        await stop.wait()
        if sys.argv[1] == "hangs":
            await asyncio.sleep(1000)
    async def other():
        await (stop.wait() if sys.argv[1] == "stops" else asyncio.sleep(1000))
    async with asyncio.TaskGroup() as group:
        group.create_task(part())
        group.create_task(other())

sys.exit(life.run(program, log))
"""


def start(mode: str, form: str = "logfmt") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode, form],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("mode", "code", "last"),
    [
        (
            "fails",
            1,
            'level=error logger=thing msg=failed replica="a b" error="ValueError: the cause"',
        ),
        ("settings", 2, 'msg="wrong settings" replica="a b" error="setting \\"a.b\\": expected c"'),
    ],
)
def test_the_cause_is_the_last_line(mode, code, last) -> None:
    out, err = (process := start(mode)).communicate(timeout=30)
    assert process.returncode == code
    assert last in err.splitlines()[-1]


def test_sigterm_ends_in_order() -> None:
    process = start("stops")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "signal=SIGTERM" in err
    assert "msg=stopped" in err.splitlines()[-1]


def test_second_signal_ends_at_once() -> None:
    process = start("hangs")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    while "msg=stopping" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 1


def test_json_lines() -> None:
    process = start("fails", "json")
    _, err = process.communicate(timeout=30)
    lines = [json.loads(line) for line in err.splitlines()]
    assert lines[0]["msg"] == "begun"
    assert lines[0]["text"] == 'x "y"'
    assert lines[0]["number"] == 1
    assert {"ts", "level", "logger", "msg"} <= lines[0].keys()


HIDES = """
import logging
from outrider_runtime import logs
logs.configure("info", "logfmt", hidden={"settings"})
logging.getLogger("library").warning("odd", extra={"settings": "all", "kept": 1})
"""


def test_hidden_fields_of_libraries_are_left_out() -> None:
    done = subprocess.run([sys.executable, "-c", HIDES], text=True, capture_output=True, check=True)
    assert "kept=1" in done.stderr
    assert "settings" not in done.stderr
