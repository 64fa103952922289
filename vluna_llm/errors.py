"""Everything that vluna_llm raises on purpose, and what to do about it.

::

    VlunaError
    ├── ConfigurationError        a setting is missing or wrong; raised before anything is spent
    ├── MissingPrincipal          nobody to bill was named
    ├── BudgetExceeded            the task has spent what its call_context allows; the gate was not asked
    ├── OutboxUnavailable         the journal cannot be written, and the settings say to refuse then
    └── GateError                 the gate answered, or could not be asked
        ├── GateDenied            this customer may not: credit, quota, budget, entitlement, disabled
        ├── GateRateLimited       not now; ``retry_after`` seconds
        ├── InvalidGateRequest    the request can never be booked (422)
        ├── IdempotencyConflict   the key was used with another body (409)
        ├── GateAuthError         key or realm are refused (401, 403, 404 realm)
        └── GateUnavailable       no answer, or an answer that is none (5xx, time-out, not a gate)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .types import Hint

DenialReason = Literal["insufficient_credit", "quota", "budget", "entitlement", "disabled"]
LimitName = Literal["max_amount_xusd", "max_tokens"]


class VlunaError(Exception):
    """Root of all errors of this package."""

    unsafe_to_replay = True
    """Read by the OpenAI Agents SDK: none of its retry policies repeats a call that ended like this (design rule 8)."""


class ConfigurationError(VlunaError):
    """A setting is missing or wrong. Raised before anything is spent; the text names the setting and the fix."""


class MissingPrincipal(VlunaError):
    """A metered call was made and nobody was named to pay for it. Raised before the provider is called."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message
            or "No principal for this call: nobody would be billed. Wrap the call in "
            '`with call_context(principal_id="...")`, use `vluna.bind(client, principal_id="...")`, '
            "or set VLUNA_LLM_PRINCIPAL for a program with a single customer."
        )


class BudgetExceeded(VlunaError):
    """The next call would take a task beyond what its ``call_context(max_amount_xusd=..., max_tokens=...)`` allows.

    Raised before the gate and the provider are asked. Not to be mixed up with a budget that the gate keeps
    (``budget_id``), which refuses by `GateDenied` with the reason ``budget``.

    Attributes:
        limit: which one: ``max_amount_xusd`` or ``max_tokens``.
        maximum: its value.
        spent: what the task has used, in the limit's unit.
        in_flight: what its calls under way will use by their estimates.
        asked: what the refused call would have used by its estimate; 0 where that is not known.
    """

    def __init__(self, *, limit: LimitName, maximum: int, spent: int, in_flight: int, asked: int) -> None:
        self.limit: LimitName = limit
        self.maximum = maximum
        self.spent = spent
        self.in_flight = in_flight
        self.asked = asked
        unit = "XUSD" if limit == "max_amount_xusd" else "tokens"
        super().__init__(
            f"This task may use {maximum} {unit} ({limit} of its call_context): {spent} are spent, {in_flight} are in "
            f"flight, and the next call needs about {asked}. It was not made; raise {limit} or end the task."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _budget_exceeded, (self.limit, self.maximum, self.spent, self.in_flight, self.asked)


def _budget_exceeded(limit: LimitName, maximum: int, spent: int, in_flight: int, asked: int) -> BudgetExceeded:
    return BudgetExceeded(limit=limit, maximum=maximum, spent=spent, in_flight=in_flight, asked=asked)


class OutboxUnavailable(VlunaError):
    """The journal cannot be written: disk full, read-only or corrupt.

    Reaches the caller, before the provider is called, only with ``on_outbox_unavailable="deny"``.
    """


class GateError(VlunaError):
    """An answer of the gate that is not a success, or no answer at all.

    Attributes:
        status: HTTP status, None where no answer came.
        code: the gate's error code, e.g. ``LIMIT.RATE_EXCEEDED``.
        message: the gate's own text.
        hints: the hints of the answer.
        trace_id: the gate's trace id, where it gives one.
        request_id: the ``X-Request-Id`` that went with the request.
        advice: one sentence that says what to do.
        retryable: whether the same request, same key and same bytes, may be sent again.
        raw: the answer as it came, decoded where it was JSON.
    """

    advice_default = "Look at the code and the message of the gate."

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        hints: Sequence[Hint] = (),
        trace_id: str | None = None,
        request_id: str | None = None,
        advice: str | None = None,
        retryable: bool = False,
        raw: Any = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.message = message
        self.status = status
        self.code = code
        self.hints = tuple(hints)
        self.trace_id = trace_id
        self.request_id = request_id
        self.advice = advice or self.advice_default
        self.retryable = retryable
        self.raw = raw
        self.meta = dict(meta or {})
        super().__init__(self._text())

    def _text(self) -> str:
        head = " ".join(str(part) for part in (self.status, self.code) if part is not None)
        tail = f" (request id {self.request_id})" if self.request_id else ""
        return f"{head + ': ' if head else ''}{self.message}. {self.advice}{tail}"

    def hint(self, kind: str) -> Hint | None:
        """The first hint of this type, or None."""
        return next((hint for hint in self.hints if hint.type == kind), None)


class GateDenied(GateError):
    """The gate refused the call for this customer; the provider was not called.

    ``reason`` says why: ``insufficient_credit``, ``quota``, ``budget``, ``entitlement`` or ``disabled``. A denial is
    an answer for the customer, not a fault: do not retry it and do not route around it.
    """

    advice_default = "Tell the customer; the call was not made."

    def __init__(self, message: str, *, reason: DenialReason, **details: Any) -> None:
        self.reason: DenialReason = reason
        super().__init__(message, **details)


class GateRateLimited(GateError):
    """The customer's rate window is full (429); the provider was not called. ``retry_after`` is in seconds."""

    advice_default = "Try again after retry_after seconds."

    def __init__(self, message: str, *, retry_after: float | None = None, **details: Any) -> None:
        self.retry_after = retry_after
        super().__init__(message, **details)


class InvalidGateRequest(GateError):
    """The gate can never book this call as asked (422): unknown feature, no policy, bad field."""

    advice_default = "Correct the feature code, its policy or the field that the message names."


class IdempotencyConflict(GateError):
    """The idempotency key was used before with another body (409)."""

    advice_default = "Use a key that is unique for each piece of work."


class GateAuthError(GateError):
    """The gate refuses the service key or the realm (401, 403, 404 ``unknown_realm``)."""

    advice_default = "Check VLUNA_SERVICE_KEY_ID, VLUNA_SERVICE_KEY_SECRET and VLUNA_REALM_ID."


class GateUnavailable(GateError):
    """The gate could not be asked, or what answered is not a working gate: transport, time-out, 5xx."""

    advice_default = "Check that VLUNA_SERVICE_BASE_URL points to a running gate."
