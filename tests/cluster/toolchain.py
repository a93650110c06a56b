"""Build Kubernetes, helm, CoreDNS and Prometheus from their Go modules, once, into the cache.

Why it exists: the tests run against the real programs, at versions pinned with checksums (go.mod
and go.sum under tools/), on machines that reach no image registry. It must not fetch anything but
by the go command, which verifies every module, and must never switch that verification off.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

from cluster import paths
from cluster.errors import ClusterError, MissingError
from cluster.progress import Step, Steps

STRIPPED = "-s -w"
KEPT_LINES = 15
KUBERNETES = "k8s.io/kubernetes/cmd"


@dataclass(frozen=True)
class Tool:
    """One program to build.

    Attributes:
        name: of the program, as it is called on the command line.
        module: the folder under tools/ whose go.mod pins it.
        package: the Go package of its main function.
        tags: Go build tags, joined by commas.
    """

    name: str
    module: str
    package: str
    tags: str = ""


# In the order of building: what the quick demo needs comes first, and the API server, which takes
# longest, before all, since the others share most of its packages.
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("kube-apiserver", "kubernetes", f"{KUBERNETES}/kube-apiserver"),
        Tool("kubectl", "kubernetes", f"{KUBERNETES}/kubectl"),
        Tool("kube-controller-manager", "kubernetes", f"{KUBERNETES}/kube-controller-manager"),
        Tool("kube-scheduler", "kubernetes", f"{KUBERNETES}/kube-scheduler"),
        Tool("kubelet", "kubernetes", f"{KUBERNETES}/kubelet"),
        Tool("kube-proxy", "kubernetes", f"{KUBERNETES}/kube-proxy"),
        Tool("helm", "helm", "helm.sh/helm/v3/cmd/helm"),
        Tool("coredns", "coredns", "github.com/coredns/coredns"),
        # Without the other ways of discovery it builds in half the time. The web pages are not in
        # the module; the API is all that the tests need.
        Tool(
            "prometheus",
            "prometheus",
            "github.com/prometheus/prometheus/cmd/prometheus",
            "netgo,remove_all_sd,enable_kubernetes_sd",
        ),
    )
}
DEMO_TOOLS = ("kube-apiserver", "kubectl", "kube-controller-manager")
ALL_TOOLS = tuple(TOOLS)


def ensure(names: Sequence[str], steps: Steps | None = None) -> dict[str, Path]:
    """Build those of the named tools that the cache does not have.

    Args:
        names: keys of TOOLS.
        steps: where to show progress; a display of its own if not given.

    Returns:
        The absolute path of each named tool.

    Raises:
        MissingError: there is no go command, or it is too old.
        ClusterError: a build failed; the error carries what the go command said.
    """
    found = {name: _place(TOOLS[name]) for name in names}
    absent = [name for name in TOOLS if name in found and not found[name].exists()]
    if absent:
        steps = steps or Steps()
        # One build at a time on this machine: each uses all cores by itself.
        with steps.step(f"Go programs: {', '.join(absent)}") as whole:
            lock = paths.cache() / "bin" / "build.lock"
            with paths.locked(lock, lambda: whole.update("waiting for another run's build")):
                for number, name in enumerate(absent):
                    whole.update(f"{number}/{len(absent)} built")
                    if not found[name].exists():  # the other run may have built it
                        _build(TOOLS[name], found[name], steps)
    for folder in {path.parent for path in found.values()}:
        paths.mark_used(folder)
    return found


def check(names: Sequence[str]) -> None:
    """Make sure that the named tools could be built here, as far as that is known beforehand.

    Raises:
        MissingError: there is no go command, or it is too old.
    """
    for module in {TOOLS[name].module for name in names}:
        _go_version(module)


def version(module: str) -> str:
    """Return the pinned version of one of the modules under tools/, e.g. "v1.34.4".

    Raises:
        ClusterError: go.mod does not require the module that the tool's package is in.
    """
    package = next(tool.package for tool in TOOLS.values() if tool.module == module)
    text = (paths.TOOLS / module / "go.mod").read_text()
    for required, pinned in re.findall(r"^\s*(?:require )?(\S+/\S+) (v\S+)", text, re.MULTILINE):
        if package == required or package.startswith(f"{required}/"):
            return str(pinned)
    raise ClusterError(f"{paths.TOOLS / module / 'go.mod'} does not require {package}")


def _place(tool: Tool) -> Path:
    """Return where the tool is or will be: bin/<module>-<key>/<name> in the cache."""
    folder = paths.TOOLS / tool.module
    key = paths.key_of(
        folder / "go.mod", folder / "go.sum", _go_version(tool.module), _linker(tool), tool.tags
    )
    return paths.cache() / "bin" / f"{tool.module}-{key}" / tool.name


@once
def _go_version(module: str) -> str:
    """Return the version of the go command that will build the module, e.g. "go1.26.8".

    Raises:
        MissingError: there is none, or it is older than the module's go.mod demands.
    """
    folder = paths.TOOLS / module
    match = re.search(r"^go (\S+)$", (folder / "go.mod").read_text(), re.MULTILINE)
    needed = match.group(1) if match else "1.24"
    install = f"install Go {needed} or later from the Go project (Debian 12's own is too old)"
    if shutil.which("go") is None:
        raise MissingError(f"no go command, needed to build {module} for the tests; {install}")
    # Asked in the module's folder: newer go commands fetch the version that go.mod asks for.
    answer = subprocess.run(
        ["go", "env", "GOVERSION"],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    found = answer.stdout.strip()
    if answer.returncode or _numbers(found) < _numbers(needed):
        detail = answer.stderr.strip() or f"it is {found}"
        raise MissingError(f"the go command cannot build {module}: {detail}; {install}")
    return found


def _numbers(go_version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", go_version)[:3])


def _environment() -> dict[str, str]:
    # CGO_ENABLED=0: static programs, which also run inside a node with its own file system.
    # GOFLAGS and GOWORK of the user's would change what is built under the same key.
    environment = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}
    environment.pop("GOFLAGS", None)
    return environment


def _linker(tool: Tool) -> str:
    if tool.module != "kubernetes":
        return STRIPPED
    # Without these the programs call themselves v0.0.0-master, and clients complain.
    pinned = version("kubernetes")
    major, minor = pinned.removeprefix("v").split(".")[:2]
    base = "-X k8s.io/component-base/version"
    return f"{STRIPPED} {base}.gitVersion={pinned} {base}.gitMajor={major} {base}.gitMinor={minor}"


def _build(tool: Tool, place: Path, steps: Steps) -> None:
    """Build one tool to a name of its own, then rename: what is in the cache is always whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f".{tool.name}.unfinished")  # the lock makes us the only writer
    flags = ["-mod=readonly", "-buildvcs=false", "-trimpath", "-ldflags", _linker(tool)]
    if tool.tags:
        flags += ["-tags", tool.tags]
    with steps.step(f"{tool.name} {version(tool.module)}: build") as step:
        total = _count_packages(tool, flags, step)
        counter = _Counter(step, total)
        _go(["build", "-v", *flags, "-o", str(unfinished), tool.package], tool, counter.take)
        unfinished.rename(place)
    others = (paths.cache() / "bin").glob(f"{tool.module}-*")
    paths.keep_newest(others)


def _count_packages(tool: Tool, flags: list[str], step: Step) -> int:
    """Return how many packages the tool is made of, fetching the modules if need be."""
    fetched = 0

    def count(line: str) -> None:
        nonlocal fetched
        if line.startswith("go: downloading"):
            fetched += 1
            step.update(f"{fetched} modules fetched")

    return len(_go(["list", "-deps", *flags, tool.package], tool, count))


class _Counter:
    """Turns the lines of `go build -v`, one per compiled package, into progress."""

    def __init__(self, step: Step, total: int) -> None:
        self._step = step
        self._total = total
        self._compiled = 0

    def take(self, line: str) -> None:
        if not line.startswith("go: "):
            self._compiled += 1
            self._step.update(f"{self._compiled}/{self._total} packages")


def _go(arguments: list[str], tool: Tool, on_line: Callable[[str], None]) -> list[str]:
    """Run the go command in the tool's module folder.

    Args:
        arguments: of the go command.
        tool: the tool in question.
        on_line: called with each line of standard error.

    Returns:
        The lines of standard output.

    Raises:
        ClusterError: it failed.
    """
    errors: list[str] = []
    with (
        tempfile.TemporaryFile("w+") as output,
        subprocess.Popen(
            ["nice", "go", *arguments],
            cwd=paths.TOOLS / tool.module,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        for line in process.stderr or ():
            errors = [*errors[-KEPT_LINES:], line.rstrip()]
            on_line(line.rstrip())
        if process.wait():
            raise ClusterError(
                f"`go {arguments[0]}` of {tool.package} failed in {paths.TOOLS / tool.module}:\n"
                + "\n".join(errors)
            )
        output.seek(0)
        return output.read().splitlines()
