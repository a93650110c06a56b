"""The Python library for plug-ins: over pipes as an agent makes them, and under a real agent."""

import os
import threading
from pathlib import Path

import pytest
from outrider_agent.core.plugin_wire import Frames, frame, record_of
from outrider_plugin import Plugin, PluginClosedError
from outrider_proto import records
from outrider_proto.v1 import agent_pb2 as pb

EXAMPLE = Path(__file__).parents[3] / "examples/plugins/filewatch"


def pipes() -> tuple[Plugin, int, int]:
    """A plug-in, and the agent's ends: for tasks and for records."""
    tasks, my_tasks = os.pipe()
    my_records, records_end = os.pipe()
    return Plugin(tasks, records_end), my_tasks, my_records


def test_records_tasks_and_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETAIL", '{"paths": ["/a"]}')
    plugin, tasks, taken = pipes()
    with plugin:
        assert plugin.settings() == {"paths": ["/a"]}
        plugin.send(6001, {"path": "/é"}, timestamp=7)
        task = pb.Task(data_type=5, object_name="me", data="what?", token="abc")
        os.write(tasks, frame(task.SerializeToString()))
        assert plugin.next_task(0.01) is not None
        assert plugin.next_task(0.01) is None
        os.write(tasks, frame(task.SerializeToString()))
        os.close(tasks)
        for found in plugin:
            plugin.answer(found, {"state": "ok"})
        with pytest.raises(PluginClosedError):
            plugin.next_task()
    first, second = map(record_of, Frames().feed(os.read(taken, 65536)))
    os.close(taken)
    assert (first.data_type, first.timestamp) == (6001, 7)
    assert records.fields_of(first) == {"path": "/é"}
    assert second.data_type == 5
    assert records.fields_of(second) == {"state": "ok", "token": "abc"}


def test_threads_do_not_mix_their_records() -> None:
    plugin, tasks, taken = pipes()
    size = 20_000  # more than a pipe takes at once

    def send(name: str) -> None:
        for _ in range(10):
            plugin.send(1, {"x": name * size})

    threads = [threading.Thread(target=send, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    frames = Frames()
    found: list[str] = []
    while len(found) < 40:
        found += [records.fields_of(record_of(m))["x"] for m in frames.feed(os.read(taken, 65536))]
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(name * size for name in "abcd" for _ in range(10))
    os.close(taken)
    with pytest.raises(PluginClosedError, match="takes no records"):
        plugin.send(1, {})
    os.close(tasks)
    plugin.close()


def test_it_says_when_no_agent_started_it() -> None:
    with pytest.raises(PluginClosedError, match="an agent starts plug-ins"):
        Plugin(1000, 1001)
