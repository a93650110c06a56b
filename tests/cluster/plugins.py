"""Plug-ins for the agents of the cluster: their packages, and an https server of packages on cp.

The server's certificate comes from the cluster's own authority, which agents are to trust by the
chart's value `agent.plugins.caConfigMap`. Knows nothing of what a plug-in does.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from cluster import api, cgroups, network, paths, pki
from cluster.layout import CONTROL_PLANE, HERE, STATE
from cluster.processes import read_pid, run, start, wait_for, write_pid
from cluster.release import NAMESPACE

PORT = 8444
"""Of the server, on cp's address inside the cluster."""

CA_CONFIG_MAP = "test-packages-ca"
"""In the release's namespace; made by `start_server`."""

LIBRARY = paths.ROOT / "plugin" / "src" / "outrider_plugin"
_FOLDER = STATE / "packages"
_NAME = "packages"


def start_server() -> None:
    """Have the server run, and its authority in CA_CONFIG_MAP.

    Raises:
        ClusterError: it did not start.
    """
    _FOLDER.mkdir(exist_ok=True)
    if not read_pid(_NAME):
        certificate = (pki.FOLDER / "packages.crt", pki.FOLDER / "packages.key")
        # In cp's network only: the files are where this machine has them.
        prefix = [*cgroups.enter_command("cp"), *network.namespace_command("cp", "-n")]
        script = [sys.executable, "-S", HERE / "https_files.py"]
        process = start(_NAME, [*prefix, *script, CONTROL_PLANE, PORT, _FOLDER, *certificate])
        write_pid(_NAME, process.pid)
        wait_for("server of packages", _listens, 20, 0.1, [_NAME])
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    bundle = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": CA_CONFIG_MAP, "namespace": NAMESPACE},
        "data": {"ca.crt": (pki.FOLDER / "ca.crt").read_text()},
    }
    for item in (namespace, bundle):
        api.kubectl("apply", "-f", "-", stdin=json.dumps(item))


def _listens() -> bool:
    ask = ["curl", "-sS", "--cacert", pki.FOLDER / "ca.crt", f"https://{CONTROL_PLANE}:{PORT}/"]
    inside = network.namespace_command("cp", "-n")
    return run(*inside, *ask, check=False).returncode == 0


def pack(name: str, executable: Path, library: Path | None = LIBRARY) -> bytes:
    """A package in tar.gz: one executable, and beside it the Python library for plug-ins.

    Args:
        name: of the executable in it.
        executable: the file.
        library: a folder with a Python package; None: nothing beside it.

    Returns:
        The same bytes whenever the files are the same.
    """
    stored = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=stored, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        _add(archive, name, executable, 0o755)
        if library:
            for file in sorted(library.glob("*.py")):
                _add(archive, f"{library.name}/{file.name}", file, 0o644)
    return stored.getvalue()


def _add(archive: tarfile.TarFile, name: str, file: Path, mode: int) -> None:
    content = file.read_bytes()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def publish(name: str, version: str, package: bytes, **more: object) -> Mapping[str, object]:
    """Put a package on the server.

    Args:
        name: of the plug-in, and of the executable in the package.
        version: of the plug-in.
        package: a tar.gz.
        more: further fields, say detail.

    Returns:
        The plug-in as an element of an AgentConfig's spec.plugins.
    """
    file = f"{name}-{version}.tar.gz"
    (_FOLDER / file).write_bytes(package)
    source = {
        "urls": [f"https://{CONTROL_PLANE}:{PORT}/{file}"],
        "sha256": hashlib.sha256(package).hexdigest(),
        "format": "tar.gz",
    }
    return {"name": name, "version": version, "source": source, **more}


def folder_on(node: str, name: str) -> Path:
    """The working directory of a plug-in on a node, as seen from this machine."""
    return STATE / node / "var-lib" / "outrider" / "plugins" / "work" / name
