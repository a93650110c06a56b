"""Which replica leads: a coordination.k8s.io Lease, held by one at a time.

Wraps the election of the Kubernetes client, which has no time limits of its own, goes by the wall
clock, and neither counts changes of holder nor gives the Lease back. A holder here counts by its
own monotonic clock, from before its last good renewal was sent, and stops leading at once when its
time is over: the next one begins later than that. Knows nothing of what leading means.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import structlog
from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock
from outrider_runtime.logs import get_logger

from outrider_operator.kube.client import KubeClient
from outrider_operator.settings import LeaderSettings


class LeaseLostError(Exception):
    """The Lease could not be renewed in time; whatever led must have stopped."""


class _CountedLease(LeaseLock):
    """A Lease that counts its changes of holder: the term that fences old leaders.

    The count goes on where somebody deleted the Lease: gateways refuse a leader of a lower term
    than they have seen, for as long as they remember it.
    """

    term: int = 0
    #: Highest count that was read or written.
    _highest: int = 0

    async def get(
        self, name: str, namespace: str
    ) -> tuple[bool, LeaderElectionRecord] | tuple[bool, Exception] | tuple[bool, None]:
        """Read the Lease, and remember its count."""
        found = await super().get(name, namespace)
        if found[0] and self.lease_reference is not None:
            self._count(self.lease_reference.spec)
        return found

    def _count(self, spec: Any) -> int:
        """The changes of holder so far: those of the Lease as it is, or of the one before it."""
        self._highest = max(self._highest, (spec.lease_transitions or 0) if spec else 0)
        return self._highest

    def update_lease(
        self, leader_election_record: LeaderElectionRecord, current_spec: Any = None
    ) -> Any:
        """The spec to be written. Counts a change of holder."""
        holder = current_spec.holder_identity if current_spec else None
        count = self._count(current_spec)
        # The client's own takeover and each creation count: a term is never 0.
        self._next = count if holder == self.identity else count + 1
        spec = super().update_lease(leader_election_record, current_spec)
        spec.lease_transitions = self._next
        return spec

    async def create(
        self, name: str, namespace: str, election_record: LeaderElectionRecord
    ) -> bool:
        """Make the Lease; False when another was first."""
        spec = self.update_lease(election_record)
        body = client.V1Lease(metadata=client.V1ObjectMeta(name=name), spec=spec)
        return await self._write(self.api_instance.create_namespaced_lease(namespace, body))

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        """Write the Lease at the version that was read; False when another was first."""
        assert self.lease_reference is not None
        self.lease_reference.spec = self.update_lease(updated_record, self.lease_reference.spec)
        return await self._write(
            self.api_instance.replace_namespaced_lease(name, namespace, self.lease_reference)
        )

    async def _write(self, request: Awaitable[Any]) -> bool:
        try:
            self.lease_reference = await request
        except ApiException as error:
            if error.status == 409:
                return False
            raise
        self.term = self._highest = self._next
        return True


async def _nothing() -> None:
    """The client's own loop, which would call this, is not used."""


class Candidate:
    """A replica that would lead.

    Args:
        kube: connection to the API server.
        settings: the section `leader`.
        namespace: of the Lease.
        identity: name of this replica, unlike that of any other.
    """

    def __init__(
        self, kube: KubeClient, settings: LeaderSettings, namespace: str, identity: str
    ) -> None:
        self._settings = settings
        self._lock = _CountedLease(settings.lease_name, namespace, identity, kube.api)
        config = Config(
            self._lock,
            lease_duration=settings.lease_duration_seconds,
            renew_deadline=settings.renew_deadline_seconds,
            retry_period=settings.retry_period_seconds,
            onstarted_leading=_nothing,
            onstopped_leading=_nothing,
        )
        self._election = LeaderElection(config)
        self._log: structlog.stdlib.BoundLogger = get_logger(
            "outrider.lease", lease=f"{namespace}/{settings.lease_name}", identity=identity
        )
        #: Monotonic time up to which this replica may act as leader.
        self.valid_until = 0.0
        self._last_error = ""
        self._observed: LeaderElectionRecord | None = None
        self._observed_at = 0.0

    @property
    def leads(self) -> bool:
        """Whether this replica holds the Lease and its time is not over."""
        return time.monotonic() < self.valid_until

    async def campaign(self, lead: Callable[[int], Awaitable[None]]) -> None:
        """Wait for the Lease, run `lead(term)` while it is held, and begin again; for ever.

        `lead` is cancelled when the Lease is lost, and the Lease is given back when this is
        cancelled, after `lead` has ended.

        Raises:
            Whatever `lead` raises.
        """
        while True:
            await self._acquire()
            term = self._lock.term
            self._log.info("leading", term=term)
            try:
                async with self._held(term):
                    await lead(term)
            except* LeaseLostError as lost:
                self._log.warning(
                    "lease lost, no longer leading", term=term, reason=str(lost.exceptions[0])
                )
            # A TaskGroup forgets that it was cancelled when one of its tasks fails in the same
            # moment (until Python 3.13).
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError

    async def _acquire(self) -> None:
        complained = False
        while not await self._try():
            if self._last_error and not complained:
                complained = True
                self._log.warning("cannot ask for the lease", error=self._last_error)
            elif not self._last_error:
                complained = False
            await asyncio.sleep(self._settings.retry_period_seconds)

    async def _try(self) -> bool:
        """Take or renew the Lease once; False when it is not ours or the API server is away."""
        began = time.monotonic()
        self._last_error = ""
        # The client goes by the time of day, and that may be set: a holder must have its whole time
        # by the steady clock, and no more than that.
        age = began - self._observed_at
        self._election.observed_time_milliseconds = int((time.time() - age) * 1000)
        try:
            async with asyncio.timeout(self._settings.retry_period_seconds + 3):
                won = await self._election.try_acquire_or_renew()
        except (ApiException, aiohttp.ClientError, TimeoutError, OSError) as error:
            status = getattr(error, "status", None)
            self._last_error = f"{type(error).__name__} {status or error}".strip()
            return False
        finally:
            if self._election.observed_record is not self._observed:
                self._observed = self._election.observed_record
                self._observed_at = time.monotonic()
        if won:
            self.valid_until = began + self._settings.renew_deadline_seconds
        return won

    @asynccontextmanager
    async def _held(self, term: int) -> AsyncIterator[None]:
        """Keep the Lease while the body runs, and give it back afterwards."""
        try:
            async with asyncio.TaskGroup() as group:
                renewal = group.create_task(self._renew(term), name="renew the lease")
                yield
                renewal.cancel()
        finally:
            if self.leads:
                await asyncio.shield(self._release())

    async def _renew(self, term: int) -> None:
        """Renew the Lease for ever. Raises LeaseLostError when it is not this term's any more."""
        while True:
            await asyncio.sleep(
                min(
                    self._settings.retry_period_seconds, max(0, self.valid_until - time.monotonic())
                )
            )
            if not self.leads:
                raise LeaseLostError("it was not renewed in time")
            try:
                async with asyncio.timeout(self.valid_until - time.monotonic()):
                    await self._try()
            except TimeoutError:
                raise LeaseLostError("it was not renewed in time") from None
            held = self._election.observed_record
            if held is not None and held.holder_identity != self._lock.identity:
                self.valid_until = 0.0
                raise LeaseLostError(f"{held.holder_identity or 'nobody'} holds it")
            if self._lock.term != term:
                # Another may have led meanwhile: all is read anew, under the new term.
                self.valid_until = 0.0
                raise LeaseLostError("somebody deleted it, and it was made anew")

    async def _release(self) -> None:
        """Give the Lease back, so that the next replica need not wait for it to run out."""
        self.valid_until = 0.0
        lease = self._lock.lease_reference
        if lease is None or lease.spec is None:
            return
        lease.spec.holder_identity = ""
        lease.spec.lease_duration_seconds = 1
        try:
            async with asyncio.timeout(3):
                await self._lock.api_instance.replace_namespaced_lease(
                    self._lock.name, self._lock.namespace, lease
                )
            self._log.info("lease given back")
        except (ApiException, aiohttp.ClientError, TimeoutError, OSError) as error:
            self._log.warning("lease not given back, it runs out", error=type(error).__name__)
