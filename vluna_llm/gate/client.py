"""The gate for threads: every endpoint that we use, typed. Its twin for event loops is ``client_async``.

Nothing here retries but ``authorize``, which has a caller waiting and a deadline; the settler has its own schedule and
stores what it sends. Redirects are never followed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any

import httpx

from ..errors import GateUnavailable
from ..types import Lease
from . import answers, queries
from . import requests as ask
from .core import AUTHORIZE_DEADLINE, DEFAULT_TIMEOUT, GateCore, Timeout, unavailable
from .credentials import GateCredentials
from .models import BatchResult, CancelResult, CommitResult, IngestResult
from .readings import (
    Allocation,
    FeatureLimits,
    Health,
    IssuedToken,
    Listing,
    Meter,
    Preflight,
    Rating,
    WalletBalance,
)
from .requests import BatchCommit, GateRequest, Labels, Meters
from .transport import Transport, open_transport
from .wire import Answer, TransportError


class GateClient(GateCore):
    """The gate, for threads. One client serves any number of them, and a forked child as well.

    Every method takes keywords only, an optional ``timeout`` (seconds for the whole exchange, or an ``httpx.Timeout``),
    ``request_id`` (generated when None) and ``traceparent`` (the current OpenTelemetry span when None).

    Raises on every call:
        ConfigurationError: an argument cannot be sent; nothing was.
        GateError: its subclass says what the gate answered; `GateUnavailable` also for no answer.

    Args:
        credentials: address, realm and service key.
        timeout: default for every call but authorize.
        http_client: your own client (proxies, client certificates, transports); it is not closed by us.
        clock: wall clock, seconds since the epoch; only read to turn the gate's ``until`` into a wait.
    """

    def __init__(
        self,
        credentials: GateCredentials,
        *,
        timeout: Timeout = DEFAULT_TIMEOUT,
        http_client: httpx.Client | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(credentials, timeout=timeout, clock=clock)
        self._transport: Transport = open_transport(credentials.base_url, http_client)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> GateClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_: TracebackType | None
    ) -> None:
        self.close()

    def send(
        self,
        request: GateRequest,
        *,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Answer:
        """Send these bytes once, freshly signed, and return the answer unjudged; ``answers.parse_*`` judge it.

        Raises:
            GateUnavailable: no answer came; ``meta["transport"]`` says ``connect`` (never sent), ``timeout`` or
                ``broken`` (it may have been carried out all the same).
        """
        wire = self.sealed(request, request_id, traceparent)
        try:
            return self._transport.exchange(wire, self.patience_for(timeout))
        except TransportError as error:
            raise unavailable(error, wire) from error.__cause__

    def health(self, *, timeout: Timeout | None = None, request_id: str | None = None) -> Health:
        """Whether the gate's process is up. It does not look at its database, nor at the key."""
        answer = self.send(ask.health_request(), timeout=timeout, request_id=request_id)
        return answers.parse_health(answer, now=self.clock())

    def authorize(
        self,
        *,
        principal_id: str,
        feature_code: str,
        user_id: str | None = None,
        feature_family_code: str | None = None,
        estimated_quantity: int | None = None,
        budget_id: str | None = None,
        lease: str | None = None,
        labels: Labels | None = None,
        idempotency_key: str | None = None,
        deadline: float = AUTHORIZE_DEADLINE,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Lease:
        """Ask for a lease, again where asking again can help, and within ``deadline`` seconds altogether.

        Retried under the same key with the same bytes: no connection, time-outs, 500 ``SERVER.UNEXPECTED`` (the first
        call of every new principal gets one), 502 to 504. See `authorize_request` for the arguments.

        Raises:
            GateDenied: credit, quota, budget, entitlement, disabled user.
            GateRateLimited: the rate window is full; never waited for here.
            InvalidGateRequest: unknown feature, no policy, bad field.
            GateUnavailable: no usable answer within the deadline.
        """
        request = ask.authorize_request(
            principal_id=principal_id,
            feature_code=feature_code,
            user_id=user_id,
            feature_family_code=feature_family_code,
            estimated_quantity=estimated_quantity,
            budget_id=budget_id,
            lease=lease,
            labels=labels,
            idempotency_key=idempotency_key,
            dialect=self.dialect,
        )
        return self.authorize_with(request, deadline=deadline, request_id=request_id, traceparent=traceparent)

    def authorize_with(
        self,
        request: GateRequest,
        *,
        deadline: float = AUTHORIZE_DEADLINE,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Lease:
        """`authorize` for a request that was composed (and noted down) before."""
        schedule = self.schedule(deadline)
        while True:
            limit = schedule.attempt_timeout(time.monotonic())
            try:
                answer = self.send(request, timeout=limit, request_id=request_id, traceparent=traceparent)
                return self.learned(answers.parse_lease(answer, now=self.clock(), request=request))
            except GateUnavailable as error:
                pause = schedule.wait(time.monotonic()) if error.retryable else None
                if pause is None:
                    error.meta["attempts"] = schedule.attempts
                    raise
            time.sleep(pause)

    def commit(
        self,
        *,
        lease: Lease,
        principal_id: str,
        quantity: int,
        user_id: str | None = None,
        meters: Meters = (),
        labels: Labels | None = None,
        idempotency_key: str | None = None,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> CommitResult:
        """Report what was used under a lease. **Look at ``result.quarantined``: 200 does not mean billed.**

        ``quantity`` is the total in tokens; see `commit_request` for the other arguments.
        """
        request = ask.commit_request(
            lease=lease,
            principal_id=principal_id,
            quantity=quantity,
            user_id=user_id,
            meters=meters,
            labels=labels,
            idempotency_key=idempotency_key,
        )
        return answers.parse_commit(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def commit_batch(
        self,
        *,
        items: Sequence[BatchCommit],
        principal_id: str,
        user_id: str | None = None,
        idempotency_key: str | None = None,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> BatchResult:
        """Report several commits at once. Read the warnings of `BatchResult` first; prefer `commit`."""
        request = ask.commit_batch_request(
            items=items, principal_id=principal_id, user_id=user_id, idempotency_key=idempotency_key
        )
        return answers.parse_commit_batch(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def cancel(
        self,
        *,
        lease: Lease,
        principal_id: str,
        user_id: str | None = None,
        idempotency_key: str | None = None,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> CancelResult:
        """End a lease whose work failed. In the dialect that has no cancel nothing is sent: ``result.lapsed``."""
        if lease.dialect != "lease_token":
            return CancelResult(None, True, lapsed=True)
        request = ask.cancel_request(
            lease=lease, principal_id=principal_id, user_id=user_id, idempotency_key=idempotency_key
        )
        return answers.parse_cancel(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def ingest(
        self,
        *,
        principal_id: str,
        feature_code: str,
        quantity: int | None = None,
        user_id: str | None = None,
        meters: Meters = (),
        occurred_at: datetime | None = None,
        budget_id: str | None = None,
        labels: Labels | None = None,
        idempotency_key: str | None = None,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> IngestResult:
        """Book usage without a lease; look at ``result.unpriced_lines``. See `ingest_request` for the arguments."""
        request = ask.ingest_request(
            principal_id=principal_id,
            feature_code=feature_code,
            quantity=quantity,
            user_id=user_id,
            meters=meters,
            occurred_at=occurred_at,
            budget_id=budget_id,
            labels=labels,
            idempotency_key=idempotency_key,
            dialect=self.dialect,
        )
        return answers.parse_ingest(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def preflight(
        self,
        *,
        principal_id: str,
        feature_code: str,
        user_id: str | None = None,
        feature_family_code: str | None = None,
        estimated_quantity: int | None = None,
        budget_id: str | None = None,
        idempotency_key: str | None = None,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Preflight:
        """Ask whether authorize would succeed, without a lease.

        Raises:
            InvalidGateRequest: this gate has no preflight (the ``lease_token`` dialect).
        """
        request = ask.preflight_request(
            principal_id=principal_id,
            feature_code=feature_code,
            user_id=user_id,
            feature_family_code=feature_family_code,
            estimated_quantity=estimated_quantity,
            budget_id=budget_id,
            idempotency_key=idempotency_key,
        )
        return answers.parse_preflight(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def issue_token(
        self,
        *,
        principal_id: str,
        user_id: str | None = None,
        scopes: Iterable[str] | None = None,
        ttl_seconds: int | None = None,
        traits: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> IssuedToken:
        """Issue an end-user token and learn the two billing ids. The token opens the whole API to its holder."""
        request = ask.issue_token_request(
            principal_id=principal_id,
            user_id=user_id,
            scopes=scopes,
            ttl_seconds=ttl_seconds,
            traits=traits,
            idempotency_key=idempotency_key,
        )
        return answers.parse_issued_token(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def limits(
        self,
        *,
        principal_id: str,
        user_id: str | None = None,
        feature_code: str | Iterable[str] | None = None,
        feature_family_code: str | Iterable[str] | None = None,
        expand: Iterable[str] = ("quotas", "rates"),
        as_of: datetime | None = None,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Listing[FeatureLimits]:
        """Quotas and rates with their windows: where the reset time of a used-up quota is found."""
        request = queries.limits_request(
            principal_id=principal_id,
            user_id=user_id,
            feature_code=feature_code,
            feature_family_code=feature_family_code,
            expand=expand,
            as_of=as_of,
        )
        return answers.parse_limits(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def meters(
        self,
        *,
        principal_id: str,
        user_id: str | None = None,
        meter_code: str | Iterable[str] | None = None,
        feature_code: str | Iterable[str] | None = None,
        feature_family_code: str | Iterable[str] | None = None,
        expand: Iterable[str] = ("pricing",),
        coverage_profile: str | None = None,
        coverage_basis: str | None = None,
        coverage_budget_id: str | None = None,
        coverage_as_of: datetime | None = None,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Listing[Meter]:
        """Meters, by default with their prices; ``meter.priced`` is False where one is missing."""
        request = queries.meters_request(
            principal_id=principal_id,
            user_id=user_id,
            meter_code=meter_code,
            feature_code=feature_code,
            feature_family_code=feature_family_code,
            expand=expand,
            coverage_profile=coverage_profile,
            coverage_basis=coverage_basis,
            coverage_budget_id=coverage_budget_id,
            coverage_as_of=coverage_as_of,
        )
        return answers.parse_meters(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def wallet_balance(
        self,
        *,
        principal_id: str,
        user_id: str | None = None,
        refresh_grants: bool = False,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> WalletBalance:
        """Credit of one (principal, user): read ``spendable_xusd``, not ``balances``."""
        request = queries.wallet_balance_request(
            principal_id=principal_id, user_id=user_id, refresh_grants=refresh_grants
        )
        return answers.parse_wallet_balance(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def ratings(
        self,
        *,
        principal_id: str,
        user_id: str | None = None,
        source_ref: str | None = None,
        lease_id: str | None = None,
        billing_account_id: str | None = None,
        billing_user_id: str | None = None,
        feature_code: str | None = None,
        meter_code: str | None = None,
        rating_kind: str | None = None,
        budget_id: str | None = None,
        rated_after: datetime | None = None,
        rated_before: datetime | None = None,
        limit: int = 200,
        cursor: str | None = None,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Listing[Rating]:
        """What the gate recorded, charged or not; narrow the time window instead of paging."""
        request = queries.ratings_request(
            principal_id=principal_id,
            user_id=user_id,
            source_ref=source_ref,
            lease_id=lease_id,
            billing_account_id=billing_account_id,
            billing_user_id=billing_user_id,
            feature_code=feature_code,
            meter_code=meter_code,
            rating_kind=rating_kind,
            budget_id=budget_id,
            rated_after=rated_after,
            rated_before=rated_before,
            limit=limit,
            cursor=cursor,
        )
        return answers.parse_ratings(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def rating(
        self,
        *,
        principal_id: str,
        rating_id: str,
        user_id: str | None = None,
        lines: bool = True,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Rating | None:
        """One recorded commit or ingest by its commit id; None where the gate has none."""
        request = queries.rating_request(principal_id=principal_id, rating_id=rating_id, user_id=user_id, lines=lines)
        return answers.parse_rating(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )

    def allocations(
        self,
        *,
        principal_id: str,
        user_id: str | None = None,
        rating_id: str | None = None,
        billing_account_id: str | None = None,
        limit: int = 200,
        cursor: str | None = None,
        timeout: Timeout | None = None,
        request_id: str | None = None,
        traceparent: str | None = None,
    ) -> Listing[Allocation]:
        """What was really charged; no allocation of a rating means that nothing was."""
        request = queries.allocations_request(
            principal_id=principal_id,
            user_id=user_id,
            rating_id=rating_id,
            billing_account_id=billing_account_id,
            limit=limit,
            cursor=cursor,
        )
        return answers.parse_allocations(
            self.send(request, timeout=timeout, request_id=request_id, traceparent=traceparent), now=self.clock()
        )
