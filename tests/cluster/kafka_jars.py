"""Fetch the Kafka broker's jars, once, into the cache, and check each against a committed checksum.

Why it exists: Maven Central is where Kafka is published, in versions that can be pinned. It must
not start a broker. `python -m cluster.kafka_jars checksums` writes the checksums anew after a
change of version in tools/kafka/pom.xml.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cluster import packages, paths
from cluster.errors import ClusterError, run_main
from cluster.progress import Step, Steps

FOLDER = paths.TOOLS / "kafka"
POM = FOLDER / "pom.xml"
CHECKSUMS = FOLDER / "jars.sha256"
JAVA_NEEDED = 17
KEPT_LINES = 15


def require_java(steps: Steps | None = None) -> None:
    """Make sure that there is a Java runtime of version 17 or later, as the broker demands.

    Raises:
        MissingError, ClusterError: as `packages.ensure`.
    """
    if _java_version() < JAVA_NEEDED:
        packages.ensure(["openjdk-17-jre-headless"], steps)


def ensure(steps: Steps | None = None) -> Path:
    """Fetch the jars if the cache does not have them; return their folder.

    Raises:
        MissingError: Maven or Java is missing and cannot be installed.
        ClusterError: Maven failed, or a jar is not the one that was pinned.
    """
    require_java(steps)
    folder = paths.cache() / "kafka" / paths.key_of(POM, CHECKSUMS)
    if not folder.exists():
        steps = steps or Steps()
        with steps.step(f"Kafka {version()}: jars") as step:
            lock = paths.cache() / "kafka" / "fetch.lock"
            with paths.locked(lock, lambda: step.update("waiting for another run")):
                if not folder.exists():
                    _fetch(folder, step, steps)
    paths.mark_used(folder)
    return folder


def version() -> str:
    """Return the pinned version of Kafka, e.g. "4.1.0".

    Raises:
        ClusterError: pom.xml does not name it.
    """
    match = re.search(r"<artifactId>kafka_[\d.]+</artifactId>\s*<version>([^<]+)", POM.read_text())
    if match is None:
        raise ClusterError(f"{POM} pins no kafka artifact")
    return match.group(1)


def checksums(folder: Path) -> str:
    """Return a line with the sha256 and the name of each jar in a folder, as sha256sum does."""
    jars = sorted(folder.glob("*.jar"))
    return "".join(f"{hashlib.sha256(jar.read_bytes()).hexdigest()}  {jar.name}\n" for jar in jars)


def _fetch(folder: Path, step: Step, steps: Steps) -> None:
    unfinished = _download(folder.parent / ".unfinished", step, steps)
    wanted, found = CHECKSUMS.read_text(), checksums(unfinished)
    if found != wanted:
        differing = set(wanted.splitlines()) ^ set(found.splitlines())
        names = sorted({line.split()[-1] for line in differing})
        raise ClusterError(
            f"jars that are not those pinned in {CHECKSUMS}: {', '.join(names)}; if the pom was "
            "changed on purpose, run `python -m cluster.kafka_jars checksums` and look at the diff"
        )
    unfinished.rename(folder)
    paths.keep_newest(path for path in folder.parent.iterdir() if path.is_dir())


def _download(folder: Path, step: Step, steps: Steps) -> Path:
    """Copy all jars that the pom needs into a new folder, by Maven.

    Raises:
        ClusterError: Maven failed; the error carries its last lines.
    """
    if shutil.which("mvn") is None:
        packages.ensure(["maven"], steps)
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        *("nice", "mvn", "--batch-mode", "--strict-checksums", f"--file={POM}"),
        *("dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={folder}"),
    ]
    lines: list[str] = []
    fetched = 0
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            lines = [*lines[-KEPT_LINES:], line.rstrip()]
            if "Downloaded from" in line:
                fetched += 1
                step.update(f"{fetched} files fetched")
    if process.returncode:
        raise ClusterError("Maven could not fetch Kafka:\n" + "\n".join(lines))
    return folder


def _java_version() -> int:
    """Return the major version of the java on the path, 0 if there is none."""
    if shutil.which("java") is None:
        return 0
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    match = re.search(r'version "(\d+)', said)
    return int(match.group(1)) if match else 0


def main() -> None:
    """Fetch the jars; with "checksums", write their checksums as the ones to expect."""
    if sys.argv[1:] == ["checksums"]:
        steps = Steps()
        require_java(steps)
        with steps.step("Kafka: jars") as step:
            folder = _download(paths.cache() / "kafka" / ".unfinished", step, steps)
        CHECKSUMS.write_text(checksums(folder))
        shutil.rmtree(folder)
    else:
        print(ensure())


if __name__ == "__main__":
    run_main(main)
