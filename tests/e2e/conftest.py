"""The cluster that the end-to-end tests share: three nodes, Kafka, Prometheus, and the chart.

Made once a session and taken away at its end, unless OUTRIDER_E2E_KEEP is set: then it stays, and
the next session upgrades the release in it, which makes trying a change a matter of seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from cluster import command, fetch, images, lifecycle, paths, plugins, release, tasks
from cluster.errors import ClusterError
from cluster.layout import KUBECONFIG
from cluster.progress import Steps

NODES = ("node1", "node2", "node3")
TEST_SECONDS = 420
KEEP = bool(os.environ.get("OUTRIDER_E2E_KEEP"))
_built: dict[str, str] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests here more time than others: nodes are lost and come back."""
    here = str(paths.ROOT / "tests" / "e2e")
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch and build first: not in a fixture, where nobody sees it and the time limit ends it."""
    used = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    if session.config.option.collectonly or not {"cluster", "parts"} & used:
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        try:
            lifecycle.require()
            steps = Steps()
            fetch.fetch_all(steps)
            if "release" in used:
                _built.update(images.build(steps))
        except ClusterError as error:
            pytest.exit(f"error: {error}", returncode=error.exit_code)


@pytest.fixture(scope="session")
def parts() -> None:
    """For tests that make clusters of their own: all parts are there."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Three nodes with Kafka and Prometheus, without Outrider."""
    if not (KEEP and KUBECONFIG.exists()):
        command.must("up", "--nodes", str(len(NODES)), "--kafka", "--prometheus")
    yield
    if not KEEP:
        command.must("down")


@pytest.fixture(scope="session")
def chart_values(cluster: None) -> dict[str, Any]:
    """The chart's values: the images of this source tree, records into Kafka, and plug-ins.

    Plug-ins count as well soon, and agents come back soon when servers do: both save time only.
    """
    command.must("packages")
    values = release.values(_built, kafka=True)
    values["agent"] |= {
        "plugins": {"caConfigMap": plugins.CA_CONFIG_MAP},
        "settings": {"plugins": {"healthySeconds": 2}, "server": {"backoffCapSeconds": 3}},
    }
    return values


class Release:
    """The release in the cluster, and the settings that it was last upgraded to."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self._settings: tuple[str, ...] | None = None

    def upgrade(self, *settings: str) -> None:
        """Have exactly these settings, as "name=value", and all three agents ready."""
        if settings != self._settings:
            self._settings = None
            release.install(self._values, settings)
            self._settings = settings
        release.await_rollout()
        tasks.eventually("three agents Ready", lambda: tasks.ready_agents() == [*NODES], 120)

    def renew_agents(self) -> None:
        """Upgrade to new Pods of agents, for good: the next test need not go back."""
        self._values["agent"]["podAnnotations"] = {"renewed": f"at-{time.time():.0f}"}
        settings, self._settings = self._settings or (), None
        self.upgrade(*settings)


@pytest.fixture(scope="session")
def _installed(chart_values: dict[str, Any]) -> Release:
    made = Release(chart_values)
    made.upgrade()
    return made


@pytest.fixture(name="release")
def ready_release(_installed: Release) -> None:
    """The release as it is by default, and ready, whatever the test before did."""
    _installed.upgrade()


@pytest.fixture
def upgrade(_installed: Release) -> Callable[..., None]:
    """Upgrades the release to settings of the test's own, unless it has them already."""
    return _installed.upgrade
