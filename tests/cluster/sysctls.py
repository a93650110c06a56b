"""Kernel settings that a cluster changes for the whole machine, remembered and put back.

kubelet writes some, and the usual bound on inotify instances is too low for several nodes. The
first cluster on the machine records what was there, the last one to go restores it. No other
settings of the machine may be changed by anybody here.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import cgroups

RECORD = Path("/run/outrider-cluster-sysctls.json")
NAMES = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
    "fs/inotify/max_user_instances",
)
# The usual 128 are for all nodes together (kubelet, containerd, `kubectl logs -f`); running out
# of them shows as "too many open files".
INOTIFY_INSTANCES = 8192


@contextmanager
def _locked() -> Iterator[None]:
    """One at a time on this machine; a folder can be locked and leaves no file behind."""
    handle = os.open(RECORD.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def save_and_set() -> None:
    """Record the settings unless another cluster did, and make room for inotify instances."""
    with _locked():
        if not RECORD.exists():
            values = {name: Path("/proc/sys", name).read_text() for name in NAMES}
            fresh = RECORD.with_suffix(".new")
            fresh.write_text(json.dumps(values))
            fresh.rename(RECORD)
        Path("/proc/sys/fs/inotify/max_user_instances").write_text(str(INOTIFY_INSTANCES))


def restore() -> None:
    """Put the recorded settings back if this was the last cluster on the machine."""
    with _locked():
        if not RECORD.exists() or cgroups.others():
            return
        for name, value in json.loads(RECORD.read_text()).items():
            setting = Path("/proc/sys", name)
            if setting.read_text() != value:
                setting.write_text(value)
        RECORD.unlink()
