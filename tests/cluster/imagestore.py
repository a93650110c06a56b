"""The image cache of the nodes, and how new images reach it and every running node.

Builds nothing: it takes images out of buildah's storage. Handing one over takes a second only
because just the layers that a store lacks travel, see `delta_archive`.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from cluster import cgroups, paths
from cluster.errors import ClusterError
from cluster.layers import Storage
from cluster.layout import IMAGES, STATE
from cluster.machines import names as machine_names
from cluster.network import namespace_command
from cluster.nodes import BLOBS
from cluster.processes import parallel, read_pid, run

OCI = "application/vnd.oci.image."
NAME_KEY = "io.containerd.image.name"
IMPORT_TIMEOUT = 300.0
_CURRENT = IMAGES / "names.json"
_REPLACED = IMAGES / "replaced.json"

# The pid namespace sees to it that containerd cannot outlive the script.
_WITH_CONTAINERD = """
mount -t tmpfs run /run; ip link set lo up
containerd --config {images}/containerd.toml >{images}/import.log 2>&1 &
n=0
until ctr version >/dev/null 2>&1; do
    n=$((n+1)); [ $n -lt 200 ] || {{ tail {images}/import.log >&2; exit 1; }}; sleep 0.05
done
for archive in "$@"; do ctr -n k8s.io images import "$archive" || exit 1; done
for name in {dropped}; do ctr -n k8s.io images rm --sync "$name"; done
kill %1; wait %1 || true
"""


def _read(file: Path, default: Any) -> Any:
    try:
        return json.loads(file.read_text())
    except OSError:
        return default


def current() -> dict[str, str]:
    """The tags in the cache, each with the name that is unique to its content."""
    return dict(_read(_CURRENT, {}))


def _change_cache(archives: Sequence[str], dropped: Sequence[str] = ()) -> None:
    """Import archives into the cache, or drop names from it, with a passing containerd."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    (IMAGES / "containerd.toml").write_text(f"""\
version = 2
root = "{IMAGES}/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[plugins."io.containerd.internal.v1.opt"]
  path = "{IMAGES}/containerd/opt"
""")
    script = _WITH_CONTAINERD.format(images=IMAGES, dropped=" ".join(dropped))
    alone = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
    run(*alone, "bash", "-c", script, "import", *archives, timeout=IMPORT_TIMEOUT)


def prune() -> None:
    """Drop images whose tag has moved on: the cache's bound. Only while no node runs."""
    with paths.locked(IMAGES / "lock"):
        if cgroups.others():
            return
        kept = set(current().values())
        dropped = [name for name in _read(_REPLACED, []) if name not in kept]
        if dropped:
            _change_cache([], dropped)
        if _REPLACED.exists():
            _REPLACED.write_text("[]")


class _ArchiveWriter:
    """Writes an OCI archive piece by piece."""

    def __init__(self, out: tarfile.TarFile) -> None:
        self._out = out

    def put(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._out.addfile(info, io.BytesIO(data))

    def copy(self, digest: str, size: int, source: IO[bytes]) -> None:
        info = tarfile.TarInfo(f"blobs/sha256/{digest}")
        info.size = size
        self._out.addfile(info, source)

    def blob(self, data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        self.put(f"blobs/sha256/{digest}", data)
        return {"digest": f"sha256:{digest}", "size": len(data)}


def unique_name(tag: str, config_digest: str) -> str:
    """A name that belongs to this content for ever, for charts and for keeping images alive.

    A tag that moves on lets containerd collect layers that the old and the new image share while
    it unpacks the new one ("parent snapshot ... does not exist"); a second name prevents it. In a
    chart it also makes an upgrade really roll.
    """
    return f"{tag.rpartition(':')[0]}:sha-{config_digest[:12]}"


def delta_archive(storage: Storage, tag: str, present: Iterable[str], out: IO[bytes]) -> str:
    """Write an OCI archive of an image without the layers that a store has.

    `ctr images import` reads, hashes and copies every layer of an archive, though the store has
    it; with a base image of 160 MB and four stores that takes half a minute. An OCI index may name
    blobs that are not in the archive as long as the store has them.

    Args:
        storage: where the image was built.
        tag: its name there.
        present: digests of the blobs in the store, without "sha256:".
        out: where to write; flushed at the end.

    Returns:
        The name that is unique to the image's content.
    """
    known = frozenset(present)
    image = storage.image(tag)
    unique = unique_name(tag, image.identity)
    with tarfile.open(fileobj=out, mode="w") as result:
        writer = _ArchiveWriter(result)
        writer.put("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        layers = []
        for layer in image.layers:
            digest = f"sha256:{layer.digest}"
            layers.append({"mediaType": f"{OCI}layer.v1.tar", "digest": digest, "size": layer.size})
            if layer.digest not in known:
                with tempfile.TemporaryFile() as content:
                    storage.write(layer, content)
                    content.seek(0)
                    writer.copy(layer.digest, layer.size, content)
        config = {"mediaType": f"{OCI}config.v1+json", **writer.blob(image.configuration)}
        media = f"{OCI}manifest.v1+json"
        manifest = {"schemaVersion": 2, "mediaType": media, "config": config, "layers": layers}
        entry = {"mediaType": media, **writer.blob(json.dumps(manifest).encode())}
        named = [{**entry, "annotations": {NAME_KEY: name}} for name in (unique, tag)]
        writer.put("index.json", json.dumps({"schemaVersion": 2, "manifests": named}).encode())
    out.flush()
    return unique


def _into_node(node: str, archive: str) -> None:
    """Import into a running node, by its standard input: it has a /tmp of its own."""
    prefix = [*cgroups.enter_command(node), *namespace_command(node)]
    with Path(archive).open("rb") as stdin:
        done = subprocess.run(
            [*prefix, "ctr", "-n", "k8s.io", "images", "import", "-"],
            stdin=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=IMPORT_TIMEOUT,
        )
    if done.returncode:
        raise ClusterError(f"{node} did not take an image: {done.stderr.strip()}")


def _running_nodes() -> list[str]:
    return [n for n in machine_names() if n != "cp" and read_pid(f"{n}.containerd")]


def _add_one(storage: Storage, tag: str) -> str:
    """Hand one image to the cache and all running nodes; returns its unique name."""
    stores = {"": IMAGES / "containerd"}
    stores |= {node: STATE / node / "var-lib" / "containerd" for node in _running_nodes()}
    written: dict[frozenset[str], str] = {}
    mutex = threading.Lock()
    with tempfile.TemporaryDirectory(dir=paths.cache(), prefix="delta-") as scratch:

        def load(store: str) -> None:
            blobs = stores[store] / BLOBS
            listed = blobs.iterdir() if blobs.exists() else ()
            present = frozenset(blob.name for blob in listed)
            with mutex:  # the stores are usually equal: one archive for all
                if present not in written:
                    archive = Path(scratch) / f"{len(written)}.tar"
                    with archive.open("wb") as out:
                        delta_archive(storage, tag, present, out)
                    written[present] = str(archive)
            if store:
                _into_node(store, written[present])
            else:
                _change_cache([written[present]])

        parallel(load, list(stores))
    return unique_name(tag, storage.image(tag).identity)


def add(storage: Storage, tags: Sequence[str]) -> dict[str, str]:
    """Hand images to the cache (for the next `up`) and to every running node.

    An image that was handed over before is left alone: nodes that run got it then, or started from
    the cache that had it.

    Returns:
        Each tag with the name that is unique to its content.

    Raises:
        ClusterError: a store did not take one.
    """
    added: dict[str, str] = {}
    with paths.locked(IMAGES / "lock"):
        known, replaced = current(), list(_read(_REPLACED, []))
        for tag in tags:
            unique = unique_name(tag, storage.image(tag).identity)
            if known.get(tag) != unique:
                _add_one(storage, tag)
                replaced += [known[tag]] if tag in known else []
                known[tag] = unique
            added[tag] = unique
        _CURRENT.write_text(json.dumps(known, indent=1))
        _REPLACED.write_text(json.dumps(replaced))
    return added
