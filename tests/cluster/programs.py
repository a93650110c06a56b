"""Outrider's own programs as plain processes beside a control plane: servers, and one agent a node.

Why it exists: the quick demo and the integration tests run the real programs against the real API
server without images or kubelets. Each agent has a Node object of its own and a token bound to it,
as a projected token would be; records go into files unless Kafka is given. It decides nothing about
the programs but their settings, and installs nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cluster.administrator import AgentPod
from cluster.controlplane import ControlPlane
from cluster.paths import ROOT
from cluster.supervised import free_port, wait_for

HOST = "127.0.0.1"
NAMESPACE = "outrider"
SERVER_ACCOUNT, AGENT_ACCOUNT = "outrider-server", "outrider-agent"
#: The name in the gateway's certificate; agents check it, whatever address they dial.
SERVER_NAME = "outrider-server.outrider.svc"
TOKEN_SECONDS = 7 * 24 * 3600
START_SECONDS = 30.0
HTTP_SECONDS = 5.0


@dataclass(frozen=True)
class Program:
    """A server or an agent: its name among the supervised processes, and where it listens."""

    name: str
    folder: Path
    ops_port: int
    #: Settings; written down when it starts.
    settings: dict[str, Any]
    #: 0 for an agent.
    grpc_port: int = 0

    @property
    def module(self) -> str:
        """What python -m is to run."""
        return "outrider_operator.main" if self.grpc_port else "outrider_agent.main"

    @property
    def config(self) -> Path:
        """The file with its settings."""
        return self.folder / "settings.yaml"


class Programs:
    """Servers and agents of one control plane; they end with it.

    Args:
        plane: a control plane that runs.
        kafka: bootstrap servers as "host:port"; without, records go into files.
    """

    def __init__(self, plane: ControlPlane, kafka: str = "") -> None:
        self.plane = plane
        self.kafka = kafka
        self.folder = plane.processes.folder / "outrider"
        self.servers: dict[str, Program] = {}
        self.agents: dict[str, Program] = {}

    def install(self) -> None:
        """Apply the resource definitions, and make ServiceAccounts and the certificate."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.plane.kubectl("apply", "--server-side", "-f", ROOT / "crds")
        self.plane.kubectl(
            "wait", "--for=condition=Established", "--timeout=30s", "-f", ROOT / "crds"
        )
        for account in (SERVER_ACCOUNT, AGENT_ACCOUNT):
            self.plane.make_service_account(NAMESPACE, account)
        make_certificate(self.folder)

    # ---------------------------------------------------------------- servers

    def server(self, name: str = "server-0", overrides: Mapping[str, Any] | None = None) -> Program:
        """Prepare one server: its folder, ports and settings. `start` runs it.

        Args:
            name: of the replica.
            overrides: settings laid over those made here, as nested mappings.
        """
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        ops_port, grpc_port = free_port(), free_port()
        token = self.plane.token(NAMESPACE, SERVER_ACCOUNT, seconds=TOKEN_SECONDS)
        _write_secret(folder / "token", token)
        settings: dict[str, Any] = {
            "ops": {"address": f"{HOST}:{ops_port}"},
            "gateway": {
                "address": f"{HOST}:{grpc_port}",
                "advertiseName": name,
                "tls": {
                    "certFile": str(self.folder / "tls.crt"),
                    "keyFile": str(self.folder / "tls.key"),
                },
            },
            "auth": {
                "agentServiceAccounts": [f"{NAMESPACE}/{AGENT_ACCOUNT}"],
                "serverServiceAccounts": [f"{NAMESPACE}/{SERVER_ACCOUNT}"],
            },
            "sink": {"kind": "file", "file": {"directory": str(folder / "records")}},
            "leader": {"leaseNamespace": NAMESPACE},
            "fleet": {
                "caFile": str(self.folder / "ca.crt"),
                "serverName": SERVER_NAME,
                "tokenFile": str(folder / "token"),
            },
            "kube": {"kubeconfig": str(self.plane.kubeconfig)},
        }
        if self.kafka:
            settings["sink"] = {"kind": "kafka", "kafka": {"bootstrapServers": [self.kafka]}}
        _merge(settings, overrides or {})
        program = Program(f"outrider-{name}", folder, ops_port, settings, grpc_port)
        self.servers[name] = program
        return program

    def gateways(self) -> str:
        """Addresses of all servers prepared so far, as a discovery target."""
        return ",".join(f"{HOST}:{server.grpc_port}" for server in self.servers.values())

    # ---------------------------------------------------------------- agents

    def agent(
        self,
        node: str,
        labels: Mapping[str, str] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Program:
        """Make a Node with its agent's Pod and token, and prepare the agent. `start` runs it."""
        self.plane.make_node(node, labels)
        pod = self.plane.make_agent_pod(node, NAMESPACE, AGENT_ACCOUNT)
        folder = self.folder / node
        folder.mkdir(exist_ok=True)
        ops_port = free_port()
        self.renew_token(node, pod)
        settings: dict[str, Any] = {
            "ops": {"address": f"{HOST}:{ops_port}"},
            "node": {"name": node},
            "server": {
                "caFile": str(self.folder / "ca.crt"),
                "serverName": SERVER_NAME,
                "tokenFile": str(folder / "token"),
            },
            "state": {"directory": str(folder / "state")},
        }
        _merge(settings, overrides or {})
        program = Program(f"outrider-agent-{node}", folder, ops_port, settings)
        self.agents[node] = program
        return program

    def renew_token(self, node: str, pod: AgentPod, seconds: int = TOKEN_SECONDS) -> None:
        """Write a new token for a node's agent, as kubelet does before the old one expires."""
        token = self.plane.token(NAMESPACE, AGENT_ACCOUNT, bound_pod=pod, seconds=seconds)
        _write_secret(self.folder / node / "token", token)

    # ---------------------------------------------------------------- both

    def start(
        self, program: Program, *, ready: bool = True, through: Sequence[str] = ("-m",)
    ) -> None:
        """Run a prepared program, again after its end too.

        Args:
            program: from `server` or `agent`.
            ready: wait until /readyz says so.
            through: what Python is told before the program's module.

        Raises:
            ClusterError: it ended, or was not ready in time; with the end of its log.
        """
        addresses = {"fleet": {"gateways": self.gateways()}}
        if not program.grpc_port:
            addresses = {"server": {"target": self.gateways()}}
        settings: dict[str, Any] = {}
        _merge(settings, addresses)
        _merge(settings, program.settings)
        program.config.write_text(yaml.safe_dump(settings, sort_keys=False))
        self.plane.processes.run(
            program.name, [sys.executable, *through, program.module, "--config", program.config]
        )
        if ready:
            self.wait_ready(program)

    def wait_ready(self, program: Program, seconds: float = START_SECONDS) -> None:
        """Wait until a program says that it is ready.

        Raises:
            ClusterError: it ended, or was not ready in time.
        """
        self.plane.processes.wait_ready(
            program.name,
            f"{program.name} is ready",
            lambda: http(program, "/readyz")[0] == 200,
            seconds,
        )

    def wait_agents_ready(self, count: int, seconds: float = START_SECONDS) -> None:
        """Wait until so many Agent objects are Ready."""
        wait_for(f"{count} agents are Ready", lambda: self.ready_agents() >= count, seconds, 0.1)

    def ready_agents(self) -> int:
        """How many Agent objects have the condition Ready."""
        found = json.loads(self.plane.kubectl("get", "agents.outrider.dev", "-o", "json"))
        return sum(
            condition["type"] == "Ready" and condition["status"] == "True"
            for agent in found["items"]
            for condition in agent.get("status", {}).get("conditions", [])
        )


def status(fleet: Programs, name: str) -> dict[str, Any]:
    """The status of an AgentTask in the default namespace; empty while it has none."""
    task = json.loads(fleet.plane.kubectl("get", "agenttask", name, "-o", "json"))
    return dict(task.get("status", {}))


def rows(fleet: Programs, name: str) -> dict[str, dict[str, Any]]:
    """What the reports of an AgentTask say, by node."""
    found = json.loads(fleet.plane.kubectl("get", "agenttaskreports", "-o", "json"))
    return {
        row["node"]: row
        for report in found["items"]
        if report["task"]["name"] == name
        for row in report["nodes"]
    }


def http(program: Program, path: str) -> tuple[int, str]:
    """Ask a program's own listener; status 0 if nothing answers."""
    url = f"http://{HOST}:{program.ops_port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=HTTP_SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def make_certificate(folder: Path, days: int = 30) -> None:
    """Write ca.crt, ca.key (kept if there), and a new tls.crt and tls.key for the gateway."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", str(days)]
    authority = ["-CA", folder / "ca.crt", "-CAkey", folder / "ca.key"]
    if not (folder / "ca.key").exists():
        _openssl(
            *("req", "-x509", *key, "-subj", "/CN=outrider-ca"),
            *("-keyout", folder / "ca.key", "-out", folder / "ca.crt"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
    for suffix in ("crt", "key"):
        (folder / f"tls.{suffix}.new").unlink(missing_ok=True)
    _openssl(
        *("req", "-x509", *authority, *key, "-subj", f"/CN={SERVER_NAME}"),
        *("-keyout", folder / "tls.key.new", "-out", folder / "tls.crt.new"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
        *("-addext", f"subjectAltName=DNS:{SERVER_NAME},DNS:localhost"),
    )
    for suffix in ("crt", "key"):
        (folder / f"tls.{suffix}.new").replace(folder / f"tls.{suffix}")


def _openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def _write_secret(file: Path, text: str) -> None:
    fresh = file.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_text(text)
    fresh.replace(file)


def _merge(target: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, Mapping):
            _merge(target.setdefault(key, {}), value)
        else:
            target[key] = value
