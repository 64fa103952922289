"""From an answer that is no success to the error that says what to do (design rule 8, gate contract 2 and 3.4)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from ..errors import (
    DenialReason,
    GateAuthError,
    GateDenied,
    GateError,
    GateRateLimited,
    GateUnavailable,
    IdempotencyConflict,
    InvalidGateRequest,
)
from ..types import Hint
from .requests import RequestKind
from .wire import Answer, TransportError

_URL = "VLUNA_SERVICE_BASE_URL"
_EVERY_GATE_HAS: frozenset[RequestKind] = frozenset({"authorize", "commit", "ingest"})

_ADVICE_DENIED: Mapping[DenialReason, str] = {
    "insufficient_credit": "Top up this customer's credit, or tell the customer; the call was not made",
    "quota": "Wait for the next quota window (see limits) or raise the quota; the call was not made",
    "budget": "Raise or refill the budget; the call was not made",
    "entitlement": "Grant this customer the feature, or tell the customer; the call was not made",
    "disabled": "Enable this billing user at the gate, or tell the customer; the call was not made",
}


def error_from(answer: Answer, body: object, kind: RequestKind, *, now: float) -> GateError:
    """The error for an answer outside 2xx.

    ``body`` is the decoded JSON, None where it was none; ``now`` is wall-clock seconds since the epoch, to turn the
    gate's ``until`` into a wait. Envelopes of a gate in development mode (no ``ok``, no ``code``) are read as well.
    """
    status = answer.status
    envelope: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
    code = _text(envelope.get("code"))
    message = _text(envelope.get("message")) or (f"HTTP {status}" if body is None else "the gate gave no message")
    hints = Hint.parse_all(envelope.get("hints"))
    meta = envelope.get("meta")
    details: dict[str, Any] = {
        "status": status,
        "code": code,
        "hints": hints,
        "trace_id": trace_id_of(envelope),
        "request_id": answer.request_id,
        "raw": body if body is not None else answer.body[:2000].decode("utf-8", "replace"),
        "meta": meta if isinstance(meta, Mapping) else None,
    }
    # Every verdict of a gate has a code; only its unforeseen errors may lack one (development mode). A proxy's own
    # JSON, e.g. {"message": "no route"}, is nothing that a gate has said about this customer.
    is_envelope = code is not None or (status >= 500 and "message" in envelope)

    if 300 <= status < 400:
        return GateUnavailable(
            f"the address redirects (HTTP {status}) and redirects are not followed",
            advice=f"Set {_URL} to the final address, scheme and path included.",
            **details,
        )
    if status in (502, 503, 504) or (status >= 500 and not is_envelope):
        return GateUnavailable(message, retryable=True, advice="Same key, same bytes may be sent again.", **details)
    if not is_envelope:
        return GateUnavailable(
            f"what answered (HTTP {status}) is not a gate",
            advice=f"Check that {_URL} points to a running gate, path included (usually ending in /mgt/v1).",
            retryable=status in (408, 425, 429),
            **details,
        )
    if status == 402:
        reason = _money_reason(code, message)
        return GateDenied(message, reason=reason, advice=_denied(reason), **details)
    if status == 403 and code is not None and code.startswith("ENTITLEMENT."):
        return GateDenied(message, reason="entitlement", advice=_denied("entitlement"), **details)
    if code == "AUTH.BILLING_USER_DISABLED":
        return GateDenied(message, reason="disabled", advice=_denied("disabled"), **details)
    if status == 429:
        wait = _retry_after(hints, answer.headers, now)
        advice = None if wait is None else f"Try again after {wait:.0f} seconds."
        return GateRateLimited(message, retry_after=wait, advice=advice, **details)
    if status == 409:
        return IdempotencyConflict(message, **details)
    if status in (401, 403) or code == "AUTH.UNKNOWN_REALM":
        return GateAuthError(message, advice=_auth_advice(code, message), **details)
    if status in (404, 405):
        return _not_found(message, kind, details)
    if status == 422:
        return InvalidGateRequest(message, **details)
    if 400 <= status < 500:
        return InvalidGateRequest(message, advice="The gate cannot read this request; do not send it again.", **details)
    if code == "SERVER.CONFIG":
        return GateUnavailable(
            message,
            advice="Correct the gate's configuration (policies, prices, ranges); sending again is useless.",
            **details,
        )
    return GateUnavailable(message, retryable=True, advice="Same key, same bytes may be sent again.", **details)


def error_from_transport(error: TransportError, *, request_id: str | None) -> GateUnavailable:
    """The error for a request that got no answer; ``meta["transport"]`` says connect, timeout or broken."""
    return GateUnavailable(
        f"no answer from the gate: {error}",
        request_id=request_id,
        retryable=True,
        meta={"transport": error.fault},
        advice=f"Check that {_URL} points to a running gate.",
    )


def trace_id_of(envelope: Mapping[str, Any]) -> str | None:
    """The gate's trace id, where one was given (the newest dialect does)."""
    meta = envelope.get("meta")
    for holder in (envelope, meta if isinstance(meta, Mapping) else {}):
        for name in ("trace_id", "traceId"):
            if isinstance(holder.get(name), str):
                return str(holder[name])
    return None


def is_missing_route(error: GateError) -> bool:
    """Whether the gate said that it has no such route: how the dialect without cancel or preflight shows."""
    return error.status in (404, 405) and error.message.startswith("Cannot ")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _denied(reason: DenialReason) -> str:
    return _ADVICE_DENIED[reason] + "."


def _money_reason(code: str | None, message: str) -> DenialReason:
    # Three of the four 402 share one code, so the message decides (gate contract 1.11).
    text = message.lower()
    if (code or "").startswith("BUDGET.") or "budget" in text:
        return "budget"
    if "quota" in text:
        return "quota"
    return "insufficient_credit"


def _auth_advice(code: str | None, message: str) -> str:
    if code == "AUTH.UNKNOWN_REALM" or message == "realm_inactive":
        return "Check VLUNA_REALM_ID: the realm is unknown, deleted or suspended."
    if code == "AUTH.SERVICE_KEY_NOT_FOUND":
        return "Check VLUNA_SERVICE_KEY_ID."
    if code in ("AUTH.SERVICE_KEY_DISABLED", "AUTH.SERVICE_KEY_EXPIRED"):
        return "Make a new service key and set VLUNA_SERVICE_KEY_ID and VLUNA_SERVICE_KEY_SECRET."
    if code == "AUTH.SERVICE_KEY_REALM_FORBIDDEN":
        return "Check that VLUNA_SERVICE_KEY_ID belongs to VLUNA_REALM_ID."
    if code == "AUTH.INVALID_SERVICE_SIGNATURE":
        return "Check VLUNA_SERVICE_KEY_SECRET, and that no proxy rewrites the path of VLUNA_SERVICE_BASE_URL."
    return GateAuthError.advice_default


def _not_found(message: str, kind: RequestKind, details: dict[str, Any]) -> GateError:
    if kind in _EVERY_GATE_HAS:
        # What is unknown there is answered 422. No fault of this customer, and usage must not be thrown away for it.
        return GateUnavailable(
            message,
            advice=f"The gate has no such route: check the path of {_URL} (usually ending in /mgt/v1).",
            **details,
        )
    if message.startswith("Cannot "):
        return InvalidGateRequest(message, advice="This gate has no such route.", **details)
    return InvalidGateRequest(message, advice="The gate knows no such thing; check the id.", **details)


def _retry_after(hints: tuple[Hint, ...], headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait: the hint's ``until``, else its ``seconds``, else ``Retry-After``; never negative."""
    for hint in hints:
        if hint.type != "rate.limit":
            continue
        until = instant(hint.fields.get("until"))
        if until is not None:
            return max(0.0, until.timestamp() - now)
        seconds = hint.fields.get("seconds")
        if isinstance(seconds, (int, float)) and not isinstance(seconds, bool):
            return max(0.0, float(seconds))
    header = headers.get("retry-after", "").strip()
    if header.isdecimal():
        return float(header)
    if header:
        try:
            return max(0.0, parsedate_to_datetime(header).timestamp() - now)
        except ValueError:
            return None
    return None


def instant(value: object) -> datetime | None:
    """Read a time as the gate writes it (``2026-11-21T03:18:00.000Z``); None for anything else."""
    if not isinstance(value, str):
        return None
    try:
        # Python 3.10 knows neither the Z nor fractions of other than three or six digits.
        moment = datetime.fromisoformat(value[:-1] + "+00:00" if value.endswith("Z") else value)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)
