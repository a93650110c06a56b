"""The inventory: differences that add up, pieces of bounded size, and hosts that lie."""

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.agent_parts import ListSink
from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.collectors import inventory as collector
from outrider_agent.collectors.filesystems import FileSystems
from outrider_agent.collectors.hostinfo import HostPaths
from outrider_agent.collectors.inventory import Inventory, Kind, kinds, lines_of, report_forever
from outrider_agent.collectors.schedule import Pace
from outrider_agent.core import inventory
from outrider_agent.core.inventory import Changes, Entries
from outrider_agent.core.records import RecordClass
from outrider_agent.metrics import AgentMetrics
from outrider_agent.settings_collectors import INVENTORY_KINDS, InventorySettings
from outrider_proto import records
from prometheus_client import CollectorRegistry

NAMES = st.text(max_size=6)
ENTRIES = st.dictionaries(NAMES, st.text(max_size=8).map(lambda v: inventory.entry(v=v)))


@given(ENTRIES, ENTRIES)
def test_a_difference_leads_from_one_to_the_other(old: Entries, new: Entries) -> None:
    changes = inventory.difference(old, new)
    assert inventory.applied(old, changes) == new
    assert inventory.identity(inventory.applied(old, changes)) == inventory.identity(new)
    assert bool(changes) == (old != new)


@given(ENTRIES, ENTRIES, st.integers(1, 5), st.integers(20, 200))
def test_pieces_one_after_the_other_are_the_whole(
    old: Entries, new: Entries, most: int, most_bytes: int
) -> None:
    changes = inventory.difference(old, new)
    made = inventory.pieces(changes, most, most_bytes)
    assert made
    result = old
    for piece in made:
        count = len(piece.added) + len(piece.changed) + len(piece.removed)
        assert count <= most
        size = sum(len(text.encode()) for text in piece.fields().values())
        assert count == 1 or size <= most_bytes + 6
        result = inventory.applied(result, piece)
    assert result == new


@given(ENTRIES)
def test_fields_are_what_consumers_can_read(entries: Entries) -> None:
    fields = Changes(entries, {}, list(entries)).fields()
    read = json.loads(fields.get("added", "{}"))
    assert {name: inventory.entry(**values) for name, values in read.items()} == entries
    assert json.loads(fields.get("removed", "[]")) == list(entries)
    for text in fields.values():
        text.encode()


LINES = st.lists(st.text(alphabet=st.sampled_from("PVA: \t0A7x-=\x00\ud800é\n"), max_size=60))


@given(LINES)
def test_no_line_of_a_host_raises_and_all_that_comes_out_is_valid_text(lines: list[str]) -> None:
    pairs = [
        *inventory.dpkg(lines),
        *inventory.apk(lines),
        *inventory.rpm(lines),
        *inventory.users(lines),
        *inventory.groups(lines),
        *inventory.modules(lines),
    ]
    list(inventory.listeners("tcp", lines, (1, 2)))
    found, _ = inventory.bounded(pairs)
    for field in Changes(found).fields().values():
        field.encode()


def test_the_bound_of_entries_holds_and_is_told() -> None:
    found, left_out = inventory.bounded(((str(n), "{}") for n in range(25)), 10)
    assert (len(found), left_out) == (10, 15)


DPKG = """Package: bash
Status: install ok installed
Version: 5.2
Architecture: amd64
Description: a shell
 Package: not-this

Package: gone
Status: deinstall ok config-files
Version: 1
Architecture: amd64
"""


def test_packages_of_every_manager() -> None:
    (found,) = inventory.dpkg(DPKG.splitlines())
    assert found == ("bash:amd64", '{"manager":"dpkg","version":"5.2","arch":"amd64"}')
    (found,) = inventory.apk(["P:musl", "V:1.2", "A:x86_64", ""])
    assert found == ("musl:x86_64", '{"manager":"apk","version":"1.2","arch":"x86_64"}')
    kernels = ["kernel\t1-1\tx86_64\n", "kernel\t2-1\tx86_64\n", "broken\n"]
    assert [name for name, _ in inventory.rpm(kernels)] == [
        "kernel:x86_64",
        "kernel:x86_64=2-1",
    ]


TCP = [
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  inode\n",
    "   0: 0100007F:0016 00000000:0000 0A 00:0 00:0 00 5 0 77 1\n",
    "   1: 0100007F:0017 0100007F:9999 01 00:0 00:0 00 5 0 78 1\n",
    "   2: 0100007F:0018 00000000:0000 0A 00:0 00:0 00 5 0 79 1\n",
]


def test_only_listening_sockets_and_no_more_of_the_table_than_they_take() -> None:
    read: list[str] = []

    def lines() -> Iterator[str]:
        for line in TCP:
            read.append(line)
            yield line

    (found,) = inventory.listeners("tcp", lines(), (32768, 60999))
    assert (found.name, found.uid, found.inode) == ("tcp 127.0.0.1:22", "5", "77")
    assert len(read) == 3
    udp = ["1: 00000000:0035 0:0 07 a b c 0 0 5 1", "2: 00000000:9999 0:0 07 a b c 0 0 6 1"]
    assert [u.port for u in inventory.listeners("udp", udp, (32768, 60999))] == [53]
    six = ["1: " + "0" * 32 + ":0050 0:0 0A a b c 0 0 5 1"]
    assert [s.name for s in inventory.listeners("tcp6", six, (1, 2))] == ["tcp6 [::]:80"]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Host:
    """One kind whose entries a test changes."""

    def __init__(self) -> None:
        self.entries: Entries = {"a": "{}", "b": "{}"}
        self.sign: object = 1
        self.reads = 0
        self.broken = False
        self.clock = Clock()
        self.failures: list[str] = []
        kind = Kind("packages", records.INVENTORY_PACKAGES, lambda: self.sign, self._read)
        chosen = InventorySettings(interval_seconds=3600, full_seconds=86_400)
        self.inventory = Inventory(
            [kind], chosen, self.failures.append, lambda _kind, _count: None, self.clock
        )

    def _read(self) -> tuple[Entries, int]:
        self.reads += 1
        if self.broken:
            raise OSError("broken")
        return dict(self.entries), 0

    def after(self, seconds: float) -> list[dict[str, str]]:
        self.clock.now += seconds
        return [fields for _, fields in self.inventory.collect()]


def test_whole_first_then_what_changed_then_whole_again_after_a_day() -> None:
    host = Host()
    (first,) = host.after(0)
    assert (first["report"], first["base"], first["entries"]) == ("full", "", "2")
    assert json.loads(first["added"]) == {"a": {}, "b": {}}
    assert host.after(60) == []
    assert host.reads == 1, "it is read although nothing tells of a change"
    host.entries = {"a": '{"x":"1"}', "c": "{}"}
    host.sign = 2
    (second,) = host.after(60)
    assert second["report"] == "changes"
    assert second["base"] == first["snapshot"]
    assert second["snapshot"] == inventory.identity(host.entries)
    assert json.loads(second["changed"]) == {"a": {"x": "1"}}
    assert json.loads(second["added"]) == {"c": {}}
    assert json.loads(second["removed"]) == ["b"]
    host.sign = 3
    assert host.after(60) == [], "nothing is different in what was read"
    host.entries["d"] = "{}"  # no sign tells of it
    assert host.after(60) == []
    (third,) = host.after(3600)
    assert json.loads(third["added"]) == {"d": {}}
    (whole,) = host.after(86_400)
    assert (whole["report"], whole["entries"]) == ("full", "3")


def test_what_cannot_be_read_is_counted_and_tried_again() -> None:
    host = Host()
    host.broken = True
    assert host.after(0) == []
    assert host.failures == ["packages"]
    host.broken = False
    (first,) = host.after(60)
    assert first["report"] == "full"


def test_a_large_inventory_is_told_in_parts() -> None:
    host = Host()
    host.entries = {f"package-{n}": inventory.entry(v="x" * 200) for n in range(1000)}
    parts = host.after(0)
    assert [p["part"] for p in parts] == [str(n + 1) for n in range(len(parts))]
    assert {p["parts"] for p in parts} == {str(len(parts))}
    assert max(sum(map(len, p.values())) for p in parts) < 80_000
    together: Entries = {}
    for part in parts:
        together |= {n: inventory.entry(**v) for n, v in json.loads(part["added"]).items()}
    assert inventory.identity(together) == parts[0]["snapshot"]


def of(paths: HostPaths, name: str) -> Kind:
    (found,) = kinds(InventorySettings(kinds=(name,)), paths, FileSystems(paths))
    return found


def test_every_kind_of_this_host_can_be_read() -> None:
    paths = HostPaths()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        entries, _ = of(paths, "ports").read()
    text = entries[f"tcp 127.0.0.1:{port}"]
    assert json.loads(text)["process"] == Path("/proc/self/comm").read_text().strip()
    assert "user:root" in of(paths, "accounts").read()[0]
    for name in INVENTORY_KINDS:
        kind = of(paths, name)
        assert kind.read()[1] == 0
        kind.sign()


def test_signs_tell_of_changes(tmp_path: Path) -> None:
    files = {
        "packages": tmp_path / "var/lib/dpkg/status",
        "accounts": tmp_path / "etc/passwd",
        "modules": tmp_path / "proc/modules",
        "mounts": tmp_path / "proc/1/mountinfo",
        "ports": tmp_path / "proc/1/net/tcp",
    }
    before = {
        "packages": DPKG,
        "accounts": "root:x:0:0:r:/root:/bin/sh\n",
        "modules": "ext4 100 1 - Live 0x0\n",
        "mounts": "1 0 8:1 / / rw - ext4 /dev/sda rw\n",
        "ports": "".join(TCP[:2]),
    }
    after = {
        "packages": DPKG + "\n" + DPKG.replace("bash", "dash"),
        "accounts": before["accounts"] + "eve:x:0:0:e:/:/bin/sh\n",
        "modules": "ext4 100 1 - Live 0x0\nrootkit 1 0 - Live 0x0 (OE)\n",
        "mounts": "1 0 8:1 / / ro - ext4 /dev/sda rw\n",
        "ports": "".join([*TCP[:2], TCP[3]]),
    }
    paths = HostPaths(tmp_path / "proc", tmp_path / "sys", tmp_path)
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(before[name])
        kind = of(paths, name)
        sign, entries = kind.sign(), kind.read()[0]
        assert kind.sign() == sign
        path.write_text(after[name])
        assert kind.sign() != sign, name
        assert kind.read()[0] != entries, name


def test_module_users_are_no_change(tmp_path: Path) -> None:
    (tmp_path / "modules").write_text("ext4 100 1 - Live 0x0\n")
    kind = of(HostPaths(proc=tmp_path), "modules")
    sign = kind.sign()
    (tmp_path / "modules").write_text("ext4 100 7 jbd2, Live 0x0\n")
    assert kind.sign() == sign


def test_hostile_files_are_bounded_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "MAX_FILE_BYTES", 10_000)
    long = tmp_path / "long"
    long.write_bytes(b"x" * 9000 + b"\nshort\xff\n" + b"y\n" * 100_000)
    found = list(lines_of(long))
    assert len(found[0]) == collector.MAX_LINE_BYTES
    assert found[1] == "short\ufffd\n"
    assert sum(map(len, found)) < 10_000
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert list(lines_of(pipe)) == []
    assert list(lines_of(tmp_path / "none")) == []


def test_rpm_is_asked_with_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "var/lib/rpm"
    folder.mkdir(parents=True)
    (folder / "rpmdb.sqlite").touch()
    program = tmp_path / "bin/rpm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf 'bash\\t5.2-1\\tx86_64\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    kind = of(HostPaths(root=tmp_path), "packages")
    assert list(kind.read()[0]) == ["bash:x86_64"]
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(collector, "RPM_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(OSError, match="rpm -qa ended"):
        kind.read()
    assert time.monotonic() - began < 30
    program.unlink()
    with pytest.raises(OSError, match="no program rpm"):
        kind.read()


async def test_records_of_the_inventory_are_logs() -> None:
    sink, paths = ListSink(), HostPaths()
    settings = InventorySettings(kinds=("accounts",), check_seconds=1)
    what = Inventory(
        kinds(settings, paths, FileSystems(paths)), settings, lambda _k: None, lambda _k, _c: None
    )
    running = asyncio.create_task(
        report_forever(
            what, Pace(what.settings.check_seconds), sink, AgentMetrics(CollectorRegistry())
        )
    )
    async with asyncio.timeout(10):
        while not sink.records:
            await asyncio.sleep(0.01)
    running.cancel()
    record, record_class = sink.records[0]
    assert (record.data_type, record_class) == (records.INVENTORY_ACCOUNTS, RecordClass.LOG)
    assert "user:root" in json.loads(records.fields_of(record)["added"])
