"""`kubectl outrider output` from server Pods: what several replicas have, one that breaks off."""

import asyncio
import base64
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes.exec_server import ExecServer
from outrider_proto import batches, records
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD
from outrider_proto.v1.sink_pb2 import StoredBatch

PLUGIN = Path(sys.executable).parent / "kubectl-outrider"
WHOLE = b"".join(b"line %d\n" % number for number in range(8000)) + b"\xff"
STEP = 9000
TASKS = "/apis/outrider.dev/v1alpha1/namespaces/default"

Run = Callable[..., Any]


def write_records(folder: Path, offsets: list[int]) -> None:
    """What one replica stored: these pieces of the output."""
    folder.mkdir()
    frames = []
    for seq, offset in enumerate(offsets, start=1):
        data = WHOLE[offset : offset + STEP]
        plain = data.isascii()
        fields = {
            "task_uid": "uid",
            "attempt": "1",
            "offset": str(offset),
            "output": data.decode() if plain else base64.b64encode(data).decode(),
            "encoding": "utf-8" if plain else "base64",
        }
        made = [records.payload(records.TASK_OUTPUT, 1, fields)]
        batch = batches.encode(made, epoch=1, seq=seq, codec=CODEC_ZSTD, created_unix_nanos=1)
        stored = StoredBatch(agent_id="a", node="node", server_unix_nanos=1, batch=batch)
        frames.append(records.frame(stored))
    (folder / "1.records").write_bytes(b"".join(frames))


def environ(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "OUTRIDER_SINK_FILE_DIRECTORY": str(folder)}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ExecServer]:
    offsets = list(range(0, len(WHOLE), STEP))
    write_records(tmp_path / "one", offsets[::2])
    write_records(tmp_path / "two", offsets[1::2])
    task = {
        "metadata": {"name": "t", "uid": "uid", "creationTimestamp": "2020-01-01T00:00:00Z"},
        "spec": {"output": {"maxBytes": 1048576}},
    }
    row = {"node": "node", "phase": "Succeeded", "attempt": 1, "outputBytes": len(WHOLE)}
    reports = {"items": [{"task": {"name": "t", "uid": "uid"}, "nodes": [row]}]}
    objects = {f"{TASKS}/agenttasks/t": task, f"{TASKS}/agenttaskreports": reports}
    pods = {"server-1": environ(tmp_path / "one"), "server-2": environ(tmp_path / "two")}
    serving = ExecServer(pods, objects)
    async with serving.running() as url:
        cluster = {"name": "c", "cluster": {"server": url}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config = {
            "clusters": [cluster],
            "contexts": [context],
            "users": [{"name": "u", "user": {}}],
        }
        (tmp_path / "config").write_text(yaml.safe_dump({**config, "current-context": "x"}))
        yield serving


@pytest.fixture
def run(tmp_path: Path) -> Run:
    async def run_output(*words: str) -> tuple[int, bytes, list[str]]:
        process = await asyncio.create_subprocess_exec(
            *(str(PLUGIN), "--kubeconfig", str(tmp_path / "config"), "output", "t", "node", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return process.returncode or 0, out, err.decode().splitlines()

    return run_output


async def test_the_parts_of_all_replicas_make_the_whole(server: ExecServer, run: Run) -> None:
    code, out, errors = await run()
    assert (code, errors) == (0, [])
    assert out == WHOLE
    assert [pod for pod, _ in server.ran] == ["server-1", "server-2"]
    command = server.ran[0][1]
    assert command[:3] == ["python", "-m", "outrider_operator.output"]
    assert command[command.index("--since") + 1] == "1577836800"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("breaking", "Pod outrider/server-2: the connection broke off"),
        ("refusing", "Pod outrider/server-2: exec was refused: "),
    ],
)
async def test_a_replica_that_cannot_be_read_is_named_with_what_is_missing(
    server: ExecServer, run: Run, fault: str, said: str
) -> None:
    getattr(server, fault).add("server-2")
    code, out, errors = await run("--wait", "0")
    assert code == 4
    assert len(out) < len(WHOLE)
    assert any(said in line for line in errors), errors
    assert "these are missing: " in errors[-1]


async def test_no_replica_can_be_read(server: ExecServer, run: Run) -> None:
    server.refusing |= {"server-1", "server-2"}
    code, out, errors = await run("--wait", "0")
    assert (code, out) == (3, b"")
    (line,) = errors
    assert line.startswith("error: Pod outrider/server-2: exec was refused: ")


async def test_what_the_reader_says_on_its_way_out_is_told(server: ExecServer, run: Run) -> None:
    for environment in server.pods.values():
        assert isinstance(environment, dict)
        environment["OUTRIDER_SINK_KIND"] = "redis"
    code, _, errors = await run("--wait", "0")
    assert code == 3
    (line,) = errors
    assert "Pod outrider/server-2: error: " in line
    assert "sink.kind" in line


async def test_kafka_is_asked_for_at_one_replica_only(server: ExecServer, run: Run) -> None:
    # A reader that answers as one of a server with Kafka does.
    python = Path(server.pods["server-1"]["OUTRIDER_SINK_FILE_DIRECTORY"]).parent / "python"
    python.write_text('#!/bin/sh\necho \'{"end": true, "sink": "kafka", "problems": ["p"]}\'\n')
    python.chmod(0o755)
    for environment in server.pods.values():
        assert isinstance(environment, dict)
        environment["PATH"] = f"{python.parent}:/usr/bin:/bin"
    code, _, errors = await run("--wait", "0")
    assert code == 4
    assert len(server.ran) == 1
    assert "warning: Pod server-1: p" in errors
