"""kubectl outrider on the three-node cluster: its exec through real kubelets, records in Kafka."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster.layout import KUBECONFIG

PLUGIN = Path(sys.executable).parent / "kubectl-outrider"
pytestmark = pytest.mark.usefixtures("release")


def outrider(*words: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "KUBECONFIG": str(KUBECONFIG)}
    return subprocess.run(
        [PLUGIN, *words], env=environ, capture_output=True, text=True, timeout=180, check=False
    )


def test_the_full_output_is_read_back_from_kafka_through_a_server_pod() -> None:
    made = outrider(
        "run", "--name", "cli-output", "--max-concurrent", "100%", "--", "seq", "1", "90000"
    )
    assert made.returncode == 0, made.stderr
    done = outrider("output", "cli-output", "node2", "--wait", "60")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{number}\n" for number in range(1, 90001))
