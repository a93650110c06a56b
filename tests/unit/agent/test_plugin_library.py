"""The Python library for plug-ins: over pipes as an agent makes them, and under a real agent."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fakes.plugin_bench import plugins_in
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


async def test_the_example_packs_signs_watches_and_answers(tmp_path: Path) -> None:
    copied = tmp_path / "examples/plugins/filewatch"
    shutil.copytree(EXAMPLE, copied)
    shutil.copytree(EXAMPLE.parents[2] / "plugin/src", tmp_path / "plugin/src")
    key, public = tmp_path / "key.pem", tmp_path / "public.pem"
    commands: tuple[list[str | Path], ...] = (
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", key],
        ["openssl", "pkey", "-in", key, "-pubout", "-out", public],
    )
    for command in commands:
        subprocess.run(command, check=True)
    printed = subprocess.run([copied / "pack.sh", key], check=True, capture_output=True, text=True)
    told = dict(line.split(": ") for line in printed.stdout.splitlines())
    content = (copied / "filewatch.tar.gz").read_bytes()
    assert told["sha256"] == hashlib.sha256(content).hexdigest()
    again = subprocess.run([copied / "pack.sh"], check=True, capture_output=True, text=True)
    assert again.stdout == f"sha256: {told['sha256']}\n"  # the same files give the same package
    watched = tmp_path / "watched"
    watched.write_text("one")
    async with plugins_in(
        tmp_path / "agent", public_keys=(str(public),), require_signature=True
    ) as bench:
        await bench.apply(
            bench.plugin(
                json.dumps({"paths": [str(watched)], "intervalSeconds": 1}),
                name="filewatch",
                content=content,
                source={"format": "tar.gz", "signature": told["signature"]},
                env={"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            )
        )
        await bench.until(lambda: bench.sink.fields(6001))
        watched.write_text("two")
        await bench.until(lambda: len(bench.sink.fields(6001)) > 1)
        watched.unlink()
        await bench.until(lambda: len(bench.sink.fields(6001)) > 2)
        present, changed, removed = bench.sink.fields(6001)
        assert (present["event"], changed["event"], removed) == (
            "present",
            "changed",
            {"path": str(watched), "event": "removed"},
        )
        assert changed["sha256"] == hashlib.sha256(b"two").hexdigest()
        watched.write_text("three")
        answer = await bench.plugins.ask("filewatch", 6001, str(watched), 10)
        assert answer == {str(watched): hashlib.sha256(b"three").hexdigest()}
        assert "error" in await bench.plugins.ask("filewatch", 1, "x", 10)
        pid = bench.pid("filewatch")
        await bench.apply()
        assert not Path(f"/proc/{pid}").exists()
