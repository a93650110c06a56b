"""How a client of the gateway connects: TLS, keepalive, limits, and the token it shows.

Both the agent and the leader's links use it. Opens no connection by itself: grpc does so at the
first call.
"""

from pathlib import Path
from typing import Final

import grpc
import grpc.aio

from outrider_proto import limits

#: Seconds between pings on an idle connection, and until an unanswered one ends it.
KEEPALIVE_SECONDS: Final = 20
KEEPALIVE_TIMEOUT_SECONDS: Final = 10
#: Metadata key of the token.
AUTHORIZATION: Final = "authorization"
#: A ServiceAccount token has about 1.5 KiB.
MAX_TOKEN_BYTES: Final = 12 * limits.KIB


class TokenFile:
    """A projected ServiceAccount token, which kubelet replaces before it expires."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def read(self) -> str:
        """The token as it is now; read anew at every call.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is empty, too large, or not a token.
        """
        with self._path.open("rb") as file:
            raw = file.read(MAX_TOKEN_BYTES + 1)
        token = raw.strip().decode("ascii", "replace")
        if not token or len(raw) > MAX_TOKEN_BYTES or not token.isprintable() or " " in token:
            raise ValueError(f"{self._path} does not hold a token")
        return token


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that shows a token."""
    return ((AUTHORIZATION, f"Bearer {token}"),)


def client_options(server_name: str) -> list[tuple[str, str | int]]:
    """Channel arguments of a client; see grpc's channel_arg_names.h for each."""
    return [
        # Addresses come from DNS as numbers; the certificate names the Service.
        ("grpc.ssl_target_name_override", server_name),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        # Without it a dead peer is only found 60 s after the ping.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        # Its pings would follow what we receive, wait behind megabytes of records on a thin link,
        # and so end the connection as if the peer were dead.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_send_message_length", limits.MESSAGE_BYTES),
        ("grpc.max_receive_message_length", limits.MESSAGE_BYTES),
        ("grpc.max_metadata_size", limits.METADATA_BYTES),
        # Every connection is made anew by us, with our own back-off and another address.
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]


def connect(address: str, *, ca: bytes, server_name: str) -> grpc.aio.Channel:
    """A channel to one server; verifies it against `ca` (PEM) as `server_name`."""
    credentials = grpc.ssl_channel_credentials(root_certificates=ca)
    return grpc.aio.secure_channel(address, credentials, options=client_options(server_name))
