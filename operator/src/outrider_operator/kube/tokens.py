"""TokenReview: has the API server say whose a token is. Never logs, keeps or returns the token."""

from collections.abc import Awaitable, Callable

from outrider_operator.core.identity import ReviewStatus, ReviewUnavailableError
from outrider_operator.core.ports import ClusterError
from outrider_operator.kube.client import KubeClient, path

REVIEWS = path("apis", "authentication.k8s.io", "v1", "tokenreviews")


def reviewer(kube: KubeClient) -> Callable[[str, str], Awaitable[ReviewStatus]]:
    """A function that reviews a token for an audience.

    It raises ReviewUnavailableError where the API server cannot be asked.
    """

    async def review(token: str, audience: str) -> ReviewStatus:
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        try:
            answer = await kube.request("POST", REVIEWS, body)
        except ClusterError as error:
            # The text names the request's path and the answer, and holds no part of the token.
            raise ReviewUnavailableError(str(error)) from None
        status = answer.get("status") or {}
        user = status.get("user") or {}
        return ReviewStatus(
            authenticated=bool(status.get("authenticated")),
            username=str(user.get("username", "")),
            audiences=tuple(status.get("audiences") or ()),
            extra={key: tuple(value) for key, value in (user.get("extra") or {}).items()},
            error=str(status.get("error", ""))[:200],
        )

    return review
