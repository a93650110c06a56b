"""Who a caller is and what it may call: decided here, from what the API server said of its token.

Nothing an agent says of itself is used. No input or output, no clock: the review is done by the
caller, and its outcome passed in.
"""

import base64
import binascii
import enum
import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Final

CLAIM_PREFIX: Final = "authentication.kubernetes.io/"
USER_PREFIX: Final = "system:serviceaccount:"
#: Longest token that is looked at, bytes; projected tokens are about 1.5 KiB.
TOKEN_BYTES: Final = 12 * 1024


class Role(enum.Enum):
    """What a caller is."""

    AGENT = "agent"
    SERVER = "server"


ANONYMOUS: Final[frozenset[Role]] = frozenset()
BOTH: Final = frozenset({Role.AGENT, Role.SERVER})

TRANSFER: Final = "/outrider.v1.AgentService/Transfer"
PLAIN_TRANSFER: Final = "/grpc.Transfer/Transfer"
#: The calls that are let in at a set rate.
STREAMS: Final = frozenset({TRANSFER, PLAIN_TRANSFER})

#: Every method that can be called at all, and who may; an empty set means anybody, without a token.
METHODS: Final[Mapping[str, frozenset[Role]]] = {
    "/grpc.health.v1.Health/Check": ANONYMOUS,
    # Not for anybody, as Check is for probes: it holds a connection open.
    "/grpc.health.v1.Health/Watch": BOTH,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": BOTH,
    TRANSFER: frozenset({Role.AGENT}),
    # As other agents name it; only there when plain records are accepted.
    PLAIN_TRANSFER: frozenset({Role.AGENT}),
    "/outrider.v1.AgentService/Ping": BOTH,
    "/outrider.v1.FleetService/Link": frozenset({Role.SERVER}),
}


class ReviewUnavailableError(Exception):
    """The API server could not be asked about a token; says nothing about the token."""


@dataclass(frozen=True)
class ReviewStatus:
    """What a TokenReview answered: its `status`.

    Attributes:
        authenticated: the token is genuine and not expired.
        username: "system:serviceaccount:NAMESPACE:NAME" for a ServiceAccount.
        audiences: those of the asked audiences the token is for.
        extra: names and values of further facts, such as the node's name.
        error: why it was not authenticated, for logs.
    """

    authenticated: bool
    username: str = ""
    audiences: tuple[str, ...] = ()
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated caller.

    Attributes:
        role: what it may do.
        service_account: as namespace/name.
        node: name of the node it runs on; never empty for an agent.
        node_uid: UID of that Node object: the agent's id.
        pod: name of its Pod.
        pod_uid: UID of its Pod.
        expires: when its token ends, seconds since the Unix epoch; None: not known.
    """

    role: Role
    service_account: str
    node: str = ""
    node_uid: str = ""
    pod: str = ""
    pod_uid: str = ""
    expires: float | None = None

    @property
    def caller(self) -> str:
        """A name for people: the node of an agent, else the ServiceAccount."""
        return self.node if self.role is Role.AGENT else self.service_account


class RefusalCode(enum.Enum):
    """Status code of a refusal, by its gRPC name."""

    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    UNAVAILABLE = "UNAVAILABLE"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Refusal:
    """Why a call is not served.

    Attributes:
        code: its status code.
        reason: a CamelCase word of a small fixed set, for metrics.
        message: what happened and what to do, for people; holds no secret.
        retry_millis: when the caller is to come back, milliseconds; 0: not said.
    """

    code: RefusalCode
    reason: str
    message: str
    retry_millis: int = 0


@dataclass(frozen=True)
class TrustPolicy:
    """Whose tokens are taken.

    Attributes:
        audience: a token must be made for it.
        agents: ServiceAccounts of agents, as namespace/name.
        servers: ServiceAccounts of servers, as namespace/name.
    """

    audience: str
    agents: Set[str]
    servers: Set[str]


def identity_of(status: ReviewStatus, policy: TrustPolicy) -> Identity | Refusal:
    """Say who the owner of a reviewed token is, or why it is refused."""
    if not status.authenticated:
        return _unauthenticated(
            "NotAuthenticated", "the API server does not know this token, or it has expired"
        )
    if policy.audience not in status.audiences:
        return _unauthenticated(
            "WrongAudience", f"the token is not made for the audience {policy.audience!r}"
        )
    account = _service_account(status.username)
    if account is None:
        return _denied("NotServiceAccount", "only tokens of ServiceAccounts are taken")
    if account in policy.servers and account not in policy.agents:
        return _with_claims(Identity(Role.SERVER, account), status)
    if account not in policy.agents:
        return _denied(
            "ServiceAccountNotAllowed",
            f"the ServiceAccount {account} is in neither auth.agentServiceAccounts "
            "nor auth.serverServiceAccounts",
        )
    agent = _with_claims(Identity(Role.AGENT, account), status)
    if not (agent.node and agent.node_uid and agent.pod and agent.pod_uid):
        return _denied(
            "NoNodeClaims",
            "the token does not name its node and pod: it must be a projected token bound to "
            "a Pod, and the cluster Kubernetes 1.30 or later",
        )
    return agent


def refuse_method(method: str, *, plain: bool = True) -> Refusal | None:
    """Refuse a method that is not on the list; None for one that is.

    Args:
        method: full name.
        plain: whether plain records are accepted.
    """
    if method in METHODS and (plain or method != PLAIN_TRANSFER):
        return None
    return Refusal(RefusalCode.UNIMPLEMENTED, "UnknownMethod", "no such method")


def refuse_role(method: str, identity: Identity) -> Refusal | None:
    """Refuse a caller whose role may not call `method`; None if it may.

    Raises:
        KeyError: the method is not on the list; ask `refuse_method` first.
    """
    if identity.role in METHODS[method]:
        return None
    return _denied("WrongRole", f"this method is not for the role {identity.role.value}")


def bearer_token(authorization: str | bytes | None) -> str | Refusal:
    """Take the token out of the metadata "authorization: Bearer TOKEN"."""
    if isinstance(authorization, bytes):
        authorization = authorization.decode("ascii", "replace")
    if not authorization:
        return _unauthenticated("NoToken", "the metadata 'authorization: Bearer TOKEN' is missing")
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or not token.isascii() or " " in token:
        return _unauthenticated("MalformedToken", "expected 'authorization: Bearer TOKEN'")
    if len(token) > TOKEN_BYTES:
        return _unauthenticated("MalformedToken", f"a token has at most {TOKEN_BYTES} bytes")
    return token


def token_expiry(token: str) -> float | None:
    """Read `exp` of a JSON web token without checking it, seconds since the Unix epoch.

    Only good for bounding how long a review may be remembered: that the token is genuine is for
    the API server to say. None where there is no such claim.
    """
    parts = token.split(".")
    if len(parts) != 3 or len(token) > TOKEN_BYTES:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return None
    expires = claims.get("exp") if isinstance(claims, dict) else None
    if isinstance(expires, bool) or not isinstance(expires, int | float):
        return None
    return float(expires) if 0 < expires < 1e12 else None


def _with_claims(identity: Identity, status: ReviewStatus) -> Identity:
    def claim(name: str) -> str:
        values = status.extra.get(CLAIM_PREFIX + name, ())
        return values[0] if len(values) == 1 else ""

    return replace(
        identity,
        node=claim("node-name"),
        node_uid=claim("node-uid"),
        pod=claim("pod-name"),
        pod_uid=claim("pod-uid"),
    )


def _service_account(username: str) -> str | None:
    namespace, separator, name = username.removeprefix(USER_PREFIX).partition(":")
    if not username.startswith(USER_PREFIX) or not separator or not namespace or not name:
        return None
    return f"{namespace}/{name}"


def _unauthenticated(reason: str, message: str) -> Refusal:
    return Refusal(RefusalCode.UNAUTHENTICATED, reason, message)


def _denied(reason: str, message: str) -> Refusal:
    return Refusal(RefusalCode.PERMISSION_DENIED, reason, message)
