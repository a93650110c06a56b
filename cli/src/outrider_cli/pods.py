"""Runs a command in a container of a Pod, as kubectl exec does, and reads what it prints."""

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml
from kubernetes.client import Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import ws_client
from websocket import WebSocketException, setdefaulttimeout

from outrider_cli.errors import ClusterError, one_line

#: A command that prints nothing for so long is given up, seconds.
SILENCE_SECONDS: Final = 60.0
#: So much of what it says on stderr is kept, characters.
ERROR_CHARACTERS: Final = 2000

# The client has few types.
_Client: Any = ws_client.WSClient
_websocket_url: Any = ws_client.get_websocket_url


def execute(
    configuration: Configuration, url: str, headers: Mapping[str, str], what: str, seconds: float
) -> Iterator[str]:
    """Run a command; yields the lines it prints.

    Args:
        configuration: How to reach the API server.
        url: Of the exec subresource, with the command in its query.
        headers: Who asks.
        what: Name of the Pod, for errors.
        seconds: How long the API server may take to begin.

    Raises:
        ClusterError: It could not be run, ended with an error, or fell silent.
    """
    setdefaulttimeout(seconds)
    try:
        client = _Client(configuration, _websocket_url(url), headers, capture_all=False)
    except (WebSocketException, ApiException, OSError) as error:
        raise ClusterError(f"{what}: exec was refused: {one_line(error)}") from None
    try:
        yield from _lines(client, what)
    except (WebSocketException, OSError) as error:
        raise ClusterError(f"{what}: the connection broke off: {one_line(error)}") from None
    finally:
        client.close()


def _lines(client: Any, what: str) -> Iterator[str]:
    """The lines of a command's output; checks how it ended."""
    left, errors, heard, more = "", "", time.monotonic(), True
    while more:
        more = client.is_open()
        client.update(timeout=1)
        data, said = (
            client.read_channel(ws_client.STDOUT_CHANNEL),
            client.read_channel(ws_client.STDERR_CHANNEL),
        )
        if data or said:
            heard = time.monotonic()
        elif time.monotonic() - heard > SILENCE_SECONDS:
            raise ClusterError(f"{what}: nothing came for {SILENCE_SECONDS:g} s")
        errors = (errors + said)[-ERROR_CHARACTERS:]
        *lines, left = (left + data).split("\n")
        yield from lines
    try:
        ended = yaml.safe_load(client.read_channel(ws_client.ERROR_CHANNEL)) or {}
    except yaml.YAMLError:
        ended = {}
    if ended.get("status") != "Success":
        last = errors.strip().splitlines()[-1:]
        said = last[0] if last else ended.get("message") or "the connection broke off"
        raise ClusterError(f"{what}: {one_line(said)}")
    if left:
        yield left
