"""The real parts that integration tests run against: one API server and one Kafka a session.

Why it exists: they take seconds to start, so that all tests share them; each test takes a
namespace, a topic and names of its own. Nothing is ever skipped for want of a part: it is fetched
before the first test, and where that cannot be, the run ends with what to do.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from cluster import controlplane, kafka_jars, paths, toolchain
from cluster.controlplane import ControlPlane
from cluster.errors import ClusterError
from cluster.kafka import KafkaBroker
from cluster.progress import Steps

CRDS = paths.ROOT / "crds"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch what the collected tests need: not in a fixture, where the time limit would end it."""
    if session.config.option.collectonly:
        return
    used = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    jobs: list[Callable[[], object]] = []
    steps = Steps()
    if {"control_plane", "control_plane_programs"} & used:
        jobs.append(lambda: controlplane.require(steps))
    if "helm" in used:
        jobs.append(lambda: toolchain.ensure(["helm"], steps))
    if {"kafka", "kafka_jars_folder"} & used:
        jobs.append(lambda: kafka_jars.ensure(steps))
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        try:
            steps.together(*jobs)
        except ClusterError as error:
            pytest.exit(f"error: {error}", returncode=error.exit_code)


@pytest.fixture(scope="session")
def control_plane_programs() -> None:
    """For tests that start control planes of their own: the programs are there."""


@pytest.fixture(scope="session")
def kafka_jars_folder() -> Path:
    """For tests that start brokers of their own: the jars are there."""
    return kafka_jars.ensure()


@pytest.fixture(scope="session")
def control_plane(
    control_plane_programs: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """A control plane with Outrider's resource definitions, shared by the session."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as plane:
        plane.kubectl("apply", "--server-side", "-f", CRDS)
        plane.kubectl("wait", "--for=condition=Established", "-f", CRDS, "--timeout=30s")
        yield plane


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A namespace of the test's own."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    body = {"metadata": {"name": name}}
    control_plane.request("POST", "/api/v1/namespaces", body)
    yield name
    control_plane.request("DELETE", f"/api/v1/namespaces/{name}", absent_ok=True)


@pytest.fixture(scope="session")
def kafka(
    kafka_jars_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KafkaBroker]:
    """A Kafka broker, shared by the session: who kills or freezes it brings it back."""
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture
def kafka_topic() -> str:
    """A topic name of the test's own; the broker makes the topic at the first use."""
    return f"test-{uuid.uuid4().hex[:8]}"
