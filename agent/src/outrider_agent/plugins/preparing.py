"""Fetches, checks and unpacks packages, in a process of its own that ends when it is done.

Of its own, because the libraries for https and signatures are a third of the agent's memory, and
because what goes wrong in an archive from outside is to go wrong elsewhere. The agent writes a
request (JSON) to its input and reads one answer a package from its output.
"""

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from outrider_agent.plugins.fetched import sha256_of
from outrider_agent.plugins.removing import discard

#: How long another one may be at work in the same folder, seconds.
LOCK_SECONDS: Final = 20.0


class Wanted(msgspec.Struct, frozen=True):
    """One package: see effective.Source; `folder` is where its content goes."""

    name: str
    urls: tuple[str, ...]
    sha256: str
    signature: str
    format: str
    executable: str
    folder: str


class Request(msgspec.Struct, frozen=True):
    """What is to be prepared.

    Attributes:
        packages: Folder of fetched packages, by sha256; one put there by hand is not fetched.
        wanted: The packages.
        keep: sha256 of packages that stay whatever the bound.
        cache_bytes: Most bytes of packages that are kept.
        max_bytes: Largest package.
        max_unpacked_bytes: Largest content of one.
        seconds: Longest time to fetch one.
        ca_file: See FetchLimits.
        public_keys: See signatures.verify.
        require_signature: Whether an unsigned package is refused.
    """

    packages: str
    wanted: tuple[Wanted, ...]
    keep: tuple[str, ...]
    cache_bytes: int
    max_bytes: int
    max_unpacked_bytes: int
    seconds: float
    ca_file: str
    public_keys: tuple[str, ...]
    require_signature: bool


class Answer(msgspec.Struct, frozen=True):
    """What became of one package: an executable and its sha256, or a reason and a sentence."""

    name: str
    executable: str = ""
    sha256: str = ""
    reason: str = ""
    message: str = ""


class _Refused(Exception):  # noqa: N818 - a verdict, not a fault
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def main() -> None:
    """Do what standard input asks for; stop at the first package that cannot be had."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    packages = Path(request.packages)
    packages.mkdir(mode=0o700, parents=True, exist_ok=True)
    for wanted in request.wanted:
        answer = _answer(request, wanted, packages)
        sys.stdout.write(json.dumps(msgspec.to_builtins(answer)) + "\n")
        sys.stdout.flush()
        if answer.reason:
            break
    with contextlib.suppress(OSError):
        prune(packages, request.cache_bytes, request.keep)


def _answer(request: Request, wanted: Wanted, packages: Path) -> Answer:
    from outrider_agent.plugins.fetching import FetchError
    from outrider_agent.plugins.unpacking import UnpackError, unpack

    try:
        with _locked(packages):
            package = _package(request, wanted, packages)
            _check_signature(request, wanted, package)
            folder = Path(wanted.folder)
            executable = unpack(
                package, wanted.format, wanted.executable, folder, request.max_unpacked_bytes
            )
            return Answer(wanted.name, str(executable), sha256_of(executable))
    except _Refused as error:
        return Answer(wanted.name, reason=error.reason, message=str(error))
    except FetchError as error:
        return Answer(wanted.name, reason="FetchFailed", message=f"cannot be fetched: {error}")
    except UnpackError as error:
        discard(Path(wanted.folder))
        return Answer(wanted.name, reason="BadPackage", message=f"its package is bad: {error}")
    except OSError as error:
        discard(Path(wanted.folder))
        text = f"cannot be put on disk: {error}; see to the disk of state.directory"
        return Answer(wanted.name, reason="DiskFailed", message=text)


def _package(request: Request, wanted: Wanted, packages: Path) -> Path:
    """The package's file, fetched if it is not there; its sha256 is the one that is wanted."""
    from outrider_agent.plugins.fetching import FetchLimits, fetch

    package = packages / wanted.sha256
    if package.exists() and sha256_of(package) == wanted.sha256:
        os.utime(package)  # the ones used last stay
        return package
    part = packages / f"{wanted.sha256}.part"
    limits = FetchLimits(request.max_bytes, request.seconds, ca_file=request.ca_file)
    fetch(wanted.urls, wanted.sha256, part, limits)
    part.replace(package)
    return package


def _check_signature(request: Request, wanted: Wanted, package: Path) -> None:
    if not wanted.signature:
        if request.require_signature:
            text = (
                "it is not signed (source.signature), and the setting plugins.requireSignature of "
                "this node is true; sign it"
            )
            raise _Refused("NotSigned", text)
        return
    if not request.public_keys:
        text = (
            "it is signed, and this node has no key to check that; name one in the setting "
            "plugins.publicKeys, or leave source.signature out"
        )
        raise _Refused("BadSignature", text)
    from outrider_agent.plugins.signatures import SignatureError, verify

    try:
        verify(package, wanted.signature, request.public_keys)
    except SignatureError as error:
        raise _Refused("BadSignature", str(error)) from None


@contextlib.contextmanager
def _locked(packages: Path) -> Iterator[None]:
    """Alone in the folder: an earlier agent's process may be at work still."""
    end = time.monotonic() + LOCK_SECONDS
    with (packages / "lock").open("wb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)
        yield


def prune(packages: Path, most: int, keep: Sequence[str]) -> None:
    """Remove the packages that were not used for longest, until the rest is within the bound.

    Raises:
        OSError: The folder cannot be read.
    """
    found: list[tuple[float, int, Path]] = []
    for path in packages.iterdir():
        status = path.stat()
        if path.name != "lock":
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= most:
            return
        if path.name.removesuffix(".part") not in keep:
            path.unlink(missing_ok=True)
            total -= size


def encoded(request: Request) -> bytes:
    """The request as it goes to the process."""
    return msgspec.json.encode(request)


def decoded(line: bytes) -> Answer:
    """An answer of the process.

    Raises:
        msgspec.DecodeError: It is none.
    """
    answer: Any = msgspec.json.decode(line, type=Answer)
    assert isinstance(answer, Answer)
    return answer


if __name__ == "__main__":
    main()
