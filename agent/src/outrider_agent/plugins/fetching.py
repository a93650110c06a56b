"""Fetches a file by https from several addresses, goes on where a broken connection left off.

What arrives is not trusted: its size is bounded, and its sha256 is checked by the caller. Runs in
a process of its own (see `preparing`), so blocking is fine and its libraries leave with it.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, SSLError
from urllib3.response import BaseHTTPResponse

from outrider_agent.plugins.fetched import sha256_of

#: Bytes read at once.
READ_BYTES: Final = 256 * 1024
#: Most redirects from one address.
REDIRECTS: Final = 5
#: How often all addresses are tried.
ROUNDS: Final = 3
#: Wait between rounds, seconds.
ROUND_SECONDS: Final = 1.0
_REDIRECTED: Final = (301, 302, 303, 307, 308)


class FetchError(Exception):
    """Nothing could be fetched, and why; a sentence that names the addresses."""


@dataclass(frozen=True)
class FetchLimits:
    """How much and how long.

    Attributes:
        max_bytes: Largest file.
        seconds: Longest time for all tries.
        connect_seconds: Longest time to connect.
        read_seconds: Longest silence.
        ca_file: Certificates (PEM) that servers' must come from; empty: those of the system.
    """

    max_bytes: int
    seconds: float
    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    ca_file: str = ""


class _WrongContentError(Exception):
    """The file arrived whole and is another one; perhaps for what was there before it."""

    def __init__(self, text: str, resumed: bool) -> None:
        super().__init__(text)
        self.resumed = resumed


class _TryLaterError(Exception):
    """It may be otherwise in a while."""


class _TooLargeError(Exception):
    """The file is larger than allowed."""


def fetch(urls: Sequence[str], sha256: str, part: Path, limits: FetchLimits) -> None:
    """Have the file of this sha256 in `part`.

    Args:
        urls: Tried in this order, several times; https only, after redirects too.
        sha256: Of the file, hex digits.
        part: Where it goes; what an earlier try left there is gone on with.
        limits: How much and how long.

    Raises:
        FetchError: No address has it.
        OSError: It cannot be written.
    """
    end = time.monotonic() + limits.seconds
    problems: dict[str, str] = {}
    dead: set[str] = set()
    timeout = urllib3.Timeout(connect=limits.connect_seconds, read=limits.read_seconds)
    ca_file = limits.ca_file or None
    with urllib3.PoolManager(ca_certs=ca_file, timeout=timeout, retries=False) as pool:
        for count in range(ROUNDS):
            if dead.issuperset(urls):
                break
            if count:
                time.sleep(min(ROUND_SECONDS * count, max(0.0, end - time.monotonic())))
            # What will not be otherwise next time is not asked again.
            for url in [url for url in urls if url not in dead]:
                try:
                    _fetch_from(pool, url, sha256, part, limits, end)
                except (HTTPError, _TryLaterError) as error:
                    problems[url] = str(error)
                    if isinstance(error, SSLError):
                        dead.add(url)
                except ValueError as error:
                    problems[url] = str(error)
                    dead.add(url)
                except _WrongContentError as error:
                    problems[url] = str(error)
                    if not (part.exists() and error.resumed):
                        dead.add(url)
                    part.unlink(missing_ok=True)
                except _TooLargeError as error:
                    part.unlink(missing_ok=True)
                    raise FetchError(f"{url}: {error}") from None
                else:
                    return
                if time.monotonic() >= end:
                    break
    told = "; ".join(f"{url}: {problem}" for url, problem in problems.items())
    raise FetchError(told or "there was no time for any address")


def _fetch_from(
    pool: urllib3.PoolManager, url: str, sha256: str, part: Path, limits: FetchLimits, end: float
) -> None:
    have = part.stat().st_size if part.exists() else 0
    if have and sha256_of(part) == sha256:
        return
    response = _open(pool, url, have)
    try:
        begin = _begin(response, have)
        if begin is None:  # nothing lies behind what we have, and that is not the file
            raise _WrongContentError(f"has not the file of sha256 {sha256}", True)
        with part.open("r+b" if part.exists() else "wb") as file:
            file.truncate(begin)
            file.seek(begin)
            _copy(response, file.fileno(), begin, limits, end)
    finally:
        response.release_conn()
        response.close()
    found = sha256_of(part)
    if found != sha256:
        raise _WrongContentError(f"has a file of sha256 {found}, expected {sha256}", begin > 0)


def _open(pool: urllib3.PoolManager, url: str, have: int) -> BaseHTTPResponse:
    """The answer to a request for what lies behind the first `have` bytes."""
    headers = {"accept-encoding": "identity", "user-agent": "outrider-agent"}
    if have:
        headers["range"] = f"bytes={have}-"
    for _ in range(REDIRECTS + 1):
        if urlsplit(url).scheme != "https":
            raise ValueError(f"leads to {url}, which is not https")
        response = pool.request("GET", url, headers=headers, preload_content=False, redirect=False)
        if response.status not in _REDIRECTED:
            return response
        url = urljoin(url, response.headers.get("location", ""))
        response.release_conn()
        response.close()
    raise ValueError(f"was redirected more than {REDIRECTS} times")


def _begin(response: BaseHTTPResponse, have: int) -> int | None:
    """Where in the file the answer begins; None if it has nothing."""
    if response.status == 200:
        return 0
    if response.status == 206 and response.headers.get("content-range", "").startswith(
        f"bytes {have}-"
    ):
        return have
    if response.status == 416 and have:
        return None
    text = f"answered {response.status} {response.reason or ''}".rstrip()
    raise (
        _TryLaterError(text)
        if response.status in (408, 429, *range(500, 600))
        else ValueError(text)
    )


def _copy(
    response: BaseHTTPResponse, target: int, begin: int, limits: FetchLimits, end: float
) -> None:
    size = begin
    length = response.headers.get("content-length", "")
    if length.isdigit() and size + int(length) > limits.max_bytes:
        raise _TooLargeError(_too_large(size + int(length), limits))
    # read1, not stream: what arrived before a connection broke is kept.
    while data := response.read1(READ_BYTES):
        size += len(data)
        if size > limits.max_bytes:
            raise _TooLargeError(_too_large(size, limits))
        view = memoryview(data)
        while view:
            view = view[os.write(target, view) :]
        if time.monotonic() > end:
            raise _TryLaterError(
                f"took longer than {limits.seconds:g} s (plugins.fetchTimeoutSeconds)"
            )


def _too_large(size: int, limits: FetchLimits) -> str:
    most = f"at most {limits.max_bytes} (the setting plugins.maxPackageBytes)"
    return f"has {size} bytes or more; {most}"
