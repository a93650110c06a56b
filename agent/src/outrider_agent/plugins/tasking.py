"""Tasks on their way into a plug-in, and those whose answer is waited for.

A plug-in that does not read them fills its pipe and then a short queue; further tasks fail at once.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Mapping
from typing import Final

from outrider_proto.v1 import agent_pb2 as pb

from outrider_agent.core.plugin_wire import TOKEN, frame, token_of
from outrider_agent.core.plugins import PluginError
from outrider_agent.plugins.pipes import WriteEnd

#: Most tasks that wait for a plug-in to read them.
QUEUED: Final = 64
#: Most tasks whose answer is waited for.
OPEN: Final = 256


class Tasks:
    """The tasks of one process of a plug-in."""

    def __init__(self, name: str, pipe: WriteEnd) -> None:
        self._name = name
        self._pipe = pipe
        self._queue: deque[tuple[str, bytes]] = deque()
        self._open: dict[str, asyncio.Future[Mapping[str, str]]] = {}
        self._wake = asyncio.Event()
        self._ended: str | None = None

    async def run(self) -> None:
        """Write what is queued, until the plug-in does not take tasks any more."""
        try:
            while True:
                while self._queue:
                    _, data = self._queue.popleft()
                    await self._pipe.write(data)
                self._wake.clear()
                await self._wake.wait()
        except OSError:
            self.end("it does not take tasks: it closed descriptor 3")

    async def ask(self, data_type: int, data: str, timeout: float) -> Mapping[str, str]:
        """Hand over a task; the fields of its answer.

        Raises:
            PluginError: PluginEnded, PluginFull or NoAnswer.
        """
        if self._ended is not None:
            raise PluginError(self._name, "PluginEnded", self._ended)
        if len(self._queue) >= QUEUED or len(self._open) >= OPEN:
            text = (
                f"{len(self._queue)} tasks wait that it does not read, {len(self._open)} have no "
                "answer yet; try again later, or look into why it is so slow"
            )
            raise PluginError(self._name, "PluginFull", text)
        token = secrets.token_hex(16)
        answer: asyncio.Future[Mapping[str, str]] = asyncio.get_running_loop().create_future()
        self._open[token] = answer
        task = pb.Task(data_type=data_type, object_name=self._name, data=data, token=token)
        self._queue.append((token, frame(task.SerializeToString())))
        self._wake.set()
        try:
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            read = all(token != waiting for waiting, _ in self._queue)
            text = f"no answer within {timeout:g} s" + (
                "" if read else "; it did not read the task"
            )
            raise PluginError(self._name, "NoAnswer", text) from None
        finally:
            del self._open[token]
            self._queue = deque(item for item in self._queue if item[0] != token)

    def answered(self, record: pb.EncodedRecord) -> None:
        """A record came: the answer to a task, perhaps."""
        if not self._open:
            return
        answer = self._open.get(token_of(record) or "")
        if answer is not None and not answer.done():
            fields = dict(pb.Payload.FromString(record.data).fields)
            fields.pop(TOKEN, None)
            answer.set_result(fields)

    def end(self, why: str) -> None:
        """Take no more tasks; those that are open fail, with a sentence that says why."""
        self._ended = why
        for answer in self._open.values():
            if not answer.done():
                answer.set_exception(PluginError(self._name, "PluginEnded", why))
        self._queue.clear()
