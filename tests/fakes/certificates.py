"""Certificates for servers in tests, made at once and only good for loopback."""

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

SERVER_NAME = "outrider-server"


class Authority:
    """A certificate authority of its own."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = self._sign("outrider test authority", self._key, days=30, ca=True)

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return self._certificate.public_bytes(Encoding.PEM)

    def issue(self, name: str = SERVER_NAME, days: int = 30) -> tuple[bytes, bytes]:
        """A certificate for a name and loopback, and its key, both PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(name, key, days=days, ca=False)
        return certificate.public_bytes(Encoding.PEM), key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )

    def _sign(
        self, name: str, key: ec.EllipticCurvePrivateKey, *, days: int, ca: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = subject if ca else self._certificate.subject
        names = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def write_pair(folder: Path, pair: tuple[bytes, bytes]) -> None:
    """Put a pair in place as kubelet does with a Secret: a folder, and a symlink moved at once."""
    version = folder / f"..{os.urandom(4).hex()}"
    version.mkdir(parents=True)
    for name, content in zip(("tls.crt", "tls.key"), pair, strict=True):
        (version / name).write_bytes(content)
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(Path("..data") / name)
    fresh = folder / "..data_tmp"
    fresh.symlink_to(version.name)
    fresh.rename(folder / "..data")
