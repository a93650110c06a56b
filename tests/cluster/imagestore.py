"""The image cache of the nodes, and how new images reach it and every running node.

Builds nothing: it takes docker archives as buildah writes them. Importing takes seconds only
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
from cluster.layout import IMAGES, STATE
from cluster.machines import names as machine_names
from cluster.network import namespace_command
from cluster.nodes import BLOBS
from cluster.processes import parallel, read_pid, run

DOCKER = "application/vnd.docker."
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
    namespaces = ("unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc")
    run(*namespaces, "bash", "-c", script, "import", *archives, timeout=IMPORT_TIMEOUT)


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


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    found = archive.extractfile(name)
    if found is None:
        raise ClusterError(f"{archive.name!s} is no docker archive: {name} is not a file in it")
    return found


def delta_archive(source: Path, present: Iterable[str], out: IO[bytes]) -> dict[str, str]:
    """Write an OCI archive of a docker archive without the layers that a store has.

    `ctr images import` reads, hashes and copies every layer of an archive, though the store has
    it; with a base image of 270 MB and four stores that takes half a minute. An OCI index may name
    blobs that are not in the archive as long as the store has them. (buildah names the members of
    a docker archive by their digest, so nothing is hashed here.)

    Args:
        source: the docker archive.
        present: digests of the blobs in the store, without "sha256:".
        out: where to write; flushed at the end.

    Returns:
        Each tag in the archive with its unique name.
    """
    known = frozenset(present)
    index: list[dict[str, object]] = []
    unique: dict[str, str] = {}
    with tarfile.open(source) as archive, tarfile.open(fileobj=out, mode="w") as result:
        writer = _ArchiveWriter(result)
        sizes = {member.name: member.size for member in archive.getmembers()}
        writer.put("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
        for image in json.load(_member(archive, "manifest.json")):
            layers = []
            for name in image["Layers"]:
                digest = Path(name).stem
                media = f"{DOCKER}image.rootfs.diff.tar"
                layer = {"mediaType": media, "digest": f"sha256:{digest}", "size": sizes[name]}
                layers.append(layer)
                if digest not in known:
                    writer.copy(digest, sizes[name], _member(archive, name))
            config = writer.blob(_member(archive, image["Config"]).read())
            config["mediaType"] = f"{DOCKER}container.image.v1+json"
            media = f"{DOCKER}distribution.manifest.v2+json"
            manifest = {"schemaVersion": 2, "mediaType": media, "config": config, "layers": layers}
            entry = {"mediaType": media, **writer.blob(json.dumps(manifest).encode())}
            for tag in image["RepoTags"]:
                unique[tag] = unique_name(tag, Path(image["Config"]).stem)
                for name in (unique[tag], tag):
                    annotations = {"io.containerd.image.name": name}
                    index.append({**entry, "annotations": annotations})
        writer.put("index.json", json.dumps({"schemaVersion": 2, "manifests": index}).encode())
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


def _add_one(source: Path) -> dict[str, str]:
    """Import one archive into the cache and all running nodes."""
    stores = {"": IMAGES / "containerd"}
    stores |= {node: STATE / node / "var-lib" / "containerd" for node in _running_nodes()}
    written: dict[frozenset[str], str] = {}
    unique: dict[str, str] = {}
    mutex = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="outrider-image-") as scratch:

        def load(store: str) -> None:
            blobs = stores[store] / BLOBS
            listed = blobs.iterdir() if blobs.exists() else ()
            present = frozenset(blob.name for blob in listed)
            with mutex:  # the stores are usually equal: one archive for all
                if present not in written:
                    archive = Path(scratch) / f"{len(written)}.tar"
                    with archive.open("wb") as out:
                        unique.update(delta_archive(source, present, out))
                    written[present] = str(archive)
            if store:
                _into_node(store, written[present])
            else:
                _change_cache([written[present]])

        parallel(load, list(stores))
    return unique


def add(archives: Sequence[Path]) -> dict[str, str]:
    """Import docker archives into the cache (for the next `up`) and into every running node.

    Returns:
        Each tag in them with its unique name.

    Raises:
        ClusterError: a store did not take one.
    """
    added: dict[str, str] = {}
    with paths.locked(IMAGES / "lock"):
        tags, replaced = current(), list(_read(_REPLACED, []))
        for source in archives:
            unique = _add_one(source)
            replaced += [tags[t] for t, name in unique.items() if tags.get(t, name) != name]
            tags.update(unique)
            added.update(unique)
        _CURRENT.write_text(json.dumps(tags, indent=1))
        _REPLACED.write_text(json.dumps(replaced))
    return added
