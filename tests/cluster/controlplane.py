"""A real Kubernetes control plane as three plain processes on loopback, without nodes.

Why it exists: server and agent are tested against the real API server (CRD schemas, watches,
TokenReview, Leases) in seconds and without root. Nodes and the agents' Pods are only objects here,
so nothing may run that removes Nodes and Pods which no kubelet reports on; and no Pod ever runs.
It must not install anything: call `require` for that.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Self

from cluster import packages, toolchain
from cluster.administrator import Administrator, AgentPod, RequestError
from cluster.controlplane_parts import (
    API_SERVER,
    CONTROLLERS,
    CONTROLLERS_USER,
    ETCD,
    HOST,
    Ports,
    commands,
    make_credentials,
    make_keys,
)
from cluster.errors import ClusterError
from cluster.progress import Steps
from cluster.supervised import Supervised, free_port, wait_for

__all__ = [
    "API_SERVER",
    "CONTROLLERS",
    "ETCD",
    "AgentPod",
    "ControlPlane",
    "RequestError",
    "require",
]

READY_SECONDS = 60.0
PACKAGES = ("etcd-server", "openssl")
STATE_FILE = "state.json"


def require(steps: Steps | None = None) -> dict[str, Path]:
    """Make sure that etcd, openssl and the Kubernetes programs are there; return the programs.

    Raises:
        MissingError, ClusterError: as `packages.ensure` and `toolchain.ensure`.
    """
    # First what nobody can mend in a minute, so that it is said before others build for minutes.
    packages.check(PACKAGES)
    toolchain.check(toolchain.DEMO_TOOLS)
    steps = steps or Steps()
    programs: dict[str, Path] = {}
    steps.together(
        lambda: programs.update(toolchain.ensure(toolchain.DEMO_TOOLS, steps)),
        lambda: packages.ensure(PACKAGES, steps),
    )
    return programs


class ControlPlane(Administrator):
    """etcd, kube-apiserver and kube-controller-manager, in a folder that `stop` removes.

    Everything ends with this process, however that ends, unless it is detached. Not thread-safe
    but for the requests. The parts are named ETCD, API_SERVER and CONTROLLERS in the methods for
    faults.

    Args:
        folder: for keys, data and logs; empty or not there yet. A temporary one if not given.
        detached: let it live on when this process ends; `attach` finds it again.
    """

    def __init__(self, folder: Path | None = None, *, detached: bool = False) -> None:
        self._folder = folder or Path(tempfile.mkdtemp(prefix="outrider-control-plane-"))
        self._detached = detached
        self._processes: Supervised | None = None
        self._programs: dict[str, Path] = {}
        self._ports = Ports(0, 0, 0)
        self._credentials: dict[str, str] = {}
        self._wanted: set[str] = set()
        super().__init__("", "", self._folder / "ca.crt")

    # ---------------------------------------------------------------- life

    def start(self) -> Self:
        """Start all three and wait until the API server is ready and has its default roles.

        Raises:
            ClusterError: one did not start; the error carries the end of its log.
        """
        self._programs = toolchain.ensure(toolchain.DEMO_TOOLS)
        self._processes = Supervised.start(self._folder, detached=self._detached)
        try:
            self._ports = Ports(free_port(HOST), free_port(HOST), free_port(HOST))
            self._write_state()
            for part in (ETCD, API_SERVER, CONTROLLERS):
                self.start_part(part)
        except BaseException:
            self.stop()
            raise
        return self

    @classmethod
    def attach(cls, folder: Path) -> Self | None:
        """Return the detached control plane that lives in a folder, or None."""
        processes = Supervised.attach(folder)
        if processes is None:
            return None
        plane = cls(folder, detached=True)
        plane._processes = processes
        plane._programs = toolchain.ensure(toolchain.DEMO_TOOLS)
        saved = json.loads((folder / STATE_FILE).read_text())
        plane._wanted = {ETCD, API_SERVER, CONTROLLERS}
        plane._set_access(Ports(**saved["ports"]), saved["credentials"])
        return plane

    def stop(self) -> None:
        """Kill everything and remove the folder; again: nothing."""
        if self._processes is not None:
            self._processes.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---------------------------------------------------------------- what users of it need

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig file with all rights (group system:masters)."""
        return self._folder / "admin.kubeconfig"

    @property
    def processes(self) -> Supervised:
        """The supervised processes; more may be run there and end with the control plane.

        Raises:
            ClusterError: it was not started.
        """
        if self._processes is None:
            raise ClusterError("the control plane was not started")
        return self._processes

    def kubeconfig_for(self, name: str, token: str) -> Path:
        """Write a kubeconfig file for the holder of a token, e.g. a ServiceAccount's.

        Args:
            name: of the file; used again, it is overwritten.
            token: the bearer token.
        """
        cluster = {"server": self.server, "certificate-authority": str(self.authority)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "outrider",
            "clusters": [{"name": "outrider", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "outrider", "context": {"cluster": "outrider", "user": name}}],
        }
        file = self._folder / f"{name}.kubeconfig"
        file.touch(mode=0o600)
        file.write_text(json.dumps(content, indent=1))
        return file

    def program(self, name: str) -> Path:
        """Return the path of one of the programs in use, e.g. "kubectl"."""
        return self._programs[name]

    def kubectl(self, *arguments: str | Path, stdin: str = "", check: bool = True) -> str:
        """Run kubectl with all rights and return what it prints.

        Raises:
            ClusterError: it failed, unless `check` is off; the error carries what it said.
        """
        done = subprocess.run(
            [
                *(self._programs["kubectl"], "--kubeconfig", self.kubeconfig),
                *("--cache-dir", self._folder / "kubectl-cache", *arguments),
            ],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            words = " ".join(map(str, arguments))
            raise ClusterError(f"kubectl {words}: exit code {done.returncode}: {done.stderr}")
        return done.stdout

    # ---------------------------------------------------------------- faults, part by part

    def start_part(self, part: str) -> None:
        """Start one of the three on its old port and data, and wait until it is of use.

        With the API server the controllers are started anew, unless they were stopped on purpose:
        they may have given up, and would else notice changes up to a minute late.

        Raises:
            ClusterError: it runs already, or did not start.
        """
        if part == CONTROLLERS:
            wait_for("the controllers' role is in force", self._controllers_allowed, READY_SECONDS)
        command = commands(self._folder, self._ports, self._programs)[part]
        self.processes.run(part, command)
        self._wanted.add(part)
        if part == ETCD:
            self.processes.wait_listening(part, self._ports.etcd, READY_SECONDS)
        if part == API_SERVER:
            self.processes.wait_listening(part, self._ports.api, READY_SECONDS)
            self.wait_ready()
            if CONTROLLERS in self._wanted:
                if self.processes.running(CONTROLLERS):
                    self.processes.kill(CONTROLLERS)
                self.start_part(CONTROLLERS)

    def _controllers_allowed(self) -> bool:
        # The API server is ready a moment before it knows all roles. The controllers take a
        # refusal at their start for final, and end.
        try:
            self.request(
                "GET",
                "/api/v1/namespaces/kube-system/serviceaccounts/none",
                token=self._credentials[CONTROLLERS_USER],
                absent_ok=True,
            )
        except RequestError as error:
            if error.code == HTTPStatus.FORBIDDEN:
                return False
            raise
        return True

    def stop_part(self, part: str) -> None:
        """End one of the three with SIGTERM, with SIGKILL after 10 s."""
        self._wanted.discard(part)
        self.processes.stop(part)

    def kill_part(self, part: str) -> None:
        """End one of the three with SIGKILL."""
        self._wanted.discard(part)
        self.processes.kill(part)

    def restart_part(self, part: str) -> None:
        """Kill one of the three and start it again.

        What watches the API server may take up to a minute to notice what it missed.
        """
        self.kill_part(part)
        self.start_part(part)

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Wait until the API server says that it is ready.

        Raises:
            ClusterError: it is not within `seconds`, or has ended.
        """

        def ready() -> bool:
            try:
                self.request("GET", "/readyz")
            except (OSError, RequestError):
                return False
            return True

        self.processes.wait_ready(API_SERVER, "the API server is ready", ready, seconds)

    def _write_state(self) -> None:
        make_keys(self._folder)
        self._set_access(self._ports, make_credentials(self._folder))
        self.kubeconfig_for("admin", self._credentials["admin"])
        self.kubeconfig_for("controllers", self._credentials[CONTROLLERS_USER])
        saved = {"ports": asdict(self._ports), "credentials": self._credentials}
        (self._folder / STATE_FILE).write_text(json.dumps(saved))

    def _set_access(self, ports: Ports, credentials: dict[str, str]) -> None:
        self._ports, self._credentials = ports, credentials
        super().__init__(f"https://{HOST}:{ports.api}", credentials["admin"], self.authority)
