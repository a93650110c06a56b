"""Make sure that Debian packages are installed.

Why it exists: etcd, containerd, Java and the like come from the distribution; a fresh machine gets
them by the same command that needs them. It must not start, stop or reconfigure anything that runs
on the machine: some of these packages start a service when installed, which would take ports and
folders that are not ours to take.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError, MissingError
from cluster.paths import cache, locked
from cluster.progress import Step, Steps

# Package scripts ask this program whether they may start a service; 101 means no.
POLICY = Path("/usr/sbin/policy-rc.d")
POLICY_MARK = "# made by Outrider's test cluster; may be removed"
POLICY_TEXT = f"#!/bin/sh\n{POLICY_MARK}\nexit 101\n"
APT = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=300"]
ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_SUSPEND": "1", "LC_ALL": "C"}
KEPT_LINES = 15


def missing(names: Sequence[str]) -> list[str]:
    """Return those of the named packages that are not installed, in the given order.

    Where there is no dpkg, that is all of them.
    """
    try:
        query = subprocess.run(
            ["dpkg-query", "-W", "-f=${Package} ${db:Status-Status}\n", *names],
            capture_output=True,
            text=True,
            check=False,  # it fails when it does not know one of the names
        )
    except FileNotFoundError:
        return list(names)
    rows = (line.split() for line in query.stdout.splitlines())
    installed = {row[0] for row in rows if row[1:] == ["installed"]}
    return [name for name in names if name not in installed]


def check(names: Sequence[str]) -> list[str]:
    """Return the named packages that are missing, if they can be installed here.

    Raises:
        MissingError: this is not Debian (or a relative with apt-get), or we are not root.
    """
    absent = missing(names)
    if absent and not Path("/usr/bin/apt-get").exists():
        raise MissingError(
            f"needed, and not to be installed without apt-get: what Debian 12 has in the packages "
            f"{', '.join(absent)}; run this on Debian 12 (a container with root will do)"
        )
    if absent and os.geteuid() != 0:
        raise MissingError(
            f"not root, so these Debian packages cannot be installed: {', '.join(absent)}; "
            f"run `sudo apt-get install {' '.join(absent)}` and try again"
        )
    return absent


def ensure(names: Sequence[str], steps: Steps | None = None) -> None:
    """Install those of the named Debian packages that are missing. Nothing is started.

    Raises:
        MissingError: as `check`.
        ClusterError: apt-get failed; the error carries its last lines.
    """
    absent = check(names)
    if not absent:
        return
    steps = steps or Steps()
    with (
        steps.step(f"Debian packages: {' '.join(absent)}") as step,
        locked(cache() / "packages.lock", lambda: step.update("waiting for another run")),
    ):
        absent = missing(names)
        if absent:
            with _no_services():
                _apt(["update"], step)
                _apt(["install", "--no-install-recommends", *absent], step)
            _disable_services(absent)


@contextmanager
def _no_services() -> Iterator[None]:
    """Keep package scripts from starting services, and leave the machine as it was."""
    ours = not POLICY.exists() or POLICY_MARK in POLICY.read_text()  # or left by a killed run
    if ours:
        POLICY.write_text(POLICY_TEXT)
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            POLICY.unlink(missing_ok=True)


def _disable_services(names: Sequence[str]) -> None:
    """Keep what we installed from starting at the next boot, where systemd would start it."""
    if not Path("/run/systemd/system").is_dir():
        return
    listing = subprocess.run(
        ["dpkg-query", "-L", *names], capture_output=True, text=True, check=True
    ).stdout
    units = [Path(path).name for path in listing.splitlines() if path.endswith(".service")]
    units = [unit for unit in units if "@" not in unit]
    if units:
        subprocess.run(["systemctl", "--quiet", "disable", *units], check=True)


def _apt(arguments: Sequence[str], step: Step) -> None:
    """Run apt-get; show its last line as the step's detail, and its last lines if it fails."""
    command = [*APT, *arguments]
    lines: list[str] = []
    with subprocess.Popen(
        command,
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            lines = [*lines[-KEPT_LINES:], line.rstrip()]
            if line.startswith(("Get:", "Unpacking", "Setting up")):
                step.update(line.split(" (")[0].strip()[:60])
    if process.returncode:
        raise ClusterError(f"`{' '.join(command)}` failed:\n" + "\n".join(lines))
