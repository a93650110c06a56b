"""The packages of plug-ins on this node: has them fetched, checked and unpacked; keeps some.

The work is done by a process that ends when it is done, see `preparing`. A package is unpacked anew
in every life of the agent, so that what somebody changed meanwhile is not trusted.
"""

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from outrider_proto.effective import Plugin, Source
from outrider_runtime.logs import get_logger

from outrider_agent.core.plugins import PluginError
from outrider_agent.plugins import preparing
from outrider_agent.plugins.removing import discard
from outrider_agent.settings import PluginsSettings
from outrider_agent.tasks.program import Children

log = get_logger("outrider.plugins")

#: What the process may take besides the time for fetching, seconds.
WORK_SECONDS: Final = 120.0
T = TypeVar("T")


@dataclass(frozen=True)
class Package:
    """A plug-in's unpacked content.

    Attributes:
        folder: All of it.
        executable: What is started.
        sha256: Of the executable.
        status: Its inode, size and time of change when it was unpacked.
    """

    folder: Path
    executable: Path
    sha256: str
    status: tuple[int, int, int]

    def unchanged(self) -> bool:
        """Whether the executable looks as it was unpacked; cheap."""
        return status_of(self.executable) == self.status


def status_of(path: Path) -> tuple[int, int, int] | None:
    """What tells of a change of a file: inode, size, time of change; None if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns


@dataclass
class Packages:
    """All packages of this node.

    Attributes:
        directory: Where they are.
        settings: Bounds and keys.
        children: Where the process is entered while it is ours to wait for.
    """

    directory: Path
    settings: PluginsSettings
    children: Children
    _unpacked: dict[tuple[Source, str], Package] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._fetched = self.directory / "packages"
        self._content = self.directory / "unpacked"

    def clear(self) -> None:
        """Remove what an earlier agent unpacked. Blocks."""
        discard(self._content)

    async def have(self, wanted: Sequence[Plugin], keep: Collection[str]) -> Mapping[str, Package]:
        """The packages of these plug-ins, by the name of the plug-in.

        Args:
            wanted: The plug-ins.
            keep: sha256 of packages that stay in the cache.

        Raises:
            PluginError: One cannot be had; nothing that runs was touched.
        """
        new = [p for p in wanted if not self._ready(p)]
        if new:
            await self._prepare(new, [*keep, *(p.source.sha256 for p in wanted)])
        return {p.name: self._unpacked[_key(p)] for p in wanted}

    def _ready(self, plugin: Plugin) -> bool:
        package = self._unpacked.get(_key(plugin))
        return package is not None and package.unchanged()

    async def again(self, plugin: Plugin) -> Package:
        """The package of a plug-in whose executable was changed, unpacked anew.

        Raises:
            PluginError: It cannot be had.
        """
        return (await self.have([plugin], ()))[plugin.name]

    def forget(self, used: Collection[Package]) -> None:
        """Remove what is unpacked and not used any more."""
        gone = [key for key, package in self._unpacked.items() if package not in used]
        for key in gone:
            del self._unpacked[key]
        kept = {package.folder.name for package in used}
        with contextlib.suppress(FileNotFoundError):
            for folder in self._content.iterdir():
                if folder.name not in kept:
                    discard(folder)

    async def _prepare(self, wanted: Sequence[Plugin], keep: Sequence[str]) -> None:
        settings = self.settings
        request = preparing.Request(
            packages=str(self._fetched),
            wanted=tuple(_wanted(plugin, self._content) for plugin in wanted),
            keep=tuple(keep),
            cache_bytes=settings.cache_bytes,
            max_bytes=settings.max_package_bytes,
            max_unpacked_bytes=settings.max_unpacked_bytes,
            seconds=settings.fetch_timeout_seconds,
            ca_file=settings.ca_file,
            public_keys=settings.public_keys,
            require_signature=settings.require_signature,
        )
        limit = len(wanted) * settings.fetch_timeout_seconds + WORK_SECONDS
        output = await _run(preparing.encoded(request), limit, self.children, self.directory)
        answers = _answers(output)
        for plugin in wanted:
            answer = answers.get(plugin.name)
            if answer is None:
                text = (
                    "it could not be prepared: the process for it ended too early or took longer "
                    f"than {limit:g} s; the agent's log may say why"
                )
                raise PluginError(plugin.name, "PrepareFailed", text)
            if answer.reason:
                raise PluginError(plugin.name, answer.reason, answer.message)
            executable = Path(answer.executable)
            status = status_of(executable)
            if status is None:
                raise PluginError(plugin.name, "PrepareFailed", f"{executable} is gone again")
            package = Package(
                _folder_of(executable, self._content), executable, answer.sha256, status
            )
            self._unpacked[_key(plugin)] = package
            log.info("plug-in is ready", plugin=plugin.name, version=plugin.version)


def _key(plugin: Plugin) -> tuple[Source, str]:
    return plugin.source, plugin.source.executable or plugin.name


def _folder_of(executable: Path, content: Path) -> Path:
    return content / executable.relative_to(content).parts[0]


def _wanted(plugin: Plugin, content: Path) -> preparing.Wanted:
    source = plugin.source
    inside = source.executable or plugin.name
    return preparing.Wanted(
        name=plugin.name,
        urls=source.urls,
        sha256=source.sha256,
        signature=source.signature,
        format=source.format,
        executable=inside if source.format == "tar.gz" else plugin.name,
        folder=str(content / f"{plugin.name}.{secrets.token_hex(4)}"),
    )


def _answers(output: bytes) -> dict[str, preparing.Answer]:
    found: dict[str, preparing.Answer] = {}
    for line in output.splitlines():
        try:
            answer = preparing.decoded(line)
        except msgspec.DecodeError:
            continue  # cut off: the one it is about has no answer then
        found[answer.name] = answer
    return found


async def _run(request: bytes, seconds: float, children: Children, directory: Path) -> bytes:
    """Output of the process that prepares packages; killed when it takes too long."""

    def start() -> "subprocess.Popen[bytes]":
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", preparing.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=directory,
            env={"PATH": os.environ.get("PATH", os.defpath), "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )

    children.starting += 1
    try:
        process = await in_thread("plug-in start", start)
        children.known.add(process.pid)
        children.on_start(process.pid)
    finally:
        children.starting -= 1

    def work() -> bytes:
        try:
            output, _ = process.communicate(request, timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        return output

    working = asyncio.ensure_future(in_thread("plug-in packages", work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        process.kill()
        await asyncio.wait([working])
        raise
    finally:
        children.known.discard(process.pid)


def in_thread(name: str, function: Callable[[], T]) -> "asyncio.Future[T]":
    """Call a function in a daemon thread: the program's end does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # a T where there is no error

    def work() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function()
        except Exception as problem:  # noqa: BLE001 - handed to the one who waits
            error = problem
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future
