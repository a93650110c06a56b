"""Processes of the harness never outlive their owner, however it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from cluster.errors import ClusterError
from cluster.supervised import Supervised, free_port, wait_for

TESTS = Path(__file__).parents[1]
SECONDS = 10.0

OWNER = """
import sys, time
from pathlib import Path
from cluster.supervised import Supervised
processes = Supervised.start(Path(sys.argv[1]), detached="detached" in sys.argv)
print(processes.run("one", ["sleep", "600"]), flush=True)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def owner(folder: Path, *words: str) -> tuple[subprocess.Popen[str], int]:
    """Start another Python that owns a process; return both."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), *words],
        cwd=TESTS,
        env={"PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as output:
        return process, int(output.readline())


def children_of(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_close_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    processes = Supervised.start(folder)
    sh = processes.run("family", ["sh", "-c", "setsid sleep 600 & sleep 600"])
    wait_for("the shell's children run", lambda: len(children_of(sh)) == 2, SECONDS)
    pids = [sh, *children_of(sh)]
    processes.close()
    assert [pid for pid in pids if not gone(pid)] == []
    assert not folder.exists()


def test_orphans_die_with_the_rest(tmp_path: Path) -> None:
    with Supervised.start(tmp_path / "state") as processes:
        sh = processes.run("parent", ["sh", "-c", "setsid sleep 600 & sleep 600"])
        wait_for("the shell's children run", lambda: len(children_of(sh)) == 2, SECONDS)
        orphans = children_of(sh)
        processes.kill("parent")
        assert not all(gone(pid) for pid in orphans)
    assert all(gone(pid) for pid in orphans)


def test_nothing_outlives_a_killed_owner(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    process, pid = owner(folder)
    process.kill()
    process.wait()
    wait_for("the process is gone", lambda: gone(pid), SECONDS)
    wait_for("the folder is gone", lambda: not folder.exists(), SECONDS)


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    processes = Supervised.start(folder)
    pid = processes.run("one", ["sleep", "600"])
    supervisor = int((folder / "supervisor.pid").read_text())
    psutil.Process(supervisor).kill()
    wait_for("the process is gone", lambda: gone(pid), SECONDS)
    with pytest.raises(ClusterError, match="gone"):
        processes.status()
    processes.close()
    # What it left is no obstacle to the next.
    with Supervised.start(folder) as again:
        assert again.status() == {}


def test_detached_lives_until_somebody_closes_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    process, pid = owner(folder, "detached")
    process.kill()
    process.wait()
    found = Supervised.attach(folder)
    assert found is not None
    with pytest.raises(ClusterError, match="in use"):
        Supervised.start(folder)
    assert found.status()["one"].pid == pid
    assert not gone(pid)
    found.close()
    assert gone(pid)
    assert not folder.exists()
    assert Supervised.attach(folder) is None


def test_exit_codes_and_signals_are_told(tmp_path: Path) -> None:
    with Supervised.start(tmp_path / "state") as processes:
        processes.run("three", ["sh", "-c", "echo why; exit 3"])
        assert processes.wait("three", SECONDS) == 3
        assert processes.log("three") == "why\n"
        processes.run(
            "stubborn", ["sh", "-c", "trap '' TERM; echo on; while :; do sleep 0.1; done"]
        )
        wait_for("the trap is set", lambda: processes.log("stubborn") == "on\n", SECONDS)
        assert processes.stop("stubborn", seconds=0.3) == -signal.SIGKILL
        processes.run("three", ["sleep", "600"])
        with pytest.raises(ClusterError, match="running already"):
            processes.run("three", ["true"])
        with pytest.raises(ClusterError, match="No such file or directory: 'no-such-program'"):
            processes.run("four", ["no-such-program"])


def test_somebody_elses_listener_is_not_taken_for_ours(tmp_path: Path) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), Supervised.start(tmp_path / "s") as processes:
        processes.run("idle", ["sleep", "600"])
        with pytest.raises(ClusterError, match=f"listens on port {port}"):
            processes.wait_listening("idle", port, seconds=0.5)


def test_a_process_that_ends_at_once_is_told_with_its_log(tmp_path: Path) -> None:
    with Supervised.start(tmp_path / "state") as processes:
        processes.run("broken", ["sh", "-c", "echo no such flag; exit 2"])
        with pytest.raises(ClusterError, match=r"ended with 2(.|\n)*no such flag"):
            processes.wait_listening("broken", free_port(), SECONDS)
