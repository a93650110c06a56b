"""The host's metrics on /metrics: names as node_exporter's, values as the kernel's, no hang."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from outrider_agent.collectors import filesystems, nodemetrics
from outrider_agent.collectors.filesystems import TIMEOUT, FileSystems
from outrider_agent.collectors.host import HostMetrics
from outrider_agent.collectors.hostinfo import HostPaths
from outrider_agent.collectors.limited import Limited
from outrider_agent.collectors.nodedevices import Found
from outrider_agent.collectors.nodekernel import Processors, single
from outrider_agent.collectors.nodemetrics import NodeMetrics
from outrider_agent.core import procfs
from outrider_agent.settings_collectors import NODE_COLLECTORS, NodeMetricsSettings
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

KNOWN = Path(__file__).with_name("node_exporter_metrics.txt")

#: Newer kernels have further names, all alike.
MEMORY = "node_memory_"


class Sample(NamedTuple):
    kind: str
    name: str
    labels: dict[str, str]
    value: float


def scrape(paths: HostPaths, settings: NodeMetricsSettings | None = None) -> list[Sample]:
    """What Prometheus makes of the page."""
    registry = CollectorRegistry()
    nodemetrics.register(
        registry, settings or NodeMetricsSettings(), paths, "node-a", FileSystems(paths)
    )
    text = generate_latest(registry).decode()
    return [
        Sample(family.type, sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def known() -> dict[str, tuple[str, str]]:
    lines = (line.split() for line in KNOWN.read_text().splitlines() if not line.startswith("#"))
    return {name: (kind, labels) for name, kind, labels in lines}


def check_names(samples: list[Sample]) -> set[str]:
    table = known()
    for sample in samples:
        if sample.name.startswith("outrider_"):
            continue
        found = (sample.kind, ",".join(sorted(sample.labels)) or "-")
        if sample.name not in table and sample.name.startswith(MEMORY):
            assert found == ("gauge", "-"), sample
        else:
            assert found == table[sample.name], sample
    keys = [(s.name, tuple(sorted(s.labels.items()))) for s in samples]
    assert len(keys) == len(set(keys)), "a sample is there twice"
    return {sample.name for sample in samples}


def write(root: Path, files: dict[str, str]) -> HostPaths:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return HostPaths(root / "proc", root / "sys", root)


def value(samples: list[Sample], metric: str, /, **labels: str) -> float:
    (found,) = [s.value for s in samples if s.name == metric and labels.items() <= s.labels.items()]
    return found


def test_this_hosts_metrics_have_the_known_names_types_and_labels() -> None:
    names = check_names(scrape(HostPaths()))
    # What dashboards and the rules of the node mixin cannot do without.
    assert names >= {
        "node_cpu_seconds_total",
        "node_memory_MemTotal_bytes",
        "node_memory_MemAvailable_bytes",
        "node_load1",
        "node_filesystem_avail_bytes",
        "node_filesystem_size_bytes",
        "node_filesystem_readonly",
        "node_disk_io_time_seconds_total",
        "node_disk_written_bytes_total",
        "node_network_receive_bytes_total",
        "node_network_transmit_drop_total",
        "node_boot_time_seconds",
        "node_uname_info",
        "node_time_seconds",
        "node_vmstat_pgmajfault",
        "node_filefd_allocated",
        "node_sockstat_TCP_inuse",
        "node_scrape_collector_success",
    }


def test_values_are_the_kernels() -> None:
    before = float(Path("/proc/stat").read_text().split()[1]) / os.sysconf("SC_CLK_TCK")
    samples = scrape(HostPaths())
    after = float(Path("/proc/stat").read_text().split()[1]) / os.sysconf("SC_CLK_TCK")
    user = sum(
        s.value
        for s in samples
        if s.name == "node_cpu_seconds_total" and s.labels["mode"] == "user"
    )
    assert before - 1 <= user <= after + 1
    memory = {
        line.split(":")[0]: int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    assert value(samples, "node_memory_MemTotal_bytes") == memory["MemTotal"] * 1024
    assert abs(value(samples, "node_load1") - os.getloadavg()[0]) < 2
    assert abs(value(samples, "node_time_seconds") - time.time()) < 60
    root = os.statvfs("/")
    if any(s.labels.get("mountpoint") == "/" for s in samples):
        size = value(samples, "node_filesystem_size_bytes", mountpoint="/")
        assert size == root.f_blocks * root.f_frsize
    assert value(samples, "node_uname_info", nodename="node-a", release=os.uname().release) == 1
    for name in NODE_COLLECTORS:
        assert value(samples, "node_scrape_collector_success", collector=name) == 1, name


HOST = {
    "proc/stat": "cpu 100 0 0 400 0 0 0 0 0 0\ncpu0 100 0 0 400 0 0 0 0 0 0\nintr 7 1\nbtime 9\n",
    "proc/diskstats": " 8 0 sda 1 2 3 4 5 6 7 8 9 10 11\n 8 1 sda1 1 2 3 4 5 6 7 8 9 10 11\n",
    "proc/1/net/dev": "x\nx\neth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n",
    "proc/pressure/irq": "full avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\n",
    "proc/pressure/cpu": "some avg10=0 total=1000000\nfull avg10=0 total=77\n",
    "proc/net/sockstat": "sockets: used 5\nTCP: inuse 1 orphan 0 tw 2 alloc 3 mem 4\n",
    "proc/1/mountinfo": (
        "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
        "23 22 0:5 / /proc rw - proc proc rw\n"
        "24 22 8:2 / /mnt/a\\040b rw - ext4 /dev/sda2 ro\n"
        "25 22 0:9 / /run/over rw - overlay overlay rw\n"
        "26 22 0:8 / /gone rw - nfs server:/x rw\n"
        "broken\n"
    ),
    "sys/class/hwmon/hwmon0/name": "coretemp\n",
    "sys/class/hwmon/hwmon0/temp1_input": "42500\n",
    "sys/class/hwmon/hwmon0/temp1_crit": "100000\n",
    "sys/class/hwmon/hwmon0/temp1_crit_alarm": "0\n",
    "sys/class/hwmon/hwmon0/temp1_max": "84000\n",
    "sys/class/hwmon/hwmon0/temp2_input": "rubbish\n",
    "sys/class/thermal/thermal_zone0/temp": "-1500\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/cooling_device0/type": "Processor\n",
    "sys/class/thermal/cooling_device0/cur_state": "1\n",
    "sys/class/thermal/cooling_device0/max_state": "9\n",
    "sys/class/net/eth0/ifindex": "2\n",
    "sys/class/net/eth0/operstate": "up\n",
    "sys/class/net/eth0/speed": "10000\n",
    "sys/class/net/eth0/flags": "0x1003\n",
}


def test_another_hosts_files_are_read_where_they_are_mounted(tmp_path: Path) -> None:
    paths = write(tmp_path, HOST)
    (tmp_path / "mnt/a b").mkdir(parents=True)
    samples = scrape(paths)
    names = check_names(samples)
    assert value(samples, "node_cpu_seconds_total", cpu="0", mode="idle") * os.sysconf(
        "SC_CLK_TCK"
    ) == pytest.approx(400)
    assert value(samples, "node_disk_read_bytes_total", device="sda") == 3 * 512
    assert not [s for s in samples if s.labels.get("device") == "sda1"], "partitions are left out"
    assert value(samples, "node_network_transmit_colls_total", device="eth0") == 14
    assert value(samples, "node_network_speed_bytes", device="eth0") == 10_000 * 1_000_000 / 8
    assert value(samples, "node_pressure_irq_stalled_seconds_total") == 2.5
    assert value(samples, "node_pressure_cpu_waiting_seconds_total") == 1
    assert "node_pressure_cpu_stalled_seconds_total" not in names
    assert value(samples, "node_hwmon_temp_celsius", sensor="temp1") == 42.5
    assert value(samples, "node_hwmon_temp_crit_celsius", chip="coretemp") == 100
    assert value(samples, "node_thermal_zone_temp", zone="0", type="cpu-thermal") == -1.5
    assert value(samples, "node_cooling_device_max_state", name="0") == 9
    points = {s.labels["mountpoint"] for s in samples if s.name == "node_filesystem_readonly"}
    assert points == {"/", "/mnt/a b", "/gone"}
    assert value(samples, "node_filesystem_readonly", mountpoint="/mnt/a b") == 1
    assert value(samples, "node_filesystem_device_error", mountpoint="/gone") == 1
    assert value(samples, "node_filesystem_device_error", mountpoint="/") == 0
    # There is no /proc/meminfo: told, and nothing else is lost.
    assert value(samples, "node_scrape_collector_success", collector="meminfo") == 0
    assert value(samples, "node_scrape_collector_success", collector="cpu") == 1


def test_the_record_of_the_same_host(tmp_path: Path) -> None:
    paths = write(tmp_path, HOST)
    found = HostMetrics(paths).collect()
    assert found["disk.sda.read_bytes"] == str(3 * 512)
    assert found["net.eth0.sent_bytes"] == "9"
    assert found["temp.coretemp_temp1.celsius"] == "42.5"
    assert found["temp.zone0_cpu-thermal.celsius"] == "-1.5"
    assert found["sockets.tcp_time_wait"] == "2"
    assert found["pressure.cpu_some_seconds"] == "1.000"
    assert found["fs./gone.error"] == "1"
    assert int(found["fs./.total_bytes"]) > 0
    assert found["boot_time"] == "9"


def test_a_record_is_bounded_however_many_devices_there_are(tmp_path: Path) -> None:
    name = "d" * 5000
    many = "".join(f"8 {n} x{n}{name} 1 2 3 4 5 6 7 8 9 10 11\n" for n in range(200))
    found = HostMetrics(write(tmp_path, {**HOST, "proc/diskstats": many})).collect()
    disks = {key for key in found if key.startswith("disk.") and key.endswith(".reads")}
    assert 0 < len(disks) <= 32
    assert max(map(len, found)) < 200


def test_what_is_left_out_by_a_bound_is_counted(tmp_path: Path) -> None:
    many = "x\nx\n" + "".join(f"v{n}: " + "1 " * 16 + "\n" for n in range(300))
    samples = scrape(write(tmp_path, {**HOST, "proc/1/net/dev": many}))
    devices = [s for s in samples if s.name == "node_network_receive_bytes_total"]
    assert len(devices) == 256
    name = "outrider_agent_collector_devices_left_out"
    assert value(samples, name, collector="netdev") == 44


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_a_file_system_that_hangs_costs_a_second_once_and_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    monkeypatch.setattr(filesystems, "ONE_SECONDS", 0.2)
    paths = write(tmp_path, HOST)
    calls: list[str] = []

    def statvfs(path: Path) -> os.statvfs_result:
        calls.append(path.name)
        if path.name == "gone":
            release.wait(60)
        return os.statvfs(tmp_path)

    found = FileSystems(paths, statvfs)
    wanted = [m for m in found.mounts() if m.kind in ("ext4", "nfs")]
    first = {f.mount.point: f.error for f in found.ask(wanted)}
    assert first == {"/": "", "/mnt/a b": "", "/gone": TIMEOUT}
    began = time.monotonic()
    assert {f.mount.point: f.error for f in found.ask(wanted)} == first
    assert time.monotonic() - began < 0.19, "it waits for it again"
    assert calls.count("gone") == 1, "it asks again while the first call hangs"
    release.set()
    deadline = time.monotonic() + 10
    while any(f.error for f in found.ask(wanted)):
        assert time.monotonic() < deadline, "it never asks again"
        time.sleep(0.01)


def test_many_that_hang_have_few_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    monkeypatch.setattr(filesystems, "ONE_SECONDS", 0.01)
    mounts = [procfs.Mount(f"s:{n}", f"/m{n}", "nfs", frozenset(), "0:1") for n in range(100)]

    def statvfs(_path: Path) -> os.statvfs_result:
        release.wait(60)
        return os.statvfs("/")

    found = FileSystems(HostPaths(root=tmp_path), statvfs)
    before = threading.active_count()
    assert {f.error for f in found.ask(mounts)} == {TIMEOUT}
    assert threading.active_count() - before <= filesystems.MAX_STUCK


def test_a_part_that_fails_or_hangs_costs_only_itself(release: threading.Event) -> None:
    def broken() -> Found:
        raise OSError("no such thing")

    hanging = Limited("h", lambda: Found([], int(release.wait(60))))
    parts: dict[str, Callable[[], Found]] = {
        "broken": broken,
        "hanging": lambda: hanging.call(0.05),
        "good": lambda: Found([single("gauge", "node_good", "", 1)]),
    }
    registry = CollectorRegistry()
    registry.register(NodeMetrics(parts))
    began = time.monotonic()
    assert registry.get_sample_value("node_good") == 1
    assert time.monotonic() - began < 10
    success = "node_scrape_collector_success"
    for name, ok in (("broken", 0), ("hanging", 0), ("good", 1)):
        assert registry.get_sample_value(success, {"collector": name}) == ok


def test_answers_are_told_again_for_a_second_and_not_longer() -> None:
    now, calls = 100.0, 0

    def part() -> Found:
        nonlocal calls
        calls += 1
        return Found([])

    metrics = NodeMetrics({"part": part}, clock=lambda: now)
    metrics.collect()
    now += 0.9
    metrics.collect()
    assert calls == 1
    now += 0.2
    metrics.collect()
    assert calls == 2


def test_processors_never_count_backwards_but_begin_anew(tmp_path: Path) -> None:
    paths = write(tmp_path, {"proc/stat": "cpu 0 0 0 0\ncpu0 9 0 0 5000 70 0 0 0 0 0\n"})
    read = Processors(paths)

    def seconds(mode: str) -> float:
        samples = read()[0].samples
        (found,) = [s.value for s in samples if s.labels == {"cpu": "0", "mode": mode}]
        return found * os.sysconf("SC_CLK_TCK")

    assert seconds("iowait") == pytest.approx(70)
    write(tmp_path, {"proc/stat": "cpu 0 0 0 0\ncpu0 9 0 0 5001 60 0 0 0 0 0\n"})
    assert seconds("iowait") == pytest.approx(70)
    write(tmp_path, {"proc/stat": "cpu 0 0 0 0\ncpu0 1 0 0 10 2 0 0 0 0 0\n"})
    assert seconds("iowait") == pytest.approx(2), "the processor was put back"


def test_only_what_the_settings_want_is_read() -> None:
    samples = scrape(HostPaths(), NodeMetricsSettings(collectors=("loadavg",)))
    names = {s.name for s in samples if s.name.startswith("node_load")}
    assert names == {"node_load1", "node_load5", "node_load15"}
    assert {s.labels.get("collector") for s in samples} <= {None, "loadavg"}
    assert scrape(HostPaths(), NodeMetricsSettings(enabled=False)) == []


TEXT = st.text(alphabet=st.sampled_from("cpu0 :=-\t\n()eth\\040/,1239total\ud7ff٣"), max_size=400)


@given(TEXT)
def test_no_text_of_a_host_raises(text: str) -> None:
    procfs.cpu_ticks(text, 10)
    procfs.stat_totals(text)
    procfs.memory(text)
    procfs.loads(text)
    list(procfs.disks(text))
    list(procfs.networks("\n\n" + text))
    procfs.sockets(text, 4096)
    list(procfs.named_numbers(text))
    list(procfs.statistics(text))
    procfs.pressure(text)
    procfs.mounts(text, "/", 10)


@given(st.integers(-(10**19), 10**19))
def test_numbers_are_read_as_written(number: int) -> None:
    assert procfs.number(f" {number}\n") == number


def test_own_mounts_stand_for_the_hosts_below_its_root() -> None:
    text = (
        "1 0 0:1 / / rw - overlay overlay rw\n"
        "2 1 8:1 / /host/root ro,relatime - ext4 /dev/sda1 rw\n"
        "3 2 8:2 / /host/root/data rw - xfs /dev/sdb rw\n"
    )
    found = {m.point: m.device for m in procfs.mounts(text, "/host/root", 100)}
    assert found == {"/": "/dev/sda1", "/data": "/dev/sdb"}
    assert len(procfs.mounts(text, "/", 100)) == 3
