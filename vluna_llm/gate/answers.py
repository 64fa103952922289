"""From the bytes of an answer to a typed result, or to the right error. No I/O; the wall clock is handed in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar

from ..errors import GateUnavailable
from ..types import Dialect, Hint, Lease
from .failures import error_from, instant, is_missing_route, trace_id_of
from .models import (
    UNPRICED_LINE,
    BatchItem,
    BatchResult,
    BatchWarning,
    CancelResult,
    CommitLine,
    CommitResult,
    IngestResult,
)
from .readings import (
    Allocation,
    Envelope,
    FeatureLimits,
    Health,
    IssuedToken,
    Listing,
    Meter,
    Preflight,
    Rating,
    Reading,
    WalletBalance,
    integer,
)
from .requests import GateRequest, RequestKind
from .wire import Answer

R = TypeVar("R", bound=Reading)
B = TypeVar("B", bound=CommitResult)

_EMPTY: Mapping[str, Any] = {}


def parse_lease(answer: Answer, *, now: float, request: GateRequest | None = None) -> Lease:
    """Read the answer of authorize; the dialect is told by the member that carries the lease (gate contract 14).

    Raises:
        GateError: the gate refused; see ``failures``.
        GateUnavailable: a 2xx answer without a lease, which is no gate's answer to authorize.
    """
    body = _success(answer, "authorize", now)
    envelope = _mapping(body)
    data = _mapping(envelope.get("data"))
    token: Any = data.get("lease_token")
    dialect: Dialect = "lease_token"
    if not isinstance(token, str) or not token:
        token, dialect = data.get("lease"), "lease"
    if not isinstance(token, str) or not token:
        raise GateUnavailable(
            "the answer to authorize carries no lease",
            status=answer.status,
            hints=Hint.parse_all(envelope.get("hints")),
            trace_id=trace_id_of(envelope),
            request_id=answer.request_id,
            raw=_raw(answer, body),
            advice="Check that VLUNA_SERVICE_BASE_URL points to a gate whose dialect is known here.",
        )
    # The gate's own spelling of the feature is what commit must repeat.
    return Lease(
        token=token,
        feature_code=_text(data.get("feature_code")) or _asked_feature(request),
        dialect=dialect,
        lease_id=_text(data.get("lease_id")),
        feature_family_code=_text(data.get("feature_family_code")),
        budget_id=_text(data.get("budget_id")),
        window_start=instant(data.get("window_start")),
        window_end=instant(data.get("window_end")),
        hints=Hint.parse_all(envelope.get("hints")),
    )


def parse_commit(answer: Answer, *, now: float) -> CommitResult:
    """Read the answer of a single commit and tell quarantined from billed (gate contract 9.2).

    Raises:
        GateError: the gate refused; see ``failures``. Never for an answer in 2xx.
    """
    return _booking(CommitResult, answer, _success(answer, "commit", now))


def parse_ingest(answer: Answer, *, now: float) -> IngestResult:
    """Read the answer of an ingest, which shows unpriced lines only in the lines themselves (gate contract 7.8).

    Raises:
        GateError: the gate refused; see ``failures``. Never for an answer in 2xx.
    """
    return _booking(IngestResult, answer, _success(answer, "ingest", now))


def parse_cancel(answer: Answer, *, now: float) -> CancelResult:
    """Read the answer of a cancel; a gate without that route means that the lease lapses by itself (design rule 10).

    Raises:
        GateError: the gate refused; see ``failures``. Never for an answer in 2xx.
    """
    if not 200 <= answer.status < 300:
        body = _decoded(answer)
        error = error_from(answer, body, "cancel", now=now)
        if not is_missing_route(error):
            raise error
        return CancelResult(answer.status, True, lapsed=True, request_id=answer.request_id, raw=_raw(answer, body))
    body = _decoded(answer)
    envelope = _mapping(body)
    data = _mapping(envelope.get("data"))
    cancelled = data.get("cancelled")
    return CancelResult(
        answer.status,
        isinstance(cancelled, bool),
        cancelled=cancelled is True,
        hints=Hint.parse_all(envelope.get("hints")),
        trace_id=trace_id_of(envelope) or _text(data.get("trace_id")),
        request_id=answer.request_id,
        raw=_raw(answer, body),
    )


def parse_commit_batch(answer: Answer, *, now: float) -> BatchResult:
    """Read the answer of a batch, with the warnings that it does not give itself (gate contract 7.7).

    Raises:
        GateError: the gate refused; see ``failures``. Never for an answer in 2xx.
    """
    body = _success(answer, "commit_batch", now)
    envelope = _mapping(body)
    data = _mapping(envelope.get("data"))
    listed = data.get("items")
    items = tuple(_batch_item(place, item, answer) for place, item in enumerate(listed)) if _is_list(listed) else ()
    warnings: list[BatchWarning] = []
    if any(item.error_type == "SERVER.ERROR" for item in items):
        warnings.append("rolled_back")
    if any(item.status in ("committed", "duplicate") for item in items):
        warnings += ["leases_still_active", "hints_hidden"]
    return BatchResult(
        answer.status,
        _is_list(listed),
        items=items,
        committed_count=integer(data.get("committed_count")),
        failed_count=integer(data.get("failed_count")),
        warnings=tuple(warnings),
        trace_id=trace_id_of(envelope),
        request_id=answer.request_id,
        raw=_raw(answer, body),
    )


def parse_preflight(answer: Answer, *, now: float) -> Preflight:
    """Read the answer of a preflight.

    Raises:
        InvalidGateRequest: this gate has none (404, dialect ``lease_token``).
        GateError: the gate refused; see ``failures``.
    """
    return _one(Preflight, answer, "preflight", now)


def parse_health(answer: Answer, *, now: float) -> Health:
    """Read the health check.

    Raises:
        GateError: what answered is no healthy gate.
    """
    return _one(Health, answer, "health", now)


def parse_wallet_balance(answer: Answer, *, now: float) -> WalletBalance:
    """Read a wallet. Raises ``GateError`` where the gate refused."""
    return _one(WalletBalance, answer, "wallet_balance", now)


def parse_issued_token(answer: Answer, *, now: float) -> IssuedToken:
    """Read an issued token. Raises ``GateError`` where the gate refused."""
    return _one(IssuedToken, answer, "issue_token", now)


def parse_rating(answer: Answer, *, now: float) -> Rating | None:
    """Read one rating; None where the gate has none of this id. Raises ``GateError`` where the gate refused."""
    if answer.status == 404:
        error = error_from(answer, _decoded(answer), "rating", now=now)
        if error.code == "RESOURCE.NOT_FOUND" and not is_missing_route(error):
            return None
        raise error
    return _one(Rating, answer, "rating", now)


def parse_limits(answer: Answer, *, now: float) -> Listing[FeatureLimits]:
    """Read limits. Raises ``GateError`` where the gate refused."""
    return _many(FeatureLimits, answer, "limits", now)


def parse_meters(answer: Answer, *, now: float) -> Listing[Meter]:
    """Read meters. Raises ``GateError`` where the gate refused."""
    return _many(Meter, answer, "meters", now)


def parse_ratings(answer: Answer, *, now: float) -> Listing[Rating]:
    """Read ratings. Raises ``GateError`` where the gate refused."""
    return _many(Rating, answer, "ratings", now)


def parse_allocations(answer: Answer, *, now: float) -> Listing[Allocation]:
    """Read allocations. Raises ``GateError`` where the gate refused."""
    return _many(Allocation, answer, "allocations", now)


def _asked_feature(request: GateRequest | None) -> str:
    asked = _mapping(json.loads(request.body)) if request is not None else _EMPTY
    return _text(asked.get("feature_code")) or ""


def _success(answer: Answer, kind: RequestKind, now: float) -> object:
    body = _decoded(answer)
    if not 200 <= answer.status < 300:
        raise error_from(answer, body, kind, now=now)
    return body


def _decoded(answer: Answer) -> object:
    try:
        return json.loads(answer.body)
    except (ValueError, RecursionError):
        return None


def _raw(answer: Answer, body: object) -> Any:
    return body if body is not None else answer.body


def _booking(model: Callable[..., B], answer: Answer, body: object) -> B:
    envelope = _mapping(body)
    return _booking_of(
        model,
        answer,
        envelope.get("data"),
        Hint.parse_all(envelope.get("hints")),
        trace_id_of(envelope),
        _raw(answer, body),
    )


def _booking_of(
    model: Callable[..., B], answer: Answer, value: object, hints: tuple[Hint, ...], trace_id: str | None, raw: Any
) -> B:
    data = _mapping(value)
    listed = data.get("lines")
    lines = tuple(map(_line, listed)) if _is_list(listed) else ()
    reasons: tuple[str, ...] = ()
    if model is not IngestResult:
        reasons = tuple(hint.type for hint in hints if hint.means_not_charged)
        if not reasons and any(line.unpriced for line in lines):
            reasons = (UNPRICED_LINE,)
    return model(
        answer.status,
        _text(data.get("commit_id")) is not None,
        commit_id=_text(data.get("commit_id")),
        amount_xusd=integer(data.get("amount_xusd")),
        cost_xusd=integer(data.get("cost_xusd")),
        lines=lines,
        hints=hints,
        quarantined=bool(reasons),
        not_charged_reasons=reasons,
        budget_id=_text(data.get("budget_id")),
        trace_id=trace_id,
        request_id=answer.request_id,
        raw=raw,
    )


def _line(value: object) -> CommitLine:
    line = _mapping(value)
    snapshot = _mapping(line.get("pricing_snapshot"))
    return CommitLine(
        meter_code=_text(line.get("meter_code")) or "",
        quantity=integer(line.get("quantity_minor")),
        amount_xusd=integer(line.get("amount_xusd")),
        unit_price_xusd=integer(line.get("unit_price_xusd")),
        unit_quantity=integer(line.get("unit_quantity_minor", snapshot.get("unit_quantity_minor"))),
        cost_xusd=integer(line.get("cost_xusd")),
        source=_text(_mapping(snapshot.get("provenance")).get("source")),
        rating_status=_text(line.get("rating_status")),
        line_id=_text(line.get("line_id")),
        raw=line,
    )


def _batch_item(place: int, value: object, answer: Answer) -> BatchItem:
    item = _mapping(value)
    error = _mapping(item.get("error"))
    commit = item.get("commit")
    index = integer(item.get("index"))
    return BatchItem(
        index=place if index is None else index,
        status=_text(item.get("status")) or "",
        commit=_booking_of(CommitResult, answer, commit, Hint.parse_all(_mapping(commit).get("hints")), None, commit)
        if isinstance(commit, Mapping)
        else None,
        error_type=_text(error.get("type")),
        error_details=_text(error.get("details")),
    )


def _envelope(answer: Answer, body: object, *, parsed: bool) -> Envelope:
    envelope = _mapping(body)
    return Envelope(
        status=answer.status,
        parsed=parsed,
        hints=Hint.parse_all(envelope.get("hints")),
        trace_id=trace_id_of(envelope),
        request_id=answer.request_id,
        raw=_raw(answer, body),
    )


def _one(model: type[R], answer: Answer, kind: RequestKind, now: float) -> R:
    body = _success(answer, kind, now)
    data = _mapping(body).get("data")
    reading = model.model_validate({str(name): member for name, member in _mapping(data).items()})
    reading._envelope = _envelope(answer, body, parsed=isinstance(data, Mapping))
    return reading


def _many(model: type[R], answer: Answer, kind: RequestKind, now: float) -> Listing[R]:
    body = _success(answer, kind, now)
    envelope = _mapping(body)
    data = envelope.get("data")
    meta = _mapping(envelope.get("meta"))
    items: list[R] = []
    if isinstance(data, list):
        items = [model.model_validate(item) for item in data if isinstance(item, Mapping)]
    return Listing(
        items=tuple(items),
        status=answer.status,
        parsed=isinstance(data, list),
        next_cursor=_text(meta.get("next_cursor")),
        has_more=meta.get("has_more") is True,
        hints=Hint.parse_all(envelope.get("hints")),
        trace_id=trace_id_of(envelope),
        request_id=answer.request_id,
        raw=_raw(answer, body),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else _EMPTY


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
