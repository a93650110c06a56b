"""Requests to the API server: one place for addresses, credentials, time limits and errors.

Every request has a time limit, and every failure becomes one of the errors in core.ports. Objects
go in and out as plain mappings: the typed models of the client cost more time than they save here.
Never logs a request's content: TokenReviews hold tokens.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
import yaml
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, incluster_config, load_kube_config
from outrider_runtime.settings import SettingsError, readable

from outrider_operator.core.ports import (
    ClusterError,
    ClusterUnavailableError,
    ConflictError,
    NotFoundError,
    Object,
)

#: Time for one request, seconds.
REQUEST_SECONDS: Final = 10.0
#: Objects asked for at a time when a list is read.
PAGE: Final = 500
JSON: Final = "application/json"
MERGE_PATCH: Final = "application/merge-patch+json"
JSON_PATCH: Final = "application/json-patch+json"
TABLE: Final = "application/json;as=Table;g=meta.k8s.io;v=v1"


async def configuration(kubeconfig: str) -> Configuration:
    """How to reach the API server.

    Args:
        kubeconfig: path of a kubeconfig file; empty: the ServiceAccount of the Pod.

    Raises:
        SettingsError: There is neither.
    """
    found = Configuration()
    found.retries = False
    try:
        if kubeconfig:
            readable(kubeconfig, setting="kube.kubeconfig")
            await load_kube_config(  # type: ignore[no-untyped-call] # the client has few types
                config_file=kubeconfig, client_configuration=found, persist_config=False
            )
        else:
            incluster_config.load_incluster_config(found)  # type: ignore[no-untyped-call] # as above
    except (ConfigException, OSError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise SettingsError(
            'setting "kube.kubeconfig": expected a kubeconfig file, or empty inside a Pod with a '
            f"ServiceAccount token: {text}"
        ) from None
    return found


def path(*parts: str, **query: str | int) -> str:
    """A request path from its parts, each quoted, and its query."""
    text = "/" + "/".join(quote(part, safe="") for part in parts)
    return f"{text}?{urlencode(query)}" if query else text


class KubeClient:
    """A connection to the API server; close it after use.

    Args:
        config: from `configuration`.
        seconds: time limit of each request.
        on_result: told of each request: "ok", "unavailable", "conflict", "missing", "refused".
    """

    def __init__(
        self,
        config: Configuration,
        seconds: float = REQUEST_SECONDS,
        on_result: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.api = ApiClient(config)
        self._host: str = config.host
        self._closed = False
        self._seconds = seconds
        self._on_result = on_result

    async def close(self) -> None:
        """Close its connections; what is asked for later is refused."""
        self._closed = True
        await self.api.close()  # type: ignore[no-untyped-call] # the client has few types

    async def request(
        self,
        method: str,
        target: str,
        body: Any = None,
        *,
        content_type: str = JSON,
        accept: str = JSON,
    ) -> Object:
        """One request; returns the decoded answer.

        Raises:
            ClusterUnavailableError: No answer in time, or one that asks to come back later.
            ConflictError: Status 409.
            NotFoundError: Status 404.
            ClusterError: Any other refusal.
        """
        try:
            answer = await self._request(method, target, body, content_type, accept)
        except ClusterError as error:
            self._on_result(_RESULTS.get(type(error), "refused"))
            raise
        self._on_result("ok")
        return answer

    async def _request(
        self, method: str, target: str, body: Any, content_type: str, accept: str
    ) -> Object:
        what = f"{method} {target.partition('?')[0]}"
        if self._closed:
            raise ClusterUnavailableError(f"{what}: not asked, this program is about to end")
        headers = {"Accept": accept, "Content-Type": content_type}
        try:
            async with asyncio.timeout(self._seconds):
                await self.api.update_params_for_auth(
                    headers, [], ["BearerToken"], target, method, body
                )
                response = await self.api.call_api(
                    method,
                    self._host + target,
                    header_params=headers,
                    body=body,
                    _request_timeout=self._seconds,
                )
                content = await response.read()  # type: ignore[no-untyped-call] # as above
        except TimeoutError:
            raise ClusterUnavailableError(f"{what}: no answer within {self._seconds:g} s") from None
        except (aiohttp.ClientError, OSError, ConfigException) as error:
            raise ClusterUnavailableError(f"{what}: {type(error).__name__}: {error}") from error
        if response.status >= 400:
            raise _error(response.status, what, content)
        decoded: Object = msgspec.json.decode(content) if content else {}
        return decoded

    async def read_all(self, target: str) -> list[Object]:
        """All items of a list, read page by page. Raises as `request`."""
        pages = [page async for page in self.pages(target)]
        return [item for page in pages for item in page.get("items") or []]

    async def pages(self, target: str, *, accept: str = JSON) -> AsyncIterator[Object]:
        """A list, page by page. Raises as `request`."""
        token = ""
        while True:
            separator = "&" if "?" in target else "?"
            query = urlencode({"limit": PAGE, **({"continue": token} if token else {})})
            answer = await self.request("GET", f"{target}{separator}{query}", accept=accept)
            yield answer
            token = (answer.get("metadata") or {}).get("continue") or ""
            if not token:
                return

    async def merge_patch(self, target: str, body: Mapping[str, Any]) -> Object:
        """Change some fields of an object. Raises as `request`."""
        return await self.request("PATCH", target, body, content_type=MERGE_PATCH)

    async def json_patch(self, target: str, operations: Sequence[Mapping[str, Any]]) -> Object:
        """Change an object by operations. Raises as `request`."""
        return await self.request("PATCH", target, list(operations), content_type=JSON_PATCH)


class FencedClient(KubeClient):
    """The connection of a leader: it writes nothing once the leader's time is over.

    Versions fence most writes at the API server already; this fences all of them, also where a
    process slept through the end of its Lease and goes on in the middle of a step.

    Args:
        inner: the connection; its owner closes it.
        leads: whether this replica leads right now.
    """

    def __init__(self, inner: KubeClient, leads: Callable[[], bool]) -> None:
        self._inner = inner
        self._leads = leads

    async def close(self) -> None:
        """Leave the connection to its owner."""

    async def request(
        self,
        method: str,
        target: str,
        body: Any = None,
        *,
        content_type: str = JSON,
        accept: str = JSON,
    ) -> Object:
        """As of `KubeClient`; a write raises ClusterUnavailableError when it may not be done."""
        if method != "GET" and not self._leads():
            raise ClusterUnavailableError("not written: this replica leads no longer")
        return await self._inner.request(
            method, target, body, content_type=content_type, accept=accept
        )


_RESULTS: Final = {
    ClusterUnavailableError: "unavailable",
    ConflictError: "conflict",
    NotFoundError: "missing",
}


def _error(status: int, what: str, content: bytes) -> ClusterError:
    try:
        message = str(msgspec.json.decode(content).get("message", ""))
    except (msgspec.DecodeError, AttributeError):
        message = content[:200].decode("utf-8", "replace")
    text = f"{what}: {status}: {message[:1000]}"
    if status == 404:
        return NotFoundError(text)
    if status == 409:
        return ConflictError(text)
    # 401 comes and goes while the API server starts or a token is renewed.
    if status in (401, 408, 429) or status >= 500:
        return ClusterUnavailableError(text)
    return ClusterError(text)
