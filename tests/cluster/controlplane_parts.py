"""What the control plane's three programs are started with: keys, ports, command lines.

Why it exists: apart from the life of the processes, so that each flag stands beside its reason. It
must not start anything but openssl.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
ISSUER = "https://kubernetes.default.svc.cluster.local"
ETCD, API_SERVER, CONTROLLERS = "etcd", "kube-apiserver", "kube-controller-manager"
CONTROLLERS_USER = "system:kube-controller-manager"

# Left out above all: node-lifecycle, pod-garbage-collector and taint-eviction, which would take our
# Nodes for dead, and whatever acts on kubelets' behalf.
ENABLED_CONTROLLERS = (
    "namespace-controller",
    "garbage-collector-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "root-ca-certificate-publisher-controller",
    "clusterrole-aggregation-controller",
)
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_LIFE = ("-days", "365", "-sha256")


@dataclass(frozen=True)
class Ports:
    """The TCP ports on loopback: of the API server, of etcd for clients, of etcd for its peers."""

    api: int
    etcd: int
    peer: int


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def make_keys(folder: Path) -> None:
    """Make an authority, the API server's certificate and the key that signs tokens."""
    authority = ("-CA", folder / "ca.crt", "-CAkey", folder / "ca.key")
    _openssl(
        *("req", "-x509", *_NEW_KEY, *_LIFE, "-subj", "/CN=outrider-test-ca"),
        *("-keyout", folder / "ca.key", "-out", folder / "ca.crt"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"),
    )
    names = f"IP:{HOST},DNS:localhost,DNS:kubernetes,DNS:kubernetes.default.svc"
    _openssl(
        *("req", "-x509", *authority, *_NEW_KEY, *_LIFE, "-subj", "/CN=kube-apiserver"),
        *("-keyout", folder / "apiserver.key", "-out", folder / "apiserver.crt"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
        *("-addext", "extendedKeyUsage=serverAuth", "-addext", f"subjectAltName={names}"),
    )
    _openssl(
        *("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-out", folder / "tokens.key"),
    )
    _openssl("pkey", "-in", folder / "tokens.key", "-pubout", "-out", folder / "tokens.pub")


def make_credentials(folder: Path) -> dict[str, str]:
    """Write the API server's file of static tokens; return the tokens by user name."""
    admin, controllers = secrets.token_hex(16), secrets.token_hex(16)
    file = folder / "static-tokens.csv"
    file.touch(mode=0o600)
    file.write_text(
        f"{admin},admin,admin,system:masters\n{controllers},{CONTROLLERS_USER},controllers,\n"
    )
    return {"admin": admin, CONTROLLERS_USER: controllers}


def commands(
    folder: Path, ports: Ports, programs: Mapping[str, Path]
) -> dict[str, list[str | Path]]:
    """Return the command line of each part, in the order of starting."""
    etcd = f"http://{HOST}:{ports.etcd}"
    return {
        ETCD: [
            *("etcd", f"--data-dir={folder / 'etcd'}", "--logger=zap", "--log-level=warn"),
            *(f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}"),
            *(f"--listen-peer-urls=http://{HOST}:{ports.peer}",),
            # The data need not survive a power cut; a kill -9 they do.
            "--unsafe-no-fsync",
        ],
        API_SERVER: [
            *(programs[API_SERVER], f"--etcd-servers={etcd}"),
            *(f"--bind-address={HOST}", f"--secure-port={ports.api}"),
            # There is nobody to tell of this address, and a loopback one is not accepted for it.
            *(f"--advertise-address={HOST}", "--endpoint-reconciler-type=none"),
            *(f"--tls-cert-file={folder / 'apiserver.crt'}",),
            *(f"--tls-private-key-file={folder / 'apiserver.key'}",),
            *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"),
            *("--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged=true"),
            # No --api-audiences: agents' tokens (audience "outrider") must be of no use here.
            f"--service-account-issuer={ISSUER}",
            *(f"--service-account-key-file={folder / 'tokens.pub'}",),
            *(f"--service-account-signing-key-file={folder / 'tokens.key'}",),
            *(f"--token-auth-file={folder / 'static-tokens.csv'}", "--profiling=false"),
        ],
        CONTROLLERS: [
            *(programs[CONTROLLERS], f"--kubeconfig={folder / 'controllers.kubeconfig'}"),
            *(f"--controllers={','.join(ENABLED_CONTROLLERS)}", "--leader-elect=false"),
            *(f"--root-ca-file={folder / 'ca.crt'}", "--use-service-account-credentials=true"),
            *(f"--service-account-private-key-file={folder / 'tokens.key'}", "--secure-port=0"),
            # With the default of 20 requests/s the controllers take 5 s to start.
            *("--kube-api-qps=300", "--kube-api-burst=500"),
        ],
    }
