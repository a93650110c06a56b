"""Who a caller is and what it may call: tables of cases, and the cache around the reviews."""

import asyncio
import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from fakes.token_review import AGENT_ACCOUNT, SERVER_ACCOUNT, FakeTokenReview, make_token
from hypothesis import given
from hypothesis import strategies as st
from outrider_operator.core.identity import (
    CLAIM_PREFIX,
    METHODS,
    Identity,
    Refusal,
    RefusalCode,
    ReviewStatus,
    Role,
    TrustPolicy,
    bearer_token,
    identity_of,
    refuse_method,
    refuse_role,
    token_expiry,
)
from outrider_operator.gateway.auth import Authenticator
from outrider_operator.metrics import ServerMetrics
from outrider_operator.settings import AuthSettings
from prometheus_client import CollectorRegistry

POLICY = TrustPolicy("outrider", {"outrider/outrider-agent"}, {"outrider/outrider-server"})
CLAIMS = {"node-name": "n", "node-uid": "nu", "pod-name": "p", "pod-uid": "pu"}


def status(account: str = AGENT_ACCOUNT, without: str = "", **changes: Any) -> ReviewStatus:
    extra = {CLAIM_PREFIX + name: (value,) for name, value in CLAIMS.items() if name != without}
    good = ReviewStatus(True, username=account, audiences=("outrider",), extra=extra)
    return replace(good, **changes)


def test_agent() -> None:
    assert identity_of(status(), POLICY) == Identity(
        Role.AGENT, "outrider/outrider-agent", "n", "nu", "p", "pu"
    )


def test_server_needs_no_claims() -> None:
    found = identity_of(status(SERVER_ACCOUNT, extra={}), POLICY)
    assert isinstance(found, Identity)
    assert (found.role, found.caller) == (Role.SERVER, "outrider/outrider-server")


@pytest.mark.parametrize(
    ("given_status", "code", "reason"),
    [
        (status(authenticated=False), "UNAUTHENTICATED", "NotAuthenticated"),
        (status(audiences=("kubernetes",)), "UNAUTHENTICATED", "WrongAudience"),
        (status(audiences=()), "UNAUTHENTICATED", "WrongAudience"),
        (status("admin"), "PERMISSION_DENIED", "NotServiceAccount"),
        (status("system:serviceaccount:outrider"), "PERMISSION_DENIED", "NotServiceAccount"),
        (status("outrider:outrider-agent"), "PERMISSION_DENIED", "NotServiceAccount"),
        (
            status("system:serviceaccount:other:outrider-agent"),
            "PERMISSION_DENIED",
            "ServiceAccountNotAllowed",
        ),
        *((status(without=name), "PERMISSION_DENIED", "NoNodeClaims") for name in CLAIMS),
        (
            status(extra={**status().extra, f"{CLAIM_PREFIX}node-name": ("n", "m")}),
            "PERMISSION_DENIED",
            "NoNodeClaims",
        ),
    ],
)
def test_refused(given_status: ReviewStatus, code: str, reason: str) -> None:
    refusal = identity_of(given_status, POLICY)
    assert isinstance(refusal, Refusal)
    assert (refusal.code.value, refusal.reason) == (code, reason)
    if reason == "NoNodeClaims":
        assert "Kubernetes 1.30 or later" in refusal.message


def test_the_list_of_methods_is_exactly_this() -> None:
    agent, server = frozenset({Role.AGENT}), frozenset({Role.SERVER})
    assert {
        "/grpc.health.v1.Health/Check": frozenset(),
        "/grpc.health.v1.Health/Watch": agent | server,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": agent | server,
        "/outrider.v1.AgentService/Transfer": agent,
        "/grpc.Transfer/Transfer": agent,
        "/outrider.v1.AgentService/Ping": agent | server,
        "/outrider.v1.FleetService/Link": server,
    } == METHODS


@given(st.text())
def test_what_is_not_on_the_list_is_refused(method: str) -> None:
    refusal = refuse_method(method)
    assert (refusal is None) == (method in METHODS)


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("method", METHODS)
def test_role_is_refused_unless_listed(role: Role, method: str) -> None:
    refusal = refuse_role(method, Identity(role, "a/b"))
    assert (refusal is None) == (role in METHODS[method])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Bearer abc", "abc"),
        (b"bearer abc", "abc"),
        (None, "NoToken"),
        ("", "NoToken"),
        ("abc", "MalformedToken"),
        ("Basic abc", "MalformedToken"),
        ("Bearer ", "MalformedToken"),
        ("Bearer a b", "MalformedToken"),
        ("Bearer \u00e9", "MalformedToken"),
        ("Bearer " + "x" * 20_000, "MalformedToken"),
    ],
)
def test_bearer_token(value: str | bytes | None, expected: str) -> None:
    found = bearer_token(value)
    assert (found.reason if isinstance(found, Refusal) else found) == expected


@given(st.text() | st.binary().map(lambda raw: f"a.{base64.urlsafe_b64encode(raw).decode()}.c"))
def test_expiry_of_rubbish_is_not_known(token: str) -> None:
    found = token_expiry(token)
    assert found is None or found > 0


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"exp": 5}, 5.0),
        ({"exp": 5.5}, 5.5),
        ({"exp": "5"}, None),
        ({"exp": True}, None),
        ({"exp": -1}, None),
        ({"exp": 1e300}, None),
        ({"exp": None}, None),
        ([], None),
        ({}, None),
    ],
)
def test_expiry(claims: object, expected: float | None) -> None:
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    assert token_expiry(f"a.{body}.c") == expected


class Case:
    """An Authenticator on a fake review and a clock that is set by hand."""

    def __init__(self, **settings: Any) -> None:
        self.registry = CollectorRegistry()
        self.reviews = FakeTokenReview()
        self.time = 1_000_000.0
        self.authenticator = Authenticator(
            AuthSettings(**settings), self.reviews, ServerMetrics(self.registry), lambda: self.time
        )

    def token(self, seconds: float) -> str:
        token = make_token(self.time + seconds)
        self.reviews.known[token] = status()
        return token

    async def ask(self, token: str) -> str:
        outcome = await self.authenticator.authenticate(token)
        return outcome.reason if isinstance(outcome, Refusal) else outcome.node

    def metric(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"outrider_server_{name}")


async def test_reviewed_once_until_the_token_expires() -> None:
    case = Case(cache_seconds=300.0)
    token = case.token(100)
    for _ in range(3):
        assert await case.ask(token) == "n"
    assert len(case.reviews.asked) == 1
    case.time += 101
    await case.ask(token)
    assert len(case.reviews.asked) == 2


async def test_reviewed_again_after_the_cache_time() -> None:
    case = Case(cache_seconds=300.0)
    token = case.token(10_000)
    await case.ask(token)
    case.time += 299
    await case.ask(token)
    assert len(case.reviews.asked) == 1
    case.time += 2
    case.reviews.known.clear()  # revoked
    assert await case.ask(token) == "NotAuthenticated"


async def test_refusals_are_remembered_shortly() -> None:
    case = Case(refusal_cache_seconds=10.0)
    assert await case.ask("bad") == "NotAuthenticated"
    assert await case.ask("bad") == "NotAuthenticated"
    assert len(case.reviews.asked) == 1
    case.time += 11
    await case.ask("bad")
    assert len(case.reviews.asked) == 2


async def test_an_api_server_that_is_away_is_not_remembered() -> None:
    case = Case()
    token = case.token(100)
    case.reviews.away = True
    outcome = await case.authenticator.authenticate(token)
    assert isinstance(outcome, Refusal)
    assert outcome.code is RefusalCode.UNAVAILABLE
    case.reviews.away = False
    assert await case.ask(token) == "n"


async def test_cache_is_bounded_and_the_oldest_go() -> None:
    case = Case(cache_entries=2)
    first, second, third = (case.token(100) for _ in range(3))
    for token in (first, second, first, third):
        await case.ask(token)
    assert case.metric("token_cache_entries") == 2
    asked = len(case.reviews.asked)
    await case.ask(first)
    assert len(case.reviews.asked) == asked
    await case.ask(second)
    assert len(case.reviews.asked) == asked + 1


class SlowReview:
    """Answers only when told to; counts how many are under way."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.calls = self.under_way = self.most = 0

    async def __call__(self, token: str, audience: str) -> ReviewStatus:
        self.calls += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.go.wait()
        finally:
            self.under_way -= 1
        return status()


def slow(**settings: Any) -> tuple[Authenticator, SlowReview]:
    review = SlowReview()
    metrics = ServerMetrics(CollectorRegistry())
    return Authenticator(AuthSettings(**settings), review, metrics), review


async def test_calls_with_one_token_share_a_review() -> None:
    authenticator, review = slow()
    token = make_token(9e9)
    calls = [asyncio.create_task(authenticator.authenticate(token)) for _ in range(50)]
    await asyncio.sleep(0)
    review.go.set()
    assert all(isinstance(outcome, Identity) for outcome in await asyncio.gather(*calls))
    assert review.calls == 1


@pytest.mark.parametrize("which", [0, 3])
async def test_a_call_may_go_away_while_others_wait(which: int) -> None:
    authenticator, review = slow()
    token = make_token(9e9)
    calls = [asyncio.create_task(authenticator.authenticate(token)) for _ in range(6)]
    await asyncio.sleep(0)
    gone = calls.pop(which)
    gone.cancel()
    await asyncio.wait([gone])
    assert gone.cancelled()
    review.go.set()
    assert all(isinstance(outcome, Identity) for outcome in await asyncio.gather(*calls))
    assert review.calls == 1


async def test_a_review_goes_on_for_a_caller_that_comes_again() -> None:
    authenticator, review = slow(max_reviews=1)
    tokens = [make_token(9e9) for _ in range(3)]
    calls = [asyncio.create_task(authenticator.authenticate(token)) for token in tokens]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    review.go.set()
    again = await asyncio.gather(*map(authenticator.authenticate, tokens))
    assert all(isinstance(outcome, Identity) for outcome in again)
    assert review.calls == 3


async def test_reviews_at_once_and_waiting_are_bounded() -> None:
    authenticator, review = slow(max_reviews=3, max_waiting=10)
    calls = [asyncio.create_task(authenticator.authenticate(make_token(9e9))) for _ in range(12)]
    for _ in range(5):
        await asyncio.sleep(0)
    review.go.set()
    outcomes = await asyncio.gather(*calls)
    assert review.most == 3
    refused = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
    assert [outcome.reason for outcome in refused] == ["TooManyReviews"] * 2


async def test_a_review_that_hangs_is_given_up() -> None:
    authenticator, _ = slow(review_timeout_seconds=0.02)
    outcome = await authenticator.authenticate(make_token(9e9))
    assert isinstance(outcome, Refusal)
    assert outcome.code is RefusalCode.UNAVAILABLE
