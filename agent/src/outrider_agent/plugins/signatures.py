"""Checks who made a package: Ed25519 over the bytes as they were fetched.

The keys are files of this node: nobody who only writes configurations can change them.
"""

import base64
import binascii
import mmap
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key


class SignatureError(Exception):
    """A signature that is not there or not good, or a key that is none."""


def verify(package: Path, signature: str, key_files: Sequence[str]) -> None:
    """Check that one of the keys signed the package.

    Args:
        package: The fetched file; not empty.
        signature: Base64 of its 64 bytes.
        key_files: Files with a public key each: PEM, or base64 of its 32 bytes.

    Raises:
        SignatureError: None did, or a key cannot be read.
        OSError: The package cannot be read.
    """
    try:
        raw = base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        raise SignatureError("its signature is no base64") from None
    keys = [_key(path) for path in key_files]
    # Mapped, not read: a package may be large.
    with (
        package.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as content,
    ):
        for key in keys:
            try:
                key.verify(raw, content)
            except InvalidSignature:
                continue
            return
    raise SignatureError(
        "its signature (source.signature) is of none of this node's keys (plugins.publicKeys: "
        f"{', '.join(key_files)})"
    )


def _key(path: str) -> Ed25519PublicKey:
    try:
        content = Path(path).read_bytes()
        if b"-----BEGIN" in content:
            key = load_pem_public_key(content)
            if not isinstance(key, Ed25519PublicKey):
                raise SignatureError(f"{path} (plugins.publicKeys) is a key of another kind")
            return key
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(content, validate=False))
    except OSError as error:
        raise SignatureError(f"{path} (plugins.publicKeys): {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            f"{path} (plugins.publicKeys) holds no Ed25519 public key: {error}"
        ) from None
