"""`kubectl outrider records`: from folders and from server Pods, shown and written to files."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from fakes.exec_server import ExecServer
from outrider_cli.core import records as shown
from outrider_proto import batches, records, stored
from outrider_proto.lines import Line
from outrider_proto.v1.agent_pb2 import CODEC_ZSTD, EncodedRecord
from outrider_proto.v1.sink_pb2 import StoredBatch

PLUGIN = Path(sys.executable).parent / "kubectl-outrider"
Run = Callable[..., Any]


def frame(
    seq: int, *, node: str = "n1", data_type: int = 20000, at: float = 0, count: int = 1
) -> bytes:
    made = [records.payload(data_type, 60, {"seq": str(seq), "n": str(n)}) for n in range(count)]
    if data_type == 7:
        made = [EncodedRecord(data_type=7, timestamp=2**62, data=b"\xff\x00")]
    batch = batches.encode(made, epoch=1, seq=seq, codec=CODEC_ZSTD, created_unix_nanos=1)
    nanos = int((at or time.time()) * 1e9)
    item = StoredBatch(agent_id=f"id-{node}", node=node, server_unix_nanos=nanos, batch=batch)
    return stored.frame(item)


def environ(folder: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "OUTRIDER_SINK_FILE_DIRECTORY": str(folder)}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ExecServer]:
    """Two Pods; batch 2 was stored by both."""
    for name, frames in (("one", [frame(1), frame(2)]), ("two", [frame(2), frame(3, node="n2")])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.records").write_bytes(b"".join(frames))
    pods = {"server-1": environ(tmp_path / "one"), "server-2": environ(tmp_path / "two")}
    serving = ExecServer(pods)
    async with serving.running() as url:
        config = {
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
            "current-context": "x",
        }
        (tmp_path / "config").write_text(yaml.safe_dump(config))
        yield serving


Start = Callable[..., Any]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    started = []

    async def begin(*words: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(str(PLUGIN), "--kubeconfig", str(tmp_path / "config"), "records", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.fixture
def run(start: Start) -> Run:
    async def whole(*words: str) -> tuple[int, list[str], list[str]]:
        process = await start(*words)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        return process.returncode, out.decode().splitlines(), err.decode().splitlines()

    return whole


def seqs(lines: list[str]) -> list[tuple[str, str]]:
    found = [json.loads(line) for line in lines]
    return sorted((line["node"], line["fields"]["seq"]) for line in found)


# ---------------------------------------------------------------- server Pods


async def test_all_replicas_are_read_and_repeats_dropped(server: ExecServer, run: Run) -> None:
    code, out, errors = await run("tail", "--no-follow", "-o", "json")
    assert (code, errors) == (0, [])
    assert seqs(out) == [("n1", "1"), ("n1", "2"), ("n2", "3")]


async def test_filters_go_to_the_servers(server: ExecServer, run: Run) -> None:
    words = ("--node", "n2", "--type", "host-metrics,1000", "--since", "10m")
    code, out, _ = await run("tail", "--no-follow", "-o", "json", *words)
    assert (code, seqs(out)) == (0, [("n2", "3")])
    command = server.ran[0][1]
    assert [w for w in command if w.startswith("--")] == ["--node", "--type", "--type", "--last"]


async def test_follows_all_replicas_until_ctrl_c(
    server: ExecServer, start: Start, tmp_path: Path
) -> None:
    process = await start("tail", "--since", "1h")
    async with asyncio.timeout(60):
        first = [(await process.stdout.readline()).decode() for _ in range(3)]
        assert {line.split()[2] for line in first} == {"host-metrics"}
        with (tmp_path / "two" / "1.records").open("ab") as file:
            file.write(frame(9, node="n9"))
        line = (await process.stdout.readline()).decode()
        assert line == "1970-01-01T00:01:00Z n9 host-metrics n=0 seq=9\n"
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    assert (await process.stderr.read()) == b""


async def test_a_lost_replica_is_asked_again(
    server: ExecServer, start: Start, tmp_path: Path
) -> None:
    server.breaking.add("server-2")
    process = await start("tail", "--since", "1h", "-o", "json")
    async with asyncio.timeout(60):
        line = (await process.stderr.readline()).decode()
        assert "Pod outrider/server-2" in line
        assert "it is asked again" in line
        server.breaking.clear()
        lines = [(await process.stdout.readline()).decode() for _ in range(3)]
        assert seqs(lines) == [("n1", "1"), ("n1", "2"), ("n2", "3")]


async def test_an_export_that_is_not_whole_says_so(server: ExecServer, run: Run) -> None:
    server.refusing.add("server-2")
    code, out, errors = await run("export", "--output", "-")
    assert code == 4
    assert seqs(out) == [("n1", "1"), ("n1", "2")]
    assert errors[-1].startswith("error: not all records are there: Pod outrider/server-2: ")


async def test_the_first_replica_refuses_and_the_next_is_asked(
    server: ExecServer, run: Run
) -> None:
    server.refusing.add("server-1")
    code, out, _ = await run("export", "--output", "-")
    assert (code, seqs(out)) == (4, [("n1", "2"), ("n2", "3")])
    server.refusing.add("server-2")
    code, out, errors = await run("export", "--output", "-")
    assert (code, out) == (3, [])
    assert "exec was refused" in errors[-1]


async def test_kafka_is_read_by_one_replica(server: ExecServer, run: Run, tmp_path: Path) -> None:
    # A reader that answers as one of a server with Kafka does.
    python = tmp_path / "python"
    lines = [{"begin": True, "sink": "kafka"}, {"problem": "p"}, {"end": True, "sink": "kafka"}]
    echoes = "".join(f"echo '{json.dumps(line)}'\n" for line in lines)
    python.write_text(f"#!/bin/sh\n{echoes}")
    python.chmod(0o755)
    for name in server.pods:
        server.pods[name] = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    code, _, errors = await run("tail", "--no-follow")
    assert (code, errors) == (0, ["warning: Pod server-1: p"])
    assert len(server.ran) == 1


async def test_no_server_is_told(server: ExecServer, run: Run) -> None:
    server.pods.clear()
    code, _, errors = await run("tail", "--no-follow")
    assert code == 3
    assert "no server Pod runs in the namespace outrider" in errors[-1]


# ---------------------------------------------------------------- folders and files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "records"
    path.mkdir()
    (path / "1.records").write_bytes(
        frame(1) + frame(1) + frame(2, node="n2", data_type=1000) + frame(3, data_type=7)
    )
    return path


async def test_a_folder_needs_no_cluster(folder: Path, run: Run) -> None:
    code, out, errors = await run("tail", "--no-follow", "--records", str(folder))
    assert (code, errors) == (0, [])
    assert out == [
        "1970-01-01T00:01:00Z n1 host-metrics n=0 seq=1",
        "1970-01-01T00:01:00Z n2 agent-heart-beat n=0 seq=2",
        "4611686018427387904 n1 7 2 bytes: ff00",
    ]


async def test_a_folder_is_followed(folder: Path, start: Start) -> None:
    process = await start("tail", "-f", "--records", str(folder), "-o", "json")
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        # What was there before is not shown: something new is, as soon as it is there.
        for seq in range(10, 1000):
            with (folder / "1.records").open("ab") as file:
                file.write(frame(seq))
            try:
                async with asyncio.timeout(0.5):
                    line = json.loads(await process.stdout.readline())
                    break
            except TimeoutError:
                continue
        assert int(line["fields"]["seq"]) >= 10
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0


async def test_parquet(folder: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.parquet"
    code, _, errors = await run(
        "export", "--format", "parquet", "--output", str(file), "--records", str(folder)
    )
    assert (code, errors) == (0, [f"3 records written to {file}"])
    table = pyarrow.parquet.read_table(file)
    assert table.column_names == [
        *("agent", "node", "type", "timestamp", "server_time", "fields", "data")
    ]
    rows = table.drop_columns(["server_time"]).to_pylist()
    assert sorted(rows[0]["fields"]) == [("n", "0"), ("seq", "1")]
    assert rows[0]["timestamp"].isoformat() == "1970-01-01T00:01:00+00:00"
    assert rows[2] == {
        "agent": "id-n1",
        "node": "n1",
        "type": 7,
        "timestamp": None,
        "fields": None,
        "data": b"\xff\x00",
    }
    assert abs(table["server_time"][0].value / 1e9 - time.time()) < 600
    assert [path.name for path in tmp_path.glob("out*")] == ["out.parquet"]


async def test_jsonl(folder: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    code, _, _ = await run(
        *("export", "--output", str(file), "--records", str(folder), "--type", "1000")
    )
    assert code == 0
    (line,) = file.read_text().splitlines()
    found = json.loads(line)
    assert abs(found.pop("server_time") - time.time()) < 600
    assert found == {
        "agent": "id-n2",
        "node": "n2",
        "type": 1000,
        "timestamp": 60,
        "fields": {"n": "0", "seq": "2"},
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tail", "--type", "metrics"), "'metrics' is no data type: give a number, or one of"),
        (("tail", "--since", "soon"), "'soon' is no time"),
        (("export", "--format", "parquet", "--output", "-"), "parquet needs a file"),
        (("export", "--output", "/nowhere/x", "--records", "."), "/nowhere/x"),
        (("tail", "--records", "/nowhere"), "--records /nowhere: No such file"),
    ],
)
async def test_wrong_flags(server: ExecServer, run: Run, words: tuple[str, ...], said: str) -> None:
    code, _, errors = await run(*words)
    assert code == 2
    assert said in errors[-1]


def test_every_name_is_a_data_type() -> None:
    for number, name in records.NAMES.items():
        assert shown.data_types([name, name.title(), name.replace(" ", "_")]) == [number] * 3
        assert shown.data_types([shown.type_name(number)]) == [number]


def test_what_would_steer_a_terminal_does_not() -> None:
    fields = {"a\x1b[2J": "b\nc\x07", "long": "x" * 1000, "empty": ""}
    line = Line("a", "n\x1b", 1, 1, 0, 1, 5, 0, 0, fields)
    text = shown.for_people(line)
    assert text.isprintable()
    assert len(text) < 400
    assert 'empty=""' in text
