"""What an administrator does at an API server: requests, Nodes, the agents' Pods and tokens.

Why it exists: tests make these objects by the hundred, and a kubectl process each would take longer
than the test. It must not hide what the API server says: a refusal is raised, with its words.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUDIENCE = "outrider"
REQUEST_SECONDS = 30.0
TOKEN_SECONDS = 3600


class RequestError(Exception):
    """The API server refused a request; `code` is the HTTP status, `message` what it said."""

    def __init__(self, method: str, path: str, code: int, message: str) -> None:
        super().__init__(f"{method} {path}: {code}: {message}")
        self.code = code
        self.message = message


@dataclass(frozen=True)
class AgentPod:
    """A Pod object that stands for an agent: what a token bound to it needs."""

    name: str
    namespace: str
    uid: str
    node: str


class Administrator:
    """A client with all rights.

    Args:
        server: URL of the API server.
        credential: a bearer token of the group system:masters.
        authority: PEM file of the certificate that the server's is signed with.
    """

    def __init__(self, server: str, credential: str, authority: Path) -> None:
        self.server = server
        self.authority = authority
        self._credential = credential
        self._ssl: ssl.SSLContext | None = None

    def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        token: str | None = None,
        absent_ok: bool = False,
    ) -> dict[str, Any]:
        """Send one request to the API server and return the object it answers with.

        Args:
            method: GET, POST, PUT, DELETE, or PATCH (a merge patch).
            path: from the root, e.g. "/api/v1/nodes".
            body: the object to send.
            token: in whose name; the administrator's if not given.
            absent_ok: answer {} in place of an error if it is not there (404) or is already (409).

        Raises:
            RequestError: the API server refused.
            OSError: it cannot be reached.
        """
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        question = urllib.request.Request(
            self.server + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token or self._credential}", "Content-Type": kind},
        )
        if self._ssl is None:
            self._ssl = ssl.create_default_context(cafile=str(self.authority))
        try:
            with urllib.request.urlopen(
                question, timeout=REQUEST_SECONDS, context=self._ssl
            ) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            with error:
                if absent_ok and error.code in (404, 409):
                    return {}
                raise RequestError(method, path, error.code, error.read().decode()) from None
        answer: dict[str, Any] = json.loads(text) if text.startswith(b"{") else {}
        return answer

    def make_node(self, name: str, labels: Mapping[str, str] | None = None) -> str:
        """Create a Node object as a kubelet would, Ready; return its UID.

        Args:
            name: of the node.
            labels: besides the usual ones for host name, operating system and architecture.
        """
        usual = {
            "kubernetes.io/hostname": name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
        }
        metadata = {"name": name, "labels": {**usual, **(labels or {})}}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": metadata}
        created = self.request("POST", "/api/v1/nodes", node)
        ready = {"type": "Ready", "status": "True", "reason": "Test", "message": "no kubelet"}
        status = {
            "conditions": [ready],
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        }
        self.request("PATCH", f"/api/v1/nodes/{name}/status", {"status": status})
        return str(created["metadata"]["uid"])

    def make_service_account(self, namespace: str, name: str) -> None:
        """Create a namespace and a ServiceAccount in it, where they are not there yet."""
        made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        self.request("POST", "/api/v1/namespaces", made, absent_ok=True)
        accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
        self.request("POST", accounts, {"metadata": {"name": name}}, absent_ok=True)

    def make_agent_pod(
        self, node: str, namespace: str, service_account: str, name: str | None = None
    ) -> AgentPod:
        """Create a Pod object bound to a node, as the DaemonSet's would be; nothing runs it.

        Deleting it takes effect at once (no grace period), which voids the tokens bound to it.

        Args:
            node: name of an existing Node.
            namespace: made if need be, as is the ServiceAccount.
            service_account: that the Pod runs as.
            name: of the Pod; "outrider-agent-" and the node's name if not given.
        """
        self.make_service_account(namespace, service_account)
        spec = {
            "nodeName": node,
            "serviceAccountName": service_account,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "agent", "image": "outrider-agent"}],
        }
        name = name or f"outrider-agent-{node}"
        labels = {"app.kubernetes.io/name": "outrider", "app.kubernetes.io/component": "agent"}
        pod = {"metadata": {"name": name, "labels": labels}, "spec": spec}
        created = self.request("POST", f"/api/v1/namespaces/{namespace}/pods", pod)
        return AgentPod(name, namespace, str(created["metadata"]["uid"]), node)

    def token(
        self,
        namespace: str,
        service_account: str,
        audience: str = AUDIENCE,
        bound_pod: AgentPod | None = None,
        seconds: int = TOKEN_SECONDS,
    ) -> str:
        """Return a ServiceAccount token, as a kubelet would put it into a Pod.

        Args:
            namespace: of the ServiceAccount.
            service_account: its name.
            audience: whom the token is for; "" is the API server itself.
            bound_pod: the Pod it is bound to: its claims then name Pod and Node, with their UIDs.
            seconds: until it expires; the API server takes no less than 600.
        """
        spec: dict[str, Any] = {"expirationSeconds": seconds}
        if audience:
            spec["audiences"] = [audience]
        if bound_pod is not None:
            reference = {"apiVersion": "v1", "kind": "Pod"}
            spec["boundObjectRef"] = {**reference, "name": bound_pod.name, "uid": bound_pod.uid}
        accounts = f"/api/v1/namespaces/{namespace}/serviceaccounts"
        answer = self.request("POST", f"{accounts}/{service_account}/token", {"spec": spec})
        return str(answer["status"]["token"])
