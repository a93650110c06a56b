"""The chart, by the real helm and API server: lint, render, dry run, install, upgrade, rights.

The rendered settings are loaded by the programs' own loaders, and every file they name must be
mounted. No Pod runs here: that is for the tests on the three-node cluster.
"""

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import toolchain
from cluster.controlplane import ControlPlane
from cluster.paths import ROOT
from cryptography import x509
from outrider_agent.settings import AgentSettings
from outrider_operator.settings import ServerSettings
from outrider_runtime.settings import load

CHART = ROOT / "charts" / "outrider"
NAMESPACE = "chart-test"
RELEASE = "outrider"
SERVER, AGENT = "outrider-server", "outrider-agent"
Objects = dict[tuple[str, str], dict[str, Any]]

KAFKA = ["sink.kind=kafka", "sink.kafka.bootstrapServers={kafka-0:9092,kafka-1:9092}"]
KAFKA_SECURED = [
    *KAFKA,
    "sink.kafka.security.protocol=sasl_ssl",
    "sink.kafka.security.userSecret=kafka-user",
    "sink.kafka.security.caSecret=kafka-ca",
    "sink.kafka.security.certificateSecret=kafka-client",
    "sink.kafka.routes[0].topic=metrics",
    "sink.kafka.routes[0].dataTypes={20000}",
    "sink.kafka.format=record",
]
#: Sets of values that must all give a chart the API server takes.
VALUES: dict[str, list[str]] = {
    "defaults": [],
    "one replica": ["server.replicas=1"],
    "kafka": KAFKA,
    "kafka with a password": KAFKA_SECURED,
    "a volume for records": ["sink.file.existingClaim=records"],
    "users": ["agent.allowedUsers={nobody,app}"],
    "full access": ["agent.hostAccess=full", "agent.hostNetwork=true"],
    "host mounts": ["agent.hostMounts=true"],
    "plug-ins": [
        "agent.plugins.caConfigMap=packages",
        "agent.plugins.publicKeys.release=MCowBQYDK2VwAyEA",
        "agent.plugins.publicKeys.other=MCowBQYDK2VwAyEB",
        "agent.settings.plugins.requireSignature=true",
    ],
    "own secret": ["tls.existingSecret=mine"],
    "own secret and CA": ["tls.existingSecret=mine", "tls.caConfigMap=ours"],
    "no annotations": ["metrics.annotations=false"],
    "without definitions": ["crds.install=false"],
    "other names": ["fullnameOverride=fleet", "nameOverride=tasks"],
    "everything about Pods": [
        "image.registry=registry.example.org/team/",
        "image.pullSecrets={one,two}",
        "image.pullPolicy=Always",
        f"server.image.digest=sha256:{'0' * 64}",
        "agent.image.tag=1.2.3",
        "server.priorityClassName=system-cluster-critical",
        "agent.priorityClassName=system-node-critical",
        "server.podLabels.team=a",
        "agent.podAnnotations.note=b",
        "server.tolerations[0].operator=Exists",
        "server.nodeSelector.disk=ssd",
        "server.serviceAccount.annotations.role=x",
        "server.log.format=json",
        "agent.log.level=debug",
    ],
    "own settings": [
        "server.settings.gateway.maxConnections=123456",
        "server.settings.sink.file.maxTotalBytes=1099511627776",
        "agent.settings.tasks.allowedKinds={command}",
    ],
}
#: These need definitions of other projects, so that the API server here cannot try them.
FOREIGN: dict[str, list[str]] = {
    "cert-manager": ["tls.certManager.enabled=true", "tls.certManager.issuerRef.name=issuer"],
    "monitors": ["metrics.serviceMonitor.enabled=true", "metrics.podMonitor.enabled=true"],
}


def all_values() -> list[Any]:
    return [pytest.param(values, id=name) for name, values in (VALUES | FOREIGN).items()]


class Helm:
    def __init__(self, program: Path, plane: ControlPlane, home: Path) -> None:
        self._command = [str(program), "--kubeconfig", str(plane.kubeconfig)]
        # Nothing of the user's: neither their settings nor their plug-ins.
        names = ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")
        self._environment = {name: str(home) for name in names} | {"HOME": str(home)}
        self._rendered: dict[tuple[str, ...], str] = {}

    def run(self, *arguments: str, values: list[str] | None = None) -> str:
        return self.try_run(*arguments, values=values, check=True).stdout

    def try_run(
        self, *arguments: str, values: list[str] | None = None, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        chosen = [part for value in values or [] for part in ("--set", value)]
        done = subprocess.run(
            [*self._command, *arguments, *chosen],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"helm {arguments}: {done.stderr}"
        return done

    def template(self, values: list[str]) -> Objects:
        """What the chart makes of the values; rendered once for all tests."""
        key = tuple(values)
        if key not in self._rendered:
            self._rendered[key] = self.run(
                *("template", RELEASE, str(CHART), "--namespace", NAMESPACE),
                *("--kube-version", toolchain.version("kubernetes")),
                values=values,
            )
        found: Objects = {}
        for item in yaml.load_all(self._rendered[key], yaml.CSafeLoader):
            if item:
                name = (item["kind"], item["metadata"]["name"])
                assert name not in found, f"{name} is rendered twice"
                found[name] = item
        return found


@pytest.fixture(scope="module")
def helm(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    program = toolchain.ensure(["helm"])["helm"]
    return Helm(program, control_plane, tmp_path_factory.mktemp("helm"))


@pytest.fixture
def release_namespace(control_plane: ControlPlane) -> str:
    """The namespace of the release: settings and certificates carry its name."""
    # A Pod is only taken where its account is there, and a dry run makes none.
    for account in ("outrider-test", "fleet-test"):
        control_plane.make_service_account(NAMESPACE, account)
    return NAMESPACE


@pytest.fixture
def installed(helm: Helm, release_namespace: str) -> Iterator[list[str]]:
    """The arguments of helm that name the release, installed with default values."""
    release = [RELEASE, str(CHART), "--namespace", release_namespace, "--take-ownership"]
    helm.run("install", *release)
    yield release
    helm.run("uninstall", RELEASE, "--namespace", release_namespace, "--ignore-not-found")


def settings_of(objects: Objects, name: str, file: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(objects["ConfigMap", name]["data"][file])
    return loaded


def pod_of(objects: Objects, kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = objects[kind, name]["spec"]["template"]["spec"]
    return found


def mounted_files(pod: dict[str, Any]) -> set[str]:
    """Paths of all files that the projected volumes of a Pod's first container hold."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    found = set()
    for mount in pod["containers"][0]["volumeMounts"]:
        for source in volumes[mount["name"]].get("projected", {}).get("sources", []):
            (part,) = source.values()
            names = [item["path"] for item in part.get("items", [])] or [part.get("path")]
            found |= {f"{mount['mountPath']}/{name}" for name in names if name}
    return found


def writable_directories(pod: dict[str, Any]) -> set[str]:
    mounts = pod["containers"][0]["volumeMounts"]
    return {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}


def server_settings(objects: Objects, folder: Path, name: str = SERVER) -> ServerSettings:
    file = folder / "server.yaml"
    file.write_text(objects["ConfigMap", name]["data"]["server.yaml"])
    return load(
        ServerSettings,
        program="outrider-server",
        version="0",
        argv=["--config", str(file)],
        environ={},
    )


def agent_settings(objects: Objects, folder: Path, name: str = AGENT) -> AgentSettings:
    file = folder / "agent.yaml"
    file.write_text(objects["ConfigMap", name]["data"]["agent.yaml"])
    container = pod_of(objects, "DaemonSet", name)["containers"][0]
    environ = {variable["name"]: variable["name"] for variable in container["env"]}
    return load(
        AgentSettings,
        program="outrider-agent",
        version="0",
        argv=["--config", str(file)],
        environ=environ,
    )


# -------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("values", all_values())
def test_lint_has_nothing_to_say(helm: Helm, values: list[str]) -> None:
    version = toolchain.version("kubernetes")
    said = helm.run("lint", "--strict", "--kube-version", version, str(CHART), values=values)
    assert "1 chart(s) linted, 0 chart(s) failed" in said


@pytest.fixture(scope="module")
def taken() -> set[str]:
    """Objects that the API server took, for other values that give the very same."""
    return set()


@pytest.mark.parametrize("values", [pytest.param(v, id=k) for k, v in VALUES.items()])
def test_the_api_server_takes_what_is_rendered(
    helm: Helm,
    control_plane: ControlPlane,
    release_namespace: str,
    taken: set[str],
    values: list[str],
) -> None:
    texts = {json.dumps(item, sort_keys=True) for item in helm.template(values).values()}
    objects = [json.loads(text) for text in sorted(texts - taken)]
    # Strict: a field at the wrong place is an error, not a warning.
    said = control_plane.kubectl(
        *("apply", "--server-side", "--force-conflicts", "--dry-run=server"),
        *("--validate=strict", "-f", "-"),
        stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}),
    )
    assert len(said.splitlines()) == len(objects)
    taken |= texts


@pytest.mark.parametrize("values", all_values())
def test_the_programs_take_their_settings_and_find_their_files(
    helm: Helm, tmp_path: Path, values: list[str]
) -> None:
    objects = helm.template(values)
    prefix = "fleet" if "fullnameOverride=fleet" in values else "outrider"
    server, agent = f"{prefix}-server", f"{prefix}-agent"
    host = f"{server}.{NAMESPACE}.svc"

    loaded = server_settings(objects, tmp_path, server)
    pod = pod_of(objects, "Deployment", server)
    needed = {loaded.gateway.tls.cert_file, loaded.gateway.tls.key_file}
    needed |= {loaded.fleet.ca_file, loaded.fleet.token_file}
    assert needed <= mounted_files(pod)
    ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    assert loaded.gateway.address == f":{ports['grpc']}"
    assert loaded.ops.address == f":{ports['http']}"
    assert loaded.fleet.gateways == f"srv:_grpc._tcp.{host}"
    assert loaded.fleet.server_name == host
    assert loaded.auth.agent_service_accounts == [f"{NAMESPACE}/{agent}"]
    assert loaded.auth.server_service_accounts == [f"{NAMESPACE}/{server}"]
    (named,) = [rule for rule in objects["Role", server]["rules"] if "resourceNames" in rule]
    assert named["resourceNames"] == [loaded.leader.lease_name]
    security = loaded.sink.kafka.security
    files = {security.username_file, security.password_file, security.ca_file}
    files |= {security.cert_file, security.key_file}
    assert files - {""} <= mounted_files(pod)
    if loaded.sink.kind == "file":
        assert loaded.sink.file.directory in writable_directories(pod)
    # Time to hand agents over and flush, before the kubelet kills.
    assert pod["terminationGracePeriodSeconds"] >= loaded.gateway.drain_seconds + 20

    found = agent_settings(objects, tmp_path, agent)
    pod = pod_of(objects, "DaemonSet", agent)
    assert {found.server.ca_file, found.server.token_file} <= mounted_files(pod)
    assert found.state.directory in writable_directories(pod)
    assert found.node.name == "OUTRIDER_NODE_NAME"
    assert found.node.pod_uid == "OUTRIDER_NODE_POD_UID"
    assert found.server.target == f"srv:_grpc._tcp.{host}"
    assert found.server.server_name == host
    (port,) = pod["containers"][0]["ports"]
    assert found.ops.address == f":{port['containerPort']}"
    tasks = found.tasks
    assert pod["terminationGracePeriodSeconds"] >= (
        tasks.drain_seconds + tasks.termination_grace_seconds + 5
    )


def test_own_settings_win(helm: Helm, tmp_path: Path) -> None:
    objects = helm.template(VALUES["own settings"])
    loaded = server_settings(objects, tmp_path)
    assert loaded.gateway.max_connections == 123456
    assert loaded.sink.file.max_total_bytes == 2**40
    assert loaded.gateway.address == ":8443"
    assert list(agent_settings(objects, tmp_path).tasks.allowed_kinds) == ["command"]
    assert server_settings(helm.template(KAFKA), tmp_path).sink.kafka.bootstrap_servers == [
        "kafka-0:9092",
        "kafka-1:9092",
    ]


def test_secrets_of_kafka_are_mounted_and_never_in_the_settings(helm: Helm, tmp_path: Path) -> None:
    objects = helm.template(KAFKA_SECURED)
    found = server_settings(objects, tmp_path).sink.kafka
    assert (found.security.protocol, found.security.mechanism) == ("sasl_ssl", "SCRAM-SHA-512")
    assert [(route.data_types, route.topic) for route in found.routes] == [([20000], "metrics")]
    assert found.format == "record"
    (volume,) = [
        volume
        for volume in pod_of(objects, "Deployment", SERVER)["volumes"]
        if volume["name"] == "settings"
    ]
    secrets = {
        source["secret"]["name"]: [item["key"] for item in source["secret"]["items"]]
        for source in volume["projected"]["sources"]
        if "secret" in source
    }
    assert secrets["kafka-user"] == ["username", "password"]
    assert secrets["kafka-ca"] == ["ca.crt"]
    assert secrets["kafka-client"] == ["tls.crt", "tls.key"]
    assert not [key for key in objects if key[0] == "Secret" and "kafka" in key[1]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["sink.kind=kafka"], "set sink.kafka.bootstrapServers"),
        ([*KAFKA, "sink.kafka.security.protocol=sasl_ssl"], "set sink.kafka.security.userSecret"),
        ([*KAFKA, "sink.kafka.security.userSecret=x"], "set sink.kafka.security.protocol"),
        ([*KAFKA, "sink.kafka.security.caSecret=x"], "set sink.kafka.security.protocol"),
        ([*KAFKA, "sink.kafka.security.password=x"], "'password' not allowed"),
        (["tls.certManager.enabled=true"], "set tls.certManager.issuerRef.name"),
        (
            ["tls.certManager.enabled=true", "tls.existingSecret=mine"],
            "tls.existingSecret and tls.certManager.enabled exclude each other",
        ),
        (["server.replica=3"], "'replica' not allowed"),
        (["agent.hostAccess=some"], "agent/hostAccess"),
    ],
)
def test_values_that_make_no_sense_are_refused(helm: Helm, values: list[str], words: str) -> None:
    version = toolchain.version("kubernetes")
    done = helm.try_run("template", str(CHART), "--kube-version", version, values=values)
    assert done.returncode != 0
    assert words in done.stderr


def test_a_kubernetes_without_node_claims_is_refused(helm: Helm) -> None:
    done = helm.try_run("template", str(CHART), "--kube-version", "v1.29.9")
    assert done.returncode != 0
    assert "requires kubeVersion: >=1.30" in done.stderr


# ------------------------------------------------------------------------ privilege and shape


def test_no_pod_has_a_privilege_it_was_not_given(helm: Helm) -> None:
    objects = helm.template([])
    pods = {
        "server": pod_of(objects, "Deployment", SERVER),
        "agent": pod_of(objects, "DaemonSet", AGENT),
        "test": objects["Pod", "outrider-test"]["spec"],
    }
    for name, pod in pods.items():
        for field in ("hostPID", "hostNetwork", "hostIPC"):
            assert not pod.get(field), name
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert not context.get("privileged"), name
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert "memory" in container["resources"]["limits"], name
        whole = {**pod.get("securityContext", {}), **pod["containers"][0]["securityContext"]}
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert name == "agent" or whole["runAsNonRoot"], name
        assert pod["enableServiceLinks"] is False, name


def test_what_tasks_may_is_what_the_pod_can(helm: Helm, tmp_path: Path) -> None:
    plain = agent_settings(helm.template([]), tmp_path).tasks
    assert (plain.allow_host, plain.allowed_users) == (False, ())
    full = agent_settings(helm.template(VALUES["full access"]), tmp_path).tasks
    assert (full.allow_host, full.allowed_users) == (True, ())
    objects = helm.template(VALUES["users"])
    users = agent_settings(objects, tmp_path).tasks
    assert (users.allow_host, users.allowed_users) == (False, ("nobody", "app"))
    context = pod_of(objects, "DaemonSet", AGENT)["containers"][0]["securityContext"]
    added = ["SETUID", "SETGID", "KILL", "SYS_PTRACE", "CHOWN", "FOWNER", "DAC_OVERRIDE"]
    assert context["capabilities"] == {"drop": ["ALL"], "add": added}
    assert context["privileged"] is False


def test_agents_find_what_packages_of_plugins_are_checked_with(helm: Helm, tmp_path: Path) -> None:
    plain = agent_settings(helm.template([]), tmp_path).plugins
    assert (plain.ca_file, plain.public_keys) == ("", ())
    objects = helm.template(VALUES["plug-ins"])
    found = agent_settings(objects, tmp_path).plugins
    assert found.require_signature
    assert found.ca_file in mounted_files(pod_of(objects, "DaemonSet", AGENT))
    # Files of the ConfigMap that is mounted whole.
    held = {f"/etc/outrider/{name}" for name in objects["ConfigMap", AGENT]["data"]}
    assert set(found.public_keys) == held - {"/etc/outrider/agent.yaml"}
    assert len(found.public_keys) == 2


def test_full_access_is_asked_for(helm: Helm) -> None:
    pod = pod_of(helm.template(VALUES["full access"]), "DaemonSet", AGENT)
    assert pod["hostPID"] is True
    assert pod["hostNetwork"] is True
    assert pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert "shareProcessNamespace" not in pod
    context = pod["containers"][0]["securityContext"]
    assert context["privileged"] is True
    assert context["readOnlyRootFilesystem"] is True


def test_agents_tell_only_of_what_they_see_of_their_node(helm: Helm, tmp_path: Path) -> None:
    objects = helm.template([])
    pod = pod_of(objects, "DaemonSet", AGENT)
    assert {v["hostPath"]["path"] for v in pod["volumes"] if "hostPath" in v} == {
        "/var/lib/outrider"
    }
    plain = agent_settings(objects, tmp_path).collectors
    assert plain.inventory.kinds == ("modules",)
    assert not {"filesystem", "netdev"} & set(plain.node_metrics.collectors)
    network = agent_settings(helm.template(["agent.hostNetwork=true"]), tmp_path).collectors
    assert network.inventory.kinds == ("modules", "ports")
    assert "netdev" in network.node_metrics.collectors
    objects = helm.template(VALUES["host mounts"])
    seen = agent_settings(objects, tmp_path)
    assert (seen.node.proc, seen.node.root) == ("/host/proc", "/host/root")
    assert "packages" in seen.collectors.inventory.kinds
    assert "filesystem" in seen.collectors.node_metrics.collectors
    mounts = pod_of(objects, "DaemonSet", AGENT)["containers"][0]["volumeMounts"]
    host = [mount for mount in mounts if mount["mountPath"].startswith("/host/")]
    assert len(host) == 3
    assert all(mount["readOnly"] for mount in host)
    full = agent_settings(helm.template(VALUES["full access"]), tmp_path)
    assert (full.node.proc, full.node.root) == ("/proc", "/proc/1/root")
    assert "packages" in full.collectors.inventory.kinds


def test_agents_hold_one_short_lived_token_and_the_ca_alone(helm: Helm) -> None:
    objects = helm.template([])
    pod = pod_of(objects, "DaemonSet", AGENT)
    assert pod["automountServiceAccountToken"] is False
    assert objects["ServiceAccount", AGENT]["automountServiceAccountToken"] is False
    sources = [
        source
        for volume in pod["volumes"]
        for source in volume.get("projected", {}).get("sources", [])
    ]
    (token,) = [s["serviceAccountToken"] for s in sources if "serviceAccountToken" in s]
    assert token == {"path": "token", "audience": "outrider", "expirationSeconds": 600}
    # A Secret that a Pod mounts can be read, whole, by its node.
    assert "secret" not in json.dumps(pod["volumes"])
    bound = [
        subject["name"]
        for (kind, _), item in objects.items()
        if kind.endswith("RoleBinding")
        for subject in item["subjects"]
    ]
    assert AGENT not in bound
    assert pod["tolerations"] == [{"operator": "Exists"}]


def test_the_service_is_found_by_srv_also_while_the_sink_is_away(helm: Helm) -> None:
    objects = helm.template([])
    service = objects["Service", SERVER]["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    assert [port["name"] for port in service["ports"]] == ["grpc"]
    labels = objects["Deployment", SERVER]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    agents = objects["DaemonSet", AGENT]["spec"]["template"]["metadata"]["labels"]
    assert not service["selector"].items() <= agents.items()
    for (kind, name), item in objects.items():
        if kind in ("Deployment", "DaemonSet"):
            spec = item["spec"]
            labels = spec["template"]["metadata"]["labels"]
            assert spec["selector"]["matchLabels"].items() <= labels.items(), name


def test_probes_and_scraping(helm: Helm) -> None:
    objects = helm.template(FOREIGN["monitors"])
    for kind, name, port in (("Deployment", SERVER, "8080"), ("DaemonSet", AGENT, "8081")):
        (container,) = pod_of(objects, kind, name)["containers"]
        for probe, path in (
            ("startup", "healthz"),
            ("liveness", "healthz"),
            ("readiness", "readyz"),
        ):
            assert container[f"{probe}Probe"]["httpGet"] == {"path": f"/{path}", "port": "http"}
        notes = objects[kind, name]["spec"]["template"]["metadata"]["annotations"]
        assert notes["prometheus.io/scrape"] == "true"
        assert notes["prometheus.io/port"] == port
    monitor = objects["ServiceMonitor", SERVER]["spec"]
    service = objects["Service", f"{SERVER}-metrics"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    # The headless one would give every replica a second time.
    headless = objects["Service", SERVER]["metadata"]["labels"]
    assert not monitor["selector"]["matchLabels"].items() <= headless.items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    agents = objects["DaemonSet", AGENT]["spec"]["template"]["metadata"]["labels"]
    chosen = objects["PodMonitor", AGENT]["spec"]["selector"]["matchLabels"]
    assert chosen.items() <= agents.items()
    without = helm.template(VALUES["no annotations"])["Deployment", SERVER]
    assert "prometheus.io/scrape" not in without["spec"]["template"]["metadata"]["annotations"]


def test_a_changed_setting_rolls_its_pods_and_no_other(helm: Helm) -> None:
    def notes(values: list[str]) -> tuple[Any, Any]:
        objects = helm.template(values)
        return (
            objects["Deployment", SERVER]["spec"]["template"],
            objects["DaemonSet", AGENT]["spec"]["template"],
        )

    before, after = notes([]), notes(["server.log.level=debug"])
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_a_budget_only_where_it_does_not_block_draining(helm: Helm) -> None:
    assert ("PodDisruptionBudget", SERVER) in helm.template([])
    assert ("PodDisruptionBudget", SERVER) not in helm.template(VALUES["one replica"])


# ----------------------------------------------------------------------- install and upgrade


def certificate(plane: ControlPlane, secret: str) -> x509.Certificate:
    found = plane.request("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/{secret}")
    return x509.load_pem_x509_certificate(base64.b64decode(found["data"]["tls.crt"]))


def authority(plane: ControlPlane) -> x509.Certificate:
    """What the agents trust."""
    found = plane.request("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps/outrider-ca")
    return x509.load_pem_x509_certificate(found["data"]["ca.crt"].encode())


def test_the_certificate_is_good_and_lives_through_upgrades(
    helm: Helm, control_plane: ControlPlane, installed: list[str]
) -> None:
    first, ca = certificate(control_plane, "outrider-tls"), authority(control_plane)
    first.verify_directly_issued_by(ca)
    names = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    service = f"{SERVER}.{NAMESPACE}"
    wanted = [SERVER, service, f"{service}.svc", f"{service}.svc.cluster.local", "localhost"]
    assert names.get_values_for_type(x509.DNSName) == wanted
    now = datetime.now(UTC)
    assert ca.not_valid_after_utc > now + timedelta(days=3640)
    assert first.not_valid_after_utc > now + timedelta(days=1090)

    helm.run("upgrade", *installed, values=["server.replicas=3"])
    assert certificate(control_plane, "outrider-tls") == first
    assert authority(control_plane) == ca

    # Old enough: a new one, of the same CA, so that agents notice nothing.
    helm.run("upgrade", *installed, values=["tls.generated.renewAfterDays=0"])
    second = certificate(control_plane, "outrider-tls")
    assert second != first
    assert authority(control_plane) == ca
    second.verify_directly_issued_by(ca)

    # Another name: a new one too, although it is young.
    helm.run("upgrade", *installed, values=["tls.extraDnsNames={outrider.example.org}"])
    third = certificate(control_plane, "outrider-tls")
    names = third.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "outrider.example.org" in names.get_values_for_type(x509.DNSName)
    third.verify_directly_issued_by(ca)

    # Its CA is lost: all is made anew, together.
    control_plane.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}/secrets/outrider-ca")
    helm.run("upgrade", *installed)
    certificate(control_plane, "outrider-tls").verify_directly_issued_by(authority(control_plane))
    assert authority(control_plane) != ca


def test_definitions_are_upgraded_and_kept(
    helm: Helm, control_plane: ControlPlane, installed: list[str], tmp_path: Path
) -> None:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/agents.outrider.dev"

    def short_names() -> list[str]:
        names: list[str] = control_plane.request("GET", path)["spec"]["names"]["shortNames"]
        return names

    older = tmp_path / "outrider"
    shutil.copytree(CHART, older)
    definition = older / "files" / "crds" / "outrider.dev_agents.yaml"
    definition.write_text(definition.read_text().replace("shortNames: [ag]", "shortNames: [old]"))
    helm.run("upgrade", RELEASE, str(older), "--namespace", NAMESPACE)
    assert short_names() == ["old"]
    helm.run("upgrade", RELEASE, str(CHART), "--namespace", NAMESPACE)
    assert short_names() == ["ag"]

    uid = control_plane.request("GET", path)["metadata"]["uid"]
    helm.run("uninstall", RELEASE, "--namespace", NAMESPACE)
    assert control_plane.request("GET", path)["metadata"]["uid"] == uid
    assert "deletionTimestamp" not in control_plane.request("GET", path)["metadata"]


#: What the server does, and what it must not be able to do: verb, resource, namespace ("" for
#: objects without one), allowed.
RIGHTS = [
    ("list", "agenttasks.outrider.dev", "other", True),
    ("watch", "agenttasks.outrider.dev", "other", True),
    ("patch", "agenttasks.outrider.dev", "other", True),
    ("patch", "agenttasks.outrider.dev/status", "other", True),
    ("delete", "agenttasks.outrider.dev", "other", True),
    # For AgentTaskSchedules; what a task says cannot be changed afterwards.
    ("create", "agenttasks.outrider.dev", "other", True),
    ("list", "agenttaskschedules.outrider.dev", "other", True),
    ("patch", "agenttaskschedules.outrider.dev/status", "other", True),
    ("create", "agenttaskschedules.outrider.dev", "other", False),
    ("delete", "agenttaskschedules.outrider.dev", "other", False),
    ("create", "agenttaskreports.outrider.dev", "other", True),
    ("update", "agenttaskreports.outrider.dev", "other", True),
    ("create", "agents.outrider.dev", "", True),
    ("patch", "agents.outrider.dev/status", "", True),
    ("delete", "agents.outrider.dev", "", True),
    ("watch", "agentconfigs.outrider.dev", "", True),
    ("patch", "agentconfigs.outrider.dev/status", "", True),
    ("delete", "agentconfigs.outrider.dev", "", False),
    ("patch", "agentconfigs.outrider.dev", "", False),
    ("create", "controllerrevisions.apps", NAMESPACE, True),
    ("patch", "controllerrevisions.apps", NAMESPACE, True),
    ("delete", "controllerrevisions.apps", NAMESPACE, True),
    ("list", "controllerrevisions.apps", NAMESPACE, True),
    ("update", "controllerrevisions.apps", NAMESPACE, False),
    ("list", "controllerrevisions.apps", "other", False),
    ("create", "controllerrevisions.apps", "other", False),
    ("watch", "nodes", "", True),
    ("patch", "nodes", "", False),
    ("create", "events", "other", True),
    ("create", "tokenreviews.authentication.k8s.io", "", True),
    ("create", "leases.coordination.k8s.io", NAMESPACE, True),
    ("update", "leases.coordination.k8s.io/outrider-leader", NAMESPACE, True),
    ("update", "leases.coordination.k8s.io/another", NAMESPACE, False),
    ("update", "leases.coordination.k8s.io/outrider-leader", "other", False),
    ("delete", "agenttaskreports.outrider.dev", "other", False),
    ("list", "namespaces", "", False),
    ("get", "secrets", NAMESPACE, False),
    ("list", "pods", NAMESPACE, False),
    ("create", "pods", NAMESPACE, False),
]


def test_the_server_may_do_its_work_and_no_more(
    control_plane: ControlPlane, installed: list[str]
) -> None:
    for verb, resource, namespace, allowed in RIGHTS:
        assert may(control_plane, SERVER, verb, resource, namespace) is allowed, (verb, resource)


def test_agents_may_do_nothing(control_plane: ControlPlane, installed: list[str]) -> None:
    for verb, resource, namespace, _ in RIGHTS:
        assert not may(control_plane, AGENT, verb, resource, namespace), (verb, resource)


def may(plane: ControlPlane, account: str, verb: str, resource: str, namespace: str) -> bool:
    """Ask the API server whether a ServiceAccount has a right."""
    kind, _, rest = resource.partition("/")
    plural, _, group = kind.partition(".")
    attributes = {"verb": verb, "resource": plural, "group": group, "namespace": namespace}
    if rest:
        attributes["subresource" if rest == "status" else "name"] = rest
    user = f"system:serviceaccount:{NAMESPACE}:{account}"
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}"]
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "groups": [*groups, "system:authenticated"]},
    }
    body["spec"]["resourceAttributes"] = attributes  # type: ignore[index] # it is a mapping
    answer = plane.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", body)
    return bool(answer["status"]["allowed"])


AGGREGATE = "rbac.authorization.k8s.io/aggregate-to-"


def test_roles_for_people_are_bound_to_nobody_and_join_others_only_if_asked(helm: Helm) -> None:
    names = ("task-editor", "task-viewer", "config-editor", "config-viewer")
    own = {f"fleet-{name}" for name in (*names, "config-revisions", "output-reader")}

    def roles(values: list[str]) -> dict[str, dict[str, str]]:
        objects = helm.template(["fullnameOverride=fleet", *values])
        bound = {item["roleRef"]["name"] for item in objects.values() if "roleRef" in item}
        assert not bound & own
        return {
            name: item["metadata"]["labels"] for (_, name), item in objects.items() if name in own
        }

    plain = roles([])
    assert plain.keys() == own
    assert not [key for labels in plain.values() for key in labels if key.startswith(AGGREGATE)]
    joined = roles(["userRoles.aggregate=true"])
    assert joined["fleet-task-editor"][f"{AGGREGATE}edit"] == "true"
    assert f"{AGGREGATE}view" not in joined["fleet-task-editor"]
    assert joined["fleet-task-viewer"][f"{AGGREGATE}view"] == "true"
    assert joined["fleet-config-viewer"][f"{AGGREGATE}view"] == "true"
    assert joined["fleet-config-editor"][f"{AGGREGATE}admin"] == "true"
    # Who may edit in some namespace is not to run plug-ins on all nodes.
    assert f"{AGGREGATE}edit" not in joined["fleet-config-editor"]
    for name in ("fleet-output-reader", "fleet-config-revisions"):
        assert not [key for key in joined[name] if key.startswith(AGGREGATE)]
    assert roles(["userRoles.create=false"]) == {}


def test_the_notes_say_what_to_type(helm: Helm, installed: list[str]) -> None:
    notes = helm.run("get", "notes", RELEASE, "--namespace", NAMESPACE)
    assert "kubectl get agents" in notes
    assert f"helm -n {NAMESPACE} test {RELEASE}" in notes
    assert "To keep them, set sink.kind=kafka" in notes
    task = yaml.safe_load(notes.partition("<<END\n")[2].partition("  END")[0])
    assert task["spec"] == {"run": {"command": ["uname", "-r"]}}
