"""Where `kubectl outrider records` reads: server Pods, by a reader that runs there, or folders.

With the file sink each replica has what its own agents sent, and all are read at once; with Kafka
one is enough. Repeats are dropped, also between replicas. What is waited for is told.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from outrider_proto.lines import Folder, Line, Wanted, from_json
from outrider_proto.repeats import Repeats

from outrider_cli import terminal
from outrider_cli.errors import ClusterError, IncompleteError, UsageError

if TYPE_CHECKING:
    from outrider_cli.cluster import Cluster

#: Labels of server Pods, as the chart sets them.
SERVERS: Final = "app.kubernetes.io/part-of=outrider,app.kubernetes.io/component=server"
CONTAINER: Final = "server"
#: Lines that wait to be looked at, of all Pods together; beyond it the connections wait.
MAX_WAITING: Final = 2000
#: A Pod that has said nothing for so long is named, seconds.
PATIENCE_SECONDS: Final = 5.0
#: While following: time between two looks for new Pods, and before a lost one is asked again.
AGAIN_SECONDS: Final = 3.0
#: What was read before is asked for again by so much, for batches that were late, seconds.
OVERLAP_SECONDS: Final = 60.0
#: Folders are looked at again so often, seconds.
POLL_SECONDS: Final = 0.3


def from_folders(folders: list[str], wanted: Wanted, *, follow: bool) -> Iterator[Line | None]:
    """Records in folders of file sinks; None whenever there is nothing for a while.

    Raises:
        UsageError: A folder cannot be read.
    """
    repeats, problems = Repeats(), list[str]()
    opened = [(name, Folder(Path(name), wanted)) for name in folders]
    while True:
        for name, folder in opened:
            try:
                for line in folder.read(problems):
                    if line is None or _is_new(repeats, line):
                        yield line
            except OSError as error:
                raise UsageError(f"--records {name}: {error.strerror or error}") from None
            for problem in problems:
                terminal.say(f"warning: {problem}")
            problems.clear()
        if not follow:
            return
        yield None
        time.sleep(POLL_SECONDS)


def _is_new(repeats: Repeats, line: Line) -> bool:
    return repeats.is_new(line.agent, line.epoch, line.seq, line.index, line.count)


@dataclass
class _Reader:
    """One Pod that is read."""

    pod: str
    begun_at: float
    sink: str = ""
    told: bool = False
    ended: bool = False
    whole: bool = False


class Servers:
    """Records as server Pods have them.

    Args:
        cluster: The API server.
        namespace: Of the server Pods.
        wanted: Which records; `since` is not looked at.
        last: Only what was taken in the last so many seconds; None for all.
        follow: Go on as records come.
    """

    def __init__(
        self, cluster: Cluster, namespace: str, wanted: Wanted, last: float | None, *, follow: bool
    ) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._wanted = wanted
        self._last = last
        self._follow = follow
        self._queue: queue.Queue[tuple[_Reader, Any]] = queue.Queue(MAX_WAITING)
        self._readers: dict[str, _Reader] = {}
        self._repeats = Repeats()
        self._seen_nanos = 0
        self._lost: list[str] = []
        self._looked_at = 0.0
        self._waiting = ""
        self._began = time.monotonic()
        self._answered = False
        self._failed: set[str] = set()

    def read(self) -> Iterator[Line | None]:
        """The records; None whenever there is nothing for a while.

        Raises:
            ClusterError: There is no server Pod, or none can be read.
            IncompleteError: At the end: some could not be read to their end.
        """
        self._look()
        while self._follow or any(not reader.ended for reader in self._readers.values()):
            try:
                reader, item = self._queue.get(timeout=0.5)
            except queue.Empty:
                self._name_silent()
                yield None
            else:
                line = self._take(reader, item)
                if line is not None and _is_new(self._repeats, line):
                    self._seen_nanos = max(self._seen_nanos, line.server_unix_nanos)
                    yield line
                if self._queue.empty():
                    yield None
            if self._follow and time.monotonic() - self._looked_at >= AGAIN_SECONDS:
                self._look()
        readers = self._readers.values()
        all_in_one = any(reader.whole and reader.sink == "kafka" for reader in readers)
        if self._lost and not all_in_one:
            if not any(reader.sink for reader in readers):
                raise ClusterError(self._lost[-1])
            raise IncompleteError(f"not all records are there: {'; '.join(self._lost[:5])}")

    def _look(self) -> None:
        """Begin to read Pods that are not read: one at first, all once it has a file sink."""
        self._looked_at = time.monotonic()
        pods = self._pods()
        for name in [name for name, r in self._readers.items() if self._follow and r.ended]:
            del self._readers[name]
        sinks = {reader.sink for reader in self._readers.values()}
        if "kafka" in sinks or any(not (r.sink or r.ended) for r in self._readers.values()):
            return  # all have the same, or one has not said yet
        new = [pod for pod in pods if pod not in self._readers]
        new.sort(key=lambda pod: pod in self._failed)
        for pod in new if "file" in sinks else new[:1]:
            self._begin(pod)

    def _pods(self) -> list[str]:
        try:
            found = [
                str(pod["metadata"]["name"])
                for pod in self._cluster.pods(self._namespace, SERVERS)
                if (pod.get("status") or {}).get("phase") == "Running"
            ]
            missing = f"no server Pod runs in the namespace {self._namespace}"
        except ClusterError as error:
            if not self._follow or not self._answered:
                raise
            found, missing = [], str(error)
        if not found:
            if not self._follow:
                raise ClusterError(
                    f"{missing}: give --server-namespace, or --records with the folder of a sink"
                )
            if not self._readers:
                self._wait_for(missing)
        return found

    def _begin(self, pod: str) -> None:
        reader = self._readers[pod] = _Reader(pod, time.monotonic())
        command = ["python", "-m", "outrider_operator.records"]
        for node in sorted(self._wanted.nodes):
            command += ["--node", node]
        for data_type in sorted(self._wanted.data_types):
            command += ["--type", str(data_type)]
        if self._seen_nanos:
            command += ["--since", f"{self._seen_nanos / 1e9 - OVERLAP_SECONDS:.0f}"]
        elif self._last is not None:
            # Pods that come later are to reach back as far as the first one.
            command += ["--last", f"{self._last + time.monotonic() - self._began:.1f}"]
        if self._follow:
            command.append("--follow")
        threading.Thread(
            target=self._run, args=(reader, command), name=f"records-{pod}", daemon=True
        ).start()

    def _run(self, reader: _Reader, command: list[str]) -> None:
        """In a thread: hand on what a Pod prints, then how it ended."""
        try:
            for text in self._cluster.execute(self._namespace, reader.pod, CONTAINER, command):
                if text:
                    self._queue.put((reader, text))
            self._queue.put((reader, None))
        except ClusterError as error:
            self._queue.put((reader, error))

    def _take(self, reader: _Reader, item: Any) -> Line | None:
        """A line of a Pod's reader, or how it ended; returns the record, if it is one."""
        if item is None or isinstance(item, ClusterError):
            if not reader.ended:
                self._lose(reader, str(item or f"Pod {reader.pod}: its answer broke off"))
            return None
        try:
            found: dict[str, Any] = json.loads(item)
            if "type" in found:
                return from_json(found)
            if found.get("begin"):
                reader.sink = str(found["sink"])
                self._waiting, self._answered = "", True
                self._look()
            elif "problem" in found:
                terminal.say(f"warning: Pod {reader.pod}: {found['problem']}")
            elif found.get("end"):
                reader.ended = reader.whole = True
            elif not found.get("alive"):
                raise ValueError("unknown")
        except (ValueError, KeyError, TypeError, AttributeError):
            said = f"{item[:200]!r} is not what a server of this version answers"
            self._lose(reader, f"Pod {reader.pod}: {said}")
        return None

    def _lose(self, reader: _Reader, why: str) -> None:
        reader.ended = True
        self._failed.add(reader.pod)
        if self._follow:
            # Others may be there at once; this one is asked again after a while.
            terminal.say(f"warning: {why}; it is asked again")
            return
        terminal.say(f"warning: {why}")
        self._lost.append(why)
        if not any(not other.ended or other.sink for other in self._readers.values()):
            self._look()

    def _name_silent(self) -> None:
        for reader in self._readers.values():
            late = time.monotonic() - reader.begun_at > PATIENCE_SECONDS
            if late and not (reader.sink or reader.ended or reader.told):
                reader.told = True
                self._wait_for(f"Pod {self._namespace}/{reader.pod} has not answered yet")

    def _wait_for(self, what: str) -> None:
        if what != self._waiting:
            self._waiting = what
            terminal.say(f"waiting: {what}")
