"""Read an image's layers straight from buildah's storage.

`buildah push` writes a whole image each time, base and all, which takes longer than everything else
after a change of code. The storage keeps each layer's files and, beside them, what is missing to
make the very same tar of them again; so a single layer can be had, byte for byte. Reads only: the
storage is buildah's.

Its form is that of containers/storage: layers.json (parent, digest and size of each layer),
<layer>.tar-split.gz (one JSON object a line: type 2 holds raw bytes of the tar in base64, type 1
stands for the contents of a file), overlay/<layer>/diff (the files).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cluster.errors import ClusterError

RAW, FILE = 2, 1


@dataclass(frozen=True)
class Layer:
    """One layer of an image.

    Attributes:
        identity: what the storage calls it.
        digest: sha256 of its tar, without "sha256:".
        size: of its tar, bytes.
    """

    identity: str
    digest: str
    size: int


@dataclass(frozen=True)
class Image:
    """An image in the storage.

    Attributes:
        identity: sha256 of its configuration.
        configuration: the configuration as stored.
        layers: the lowest first.
    """

    identity: str
    configuration: bytes
    layers: tuple[Layer, ...]


class _Writer:
    """Counts and hashes what passes on to another stream."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._out.write(data)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


class Storage:
    """buildah's storage in a folder (its --root), with the overlay driver."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def image(self, tag: str) -> Image:
        """Find an image by its full name.

        Raises:
            ClusterError: there is none of that name.
        """
        for image in json.loads((self._root / "overlay-images/images.json").read_text()):
            if tag in image.get("names", ()):
                name = base64.b64encode(f"sha256:{image['id']}".encode()).decode()
                file = self._root / "overlay-images" / image["id"] / f"={name}"
                layers = tuple(self._layers(image["layer"]))
                return Image(image["id"], file.read_bytes(), layers)
        raise ClusterError(f"buildah has no image called {tag}; `image build` makes it")

    def _layers(self, top: str) -> Iterator[Layer]:
        table = {
            layer["id"]: layer
            for layer in json.loads((self._root / "overlay-layers/layers.json").read_text())
        }
        chain = []
        current: str | None = top
        while current:
            chain.append(table[current])
            current = table[current].get("parent")
        for layer in reversed(chain):
            digest = layer["diff-digest"].removeprefix("sha256:")
            yield Layer(layer["id"], digest, layer["diff-size"])

    def write(self, layer: Layer, out: IO[bytes]) -> None:
        """Write a layer's tar.

        Raises:
            ClusterError: what came out is not what the digest says.
        """
        files = self._root / "overlay" / layer.identity / "diff"
        writer = _Writer(out)
        split = self._root / "overlay-layers" / f"{layer.identity}.tar-split.gz"
        with gzip.open(split) as lines:
            for line in lines:
                entry = json.loads(line)
                if entry["type"] == RAW:
                    writer.write(base64.b64decode(entry["payload"]))
                elif entry["type"] == FILE and entry.get("size"):
                    with (files / entry["name"]).open("rb") as content:
                        shutil.copyfileobj(content, writer, 1 << 20)
        if writer.digest != layer.digest:
            raise ClusterError(
                f"layer {layer.identity} in {self._root} does not match its digest; "
                f"remove {self._root} and build again"
            )
