"""The cluster leaves nothing behind, whatever happened to the command that made it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import command, paths

# A cluster of its own, beside the one the other tests share.
NAME, PORT = "outrider-teardown", 18443
CHANGES = {"OUTRIDER_CLUSTER_NAME": NAME, "OUTRIDER_CLUSTER_PORT": str(PORT)}
STATE = paths.state(NAME)
pytestmark = pytest.mark.usefixtures("parts")


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return command.attempt(*arguments, **CHANGES)


def _start_up() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "cluster", "up", "--nodes", "1"],
        env=command.environment(**CHANGES),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _await(path: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "`up` ended before it could be killed"
        assert time.monotonic() < end, f"{path} was never made"
        time.sleep(0.005)


def _assert_nothing_left() -> None:
    check = _command("down", "--check")
    assert (check.returncode, check.stdout) == (0, "nothing left\n"), check.stdout + check.stderr
    assert not STATE.exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{NAME}"))
    assert f"{STATE}/" not in Path("/proc/self/mountinfo").read_text()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", PORT)) != 0


@pytest.fixture(autouse=True)
def _taken_away() -> Iterator[None]:
    yield
    _command("down")


def test_check_sees_a_running_cluster_and_down_leaves_nothing() -> None:
    sysctl = Path("/proc/sys/fs/inotify/max_user_instances")
    done = _command("up", "--nodes", "1")
    assert done.returncode == 0, done.stderr
    seen = _command("down", "--check")
    assert seen.returncode == 1
    for sign in ("in the cgroup", "cgroup /sys", "folder", "mounts of", "network namespace", "("):
        assert sign in seen.stdout, f"{sign!r} is not among what --check sees"
    assert int(sysctl.read_text()) >= 8192
    done = _command("down")
    assert done.returncode == 0, done.stderr
    _assert_nothing_left()


@pytest.mark.parametrize(
    "moment",
    ["cluster.json", "pki/ca.crt", "node1/booted", "command/cp.etcd", "command/node1.kubelet"],
)
def test_down_after_up_was_killed(moment: str) -> None:
    process = _start_up()
    _await(STATE / moment, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert _command("down").returncode == 0
    _assert_nothing_left()


def test_down_ends_a_running_up() -> None:
    process = _start_up()
    _await(STATE / "command" / "cp.etcd", process)
    assert _command("down").returncode == 0
    assert process.wait(30) != 0
    _assert_nothing_left()


def test_down_of_a_frozen_and_partitioned_node() -> None:
    assert _command("up", "--nodes", "2").returncode == 0
    assert _command("node", "freeze", "1").returncode == 0
    assert _command("node", "partition", "2").returncode == 0
    assert _command("down").returncode == 0
    _assert_nothing_left()


def test_second_down_does_nothing() -> None:
    assert _command("down").stdout == "down: 0 processes killed\n"
