"""The API server, as the commands use it: kubeconfig, requests, exec.

Every failure becomes one of the errors of `errors`, as one line. Objects are plain mappings.
"""

import contextlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import urllib3
import yaml
from kubernetes import config
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.config.kube_config import KubeConfigLoader, KubeConfigMerger

from outrider_cli.errors import (
    ClusterError,
    ConflictError,
    NotFoundError,
    UnavailableError,
    UsageError,
    one_line,
)
from outrider_cli.pods import execute

Object = dict[str, Any]

# The client has few types.
_incluster: Any = config.load_incluster_config
_Loader: Any = KubeConfigLoader
_Merger: Any = KubeConfigMerger

GROUP: Final = "/apis/outrider.dev/v1alpha1"
TASK_LABEL: Final = "outrider.dev/task"
CONFIG_LABEL: Final = "outrider.dev/agentconfig"
#: A request is given so long, seconds.
REQUEST_SECONDS: Final = 10.0
#: Objects asked for at a time when a list is read.
PAGE: Final = 500
#: The server ends a watch after so long, seconds.
WATCH_SECONDS: Final = 3600
#: Changes that wait to be looked at; beyond it the connection waits.
WATCH_QUEUE: Final = 1000
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def connect(kubeconfig: str, context: str, namespace: str, seconds: float) -> "Cluster":
    """A connection as kubectl would make it.

    Args:
        kubeconfig: Path; "" for $KUBECONFIG, ~/.kube/config or the Pod's ServiceAccount.
        context: Name of a context; "" for the current one.
        namespace: "" for the context's.
        seconds: How long a request may take.

    Raises:
        UsageError: There is no such file or context, or it cannot be used.
    """
    found = Configuration()
    found.retries = False
    try:
        in_pod = not kubeconfig and not context and not _default_exists()
        if in_pod and "KUBERNETES_SERVICE_HOST" in os.environ:
            _incluster(client_configuration=found)
            own = _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else ""
        else:
            own = _load(found, kubeconfig, context)
    except (ConfigException, OSError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"the kubeconfig cannot be used: {text}") from None
    # What it warns of is the kubeconfig's decision, and the warning is many lines.
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    return Cluster(found, namespace or own or "default", seconds)


def _default_exists() -> bool:
    places = os.environ.get("KUBECONFIG") or "~/.kube/config"
    return any(Path(place).expanduser().exists() for place in places.split(os.pathsep) if place)


def _load(found: Configuration, kubeconfig: str, context: str) -> str:
    """Read a kubeconfig; returns the namespace of its context, or ""."""
    places = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
    merged = _Merger(places).config
    if merged is None:
        raise ConfigException(f"there is no file {places}")
    loader = _Loader(config_dict=merged, active_context=context or None, config_base_path=None)
    loader.load_and_set(found)
    return str(loader.current_context["context"].get("namespace") or "")


class Cluster:
    """The API server.

    Args:
        configuration: How to reach it.
        namespace: Where tasks are.
        seconds: Time for a request.
    """

    def __init__(self, configuration: Configuration, namespace: str, seconds: float) -> None:
        self.namespace = namespace
        self._configuration = configuration
        self._api = ApiClient(configuration)
        self._seconds = seconds

    # ---------------------------------------------------------------- Outrider's objects

    def create_task(self, task: Mapping[str, Any]) -> Object:
        """Make an AgentTask; unknown fields are an error. Raises as `request`."""
        return self.request("POST", self._tasks(fieldValidation="Strict"), task)

    def task(self, name: str) -> Object:
        """An AgentTask. Raises as `request`."""
        try:
            return self.request("GET", self._task(name))
        except NotFoundError:
            raise NotFoundError(f"there is no AgentTask {self.namespace}/{name}") from None

    def cancel_task(self, name: str) -> Object:
        """Set spec.cancel. Raises as `request`."""
        try:
            return self.request("PATCH", self._task(name), {"spec": {"cancel": True}})
        except NotFoundError:
            raise NotFoundError(f"there is no AgentTask {self.namespace}/{name}") from None

    def delete_task(self, name: str) -> None:
        """Delete an AgentTask. Raises as `request`."""
        self.request("DELETE", self._task(name))

    def reports(self, name: str) -> list[Object]:
        """The AgentTaskReports of a task. Raises as `request`."""
        return self.items(self._reports(labelSelector=f"{TASK_LABEL}={name}"))

    def agents(self) -> list[Object]:
        """All Agents. Raises as `request`."""
        return self.items(f"{GROUP}/agents")

    def agent(self, name: str) -> Object:
        """The Agent of a node. Raises as `request`."""
        return self._one(f"{GROUP}/agents/{quote(name, safe='')}", f"Agent {name}")

    def agent_configs(self) -> list[Object]:
        """All AgentConfigs. Raises as `request`."""
        return self.items(f"{GROUP}/agentconfigs")

    def agent_config(self, name: str) -> Object:
        """An AgentConfig. Raises as `request`."""
        return self._one(_config(name), f"AgentConfig {name}")

    def replace_agent_config(self, body: Mapping[str, Any], *, dry_run: bool) -> Object:
        """Write an AgentConfig that was read before, if nobody else did since.

        Raises:
            ConflictError: Somebody did.
            ClusterError: And its kinds, as `request`.
        """
        target = _config(body["metadata"]["name"], fieldValidation="Strict", **_dry(dry_run))
        return self.request("PUT", target, body)

    def annotate_agent_config(self, name: str, key: str, value: str, *, dry_run: bool) -> Object:
        """Set an annotation of an AgentConfig. Raises as `request`."""
        body = {"metadata": {"annotations": {key: value}}}
        return self.request("PATCH", _config(name, **_dry(dry_run)), body)

    def controller_revisions(self, namespace: str, config: str) -> list[Object]:
        """The kept revisions of an AgentConfig. Raises as `request`."""
        query = urlencode({"labelSelector": f"{CONFIG_LABEL}={config}"})
        return self.items(f"{_revisions(namespace)}?{query}")

    def controller_revision(self, namespace: str, name: str) -> Object:
        """One of them, by its own name. Raises as `request`."""
        return self.request("GET", f"{_revisions(namespace)}/{quote(name, safe='')}")

    def _one(self, target: str, what: str) -> Object:
        try:
            return self.request("GET", target)
        except NotFoundError:
            raise NotFoundError(f"there is no {what}") from None

    def watch_reports(self, name: str) -> "Watch":
        """A task's reports as they are, and their changes from then on. Raises as `request`."""
        query = {
            "labelSelector": f"{TASK_LABEL}={name}",
            # From what the API server has in memory: else it first has to see how far etcd is,
            # which takes seconds where little is written.
            "resourceVersion": "0",
            "watch": "1",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        return Watch(self._open("GET", self._reports(**query), None, (self._seconds, None)))

    def _tasks(self, **query: str) -> str:
        return self._path("agenttasks", **query)

    def _task(self, name: str) -> str:
        return self._path("agenttasks", name)

    def _reports(self, **query: str) -> str:
        return self._path("agenttaskreports", **query)

    def _path(self, *parts: str, **query: str) -> str:
        whole = ("namespaces", self.namespace, *parts)
        path = "/".join([GROUP, *(quote(part, safe="") for part in whole)])
        return f"{path}?{urlencode(query)}" if query else path

    # ---------------------------------------------------------------- Pods

    def pods(self, namespace: str, selector: str) -> list[Object]:
        """The Pods that a label selector fits. Raises as `request`."""
        query = urlencode({"labelSelector": selector})
        return self.items(f"/api/v1/namespaces/{quote(namespace, safe='')}/pods?{query}")

    def execute(
        self, namespace: str, pod: str, container: str, command: Sequence[str]
    ) -> Iterator[str]:
        """Run a command in a container; yields the lines it prints.

        Raises:
            ClusterError: It could not be run, ended with an error, or fell silent.
        """
        query = [("container", container), ("stdout", "true"), ("stderr", "true")]
        query += [("command", word) for word in command]
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/pods/{quote(pod, safe='')}/exec"
        headers: dict[str, str] = {}
        what = f"Pod {namespace}/{pod}"
        try:
            self._authorize(headers, path, "GET")
        except ConfigException as error:
            raise ClusterError(f"the kubeconfig's credentials fail: {one_line(error)}") from None
        url = f"{self._configuration.host}{path}?{urlencode(query)}"
        yield from execute(self._configuration, url, headers, what, self._seconds)

    # ---------------------------------------------------------------- requests

    def items(self, target: str) -> list[Object]:
        """All items of a list, read page by page. Raises as `request`."""
        found: list[Object] = []
        token = ""
        while True:
            separator = "&" if "?" in target else "?"
            query = urlencode({"limit": PAGE, **({"continue": token} if token else {})})
            answer = self.request("GET", f"{target}{separator}{query}")
            found.extend(answer.get("items") or [])
            token = (answer.get("metadata") or {}).get("continue") or ""
            if not token:
                return found

    def request(self, method: str, target: str, body: Any = None) -> Object:
        """One request; returns the decoded answer.

        Raises:
            UnavailableError: No answer in time, or one that asks to come back later.
            NotFoundError: Status 404.
            ConflictError: Status 409.
            ClusterError: Any other refusal.
        """
        response = self._open(method, target, body, self._seconds)
        try:
            content = response.read()
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise UnavailableError(f"the API server does not answer: {one_line(error)}") from None
        decoded: Object = json.loads(content) if content else {}
        return decoded

    def _open(self, method: str, target: str, body: Any, seconds: Any) -> Any:
        """A response whose status is none of an error; its content is not read yet."""
        patch = method == "PATCH"
        headers = {
            "Accept": "application/json",
            "Content-Type": "application/merge-patch+json" if patch else "application/json",
        }
        try:
            self._authorize(headers, target, method)
            response = self._api.call_api(
                method,
                self._configuration.host + target,
                header_params=headers,
                body=body,
                _request_timeout=seconds,
            ).response
            if response.status < 400:
                return response
            content = response.read()
        except (urllib3.exceptions.HTTPError, ApiException, OSError) as error:
            raise UnavailableError(
                f"the API server {self._configuration.host} does not answer: {one_line(error)}"
            ) from None
        except ConfigException as error:
            raise ClusterError(f"the kubeconfig's credentials fail: {one_line(error)}") from None
        raise _refusal(response.status, content)

    def _authorize(self, headers: dict[str, str], target: str, method: str) -> None:
        self._api.update_params_for_auth(headers, [], ["BearerToken"], target, method, None)


def _config(name: str, **query: str) -> str:
    path = f"{GROUP}/agentconfigs/{quote(name, safe='')}"
    return f"{path}?{urlencode(query)}" if query else path


def _dry(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "All"} if dry_run else {}


def _revisions(namespace: str) -> str:
    return f"/apis/apps/v1/namespaces/{quote(namespace, safe='')}/controllerrevisions"


class Watch:
    """Changes of objects, each with the time when it came; close it after use.

    A thread reads them, for the time of each counts and the one who waits has a limit.
    """

    def __init__(self, response: Any) -> None:
        self._response = response
        self._queue: queue.Queue[tuple[float, Object] | None] = queue.Queue(WATCH_QUEUE)
        self._thread = threading.Thread(target=self._read, name="watch", daemon=True)
        self._thread.start()

    def next(self, seconds: float) -> tuple[float, Object] | None:
        """The next change and when it came (time.monotonic); None if none came so long.

        Raises:
            UnavailableError: The watch has ended: begin another one.
        """
        try:
            found = self._queue.get(timeout=max(0.01, seconds))
        except queue.Empty:
            return None
        if found is None:
            raise UnavailableError("the API server ended the watch")
        return found

    def close(self) -> None:
        """End it."""
        # Wakes the thread. RuntimeError: the API server has ended it, and there is nothing to wake.
        with contextlib.suppress(OSError, RuntimeError, urllib3.exceptions.HTTPError):
            self._response.shutdown()
        self._response.close()

    def _read(self) -> None:
        left = b""
        # However it ends, the one who waits is told: ValueError is what a closed response raises.
        with contextlib.suppress(urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError):
            for data in self._response.stream(1 << 16):
                came = time.monotonic()
                *lines, left = (left + data).split(b"\n")
                for line in filter(None, lines):
                    event = json.loads(line)
                    if event.get("type") in ("ADDED", "MODIFIED"):
                        self._queue.put((came, event["object"]))
        self._queue.put(None)


def _refusal(status: int, content: bytes) -> ClusterError:
    try:
        said = str(json.loads(content).get("message", ""))
    except (ValueError, AttributeError):
        said = content[:200].decode("utf-8", "replace")
    text = one_line(said) or f"status {status}"
    if status == 404:
        return NotFoundError(text)
    if status == 409:
        return ConflictError(text)
    if status == 401:
        return ClusterError("the API server does not know this user (401): log in again")
    if status in (408, 429) or status >= 500:
        return UnavailableError(text)
    return ClusterError(text)
