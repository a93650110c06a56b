"""A plug-in's two pipes: records go out on descriptor 4, tasks come in on descriptor 3."""

import json
import os
import select
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self

from outrider_plugin import wire
from outrider_plugin.wire import Task

TASKS_FD: Final = 3
RECORDS_FD: Final = 4


class PluginClosedError(Exception):
    """The agent is gone: end the plug-in."""


class Plugin:
    """This plug-in. `send` and `answer` may be called from any thread; tasks are for one.

    Args:
        tasks_fd: Where tasks come from.
        records_fd: Where records go to.
    """

    def __init__(self, tasks_fd: int = TASKS_FD, records_fd: int = RECORDS_FD) -> None:
        self._tasks = tasks_fd
        self._records = records_fd
        self._lock = threading.Lock()
        for fd in (tasks_fd, records_fd):
            try:
                os.set_inheritable(fd, False)  # not to what the plug-in starts itself
            except OSError:
                raise PluginClosedError(
                    f"descriptor {fd} is not open: an agent starts plug-ins, people do not"
                ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def detail(self) -> str:
        """The settings of this plug-in, `detail` in the AgentConfig."""
        return os.environ.get("DETAIL", "")

    def settings(self) -> Any:
        """The settings as JSON; {} where there are none.

        Raises:
            ValueError: They are no JSON.
        """
        return json.loads(self.detail or "{}")

    @property
    def node(self) -> str:
        """Name of the node."""
        return os.environ.get("OUTRIDER_NODE", "")

    def send(self, data_type: int, fields: Mapping[str, str], timestamp: int | None = None) -> None:
        """Send a record. Waits while the agent has no room: it then holds back, not throws away.

        Args:
            data_type: What kind of record; the plug-in's to define, 1 to 19999.
            fields: Names and values.
            timestamp: Seconds since the Unix epoch; now if not given.

        Raises:
            PluginClosedError: The agent is gone.
            ValueError: See `wire.record`.
        """
        data = wire.record(data_type, int(time.time()) if timestamp is None else timestamp, fields)
        view = memoryview(data)
        with self._lock:  # a record is written whole before the next one begins
            while view:
                try:
                    view = view[os.write(self._records, view) :]
                except OSError as error:
                    raise PluginClosedError(f"the agent takes no records: {error}") from None

    def answer(self, task: Task, fields: Mapping[str, str], data_type: int | None = None) -> None:
        """Answer a task; its run succeeds with these fields as output.

        Args:
            task: The task.
            fields: Names and values.
            data_type: Type of the record; that of the task if not given.

        Raises:
            PluginClosedError: The agent is gone.
            ValueError: See `wire.record`.
        """
        self.send(data_type or task.data_type, {**fields, "token": task.token})

    def __iter__(self) -> Iterator[Task]:
        """The tasks, as they come, until the agent wants the plug-in to end."""
        while True:
            try:
                found = self.next_task()
            except PluginClosedError:
                return
            if found is not None:
                yield found

    def next_task(self, timeout: float | None = None) -> Task | None:
        """The next task; None if there is none in so many seconds.

        Raises:
            PluginClosedError: The agent wants the plug-in to end.
        """
        if timeout is not None:
            readable, _, _ = select.select([self._tasks], [], [], timeout)
            if not readable:
                return None
        size = wire.length(self._read(4))
        return wire.task(self._read(size))

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = os.read(self._tasks, size - len(data))
            if not piece:
                raise PluginClosedError("there are no more tasks")
            data += piece
        return data

    def close(self) -> None:
        """Close both pipes."""
        for fd in (self._tasks, self._records):
            try:
                os.close(fd)
            except OSError:
                continue  # closed already
