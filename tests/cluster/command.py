"""Run the cluster's commands from tests, in processes of their own, as people do.

Not in the test's process: what they start lives on when they end, and a command that is killed
must not take the test with it.
"""

from __future__ import annotations

import os
import subprocess
import sys

from cluster import paths
from cluster.errors import ClusterError


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command; with the given changes, say another cluster's name."""
    return {**os.environ, "PYTHONPATH": str(paths.ROOT / "tests"), **changes}


def attempt(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, however that is."""
    return subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        env=environment(**changes),
        capture_output=True,
        text=True,
        check=False,
    )


def must(*arguments: str, **changes: str) -> str:
    """Run a command that has to work and return what it prints.

    Raises:
        ClusterError: it did not; with what it said.
    """
    done = attempt(*arguments, **changes)
    if done.returncode:
        words = " ".join(arguments)
        raise ClusterError(f"`cluster {words}` ended with {done.returncode}: {done.stderr}")
    return done.stdout
