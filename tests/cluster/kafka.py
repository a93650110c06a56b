"""A real Kafka broker: one plain process in KRaft mode, to be killed, frozen and restarted.

Why it exists: what Outrider promises about records ("acknowledged only when Kafka has them") is
about a real broker's behaviour under faults. It must not be fit for anything but tests: one
replica, small heap, and security only where a test asks for it (kafka_security.py).
"""

from __future__ import annotations

import base64
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Self

from cluster import kafka_jars
from cluster.errors import ClusterError
from cluster.progress import Steps
from cluster.supervised import Supervised, free_port

HOST = "127.0.0.1"
BROKER = "kafka"
PARTITIONS = 3
READY_SECONDS = 60.0
STOP_SECONDS = 20.0
STARTED = "Kafka Server started"
# Without the second compiler the broker is up in half the time; throughput is no matter here.
JAVA = ("java", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
_LOGGER = "-Dorg.slf4j.simpleLogger"
QUIET = (f"{_LOGGER}.defaultLogLevel=warn", f"{_LOGGER}.log.kafka.server.KafkaRaftServer=info")


def properties(data: Path, listener: str, advertised: str, controller_port: int) -> str:
    """Return a server.properties for one broker that is its own controller.

    Args:
        data: folder of the log.
        listener: "address:port" that clients connect to.
        advertised: "host:port" that clients are told to use.
        controller_port: on loopback, for the controller.
    """
    controller = f"127.0.0.1:{controller_port}"
    settings = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@{controller}",
        "listeners": f"PLAINTEXT://{listener},CONTROLLER://{controller}",
        "advertised.listeners": f"PLAINTEXT://{advertised}",
        "controller.listener.names": "CONTROLLER",
        "log.dirs": str(data),
        "num.partitions": str(PARTITIONS),
        # There is one broker, so that nothing can have more replicas.
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "1",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        # A test's consumer should not wait for others to join its group.
        "group.initial.rebalance.delay.ms": "0",
        # A killed broker is let in again only when its old session has run out (9 s by default).
        "broker.session.timeout.ms": "1500",
        "broker.heartbeat.interval.ms": "300",
        # Bounds: memory of the log cleaner, bytes kept in each partition.
        "log.cleaner.dedupe.buffer.size": str(10 * 1024 * 1024),
        "log.segment.bytes": str(64 * 1024 * 1024),
        "log.retention.bytes": str(512 * 1024 * 1024),
    }
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def format_command(jars: Path, settings: Path, *more: str) -> list[str]:
    """Return the command that prepares an empty data folder; to be run once, before the broker.

    `more` are further options of the tool.
    """
    cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    tool = ["-cp", f"{jars}/*", "kafka.tools.StorageTool", "format"]
    # One word: an id may begin with "-", which would be taken for another option.
    return [*JAVA, *QUIET, *tool, f"--cluster-id={cluster}", "-c", str(settings), *more]


def broker_command(jars: Path, settings: Path) -> list[str]:
    """Return the command of the broker; it has started when it prints STARTED."""
    return [*JAVA, *QUIET, "-cp", f"{jars}/*", "kafka.Kafka", str(settings)]


class KafkaBroker:
    """One broker on loopback, in a folder that `stop` removes; it ends with this process.

    Args:
        folder: for data and logs; empty or not there yet. A temporary one if not given.
        steps: where to show progress, should the jars have to be fetched.
    """

    def __init__(self, folder: Path | None = None, steps: Steps | None = None) -> None:
        self._folder = folder or Path(tempfile.mkdtemp(prefix="outrider-kafka-"))
        self._steps = steps
        self._processes: Supervised | None = None
        self._port = 0
        self._jars = Path()

    @property
    def bootstrap(self) -> str:
        """Where clients connect, as "host:port"; the same through all restarts."""
        return f"{HOST}:{self._port}"

    @property
    def processes(self) -> Supervised:
        """The supervised process, named BROKER.

        Raises:
            ClusterError: it was not started.
        """
        if self._processes is None:
            raise ClusterError("the Kafka broker was not started")
        return self._processes

    @property
    def _settings(self) -> Path:
        return self._folder / "server.properties"

    def start(self) -> Self:
        """Prepare the data folder, start the broker and wait until it takes requests.

        Raises:
            ClusterError: it did not start; the error carries the end of its log.
        """
        self._jars = kafka_jars.ensure(self._steps)
        self._processes = Supervised.start(self._folder)
        try:
            self._port, controller = free_port(HOST), free_port(HOST)
            self._settings.write_text(self._properties(controller))
            command = format_command(self._jars, self._settings, *self._format_options())
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ClusterError(f"Kafka's storage tool failed: {done.stdout}{done.stderr}")
            self.resume()
        except BaseException:
            self.stop()
            raise
        return self

    def _properties(self, controller_port: int) -> str:
        """What stands in server.properties; a line that comes later replaces an earlier one."""
        data = self._folder / "data"
        return properties(data, self.bootstrap, self.bootstrap, controller_port)

    def _format_options(self) -> list[str]:
        """Further options for preparing the data folder."""
        return []

    def resume(self) -> None:
        """Start the broker again after `kill` or `terminate`, on the same port and data.

        Raises:
            ClusterError: it runs already, or did not start.
        """
        before = self.processes.log(BROKER).count(STARTED)
        self.processes.run(BROKER, broker_command(self._jars, self._settings))
        self.processes.wait_listening(BROKER, self._port, READY_SECONDS)
        self.processes.wait_ready(
            BROKER,
            "Kafka takes requests",
            lambda: self.processes.log(BROKER).count(STARTED) > before,
            READY_SECONDS,
        )

    def kill(self) -> None:
        """End the broker with SIGKILL; `resume` starts it on what it had stored."""
        self.processes.kill(BROKER)

    def terminate(self) -> None:
        """End the broker in good order."""
        self.processes.stop(BROKER, STOP_SECONDS)

    def freeze(self) -> None:
        """Stop the broker in its tracks: it keeps its connections and answers nothing."""
        self.processes.freeze(BROKER)

    def thaw(self) -> None:
        """Let the frozen broker go on."""
        self.processes.thaw(BROKER)

    def stop(self) -> None:
        """Kill the broker and remove the folder; again: nothing."""
        if self._processes is not None:
            self._processes.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
