"""Fetching: what is missing is said in a sentence, and nothing is made twice at once."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cluster import kafka_jars, packages, paths, toolchain
from cluster.errors import ClusterError, MissingError
from cluster.progress import Steps
from cluster.supervised import wait_for

TESTS = Path(__file__).parents[1]
FETCH = [sys.executable, "-m", "cluster.fetch", "--demo"]


def fetch_with_path(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the fetch command on a machine that has nothing but what is in a folder."""
    environment = {"PYTHONPATH": str(TESTS), "PATH": str(folder), "HOME": str(folder)}
    return subprocess.run(FETCH, env=environment, capture_output=True, text=True, check=False)


def program(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


ALL_INSTALLED = 'for name in "$@"; do echo "$name installed"; done'


def test_no_go_command(tmp_path: Path) -> None:
    program(tmp_path, "dpkg-query", ALL_INSTALLED)
    done = fetch_with_path(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no go command, needed to build kubernetes")
    assert "install Go 1.24" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_go_too_old(tmp_path: Path) -> None:
    program(tmp_path, "dpkg-query", ALL_INSTALLED)
    program(tmp_path, "go", "echo go1.19.8")
    done = fetch_with_path(tmp_path)
    assert done.returncode == 2
    assert "it is go1.19.8" in done.stderr
    assert "install Go 1.24" in done.stderr


def test_packages_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MissingError, match="sudo apt-get install outrider-no-such-package"):
        packages.check(["dpkg", "outrider-no-such-package"])
    assert packages.check(["dpkg"]) == []


def test_pinned_versions_are_told() -> None:
    for module in {tool.module for tool in toolchain.TOOLS.values()}:
        assert toolchain.version(module).startswith("v")
    assert kafka_jars.version().count(".") == 2


def test_the_key_follows_content_not_place(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("same")
    two.write_text("same")
    assert paths.key_of(one, "x") == paths.key_of(two, "x")
    two.write_text("other")
    assert paths.key_of(one, "x") != paths.key_of(two, "x")
    assert paths.key_of("ab", "c") != paths.key_of("a", "bc")


def test_the_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(5)]
    for age, folder in enumerate(folders):
        folder.mkdir()
        os.utime(folder, (0, 1000 - age))
    paths.mark_used(folders[4])
    paths.keep_newest(tmp_path.iterdir(), kept=2)
    assert sorted(tmp_path.iterdir()) == [folders[0], folders[4]]


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    lock, events, waiting = tmp_path / "lock", list[str](), threading.Event()

    def other() -> None:
        with paths.locked(lock, waiting.set):
            events.append("other")

    thread = threading.Thread(target=other)
    with paths.locked(lock):
        thread.start()
        assert waiting.wait(10)
        events.append("we")
    thread.join(10)
    assert events == ["we", "other"]


def test_progress_in_plain_logs() -> None:
    stream = io.StringIO()
    steps = Steps(stream, interval=0.05)
    with steps.step("slow thing") as step:
        step.update("3/10 packages")
        wait_for("a line on how far it is", lambda: "slow thing … 3/10" in stream.getvalue(), 10)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "· slow thing …"
    assert lines[-1].startswith("✓ slow thing: ")


def test_progress_of_a_failure_and_of_the_others_beside_it() -> None:
    stream = io.StringIO()
    steps = Steps(stream)
    slow_ended = threading.Event()

    def bad() -> None:
        with steps.step("bad"):
            raise ClusterError("no luck")

    def slow() -> None:
        with steps.step("slow"):
            end = time.monotonic() + 10
            while "✗ bad" not in stream.getvalue() and time.monotonic() < end:
                time.sleep(0.01)
        slow_ended.set()

    with pytest.raises(ClusterError, match="no luck"):
        steps.together(slow, bad)
    assert slow_ended.is_set()
    text = stream.getvalue()
    assert text.index("✗ bad failed") < text.index("✓ slow")


def test_services_are_not_started_and_the_machine_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(packages, "POLICY", policy)
    for left_by_a_killed_run in (False, True):
        if left_by_a_killed_run:
            policy.write_text(packages.POLICY_TEXT)
        with packages._no_services():
            assert subprocess.run([policy, "etcd", "start"], check=False).returncode == 101
        assert not policy.exists()
    policy.write_text("#!/bin/sh\nexit 0 # the administrator's own\n")
    with packages._no_services():
        pass
    assert "administrator" in policy.read_text()


def test_failures_of_several_jobs_are_all_told() -> None:
    def fail(error: Exception) -> None:
        raise error

    steps = Steps(io.StringIO())
    with pytest.raises(ClusterError, match=r"^one\ntwo$"):
        steps.together(lambda: fail(ClusterError("one")), lambda: fail(ClusterError("two")))
    # What is missing comes first: without it the rest cannot work.
    with pytest.raises(MissingError, match=r"^one$"):
        steps.together(lambda: fail(MissingError("one")), lambda: fail(ClusterError("two")))
    with pytest.raises(BaseExceptionGroup):
        steps.together(lambda: fail(ClusterError("one")), lambda: fail(ValueError("two")))
