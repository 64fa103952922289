"""What a settlement says and what its answer means. Pure: rows and answers in, requests and verdicts out."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
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
from .operation import OperationState, Part
from .outbox import Row
from .outbox.row import named
from .owed import lines_of, lines_sent
from .reporting import span_of
from .types import Lease, Receipt, ReceiptState
from .usage.features import MeterNames
from .usage.meters import MeterLine, MetersMode

FAST_ATTEMPTS = 8
"""Deliveries in quick succession before a settlement is kept and tried slowly (gate contract, section 12)."""

LONGEST_WAIT = 300.0
"""Seconds between two deliveries at most, whatever a hint or a stored time says: clocks jump, and early is harmless."""

PRICE_IS_MISSING = frozenset({"pricing_not_configured", "meter_not_allowed_for_feature", "policy_window_not_found"})
"""Reason codes of a quarantined rating that an operator has to mend before its usage can be charged."""

FRUITLESS_ROUNDS = 8
"""Ingests of one operation after which one that charged nothing at all waits for an operator: the gate tells prices by
which it does not charge, and each try leaves an entry of 0 in its books for ever."""

Outcome = Literal["done", "repair", "rest", "held", "retry", "retry_slowly", "look_up"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do after one delivery.

    ``done`` and ``held`` end it (``held`` waits for an operator), ``repair`` books the usage by ingest, ``retry`` sends
    the same bytes again after ``delay`` seconds or the usual backoff, ``retry_slowly`` the same, tells loudly and marks
    the row as one that needs an operator first. ``look_up`` asks the gate's own books (`vluna_llm.books`):
    ``uncharged`` follows where they prove that nothing was charged, ``unproven`` where they do not show enough.
    ``recorded``: the gate has a commit of ours on record, so that books which do not show it are not to be believed.

    ``shown`` is the booking that was found there; it takes the place of the answer's.

    ``rest`` is the outcome of an ingest of which lines were booked as 0: those of ``rest``, under the key number
    ``round_``, beside ``parts`` that were charged of this operation. They alone are sent again; with ``held`` as the
    outcome after an operator's repair, else by themselves. ``whole``: they are all of the operation's usage, and it is
    split anew by the prices of then.
    """

    outcome: Outcome
    state: ReceiptState | None = None
    detail: str | None = None
    delay: float | None = None
    uncharged: Verdict | None = None
    unproven: Verdict | None = None
    recorded: bool = True
    shown: CommitResult | None = None
    rest: tuple[MeterLine, ...] = ()
    parts: tuple[Part, ...] = ()
    round_: int = 0
    whole: bool = False


def settle_key(row: Row) -> str:
    """The idempotency key of the row's present settlement. An ingest that repairs a commit shares the commit's base.

    An ingest that the gate booked as 0, for want of a price, has used up its key for ever: the next one is numbered.
    """
    key = f"{row.settle_key}:{row.state.route}"
    return f"{key}:{row.state.used_up}" if row.state.route == "ingest" and row.state.used_up else key


SETTLEMENT_LABEL = "settlement"
"""The label of an ingest whose key other runs of the same job arrive at, too: the base of that key."""
ROUND_LABEL = "settlement_round"
"""The label of an ingest of what earlier ones booked as 0: the number at the end of its key."""
_READ_BACK = (SETTLEMENT_LABEL, ROUND_LABEL)


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
    if row.state.used_up:
        return False  # an ingest went out, and other runs may go on with what it left
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
    if state.rest and state.route == "ingest":
        return _rest_request(row, state.rest, key)
    meters = {line.meter_code: line.quantity for line in lines_of(row, mode, names, priced)}
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
    return _ingest(row, state.usage.total_tokens, meters, key)


def with_bytes_of_rest(row: Row) -> Row:
    """The row with the request for what is left of a partly charged ingest, where that is all that is to be sent.

    Wherever such a row can be delivered it holds these bytes: a host of an older version that shares PostgreSQL with us
    knows the whole usage only. Raises `ConfigurationError` as `compose` does.
    """
    state = row.state
    if not state.rest or state.settlement != "pending" or state.route != "ingest" or row.body is not None:
        return row
    request = _rest_request(row, state.rest, settle_key(row))
    return row.evolve(path=request.path, body=request.body)


def _rest_request(row: Row, rest: tuple[MeterLine, ...], key: str) -> GateRequest:
    """What is left of a partly charged ingest: the same lines on the same meters, whatever has a price meanwhile."""
    usage, quantity = row.state.usage, sum(line.quantity for line in rest)
    if all(line.meter_code == row.feature_code for line in rest):
        return _ingest(row, quantity, {}, key)
    if usage is not None and rest == row.state.meters:
        quantity = usage.total_tokens  # all of it, beside the total that the caller gave
    return _ingest(row, quantity, {line.meter_code: line.quantity for line in rest}, key)


def _ingest(row: Row, quantity: int, meters: Mapping[str, int], key: str) -> GateRequest:
    return ingest_request(
        principal_id=row.principal_id,
        user_id=row.user_id,
        feature_code=row.feature_code,
        quantity=quantity,
        meters=meters,
        occurred_at=datetime.fromtimestamp(row.ended_at or row.created_at, timezone.utc),
        budget_id=row.budget_id,
        labels=labels_of(row),
        idempotency_key=key,
    )


def labels_of(row: Row) -> dict[str, str]:
    """The labels of a booking: the caller's own, and the references of ours that can be read back (rule 11)."""
    ours: Mapping[str, str | None] = {
        "operation_id": row.operation_id,
        "response_id": row.response_id,
        "request_id": row.request_id,
        "model": row.model,
        "usage_source": row.state.usage_source,
        # By these the ingests of one settlement are told apart in the gate's books, which show no keys.
        SETTLEMENT_LABEL: row.settle_key if row.derived and row.state.route == "ingest" else None,
        ROUND_LABEL: str(row.state.used_up) if row.state.route == "ingest" and row.state.used_up else None,
    }
    found = {**(row.labels or {}), **{name: value for name, value in ours.items() if value}}
    for name in _READ_BACK:
        if ours[name] is None:
            found.pop(name, None)  # the caller's own would be taken for ours
    return found


def judge_commit(result: CommitResult, row: Row) -> Verdict:
    """Tell a charged commit from one that was answered 200 and not charged (rule 6, gate contract 9.2)."""
    if not result.parsed:
        return _unreadable(row)
    if not result.quarantined:
        return Verdict("done", "booked")
    kinds = {hint.type for hint in result.hints if hint.means_not_charged}
    closed = next((hint for hint in result.hints if hint.type == "lease.closed_at_commit"), None)
    why = ", ".join(result.not_charged_reasons)
    if closed is not None and closed.fields.get("state") != "canceled":
        return _doubt_of_closed(row, why)
    if kinds & {"feature.meter_not_allowed", "pricing.not_configured", "policy.window_not_found"} or not kinds:
        return Verdict("held", "quarantined", f"{why}: add the missing price or meter at the gate, then repair")
    return Verdict("repair", detail=f"{why}: nothing was charged")


def _doubt_of_closed(row: Row, why: str) -> Verdict:
    """The lease was committed before, and maybe charged. Under a derived key that was a run of the same job."""
    detail = f"{why}: an earlier commit of this lease may have been charged"
    return _look_up(
        detail,
        uncharged=Verdict("repair", detail=f"{why}: the gate's own books show that nothing was charged"),
        unproven=_ANOTHER_RUN if row.derived else Verdict("held", "quarantined", detail),
    )


def _look_up(detail: str, *, uncharged: Verdict, unproven: Verdict) -> Verdict:
    return Verdict("look_up", detail=detail, uncharged=uncharged, unproven=unproven)


_ANOTHER_RUN = Verdict("done", "lapsed", "already settled by another run of this job")
_UNTOLD = Verdict("held", "refused", "lines were booked as 0, and neither the answer nor the gate's books tell which")


def _unreadable(row: Row) -> Verdict:
    """A 2xx that cannot be read may be the gate's, or a page of something that stands before it.

    Asking again under the same key is always safe (rule 7). Where that brings nothing readable, the gate's own books
    tell whether it was charged; until they do it is never taken for booked.
    """
    detail = "it was answered 2xx with a body that is not the gate's"
    if row.attempts < _READ_AGAIN:
        return Verdict("retry", detail=detail)
    # Attempts of every kind are counted, so that one such answer after a few lost ones is no reason to slow down yet.
    soon = row.attempts < FAST_ATTEMPTS
    kept = Verdict(
        "retry" if soon else "retry_slowly", detail=f"{detail}: does VLUNA_SERVICE_BASE_URL point to the gate?"
    )
    return _look_up(detail, uncharged=kept, unproven=kept)


def judge_ingest(result: CommitResult, row: Row, *, repaired: bool) -> Verdict:
    """An ingest is never quarantined, but a line without a price is booked as 0 without any hint (contract 7.8).

    The gate answers the same to the same bytes for ever, so a repeat after a crash shows the same lines.
    """
    booked: ReceiptState = "rebooked" if repaired else "booked"
    if not result.parsed:
        return _unreadable(row)
    if result.unpriced_lines:
        rest = _unpriced_lines(result, row)
        if rest is None:
            return _look_up(
                "lines were booked as 0, and the answer does not tell how much",
                uncharged=_UNTOLD,
                unproven=_UNTOLD,
            )
        some = len(result.unpriced_lines) < len(result.lines)
        parts = (Part(result.commit_id or "", result.amount_xusd or 0),) if some else ()
        return unbilled(row, rest, parts, row.state.used_up, whole=not some and row.state.rest is None)
    return Verdict("done", booked)


def unbilled(
    row: Row, rest: tuple[MeterLine, ...], parts: tuple[Part, ...], round_: int, *, whole: bool = False
) -> Verdict:
    """Lines were booked as 0 by the ingest number ``round_``: they go out alone, under the key with the next number."""
    sofar = sum(part.charged_xusd for part in (*row.state.parts, *parts))
    detail = f"no price for {named(rest)}: booked as 0" + (f", {sofar:,} XUSD charged for the others" if sofar else "")
    if not parts and round_ >= FRUITLESS_ROUNDS:
        detail += (
            f". The gate lists a price, and {round_ + 1} ingests later it does not charge by it: mend it, then repair"
        )
        return Verdict("held", "quarantined", detail, rest=rest, round_=round_, whole=whole)
    return Verdict("rest", detail=detail, rest=rest, parts=parts, round_=round_, whole=whole)


def _unpriced_lines(result: CommitResult, row: Row) -> tuple[MeterLine, ...] | None:
    """What was sent on the meters that the answer shows without a price; None where the two do not fit together."""
    asked = {line.meter_code.lower(): line for line in lines_sent(row)}
    found = {line.meter_code.lower() for line in result.unpriced_lines}
    return tuple(asked[code] for code in sorted(found)) if found <= asked.keys() else None


def before_repair(row: Row) -> Verdict:
    """What an operator's repair of usage has to know first where a commit of it may have been charged.

    To be judged by `vluna_llm.books.judge_books`: ``repair`` means that the ingest may go out.
    """
    last = f" ({row.last_error})" if row.last_error else ""
    return Verdict(
        "look_up",
        detail=f"before the repair{last}",
        uncharged=Verdict("repair", detail="the gate's own books show that nothing was charged"),
        unproven=Verdict("held", "refused", f"not repaired: a commit of it may have been charged{last}"),
        # What was refused is not on record; what was quarantined is.
        recorded=row.receipt is not None and json.loads(row.receipt).get("state") == "quarantined",
    )


def judge_cancel(result: CancelResult) -> Verdict:
    """A cancel has no effect on money; whatever it answers, nothing is owed."""
    return Verdict("done", "cancelled" if result.cancelled else "lapsed")


def judge_error(error: GateError, row: Row) -> Verdict:
    """What to do when a delivery was refused or got no answer (design rules 7 and 8; gate contract 2, 3.4 and 12).

    ======================================  ==========================================================================
    the gate said                           then
    ======================================  ==========================================================================
    nothing; 500, 502 to 504; 408, 425      again, same key and bytes
    429                                     again at the hint's time
    401, 403 key, 404 realm, 404 route,     again slowly, aloud: no verdict on this usage; an operator mends the
    3xx, 400, 415, a page of something else setting, and then it goes out
    409, 413, 422, entitlement, disabled    the gate's own books are looked at (it may have been charged before an
    user, 500 ``SERVER.CONFIG``             answer was lost), then it is kept for the operator, with the reason
    409 under a job's key                   another run of it was there first; the books tell whether all its lines
                                            had a price
    422 ``lease not found``                 nothing was charged under it: booked by ingest
    ======================================  ==========================================================================

    A cancel moves no money (gate contract 7.6): a gate that refuses it ends it, and the lease lapses.
    """
    if isinstance(error, GateRateLimited):
        return Verdict("retry", detail=str(error), delay=error.retry_after or 1.0)
    if isinstance(error, GateUnavailable) and (error.retryable or error.status is None):
        return Verdict("retry", detail=str(error))
    if isinstance(error, GateAuthError) or (isinstance(error, GateUnavailable) and error.code != "SERVER.CONFIG"):
        return Verdict("retry_slowly", detail=str(error))
    if row.state.route == "cancel":
        return Verdict("done", "lapsed", str(error))
    if isinstance(error, IdempotencyConflict):
        return _conflict(error, row)
    if isinstance(error, InvalidGateRequest):
        if error.status in _MANGLED:
            return Verdict("retry_slowly", detail=str(error))
        if row.state.route == "commit" and error.message in _LEASE_UNKNOWN:
            repair = Verdict("repair", detail=f"{error.message}: nothing was charged")
            return _look_up(error.message, uncharged=repair, unproven=repair)
    if isinstance(error, (InvalidGateRequest, GateDenied, GateUnavailable)):
        kept = Verdict("held", "refused", str(error))
        return _look_up(str(error), uncharged=kept, unproven=kept)
    return Verdict("retry_slowly", detail=str(error))


def _conflict(error: IdempotencyConflict, row: Row) -> Verdict:
    """The gate carried out another request under our key.

    A commit may have been quarantined, which the books tell; an ingest never is. A job's key is also that of its other
    runs.
    """
    kept = _ANOTHER_RUN if row.derived else Verdict("held", "refused", str(error))
    if row.state.route == "ingest":
        if row.derived and row.state.rest:
            # What is left of this operation is booked under its next key: not to be told as charged unseen.
            kept = Verdict("held", "refused", str(error))
        return _look_up(str(error), uncharged=kept, unproven=kept)
    repair = Verdict("repair", detail="409, and the gate's own books show that nothing was charged")
    return _look_up(str(error), uncharged=repair, unproven=kept)


_READ_AGAIN = 2
_LEASE_UNKNOWN = frozenset({"lease not found", "invalid lease token", "invalid lease token format"})
_MANGLED = frozenset({400, 405, 411, 415, 431})
"""What a gate says of a request that is not as we sent it (ours is always whole JSON with all its headers)."""


def pause(verdict: Verdict, attempts: int, jitter: float, fast: Callable[[int, float], float] | None = None) -> float:
    """Seconds until the ``attempts``-th failed delivery (from 1) is tried again; ``jitter`` is within 0 and 1.

    A time that the gate gave is kept to, within `LONGEST_WAIT`; a little later, so that not all who were told the same
    come at once. ``fast`` takes the place of `backoff`.
    """
    if verdict.outcome == "retry_slowly":
        return slow_backoff(attempts, jitter)
    wait = fast or backoff
    if verdict.delay is None:
        return wait(attempts, jitter)
    return max(min(verdict.delay * (1.0 + 0.1 * jitter), LONGEST_WAIT), wait(min(attempts, 3), jitter))


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
    """The receipt of a settled row. What parts of it were charged before is in its amounts."""
    usage = row.state.usage
    tokens = None if row.unsplit else usage
    before = sum(part.charged_xusd for part in row.state.parts)
    shown = result.amount_xusd if result is not None else None
    if row.state.parts:
        shown = (shown or 0) + before
        ids = ", ".join(part.commit_id for part in row.state.parts)
        said = f"{before:,} XUSD of it were charged by {ids}"
        if said not in (detail or ""):  # a receipt that is read back says so already
            detail = f"{detail}; {said}" if detail else said
    charged = shown if state in ("booked", "rebooked") else None if state == "held" else before
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
        meters={line.meter_code: line.quantity for line in row.state.meters},
        usage_source=row.state.usage_source,
        model=row.model,
        response_id=row.response_id,
        hints=result.hints if result is not None else (),
        detail=detail,
    )


def withdrawn(row: Row) -> Row:
    """The row without the bytes of a settlement that will not be sent (again): its route has changed."""
    return row.evolve(path=None, body=None, attempts=0, next_attempt_at=0.0)
