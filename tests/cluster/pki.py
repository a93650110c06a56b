"""Certificates of the cluster's own parts: one authority, one certificate a component.

Made anew at every `up` and gone with `down`. Nothing here is fit for anything but a test.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from cluster.layout import API_SERVICE, CONTROL_PLANE, STATE, node_address
from cluster.processes import parallel, run

FOLDER = STATE / "pki"
CONTEXT = "outrider-test"
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_LIFE = ("-days", "3650", "-sha256")

API_SERVER_NAMES = (
    *("DNS:kubernetes", "DNS:kubernetes.default", "DNS:kubernetes.default.svc"),
    *("DNS:kubernetes.default.svc.cluster.local", "DNS:localhost"),
    *("IP:127.0.0.1", f"IP:{API_SERVICE}", f"IP:{CONTROL_PLANE}"),
)


def _issue(certificate: tuple[str, str, tuple[str, ...]]) -> None:
    """Issue one certificate: file name, subject, alternative names (none: only a client's)."""
    name, subject, alternatives = certificate
    usage = "serverAuth,clientAuth" if alternatives else "clientAuth"
    extensions = ["-addext", "basicConstraints=critical,CA:FALSE"]
    extensions += ["-addext", f"extendedKeyUsage={usage}"]
    if alternatives:
        extensions += ["-addext", "subjectAltName=" + ",".join(alternatives)]
    run(
        *("openssl", "req", "-x509", "-CA", FOLDER / "ca.crt", "-CAkey", FOLDER / "ca.key"),
        *(*_NEW_KEY, *_LIFE, "-subj", subject, *extensions),
        *("-keyout", FOLDER / f"{name}.key", "-out", FOLDER / f"{name}.crt"),
    )


def make(nodes: int) -> None:
    """Make the authority, the service account key and all certificates in FOLDER."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    FOLDER.chmod(0o700)
    run(
        *("openssl", "req", "-x509", *_NEW_KEY, *_LIFE, "-subj", "/CN=outrider-test-ca"),
        *("-keyout", FOLDER / "ca.key", "-out", FOLDER / "ca.crt"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"),
    )
    run("openssl", "genrsa", "-out", FOLDER / "sa.key", 2048)
    run("openssl", "rsa", "-in", FOLDER / "sa.key", "-pubout", "-out", FOLDER / "sa.pub")
    certificates: list[tuple[str, str, tuple[str, ...]]] = [
        ("apiserver", "/CN=kube-apiserver", API_SERVER_NAMES),
        ("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client", ()),
        ("admin", "/O=system:masters/CN=admin", ()),
        ("controller-manager", "/CN=system:kube-controller-manager", ()),
        ("scheduler", "/CN=system:kube-scheduler", ()),
        ("proxy", "/CN=system:kube-proxy", ()),
        ("coredns", "/CN=coredns", ()),
        ("prometheus", "/CN=prometheus", ()),
        ("packages", "/CN=packages", (f"IP:{CONTROL_PLANE}",)),
    ]
    for index in range(1, nodes + 1):
        name = f"node{index}"
        subject = f"/O=system:nodes/CN=system:node:{name}"
        certificates.append((name, subject, (f"DNS:{name}", f"IP:{node_address(index)}")))
    parallel(_issue, certificates)


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def kubeconfig(certificate: str, server: str) -> str:
    """A kubeconfig file's text for the holder of a certificate.

    Args:
        certificate: its file name without ending.
        server: URL of the API server.
    """
    user = {
        "client-certificate-data": _base64(FOLDER / f"{certificate}.crt"),
        "client-key-data": _base64(FOLDER / f"{certificate}.key"),
    }
    cluster = {"server": server, "certificate-authority-data": _base64(FOLDER / "ca.crt")}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": CONTEXT,
            "clusters": [{"name": CONTEXT, "cluster": cluster}],
            "users": [{"name": certificate, "user": user}],
            "contexts": [{"name": CONTEXT, "context": {"cluster": CONTEXT, "user": certificate}}],
        },
        indent=1,
    )
