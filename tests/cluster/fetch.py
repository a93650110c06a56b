"""Build and fetch all that tests and demos need, with one display of how far it is.

Why it exists: what is slow should be done once, before, and side by side: while Go compiles
Kubernetes, packages, jars, wheels and the base image come in. It must not start anything of what
it fetched.

    python -m cluster.fetch           what the integration tests need
    python -m cluster.fetch --demo    what `make demo` needs, and no more
    python -m cluster.fetch --all     what every test and demo needs; as root
"""

from __future__ import annotations

import argparse
import time

from cluster import controlplane, images, kafka_jars, layout, packages, paths, toolchain
from cluster.errors import run_main
from cluster.progress import Steps


def fetch_demo(steps: Steps) -> None:
    """Fetch what `make demo` needs: a control plane without nodes."""
    controlplane.require(steps)


def fetch_integration(steps: Steps) -> None:
    """Fetch what the integration tests need: a control plane and Kafka."""
    steps.together(lambda: controlplane.require(steps), lambda: kafka_jars.ensure(steps))


def fetch_all(steps: Steps) -> None:
    """Fetch what the three-node cluster needs, too: all programs, images, wheels."""

    def image_parts() -> None:
        images.ensure_base(steps)
        images.ensure_pause(steps)

    def beside_go() -> None:
        # All at once: one round of apt-get is faster than many, and they would wait for each other.
        packages.ensure([*controlplane.PACKAGES, *layout.DEBIAN_PACKAGES], steps)
        steps.together(
            lambda: kafka_jars.ensure(steps),
            lambda: images.ensure_wheels(steps),
            image_parts,
        )

    # First what nobody can mend in a minute, so that it is said before others build for minutes.
    packages.check(layout.DEBIAN_PACKAGES)
    toolchain.check(toolchain.ALL_TOOLS)
    steps.together(lambda: toolchain.ensure(toolchain.ALL_TOOLS, steps), beside_go)


def main() -> None:
    """Fetch; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--demo", action="store_true", help="only what `make demo` needs")
    choice.add_argument("--all", action="store_true", help="the three-node cluster's parts too")
    arguments = parser.parse_args()
    began = time.monotonic()
    steps = Steps()
    if arguments.demo:
        fetch_demo(steps)
    elif arguments.all:
        fetch_all(steps)
    else:
        fetch_integration(steps)
    steps.say(f"all there, in {paths.cache()}: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    run_main(main)
