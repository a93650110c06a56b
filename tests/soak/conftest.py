"""What the long tests need is there before the first one begins; see those of tests/integration."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from cluster import controlplane, kafka_jars
from cluster.errors import ClusterError
from cluster.progress import Steps


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch it: not in a fixture, where the time limit would end it."""
    if session.config.option.collectonly:
        return
    steps = Steps()
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        try:
            controlplane.require(steps)
            kafka_jars.ensure(steps)
        except ClusterError as error:
            pytest.exit(f"error: {error}", returncode=error.exit_code)
