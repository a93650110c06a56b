"""The gateway's certificate, read anew when its files change, without a restart.

Certificates of a Secret are renewed while the server runs. A pair that cannot be read or does not
fit is reported and never used: the old one stays. Issues no certificates.
"""

import asyncio
import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from outrider_runtime.health import Health
from outrider_runtime.logs import get_logger
from outrider_runtime.settings import SettingsError, readable

from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import TlsSettings

#: A warning is logged from so long before the certificate's end.
EXPIRY_WARNING_SECONDS: Final = 3 * 24 * 3600

log = get_logger(__name__)

Stamp = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class KeyPair:
    """A certificate with its issuers and its key, both PEM, that fit each other."""

    certificates: bytes
    key: bytes
    expires: datetime

    def __repr__(self) -> str:
        return f"KeyPair(expires={self.expires.isoformat()})"


def parse_pair(certificates: bytes, key: bytes, settings: TlsSettings) -> KeyPair:
    """Check that a certificate and a key can be used together.

    Raises:
        SettingsError: They cannot; names the setting at fault.
    """
    try:
        leaf = x509.load_pem_x509_certificates(certificates)[0]
        public = leaf.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(
            f'setting "gateway.tls.certFile": {settings.cert_file!r} holds no PEM certificate: '
            f"{_one_line(error)}"
        ) from None
    try:
        own = load_pem_private_key(key, password=None).public_key()
        fits = own.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == public
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The library's own text may quote the content, and that is a key.
        raise SettingsError(
            f'setting "gateway.tls.keyFile": {settings.key_file!r} holds no PEM private key '
            "without a password"
        ) from None
    if not fits:
        raise SettingsError(
            f'setting "gateway.tls.keyFile": the key in {settings.key_file!r} does not belong to '
            f"the certificate in {settings.cert_file!r}"
        )
    return KeyPair(certificates, key, leaf.not_valid_after_utc)


class Certificate:
    """The pair in use, as credentials for a grpc server.

    Args:
        settings: where the files are.
        metrics: where loads and the expiry are counted.
        health: the condition "tls" is set here: false once the certificate has ended.

    Raises:
        SettingsError: the files cannot be used at start.
    """

    def __init__(self, settings: TlsSettings, metrics: ServerMetrics, health: Health) -> None:
        self._settings = settings
        self._metrics = metrics
        self._health = health
        # Handshakes ask in threads of grpc, `watch` in the loop.
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._pair = self._load()
        self._served = self._pair
        self._note_expiry()

    @property
    def expires(self) -> datetime:
        """When the certificate in use ends."""
        return self._pair.expires

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that use a changed pair from the next handshake on."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._pair),
            self._fetch,  # type: ignore[arg-type]  # None is documented, the stubs forget it
            require_client_authentication=False,
        )

    def refresh(self) -> bool:
        """Read the files if they changed; True when a new pair is in use."""
        with self._lock:
            stamp = self._look()
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            try:
                pair = self._load()
            except SettingsError as error:
                self._metrics.certificate_loads.labels("failed").inc()
                log.error(  # noqa: TRY400 - the text says it all
                    "changed certificate not usable, keeping the old one", error=str(error)
                )
                return False
            changed = pair != self._pair
            self._pair = pair
            self._note_expiry()
        if changed:
            self._metrics.certificate_loads.labels("loaded").inc()
            log.info("certificate changed", expires=pair.expires.isoformat())
        return changed

    async def watch(self) -> None:
        """Look at the files from time to time, for ever.

        Handshakes look as well; without any, the expiry that is measured would grow old.
        """
        warned: datetime | None = None
        while True:
            self.refresh()
            left = (self.expires - datetime.now(UTC)).total_seconds()
            self._health.set(
                "tls",
                left > 0,
                f"the certificate in {self._settings.cert_file!r} ended "
                f"{self.expires.isoformat()}: renew it",
            )
            if left < EXPIRY_WARNING_SECONDS and warned != self.expires:
                warned = self.expires
                log.warning("certificate ends soon", expires=self.expires.isoformat())
            await asyncio.sleep(self._settings.check_seconds)

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by grpc in a thread of its own at each handshake; None: nothing changed."""
        try:
            self.refresh()
            if self._served is self._pair:
                return None
            self._served = self._pair
            return _configuration(self._pair)
        except Exception as error:
            log.exception("certificate not looked at", error=_one_line(error))
            return None

    def _look(self) -> Stamp:
        """What tells a changed file from an unchanged one, also behind symlinks of a Secret."""
        found = []
        for name in (self._settings.cert_file, self._settings.key_file):
            try:
                facts = os.stat(name)  # noqa: PTH116 - cheaper than a Path at each handshake
                found.append((facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size))
            except OSError as error:
                found.append((0, 0, 0, -(error.errno or 1)))
        return tuple(found)

    def _load(self) -> KeyPair:
        certificates = readable(self._settings.cert_file, setting="gateway.tls.certFile")
        key = readable(self._settings.key_file, setting="gateway.tls.keyFile")
        return parse_pair(certificates, key, self._settings)

    def _note_expiry(self) -> None:
        self._metrics.certificate_expiry.set(self._pair.expires.timestamp())


def _configuration(pair: KeyPair) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificates)])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
