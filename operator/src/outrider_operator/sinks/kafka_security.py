"""How brokers are spoken to: the same settings in the words of both Kafka libraries.

Secrets are read from files at each use, so that a changed one counts with the next connection;
nothing here writes them anywhere, and no error carries them.
"""

import ssl
from pathlib import Path
from typing import Any, Final

from outrider_proto import limits

from outrider_operator.settings_kafka import KafkaSecuritySettings, KafkaSinkSettings

#: A name, password or certificate file is smaller, bytes.
MAX_FILE_BYTES: Final = limits.MIB


class SecurityError(Exception):
    """A file of sink.kafka.security cannot be used; the text says which and why."""


def for_librdkafka(settings: KafkaSinkSettings) -> dict[str, Any]:
    """Brokers and security as confluent-kafka's clients take them.

    Raises:
        SecurityError: a file cannot be read.
    """
    security = settings.security
    found: dict[str, Any] = {
        "bootstrap.servers": ",".join(settings.bootstrap_servers),
        "client.id": settings.client_id,
        "security.protocol": security.protocol,
    }
    if security.protocol.endswith("ssl"):
        if security.ca_file:
            found["ssl.ca.pem"] = _read(security.ca_file, "caFile")
        else:
            found["ssl.ca.location"] = "probe"
        if security.cert_file:
            found["ssl.certificate.pem"] = _read(security.cert_file, "certFile")
            found["ssl.key.pem"] = _read(security.key_file, "keyFile")
    if security.protocol.startswith("sasl_"):
        username, password = _login(security)
        found |= {
            "sasl.mechanism": security.mechanism,
            "sasl.username": username,
            "sasl.password": password,
        }
    return found


def for_aiokafka(settings: KafkaSinkSettings) -> dict[str, Any]:
    """The same as aiokafka's clients take it.

    Raises:
        SecurityError: a file cannot be used.
    """
    security = settings.security
    found: dict[str, Any] = {
        "bootstrap_servers": list(settings.bootstrap_servers),
        "client_id": settings.client_id,
        "security_protocol": security.protocol.upper(),
    }
    if security.protocol.endswith("ssl"):
        try:
            context = ssl.create_default_context(cafile=security.ca_file or None)
            if security.cert_file:
                context.load_cert_chain(security.cert_file, security.key_file)
        except OSError as error:  # ssl.SSLError is one
            raise SecurityError(
                f"the certificate files of sink.kafka.security cannot be used: {error}"
            ) from None
        found["ssl_context"] = context
    if security.protocol.startswith("sasl_"):
        username, password = _login(security)
        found |= {
            "sasl_mechanism": security.mechanism,
            "sasl_plain_username": username,
            "sasl_plain_password": password,
        }
    return found


def _login(security: KafkaSecuritySettings) -> tuple[str, str]:
    # Editors and `kubectl create secret --from-file` leave a line end that is no part of it.
    return (
        _read(security.username_file, "usernameFile").strip(),
        _read(security.password_file, "passwordFile").rstrip("\r\n"),
    )


def _read(name: str, setting: str) -> str:
    try:
        with Path(name).open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise SecurityError(f"sink.kafka.security.{setting}: {name} is too large")
        text = content.decode()
    except OSError as error:
        raise SecurityError(
            f"sink.kafka.security.{setting}: {name} cannot be read: {error.strerror}"
        ) from None
    except UnicodeDecodeError:
        raise SecurityError(f"sink.kafka.security.{setting}: {name} holds no text") from None
    if not text.strip():
        raise SecurityError(f"sink.kafka.security.{setting}: {name} is empty")
    return text
