"""What a refusal looks like to an HTTP client: a status, and an error in OpenAI's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import (
    BudgetExceeded,
    ConfigurationError,
    GateDenied,
    GateError,
    GateRateLimited,
    InvalidGateRequest,
    MissingPrincipal,
    VlunaError,
)

NOBODY_PAYS = (
    "This key belongs to no customer, so nobody would be billed and the call was not made. The operator of this proxy "
    'can give the key or its team the metadata {"vluna": {"principal_id": "..."}}, or say in '
    "VLUNA_LLM_LITELLM_IDENTITY which field of the key names the customer."
)
_MISCONFIGURED = (
    "Billing is not set up for this call, so it was not made. The log of the proxy tells its operator what to change."
)
_AWAY = "Billing cannot be asked at the moment, so the call was not made. Try again later."


@dataclass(frozen=True, slots=True)
class Answer:
    """The refusal of one request.

    Attributes:
        status: the HTTP status.
        kind: why, in one word: the member ``type`` of the error.
        code: the gate's own code, or the kind again: the member ``code``.
        message: for the client to read; names nothing of the proxy's inside.
        retry_after: seconds after which it may be tried again.
        hints: the gate's hints, as it sent them.
    """

    status: int
    kind: str
    code: str
    message: str
    retry_after: int | None = None
    hints: tuple[dict[str, Any], ...] = ()
    gate: dict[str, Any] = field(default_factory=dict)

    def details(self) -> dict[str, Any]:
        """What stands under ``provider_specific_fields.vluna``: the same in every line and on every route."""
        told: dict[str, Any] = {"reason": self.kind, "code": self.code, "message": self.message, **self.gate}
        if self.retry_after is not None:
            told["retry_after"] = self.retry_after
        told["hints"] = list(self.hints)
        return told

    def error(self) -> dict[str, Any]:
        """The member ``error`` of the body."""
        return {
            "message": self.message,
            "type": self.kind,
            "param": None,
            "code": self.code,
            "provider_specific_fields": {"vluna": self.details()},
        }

    def headers(self) -> dict[str, str]:
        """``Retry-After`` where there is something to wait for."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def answer_to(error: VlunaError) -> Answer:
    """How a refusal is told to a client over HTTP, such as that of a proxy or a web application.

    A denial is the customer's business and is told as the gate put it. What only the operator can mend (a key that
    names nobody, a setting, a gate that is away) is told without what the operator alone should see.
    """
    if isinstance(error, GateDenied):
        forbidden = error.reason in ("entitlement", "disabled") or error.status == 403
        return _of_gate(error, 403 if forbidden else 402, error.reason)
    if isinstance(error, GateRateLimited):
        seconds = None if error.retry_after is None else max(1, math.ceil(error.retry_after))
        return _of_gate(error, 429, "rate_limited", seconds)
    if isinstance(error, InvalidGateRequest):
        return _of_gate(error, 400, "invalid_request_error")
    if isinstance(error, MissingPrincipal):
        return Answer(403, "missing_principal", "missing_principal", NOBODY_PAYS)
    if isinstance(error, BudgetExceeded):
        return Answer(402, "budget", "budget_exceeded", str(error))
    if getattr(error, "unmetered", False):
        return Answer(403, "not_metered", "not_metered", str(error))
    if isinstance(error, ConfigurationError):
        return Answer(403, "billing_misconfigured", "billing_misconfigured", _MISCONFIGURED)
    return Answer(503, "billing_unavailable", "billing_unavailable", _AWAY)


def _of_gate(error: GateError, status: int, kind: str, retry_after: int | None = None) -> Answer:
    known = {"status": error.status, "trace_id": error.trace_id, "request_id": error.request_id}
    return Answer(
        status,
        kind,
        error.code or kind,
        error.message,
        retry_after,
        tuple(hint.as_dict() for hint in error.hints),
        {name: value for name, value in known.items() if value is not None},
    )
