"""Authentication of every call before it is dispatched and before any message of it is read.

Asks the API server who the owner of a token is, remembers the answer for a while, and looks the
method up in the explicit list. What the answer means is decided in core/identity.py. Tokens are
kept only as SHA-256 digests and never logged.
"""

import asyncio
import contextvars
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
import grpc.aio
from outrider_proto.channel import AUTHORIZATION
from outrider_runtime.logs import get_logger

from outrider_operator.core.identity import (
    METHODS,
    STREAMS,
    Identity,
    Refusal,
    RefusalCode,
    ReviewStatus,
    ReviewUnavailableError,
    TrustPolicy,
    bearer_token,
    identity_of,
    refuse_method,
    refuse_role,
    token_expiry,
)
from outrider_operator.core.rates import Admission
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import AuthSettings, GatewaySettings

#: Asks the API server about a token (first) for an audience (second).
#: Raises ReviewUnavailableError when it cannot be asked.
Review = Callable[[str, str], Awaitable[ReviewStatus]]

Outcome = Identity | Refusal
if TYPE_CHECKING:  # generic in the stubs only
    Handler = grpc.RpcMethodHandler[Any, Any]

_NO_ANSWER: Final = Refusal(
    RefusalCode.UNAVAILABLE,
    "ReviewUnavailable",
    "the token cannot be checked: the API server does not answer; try later",
)

#: Trailing metadata: milliseconds after which the caller is to try again, as gRPC has it.
PUSHBACK: Final = "grpc-retry-pushback-ms"

log = get_logger(__name__)

#: Reviews that may wait for each one under way. An agent waits 10 s for its welcome: with thousands
#: of reviews ahead it gives up and comes again, and all that was done for it was for nothing.
REVIEWS_AHEAD: Final = 4

# The interceptor and the handler of a call run in one task, so this is the call's own.
_identity: contextvars.ContextVar[Identity] = contextvars.ContextVar("identity")


def current_identity() -> Identity:
    """Who made the call that this task serves.

    Raises:
        LookupError: outside of an authenticated call.
    """
    return _identity.get()


class Authenticator:
    """Says who the owner of a token is, with as few TokenReviews as can be.

    Args:
        settings: audience, allow-lists, bounds.
        review: asks the API server.
        metrics: where reviews are counted.
        now: seconds since the Unix epoch.
    """

    def __init__(
        self,
        settings: AuthSettings,
        review: Review,
        metrics: ServerMetrics,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._review = review
        self._metrics = metrics
        self._now = now
        self._policy = TrustPolicy(
            audience=settings.audience,
            agents=frozenset(settings.agent_service_accounts),
            servers=frozenset(settings.server_service_accounts),
        )
        self._cache: OrderedDict[bytes, tuple[Outcome, float]] = OrderedDict()
        self._pending: dict[bytes, asyncio.Task[Outcome]] = {}
        self._slots = asyncio.Semaphore(settings.max_reviews)

    async def authenticate(self, token: str) -> Outcome:
        """Identity of a token's owner, or why it is refused; never raises for a bad token."""
        key = hashlib.sha256(token.encode()).digest()
        remembered = self._remembered(key)
        if remembered is not None:
            self._metrics.token_cache_hits.inc()
            return remembered
        pending = self._pending.get(key)
        if pending is None:
            if len(self._pending) >= self._settings.max_waiting:
                return Refusal(
                    RefusalCode.UNAVAILABLE,
                    "TooManyReviews",
                    "too many tokens to review, try later",
                )
            pending = self._begin(key, token)
        # Shielded: the caller may go away, and finds the answer when it comes again. Were the
        # review ended with it, thousands that come at once and have patience for less than the
        # queue takes would get nowhere, however often they come.
        try:
            async with asyncio.timeout(self._settings.review_timeout_seconds):
                return await asyncio.shield(pending)
        except TimeoutError:
            return _NO_ANSWER

    @property
    def crowded(self) -> bool:
        """Whether so many tokens wait for their review that more would wait for too long."""
        return len(self._pending) >= REVIEWS_AHEAD * self._settings.max_reviews

    def _remembered(self, key: bytes) -> Outcome | None:
        entry = self._cache.get(key)
        if entry is None:
            return None
        if entry[1] <= self._now():
            del self._cache[key]
            self._metrics.token_cache_entries.set(len(self._cache))
            return None
        self._cache.move_to_end(key)
        return entry[0]

    def _begin(self, key: bytes, token: str) -> asyncio.Task[Outcome]:
        """Review a token for all callers that wait for it, now or later."""
        task = asyncio.create_task(self._reviewed(key, token), name="token review")
        self._pending[key] = task
        self._metrics.reviews_waiting.set(len(self._pending))
        task.add_done_callback(lambda _: self._settle(key))
        return task

    def _settle(self, key: bytes) -> None:
        del self._pending[key]
        self._metrics.reviews_waiting.set(len(self._pending))

    async def _reviewed(self, key: bytes, token: str) -> Outcome:
        try:
            async with self._slots, asyncio.timeout(self._settings.review_timeout_seconds):
                with self._metrics.review_seconds.time():
                    status = await self._review(token, self._settings.audience)
        except (ReviewUnavailableError, TimeoutError) as error:
            self._metrics.reviews.labels("unavailable").inc()
            log.warning("token not reviewed", error=str(error) or "timeout")
            return _NO_ANSWER
        outcome = identity_of(status, self._policy)
        if isinstance(outcome, Refusal):
            self._metrics.reviews.labels("refused").inc()
            log.info("token refused", reason=outcome.reason, error=status.error)
        else:
            self._metrics.reviews.labels("accepted").inc()
            outcome = replace(outcome, expires=token_expiry(token))
        self._remember(key, outcome)
        return outcome

    def _remember(self, key: bytes, outcome: Outcome) -> None:
        if isinstance(outcome, Refusal):
            until = self._now() + self._settings.refusal_cache_seconds
        else:
            until = self._now() + self._settings.cache_seconds
            until = min(until, until if outcome.expires is None else outcome.expires)
        self._cache[key] = (outcome, until)
        while len(self._cache) > self._settings.cache_entries:
            self._cache.popitem(last=False)
        self._metrics.token_cache_entries.set(len(self._cache))

    async def admit(self, method: str, authorization: list[str | bytes]) -> Identity | Refusal:
        """Identity of a caller that may call `method`, else why not.

        Args:
            method: full name, such as "/outrider.v1.AgentService/Ping"; must need a token.
            authorization: all values of that metadata key.
        """
        if len(authorization) > 1:
            return Refusal(
                RefusalCode.UNAUTHENTICATED, "MalformedToken", "more than one 'authorization'"
            )
        token = bearer_token(authorization[0] if authorization else None)
        if isinstance(token, Refusal):
            return token
        outcome = await self.authenticate(token)
        if isinstance(outcome, Refusal):
            return outcome
        return refuse_role(method, outcome) or outcome


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call through to its handler only when its caller may make it, and when it is its turn.

    Args:
        authenticator: says who a caller is.
        settings: at what rate streams may begin, and which there are.
        metrics: where refusals are counted.
        monotonic: seconds.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        settings: GatewaySettings,
        metrics: ServerMetrics,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._authenticator = authenticator
        self._plain = settings.accept_plain_records
        self._metrics = metrics
        self._monotonic = monotonic
        self._admission = Admission(settings.connect_rate, settings.connect_burst, monotonic())

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Called by grpc for each call, in the call's own task."""
        method = handler_call_details.method
        refusal = refuse_method(method, plain=self._plain)
        # Before any work on the token: thousands may come at once.
        if refusal is None and method in STREAMS:
            refusal = await self._admit()
        if refusal is not None:
            return self._refused(refusal)
        if METHODS[method]:
            shown = [v for k, v in handler_call_details.invocation_metadata if k == AUTHORIZATION]
            outcome = await self._authenticator.admit(method, shown)
            if isinstance(outcome, Refusal):
                return self._refused(outcome)
            _identity.set(outcome)
        return await continuation(handler_call_details)

    async def _admit(self) -> Refusal | None:
        """Let a stream in at the set rate, which may take a moment, or say when to come back."""
        crowded = self._authenticator.crowded
        admitted, seconds = self._admission.ask(self._monotonic(), crowded=crowded)
        if not admitted:
            self._metrics.connects.labels("sent_back").inc()
            bound = "the API server" if crowded else "gateway.connectRate"
            return Refusal(
                RefusalCode.UNAVAILABLE,
                "TooManyConnects",
                f"more agents connect than {bound} has time for: come back in {seconds:.1f} s",
                retry_millis=int(seconds * 1000) + 1,
            )
        self._metrics.connects.labels("held" if seconds else "admitted").inc()
        if seconds:
            await asyncio.sleep(seconds)
        return None

    def _refused(self, refusal: Refusal) -> "Handler":
        self._metrics.refusals.labels(refusal.code.value, refusal.reason).inc()
        code = grpc.StatusCode[refusal.code.value]
        trailing = ((PUSHBACK, str(refusal.retry_millis)),) if refusal.retry_millis else ()

        async def refuse(_requests: Any, context: Any) -> NoReturn:
            await context.abort(code, refusal.message, trailing_metadata=trailing)
            raise AssertionError("abort raises")

        # Of the four kinds of handler this one alone reads no message before it is called.
        return grpc.stream_stream_rpc_method_handler(refuse)
