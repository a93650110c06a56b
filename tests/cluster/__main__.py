"""A real Kubernetes cluster of several nodes on one machine, without docker or systemd.

It takes root, cgroup version 1 and about 1.2 GB of memory for three nodes. What it needs of Debian
packages and Go programs it installs and builds the first time. See docs/test-cluster.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from cluster import (
    addons,
    cgroups,
    faults,
    images,
    imagestore,
    lifecycle,
    machines,
    network,
    plugins,
    status,
)
from cluster.errors import ClusterError, run_main
from cluster.layout import KUBECONFIG, STATE, machine_name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    sub = command("up", "start the control plane and the nodes")
    sub.add_argument("-n", "--nodes", type=int, default=3)
    sub.add_argument("--kafka", action="store_true", help="with a Kafka broker")
    sub.add_argument("--prometheus", action="store_true", help="with a Prometheus")
    sub = command("down", "remove everything")
    sub.add_argument("--check", action="store_true", help="only tell what there is; 1 if anything")
    sub = command("status", "processes, memory, CPU, nodes")
    sub.add_argument("--seconds", type=float, default=5.0, help="how long to measure")
    sub = command("image", "build this project's images for the nodes, or list what is cached")
    sub.add_argument("action", choices=["build", "list"])
    sub = command("node", "power a node off or on, cut it off, stop its world")
    sub.add_argument("action", choices=["stop", "start", "partition", "heal", "freeze", "thaw"])
    sub.add_argument("machine", type=machine_name, help="a node's number or name")
    sub.add_argument("--from", dest="peers", nargs="*", type=machine_name, default=[])
    sub = command("svc", "kill or start a daemon of a machine, e.g. `svc restart cp apiserver`")
    sub.add_argument("action", choices=["stop", "start", "restart"])
    sub.add_argument("machine", type=machine_name)
    sub.add_argument("name")
    sub = command("resync", "restart what watches the API server, after a long outage")
    sub.add_argument("machine", nargs="*", type=machine_name)
    sub = command("sh", "run a command (default: a shell) inside a machine")
    sub.add_argument("machine", type=machine_name)
    sub.add_argument("argv", nargs=argparse.REMAINDER)
    sub = command("spawn", "run a command inside a machine as a daemon that svc knows")
    sub.add_argument("machine", type=machine_name)
    sub.add_argument("name")
    sub.add_argument("argv", nargs=argparse.REMAINDER)
    sub = command("forward", "127.0.0.1:PORT here to an address as seen from a machine")
    sub.add_argument("port", type=int)
    sub.add_argument("machine", type=machine_name)
    sub.add_argument("target", help="ADDRESS:PORT")
    command("packages", "serve plug-ins to the nodes by https, unless that is done already")
    command("kubectl", "kubectl as administrator, with all that follows")
    return parser


def _up(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    images.ensure_pause()
    lifecycle.up(arguments.nodes)
    if arguments.kafka:
        addons.start_kafka()
    if arguments.prometheus:
        addons.start_prometheus()
    seconds = time.monotonic() - began
    print(f"{arguments.nodes} nodes are up after {seconds:.1f} s; export KUBECONFIG={KUBECONFIG}")


def _down(arguments: argparse.Namespace) -> int:
    if arguments.check:
        found = lifecycle.left_overs()
        print("\n".join(found) or "nothing left")
        return int(bool(found))
    print(f"down: {lifecycle.down()} processes killed")
    return 0


def _image(arguments: argparse.Namespace) -> None:
    tags = images.build() if arguments.action == "build" else imagestore.current()
    for tag, unique in sorted(tags.items()):
        print(f"{tag} = {unique}")


def _node(arguments: argparse.Namespace) -> None:
    machine = arguments.machine
    if arguments.action == "partition":
        faults.partition(machine, arguments.peers)
        return
    actions = {
        "stop": faults.power_off,
        "start": faults.power_on,
        "heal": faults.heal,
        "freeze": faults.freeze,
        "thaw": faults.thaw,
    }
    actions[arguments.action](machine)


def _svc(arguments: argparse.Namespace) -> None:
    actions = {
        "stop": faults.stop_daemon,
        "start": faults.start_daemon,
        "restart": faults.restart_daemon,
    }
    actions[arguments.action](arguments.machine, arguments.name)


def _words(arguments: argparse.Namespace) -> list[str]:
    words: list[str] = arguments.argv
    return words[1:] if words[:1] == ["--"] else words


def _sh(arguments: argparse.Namespace) -> None:
    machine = arguments.machine
    prefix = [*cgroups.enter_command(machine), *network.namespace_command(machine)]
    os.execvp(prefix[0], [*prefix, *(_words(arguments) or ["/bin/bash"])])


def _kubectl(words: list[str]) -> None:
    program = STATE / "bin" / "kubectl"
    if not program.exists():
        raise ClusterError("there is no cluster; `python -m cluster up` starts one")
    os.execv(program, ["kubectl", "--kubeconfig", str(KUBECONFIG), *words])


def main() -> int:
    """Run one command; returns the exit code.

    Raises:
        ClusterError: what was asked for did not work.
    """
    if sys.argv[1:2] == ["kubectl"]:  # its options are not ours to read
        _kubectl(sys.argv[2:])
    arguments = _parser().parse_args()
    match arguments.command:
        case "up":
            _up(arguments)
        case "down":
            return _down(arguments)
        case "status":
            status.show(arguments.seconds)
        case "image":
            _image(arguments)
        case "node":
            _node(arguments)
        case "svc":
            _svc(arguments)
        case "resync":
            faults.resync(arguments.machine)
        case "sh":
            _sh(arguments)
        case "spawn":
            machines.spawn(arguments.machine, arguments.name, _words(arguments))
        case "forward":
            network.forward(arguments.port, arguments.machine, arguments.target)
        case "packages":
            plugins.start_server()
    return 0


if __name__ == "__main__":
    run_main(main)
