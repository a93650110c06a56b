"""An API server that knows some tokens: what Authenticator asks, without a cluster.

Tokens look like real ones (three parts, claims in the second) but are not signed.
"""

import asyncio
import base64
import json
import time
import uuid
from dataclasses import dataclass, field

from outrider_operator.core.identity import CLAIM_PREFIX, ReviewStatus, ReviewUnavailableError

AGENT_ACCOUNT = "system:serviceaccount:outrider:outrider-agent"
SERVER_ACCOUNT = "system:serviceaccount:outrider:outrider-server"


def make_token(expires: float) -> str:
    """A token that ends then, in seconds since the Unix epoch; each one differs."""

    def part(content: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none'})}.{part({'exp': expires, 'jti': str(uuid.uuid4())})}.x"


@dataclass
class FakeTokenReview:
    """Answers TokenReviews; `away` makes it fail as an API server that is down.

    `slow` makes each take so long, seconds.
    """

    known: dict[str, ReviewStatus] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    away: bool = False
    slow: float = 0.0

    async def __call__(self, token: str, audience: str) -> ReviewStatus:
        self.asked.append(token)
        await asyncio.sleep(self.slow)
        if self.away:
            raise ReviewUnavailableError("connection refused")
        status = self.known.get(token, ReviewStatus(False, error="invalid bearer token"))
        if audience not in status.audiences:
            return ReviewStatus(False, error="token audiences do not match")
        return status

    def agent(self, node: str, *, seconds: float = 600.0) -> str:
        """A token of the agent on a node."""
        return self._add(
            AGENT_ACCOUNT,
            seconds,
            {
                "node-name": node,
                "node-uid": node_uid(node),
                "pod-name": f"agent-{node}",
                "pod-uid": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"pod.{node}")),
            },
        )

    def server(self, *, seconds: float = 600.0) -> str:
        """A token of a server."""
        return self._add(SERVER_ACCOUNT, seconds, {})

    def other(self, account: str) -> str:
        """A token of some other ServiceAccount, "namespace:name"."""
        return self._add(f"system:serviceaccount:{account}", 600.0, {})

    def _add(self, username: str, seconds: float, claims: dict[str, str]) -> str:
        token = make_token(time.time() + seconds)
        self.known[token] = ReviewStatus(
            True,
            username=username,
            audiences=("outrider",),
            extra={CLAIM_PREFIX + name: (value,) for name, value in claims.items()},
        )
        return token


def node_uid(node: str) -> str:
    """UID of a node, the same at every call."""
    return str(uuid.uuid5(uuid.NAMESPACE_DNS, node))
