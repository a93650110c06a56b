"""The images that the cluster's nodes run: the base, this project's two, and the pause image.

Built with buildah on this machine, without a daemon and without an image registry: unless
OUTRIDER_BASE_IMAGE names another, the Dockerfiles' base is a Debian made with debootstrap, and
Python packages are fetched outside the build, against the hashes in the lock files. What reaches
the nodes is for `imagestore`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cluster import imagestore, machines, packages, paths
from cluster.errors import ClusterError
from cluster.layers import Storage
from cluster.layout import DEBIAN_PACKAGES, PAUSE_IMAGE, TOOLS
from cluster.progress import Step, Steps

SUITE = "bookworm"
BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")
BASE_PYTHON = "3.11"
"""The Python of SUITE: wheels are fetched for it."""

BASE_RECIPE = "1"
"""Count up when the way the base is made changes, so that a cached one is not taken."""

LOCKS = (
    "operator/requirements.lock",
    "agent/requirements.lock",
    "tests/cluster/tools/hatchling/requirements.lock",  # builds the members themselves
)
IMAGES = {
    "localhost/outrider-server": "Dockerfile.server",
    "localhost/outrider-agent": "Dockerfile.agent",
}
TAG = "dev"
KEPT_LINES = 20
KEPT_IMAGES = 150
BUILD_TIMEOUT = 900.0
_STORAGE = paths.cache() / "buildah"
_LOCK = paths.cache() / "images.lock"
_WHEELS_LOCK = paths.cache() / "wheels.lock"


def base_name() -> str:
    """The name of the base image: the one asked for, or the local one for today's recipe."""
    key = paths.key_of(SUITE, *BASE_PACKAGES, BASE_RECIPE, platform.machine())
    return os.environ.get("OUTRIDER_BASE_IMAGE") or f"localhost/outrider-base:{key}"


@contextmanager
def _buildah() -> Iterator[Callable[..., str]]:
    """A function that runs buildah; overlay, because vfs copies the whole tree for each layer.

    Each command has mount and pid namespaces of its own, so that nothing it mounts or starts
    outlives it, whatever ends it.
    """
    with tempfile.TemporaryDirectory(prefix="outrider-buildah-") as runroot:
        storage = ("--root", _STORAGE, "--runroot", runroot, "--storage-driver", "overlay")

        def run(*arguments: object, on_line: Callable[[str], None] | None = None) -> str:
            return _run("buildah", *storage, *arguments, on_line=on_line)

        yield run


def _run(*argv: object, on_line: Callable[[str], None] | None = None) -> str:
    """Run a command in namespaces of its own and return its output.

    Raises:
        ClusterError: it failed; with its last lines.
    """
    words = [str(word) for word in argv]
    alone = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    lines: list[str] = []
    with subprocess.Popen(
        [*alone, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            if on_line:
                on_line(line.rstrip())
    if process.returncode:
        last = "\n".join(lines[-KEPT_LINES:])
        raise ClusterError(f"`{' '.join(words)[:300]}` ended with {process.returncode}:\n{last}")
    return "\n".join(lines)


def _exists(buildah: Callable[..., str], name: str) -> bool:
    try:
        buildah("inspect", "--type", "image", "--format", "{{.FromImageID}}", name)
    except ClusterError:
        return False
    return True


# ------------------------------------------------------------------ base
def ensure_base(steps: Steps | None = None) -> str:
    """Make the base image if the cache lacks it; returns its name.

    Raises:
        MissingError: debootstrap or buildah cannot be installed here.
        ClusterError: debootstrap or buildah failed.
    """
    name = base_name()
    if os.environ.get("OUTRIDER_BASE_IMAGE"):
        return name
    steps = steps or Steps()
    packages.ensure(DEBIAN_PACKAGES, steps)
    with paths.locked(_LOCK), _buildah() as buildah:
        if not _exists(buildah, name):
            with (
                steps.step(f"base image: Debian {SUITE} with Python {BASE_PYTHON}") as step,
                tempfile.TemporaryDirectory(dir=paths.cache(), prefix="base-") as scratch,
            ):
                _make_base(buildah, name, Path(scratch), step)
    return name


def _mirror() -> list[str]:
    """The mirror that this machine's apt uses for SUITE; empty for debootstrap's own choice."""
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(SUITE) $(COMPONENT) $(REPO_URI)"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    for line in listing.splitlines():
        suite, component, *uri = line.split()
        if (suite, component) == (SUITE, "main") and uri:
            return [uri[0]]
    return []


def _make_base(buildah: Callable[..., str], name: str, scratch: Path, step: Step) -> None:
    count = 0

    def progress(line: str) -> None:
        nonlocal count
        if line.startswith("I: "):
            count += 1
            step.update(
                f"{count} of about 700 steps, {line[3:45].split('...', maxsplit=1)[0].lower()}"
            )

    tree = scratch / "tree"
    include = f"--include={','.join(BASE_PACKAGES)}"
    _run("debootstrap", "--variant=minbase", include, SUITE, tree, *_mirror(), on_line=progress)
    step.update("packing")
    left_out = ("./var/cache/apt/*", "./var/lib/apt/lists/*", "./usr/share/doc/*", "./dev/*")
    excluded = [f"--exclude={pattern}" for pattern in (*left_out, "./usr/share/man/*")]
    _run("tar", "-C", tree, "-cf", scratch / "base.tar", *excluded, ".")
    file = 'FROM scratch\nADD base.tar /\nENV LANG=C.UTF-8\nCMD ["python3"]\n'
    (scratch / "Dockerfile").write_text(file)
    step.update("making the image")
    buildah("bud", "--isolation", "chroot", "-t", name, scratch)


# ------------------------------------------------------------------ pause
def ensure_pause(steps: Steps | None = None) -> None:
    """Make the image of pods' sandboxes and put it into the image cache, unless it is there.

    Raises:
        ClusterError: the compiler or buildah failed.
    """
    if PAUSE_IMAGE in imagestore.current():
        return
    steps = steps or Steps()
    packages.ensure(DEBIAN_PACKAGES, steps)
    with steps.step("pause image"), paths.locked(_LOCK), _buildah() as buildah:
        machines.build_init()
        with tempfile.TemporaryDirectory(prefix="outrider-pause-") as scratch:
            shutil.copy2(TOOLS / "pause", scratch)
            file = 'FROM scratch\nCOPY pause /pause\nENTRYPOINT ["/pause"]\n'
            (Path(scratch) / "Dockerfile").write_text(file)
            buildah("bud", "-q", "--isolation", "chroot", "-t", PAUSE_IMAGE, scratch)
            imagestore.add(Storage(_STORAGE), [PAUSE_IMAGE])


# ------------------------------------------------------------------ wheels
def ensure_wheels(steps: Steps | None = None) -> Path:
    """Fetch the wheels of all locked packages, checked against the locks' hashes.

    Returns:
        The folder of wheels for BASE_PYTHON.

    Raises:
        ClusterError: pip failed, say because a package has no wheel.
    """
    locks = [paths.ROOT / lock for lock in LOCKS]
    key = paths.key_of(BASE_PYTHON, platform.machine(), *locks)
    folder = paths.cache() / "wheels" / key
    if not folder.exists():
        steps = steps or Steps()
        with steps.step("wheels of the locked Python packages") as step, paths.locked(_WHEELS_LOCK):
            if not folder.exists():
                _fetch_wheels(locks, folder, step)
    paths.mark_used(folder)
    paths.keep_newest(child for child in folder.parent.iterdir() if child.is_dir())
    return folder


def _fetch_wheels(locks: Sequence[Path], folder: Path, step: Step) -> None:
    pip = paths.ROOT / ".tools" / "uv" / "bin" / "pip"
    if not pip.exists():
        raise ClusterError(f"{pip} is not there; `make setup` makes it")
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    machine = platform.machine()
    kinds = [f"--platform={kind}_{machine}" for kind in ("manylinux_2_28", "manylinux_2_17")]
    kinds += [f"--platform=manylinux2014_{machine}", f"--python-version={BASE_PYTHON}"]
    count = 0

    def progress(line: str) -> None:
        nonlocal count
        if line.startswith(("Saved", "  Downloading")):
            count += 1
            step.update(f"{count} files")

    for lock in locks:
        fetch = ("download", "--disable-pip-version-check", "--require-hashes", "--no-deps")
        chosen = ("--only-binary=:all:", *kinds, "-r", lock, "-d", unfinished)
        _run(pip, *fetch, *chosen, on_line=progress)
    unfinished.rename(folder)


# ------------------------------------------------------------------ this project's
def build(steps: Steps | None = None) -> dict[str, str]:
    """Build both images from the source tree and hand them to the cache and all running nodes.

    Returns:
        Each image's tag with the name that is unique to its content: that is for the chart.

    Raises:
        MissingError: something is missing that cannot be installed here.
        ClusterError: a build failed; with its last lines.
    """
    steps = steps or Steps()
    base = ensure_base(steps)
    own_base = "OUTRIDER_BASE_IMAGE" in os.environ
    wheels = None if own_base else ensure_wheels(steps)
    with (
        steps.step("images of server and agent") as step,
        paths.locked(_LOCK),
        _buildah() as buildah,
    ):
        for name, file in IMAGES.items():
            _build_one(buildah, name, file, base, wheels, step)
        step.update("handing them to the nodes")
        unique = imagestore.add(Storage(_STORAGE), [f"{name}:{TAG}" for name in IMAGES])
        _bound_storage(buildah)
    return unique


def _bound_storage(buildah: Callable[..., str]) -> None:
    """Drop the layers of earlier builds once there are many; the next build makes its own anew.

    Not after every build: the layers of a Dockerfile's first stage belong to no tagged image, and
    they are the ones that take long.
    """
    if len(buildah("images", "--all", "--quiet").splitlines()) > KEPT_IMAGES:
        buildah("rmi", "--prune", "--force")


def _build_one(
    buildah: Callable[..., str], name: str, file: str, base: str, wheels: Path | None, step: Step
) -> None:
    def progress(line: str) -> None:
        if line.startswith("STEP"):
            step.update(f"{file} {line[5:60]}")

    options: list[object] = ["--layers", "--isolation", "chroot", "--build-arg", f"BASE={base}"]
    if wheels:
        # A volume and no part of the build context: for who builds with docker there is none.
        options += ["--volume", f"{wheels}:/wheels:ro"]
        options += ["--build-arg", "PIP_OPTIONS=--no-index --find-links=/wheels"]
    options += ["-t", f"{name}:{TAG}", "-f", paths.ROOT / file, paths.ROOT]
    buildah("bud", *options, on_line=progress)
