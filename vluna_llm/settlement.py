"""What a settlement says and what its answer means. Pure: rows and answers in, requests and verdicts out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal

from .errors import (
    GateAuthError,
    GateDenied,
    GateError,
    GateRateLimited,
    GateUnavailable,
    IdempotencyConflict,
    InvalidGateRequest,
)
from .gate.models import CancelResult, CommitResult
from .gate.requests import GateRequest, cancel_request, commit_request, ingest_request
from .operation import OperationState
from .outbox import Row
from .reporting import span_of
from .types import Lease, Receipt, ReceiptState
from .usage.features import MeterNames
from .usage.meters import MetersMode, compose_lines

FAST_ATTEMPTS = 8
"""Deliveries in quick succession before a settlement is kept and tried slowly (gate contract, section 12)."""

LONGEST_WAIT = 300.0
"""Seconds between two deliveries at most, whatever a hint or a stored time says: clocks jump, and early is harmless."""

Outcome = Literal["done", "repair", "held", "retry", "retry_slowly"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do after one delivery.

    ``done`` and ``held`` end it (``held`` waits for an operator), ``repair`` books the usage by ingest, ``retry`` sends
    the same bytes again after ``delay`` seconds or the usual backoff, ``retry_slowly`` the same and tells loudly.
    """

    outcome: Outcome
    state: ReceiptState | None = None
    detail: str | None = None
    delay: float | None = None


def settle_key(row: Row) -> str:
    """The idempotency key of the row's present settlement. An ingest that repairs a commit shares the commit's base."""
    return f"{row.settle_key}:{row.state.route}"


def authorize_arguments(row: Row) -> dict[str, Any]:
    """What authorize is asked for this row; nothing in its body differs between runs of one job (rule 17)."""
    span = span_of(row)
    return {
        "principal_id": row.principal_id,
        "user_id": row.user_id,
        "feature_code": row.feature_code,
        "feature_family_code": row.feature_family_code,
        "estimated_quantity": row.estimated_input + row.estimated_output,
        "budget_id": row.budget_id,
        "lease": row.settle_key,
        "idempotency_key": row.authorize_key,
        "request_id": row.request_id,
        "traceparent": span.traceparent if span else None,
    }


def wants_lease(row: Row) -> bool:
    """Whether a job that ran without a lease asks for it before it is settled.

    Another run of it may be, or have been, charged by a commit, of which an ingest knows nothing.
    """
    return bool(row.derived and row.authorize_key and row.state.admission == "ungated" and row.body is None)


def leased(row: Row, lease: Lease, state: OperationState) -> Row:
    """The row with its lease."""
    return row.evolve(
        state=state,
        lease_token=lease.token,
        lease_id=lease.lease_id,
        feature_code=lease.feature_code,
        feature_family_code=lease.feature_family_code or row.feature_family_code,
    )


def lease_of(row: Row) -> Lease:
    """The lease as it came, from what the row keeps."""
    return Lease(row.lease_token or "", row.feature_code, row.state.dialect, row.lease_id, row.feature_family_code)


def compose(row: Row, *, mode: MetersMode, names: MeterNames, priced: Collection[str] | None) -> GateRequest:
    """The request that settles this row; its bytes are stored before they are sent and never composed again.

    Args:
        row: an operation whose settlement is pending.
        mode: how usage is split (``VLUNA_LLM_METERS``).
        names: the feature's meters.
        priced: the meters of the feature that have a price; None where that is not known.

    Raises:
        ConfigurationError: the row holds a value that cannot be sent.
    """
    state = row.state
    key = settle_key(row)
    if state.route == "cancel":
        return cancel_request(
            lease=lease_of(row), principal_id=row.principal_id, user_id=row.user_id, idempotency_key=key
        )
    assert state.usage is not None
    mode = "never" if row.unsplit else mode
    lines = compose_lines(
        state.usage, row.feature_code, mode=mode, names=names, priced=None if priced is None else frozenset(priced)
    )
    meters = {line.meter_code: line.quantity for line in lines}
    if state.route == "commit":
        return commit_request(
            lease=lease_of(row),
            principal_id=row.principal_id,
            user_id=row.user_id,
            quantity=state.usage.total_tokens,
            meters=meters,
            labels=labels_of(row),
            idempotency_key=key,
        )
    return ingest_request(
        principal_id=row.principal_id,
        user_id=row.user_id,
        feature_code=row.feature_code,
        quantity=state.usage.total_tokens,
        meters=meters,
        occurred_at=datetime.fromtimestamp(row.ended_at or row.created_at, timezone.utc),
        budget_id=row.budget_id,
        labels=labels_of(row),
        idempotency_key=key,
    )


def unpriced(row: Row, names: MeterNames, priced: Collection[str]) -> list[str]:
    """The meters to which this usage would go and which have no price."""
    assert row.state.usage is not None
    mode: MetersMode = "never" if row.unsplit else "auto"
    lines = compose_lines(row.state.usage, row.feature_code, mode=mode, names=names, priced=frozenset(priced))
    codes = [line.meter_code for line in lines] or [row.feature_code]
    return [code for code in codes if code not in priced]


def labels_of(row: Row) -> dict[str, str]:
    """The labels of a booking: the caller's own, and the references of ours that can be read back (rule 11)."""
    ours: Mapping[str, str | None] = {
        "operation_id": row.operation_id,
        "response_id": row.response_id,
        "request_id": row.request_id,
        "model": row.model,
        "usage_source": row.state.usage_source,
    }
    return {**(row.labels or {}), **{name: value for name, value in ours.items() if value}}


def judge_commit(result: CommitResult, row: Row) -> Verdict:
    """Tell a charged commit from one that was answered 200 and not charged (rule 6, gate contract 9.2).

    Under a derived key a closed lease means that another run of the same job was charged: already settled (rule 17).
    """
    if not result.parsed:
        return _unreadable(row, "booked")
    if not result.quarantined:
        return Verdict("done", "booked")
    kinds = {hint.type for hint in result.hints if hint.means_not_charged}
    closed = next((hint for hint in result.hints if hint.type == "lease.closed_at_commit"), None)
    why = ", ".join(result.not_charged_reasons)
    if closed is not None and closed.fields.get("state") != "canceled":
        if row.derived:
            return Verdict("done", "lapsed", "already settled by another run of this job")
        return Verdict("held", "quarantined", f"{why}: an earlier commit of this lease may have been charged")
    if kinds & {"feature.meter_not_allowed", "pricing.not_configured", "policy.window_not_found"} or not kinds:
        return Verdict("held", "quarantined", f"{why}: add the missing price or meter at the gate, then repair")
    return Verdict("repair", detail=f"{why}: nothing was charged")


def _unreadable(row: Row, state: ReceiptState) -> Verdict:
    """A 2xx that cannot be read is an answer (rule 7); asking again under the same key may give it readably."""
    detail = "the gate answered 2xx with a body that could not be read"
    return Verdict("retry", detail=detail) if row.attempts < _READ_AGAIN else Verdict("done", state, detail)


def judge_ingest(result: CommitResult, row: Row, *, repaired: bool) -> Verdict:
    """An ingest is never quarantined, but a line without a price is booked as 0 without any hint (contract 7.8)."""
    booked: ReceiptState = "rebooked" if repaired else "booked"
    if not result.parsed:
        return _unreadable(row, booked)
    if result.unpriced_lines:
        codes = ", ".join(sorted(line.meter_code or "?" for line in result.unpriced_lines))
        if len(result.unpriced_lines) == len(result.lines):
            return Verdict("held", "quarantined", f"no price for {codes}: add it at the gate, then repair")
        return Verdict("done", booked, f"no price for {codes}: these lines were booked as 0")
    return Verdict("done", booked)


def judge_cancel(result: CancelResult) -> Verdict:
    """A cancel has no effect on money; whatever it answers, nothing is owed."""
    return Verdict("done", "cancelled" if result.cancelled else "lapsed")


def judge_error(error: GateError, row: Row) -> Verdict:
    """What to do when a delivery was refused or got no answer (design rules 7 and 8)."""
    route = row.state.route
    if isinstance(error, GateRateLimited):
        return Verdict("retry", detail=str(error), delay=error.retry_after or 1.0)
    if isinstance(error, GateAuthError):
        return Verdict("retry_slowly", detail=str(error))
    if isinstance(error, GateUnavailable):
        if error.retryable or error.status is None:
            return Verdict("retry", detail=str(error))
        if error.code == "SERVER.CONFIG":
            return Verdict("held", "refused", str(error))
        return Verdict("retry_slowly", detail=str(error))
    if route == "cancel":
        return Verdict("done", "lapsed", str(error))
    if isinstance(error, IdempotencyConflict) and row.derived:
        return Verdict("done", "lapsed", "already settled by another run of this job")
    if isinstance(error, InvalidGateRequest) and route == "commit" and error.message in _LEASE_UNKNOWN:
        return Verdict("repair", detail=f"{error.message}: nothing was charged")
    if isinstance(error, (InvalidGateRequest, IdempotencyConflict, GateDenied)):
        return Verdict("held", "refused", str(error))
    return Verdict("retry_slowly", detail=str(error))


_READ_AGAIN = 2
_LEASE_UNKNOWN = frozenset({"lease not found", "invalid lease token", "invalid lease token format"})


def backoff(attempt: int, jitter: float) -> float:
    """Seconds to wait after the ``attempt``-th failed delivery (from 1); ``jitter`` is within 0 and 1.

    0.25 s doubling to 4 s, then, kept in the outbox, up to five minutes (gate contract, section 12).
    """
    cap = 4.0 if attempt < FAST_ATTEMPTS else LONGEST_WAIT
    base = min(cap, 0.25 * 2.0 ** min(attempt - 1, 12))
    return base * (0.5 + 0.5 * jitter)


def slow_backoff(attempt: int, jitter: float) -> float:
    """Seconds between deliveries that need an operator's hand first: 15 s doubling to five minutes."""
    return min(LONGEST_WAIT, 15.0 * 2.0 ** min(attempt - 1, 6)) * (0.5 + 0.5 * jitter)


def receipt_of(row: Row, state: ReceiptState, result: CommitResult | None, detail: str | None) -> Receipt:
    """The receipt of a settled row."""
    usage = row.state.usage
    tokens = None if row.unsplit else usage
    shown = result.amount_xusd if result is not None else None
    charged = shown if state in ("booked", "rebooked") else None if state == "held" else 0
    return Receipt(
        operation_id=row.operation_id,
        state=state,
        feature_code=row.feature_code,
        principal_id=row.principal_id,
        amount_xusd=shown,
        charged_xusd=charged,
        commit_id=result.commit_id if result is not None else None,
        input_tokens=tokens.input_tokens if tokens else 0,
        cached_tokens=tokens.cached_tokens if tokens else 0,
        output_tokens=tokens.output_tokens if tokens else 0,
        quantity=usage.total_tokens if usage else 0,
        usage_source=row.state.usage_source,
        model=row.model,
        response_id=row.response_id,
        hints=result.hints if result is not None else (),
        detail=detail,
    )


def withdrawn(row: Row) -> Row:
    """The row without the bytes of a settlement that will not be sent (again): its route has changed."""
    return row.evolve(path=None, body=None, attempts=0, next_attempt_at=0.0)
