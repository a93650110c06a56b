"""Layers out of buildah's storage, byte for byte, and only those that a store lacks."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from cluster.errors import ClusterError
from cluster.imagestore import delta_archive, unique_name
from cluster.layers import Storage

TAG = "localhost/outrider-thing:dev"
CONFIGURATION = b'{"architecture": "amd64"}'


def _tar(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def _add_layer(root: Path, identity: str, parent: str, content: bytes) -> dict[str, object]:
    """Store a layer of one file as containers/storage does: what is not content, and content."""
    tar = _tar("file", content)
    lines: list[dict[str, object]] = [
        {"type": 2, "payload": base64.b64encode(tar[:512]).decode()},
        {"type": 1, "name": "file", "size": len(content), "payload": ""},
        {"type": 2, "payload": base64.b64encode(tar[512 + len(content) :]).decode()},
    ]
    split = "\n".join(json.dumps(line) for line in lines)
    (root / "overlay-layers").mkdir(parents=True, exist_ok=True)
    (root / "overlay-layers" / f"{identity}.tar-split.gz").write_bytes(
        gzip.compress(split.encode())
    )
    (root / "overlay" / identity / "diff").mkdir(parents=True)
    (root / "overlay" / identity / "diff" / "file").write_bytes(content)
    digest = f"sha256:{hashlib.sha256(tar).hexdigest()}"
    return {"id": identity, "parent": parent, "diff-digest": digest, "diff-size": len(tar)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    layers = [
        _add_layer(tmp_path, "top", "base", b"code" * 1000),
        _add_layer(tmp_path, "base", "", b"system" * 1000),
    ]
    (tmp_path / "overlay-layers" / "layers.json").write_text(json.dumps(layers))
    identity = hashlib.sha256(CONFIGURATION).hexdigest()
    images = [{"id": identity, "names": [TAG], "layer": "top"}]
    folder = tmp_path / "overlay-images"
    name = base64.b64encode(f"sha256:{identity}".encode()).decode()
    (folder / identity).mkdir(parents=True)
    (folder / identity / f"={name}").write_bytes(CONFIGURATION)
    (folder / "images.json").write_text(json.dumps(images))
    return tmp_path


def test_layer_is_made_again_byte_for_byte(root: Path) -> None:
    storage = Storage(root)
    image = storage.image(TAG)
    assert [layer.identity for layer in image.layers] == ["base", "top"]
    for layer, content in zip(image.layers, (b"system" * 1000, b"code" * 1000), strict=True):
        out = io.BytesIO()
        storage.write(layer, out)
        assert out.getvalue() == _tar("file", content)


def test_changed_layer_is_refused(root: Path) -> None:
    (root / "overlay" / "top" / "diff" / "file").write_bytes(b"edoc" * 1000)
    storage = Storage(root)
    with pytest.raises(ClusterError, match="does not match its digest"):
        storage.write(storage.image(TAG).layers[1], io.BytesIO())


def test_unknown_image_is_named(root: Path) -> None:
    with pytest.raises(ClusterError, match="localhost/other:dev"):
        Storage(root).image("localhost/other:dev")


def test_archive_holds_only_what_the_store_lacks(root: Path) -> None:
    base, top = Storage(root).image(TAG).layers
    out = io.BytesIO()
    unique = delta_archive(Storage(root), TAG, [base.digest], out)
    assert unique == unique_name(TAG, hashlib.sha256(CONFIGURATION).hexdigest())
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        members = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        data = {name: file.read() for name, file in members.items() if file}
    blobs = {name.rpartition("/")[2]: data[name] for name in data if name.startswith("blobs/")}
    for digest, blob in blobs.items():
        assert hashlib.sha256(blob).hexdigest() == digest
    assert top.digest in blobs
    assert base.digest not in blobs
    index = json.loads(data["index.json"])["manifests"]
    names = {entry["annotations"]["io.containerd.image.name"] for entry in index}
    assert names == {TAG, unique}
    manifest = json.loads(blobs[index[0]["digest"].removeprefix("sha256:")])
    listed = [layer["digest"].removeprefix("sha256:") for layer in manifest["layers"]]
    assert listed == [base.digest, top.digest]
