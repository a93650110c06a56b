"""A Kafka broker that asks who is there: by password over TLS, or by certificate.

Why it exists: that a server may log in, and says what is wrong when it may not, is about a real
broker's refusals. Its passwords are in its own files; it is for tests on loopback only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.kafka import HOST, KafkaBroker
from cluster.supervised import free_port

MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_MODULES = "org.apache.kafka.common.security"


@dataclass(frozen=True)
class Credentials:
    """What the broker knows its clients by.

    Attributes:
        username: the one user, of all mechanisms.
        password: of that user.
        ca: certificate of the authority of both sides, PEM.
        certificate: the broker's own, PEM.
        key: its private key, PKCS 8, PEM.
    """

    username: str
    password: str
    ca: str
    certificate: str
    key: str


class SecuredBroker(KafkaBroker):
    """A broker with listeners for SASL over TLS and for client certificates, besides the plain one.

    Args:
        folder: as of any broker.
        credentials: who is let in.
    """

    def __init__(self, folder: Path, credentials: Credentials) -> None:
        super().__init__(folder)
        self._credentials = credentials
        self._sasl, self._tls = free_port(HOST), free_port(HOST)

    @property
    def sasl(self) -> str:
        """Where clients with a password connect, over TLS."""
        return f"{HOST}:{self._sasl}"

    @property
    def tls(self) -> str:
        """Where clients with a certificate connect."""
        return f"{HOST}:{self._tls}"

    def _properties(self, controller_port: int) -> str:
        known = self._credentials
        ours = f"PLAINTEXT://{self.bootstrap},PASSWORD://{self.sasl},CERTIFICATE://{self.tls}"
        protocols = ("PLAINTEXT:PLAINTEXT", "PASSWORD:SASL_SSL", "CERTIFICATE:SSL")
        plain = (
            f'{_MODULES}.plain.PlainLoginModule required user_{known.username}="{known.password}";'
        )
        scram = f"{_MODULES}.scram.ScramLoginModule required;"
        more = {
            "listeners": f"{ours},CONTROLLER://{HOST}:{controller_port}",
            "advertised.listeners": ours,
            "listener.security.protocol.map": ",".join((*protocols, "CONTROLLER:PLAINTEXT")),
            "ssl.keystore.type": "PEM",
            "ssl.keystore.certificate.chain": _one_line(known.certificate),
            "ssl.keystore.key": _one_line(known.key),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.certificates": _one_line(known.ca),
            "listener.name.certificate.ssl.client.auth": "required",
            "listener.name.password.sasl.enabled.mechanisms": ",".join(MECHANISMS),
            "listener.name.password.plain.sasl.jaas.config": plain,
            "listener.name.password.scram-sha-256.sasl.jaas.config": scram,
            "listener.name.password.scram-sha-512.sasl.jaas.config": scram,
        }
        lines = "".join(f"{name}={value}\n" for name, value in more.items())
        return super()._properties(controller_port) + lines

    def _format_options(self) -> list[str]:
        login = f"[name={self._credentials.username},password={self._credentials.password}]"
        return [
            part
            for mechanism in MECHANISMS
            if mechanism != "PLAIN"
            for part in ("--add-scram", f"{mechanism}={login}")
        ]


def _one_line(pem: str) -> str:
    """A PEM file as a value in a properties file, where a backslash and "n" are a line end."""
    return pem.strip().replace("\n", "\\n")
