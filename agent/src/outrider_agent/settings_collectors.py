"""The settings of what the agent gathers: how often, what of it, and what is left out.

A part of `settings`, apart because of its size.
"""

import re
from typing import Annotated

from msgspec import Meta, field
from outrider_runtime.settings import Section, SettingsError

#: What can be read for /metrics, by the names of node_exporter's collectors.
NODE_COLLECTORS = (
    "conntrack", "cpu", "diskstats", "filefd", "filesystem", "hwmon", "loadavg", "meminfo",
    "netclass", "netdev", "netstat", "pressure", "sockstat", "stat", "thermal_zone", "time",
    "uname", "vmstat",
)  # fmt: skip
#: What the inventory can hold.
INVENTORY_KINDS = ("packages", "accounts", "ports", "mounts", "modules")


class HeartbeatSettings(Section, frozen=True):
    """The heart-beat record."""

    interval_seconds: Annotated[
        float, Meta(ge=1, le=3600, description="Time between two heart-beat records, seconds.")
    ] = 60.0


class HostSettings(Section, frozen=True):
    """Metrics of the host, as records."""

    enabled: Annotated[bool, Meta(description="Whether they are gathered.")] = True
    interval_seconds: Annotated[
        float, Meta(ge=1, le=3600, description="Time between two collections, seconds.")
    ] = 15.0


class NodeMetricsSettings(Section, frozen=True):
    """Metrics of the host on /metrics, under the names of Prometheus' node_exporter."""

    enabled: Annotated[bool, Meta(description="Whether they are there.")] = True
    collectors: Annotated[
        tuple[str, ...],
        Meta(description=f"What is read, of {', '.join(NODE_COLLECTORS)}."),
    ] = NODE_COLLECTORS
    mount_points_exclude: Annotated[
        str, Meta(description="Regular expression of mount points that are left out.")
    ] = r"^/(dev|proc|run/credentials/.+|sys|var/lib/docker/.+|var/lib/containers/storage/.+)($|/)"
    fs_types_exclude: Annotated[
        str, Meta(description="Regular expression of kinds of file systems that are left out.")
    ] = (
        r"^(autofs|binfmt_misc|bpf|cgroup2?|configfs|debugfs|devpts|devtmpfs|fusectl|hugetlbfs"
        r"|iso9660|mqueue|nsfs|overlay|proc|procfs|pstore|rpc_pipefs|securityfs|selinuxfs"
        r"|squashfs|erofs|sysfs|tracefs)$"
    )
    disks_exclude: Annotated[
        str, Meta(description="Regular expression of disks that are left out.")
    ] = r"^(z?ram|loop|fd|(h|s|v|xv)d[a-z]|nvme\d+n\d+p)\d+$"
    networks_exclude: Annotated[
        str,
        Meta(description="Regular expression of network devices that are left out; empty: none."),
    ] = ""


class InventorySettings(Section, frozen=True):
    """What there is on the host, as records: whole, and then what changed."""

    enabled: Annotated[bool, Meta(description="Whether it is gathered.")] = True
    kinds: Annotated[
        tuple[str, ...], Meta(description=f"What is gathered, of {', '.join(INVENTORY_KINDS)}.")
    ] = INVENTORY_KINDS
    check_seconds: Annotated[
        float,
        Meta(ge=1, le=86_400, description="Time between two looks for signs of a change, seconds."),
    ] = 60.0
    interval_seconds: Annotated[
        float,
        Meta(ge=1, le=604_800, description="Longest time until all is read again, seconds."),
    ] = 3600.0
    full_seconds: Annotated[
        float,
        Meta(ge=1, le=2_592_000, description="Longest time until all is told again, seconds."),
    ] = 86_400.0


class CollectorsSettings(Section, frozen=True):
    """What is gathered."""

    host: HostSettings = field(default_factory=HostSettings)
    node_metrics: NodeMetricsSettings = field(default_factory=NodeMetricsSettings)
    inventory: InventorySettings = field(default_factory=InventorySettings)


def check_collectors(settings: CollectorsSettings) -> None:
    """Refuse names and patterns that are none.

    Raises:
        SettingsError: With the setting's name and what was expected.
    """
    node, inventory = settings.node_metrics, settings.inventory
    for setting, names, known in (
        ("nodeMetrics.collectors", node.collectors, NODE_COLLECTORS),
        ("inventory.kinds", inventory.kinds, INVENTORY_KINDS),
    ):
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise SettingsError(
                f'setting "collectors.{setting}": expected some of {", ".join(known)}, '
                f"got {', '.join(unknown)}"
            )
    for name in ("mount_points", "fs_types", "disks", "networks"):
        pattern = getattr(node, f"{name}_exclude")
        try:
            re.compile(pattern)
        except re.error as error:
            parts = name.split("_")
            text = parts[0] + "".join(part.title() for part in parts[1:])
            raise SettingsError(
                f'setting "collectors.nodeMetrics.{text}Exclude": expected a regular expression, '
                f"got {pattern!r}: {error}"
            ) from None
