"""What the gate's answer, or its silence, means for the call. Pure: integrations act on what is decided here.

The table (design rules 8 and 9), for ``enforce``; ``observe`` never refuses:

==================================  =====================  ==========================================
what authorize gave                 the call               why
==================================  =====================  ==========================================
a lease                             runs                   allowed
402, 403 entitlement, disabled      refused                an answer for the customer
429                                 refused                an answer for the customer
422 and the like                    refused                it could never be booked
no answer, 5xx                      ungated or refused     ``on_gate_unavailable``
401, 403 key, 404 realm, 409,       ungated or refused     ``on_gate_unavailable``, and loud: an operator
500 ``SERVER.CONFIG``                                      has to do something
==================================  =====================  ==========================================

An ungated call runs without a lease and its usage is booked later by ingest. While the gate cannot be asked, a customer
who was just denied stays denied, and nobody may run more than a capped number of calls ungated.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .errors import (
    GateAuthError,
    GateDenied,
    GateError,
    GateRateLimited,
    GateUnavailable,
    IdempotencyConflict,
    InvalidGateRequest,
)
from .types import Lease

if TYPE_CHECKING:
    from .settings import Mode, OnUnavailable

Action = Literal["allow", "ungated", "refuse"]
Severity = Literal["quiet", "warn", "loud"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with one call.

    Attributes:
        action: ``allow`` runs it under its lease, ``ungated`` runs it without one, ``refuse`` raises ``error`` before
            the provider is called.
        reason: one sentence for people.
        severity: how to tell: ``quiet`` (normal), ``warn`` (seen by the operator), ``loud`` (money or configuration).
        error: what to raise; None unless refused.
        bookable: whether an ingest of this call's usage can succeed as things are; False where the gate refuses the
            feature or the user altogether, so that the loss is told now.
        denial: the denial that the gate gave, to be remembered for the time when it cannot be asked.
    """

    action: Action
    reason: str
    severity: Severity = "quiet"
    error: GateError | None = None
    bookable: bool = True
    denial: GateDenied | None = None

    @property
    def runs(self) -> bool:
        """Whether the provider may be called."""
        return self.action != "refuse"


_ALLOWED = Decision("allow", "the gate gave a lease")


def decide(
    outcome: Lease | GateError,
    *,
    mode: Mode,
    on_gate_unavailable: OnUnavailable = "allow",
    recent_denial: GateDenied | None = None,
    ungated_room: bool = True,
) -> Decision:
    """Decide from the outcome of authorize.

    Args:
        outcome: the lease, or the error.
        mode: ``enforce`` refuses; anything else never does.
        on_gate_unavailable: what a gate that cannot be asked means.
        recent_denial: the last denial of this customer for this feature, if it is recent; it stands while the gate
            cannot be asked, and is ignored when the gate answers.
        ungated_room: whether this customer may run another call ungated (see `UngatedCap`).
    """
    if isinstance(outcome, Lease):
        return _ALLOWED
    if isinstance(outcome, (GateDenied, GateRateLimited)):
        return _denied(outcome, enforce=mode == "enforce")
    if isinstance(outcome, InvalidGateRequest):
        return _invalid(outcome, enforce=mode == "enforce")
    return _unavailable(
        outcome,
        enforce=mode == "enforce",
        allow=on_gate_unavailable == "allow",
        recent_denial=recent_denial,
        room=ungated_room,
    )


def _denied(error: GateDenied | GateRateLimited, *, enforce: bool) -> Decision:
    denial = error if isinstance(error, GateDenied) else None
    what = f"the gate denied it ({error.reason})" if isinstance(error, GateDenied) else "the rate window is full"
    if enforce:
        return Decision("refuse", what, error=error, denial=denial)
    # Ingest checks neither credit nor quota nor rate, but the entitlement and the user (gate contract 7.8, 10.15).
    bookable = denial is None or denial.reason not in ("entitlement", "disabled")
    tail = "it runs in observe mode" + (" and is booked later" if bookable else ", and its usage cannot be booked")
    return Decision("ungated", f"{what}; {tail}", "warn" if bookable else "loud", bookable=bookable, denial=denial)


def _invalid(error: InvalidGateRequest, *, enforce: bool) -> Decision:
    if enforce:
        return Decision("refuse", f"it could never be booked: {error.message}", "loud", error, bookable=False)
    reason = f"it runs in observe mode, but its usage cannot be booked: {error.message}"
    return Decision("ungated", reason, "loud", bookable=False)


def _unavailable(
    error: GateError, *, enforce: bool, allow: bool, recent_denial: GateDenied | None, room: bool
) -> Decision:
    severity: Severity = "warn" if isinstance(error, GateUnavailable) and error.retryable else "loud"
    why = _why(error)
    if not enforce:
        return Decision("ungated", f"{why}; it runs in observe mode and is booked later", severity)
    if recent_denial is not None:
        stands = restated(recent_denial)
        stands.__cause__ = error
        return Decision(
            "refuse", f"{why}; the last answer for this customer was a denial, and stands", severity, stands
        )
    if allow and room:
        return Decision("ungated", f"{why}; it runs without a lease and is booked later", severity)
    if allow:
        reason = f"{why}, and this customer has run as many calls without a lease as are allowed"
        return Decision("refuse", reason, "loud", _as_unavailable(error, reason))
    return Decision("refuse", f"{why}, and on_gate_unavailable is deny", severity, _as_unavailable(error, None))


def _why(error: GateError) -> str:
    if isinstance(error, GateAuthError):
        return "the gate refuses our key or realm"
    if isinstance(error, IdempotencyConflict):
        return "the gate knows this idempotency key with another request"
    if isinstance(error, GateUnavailable) and not error.retryable:
        return "the gate cannot work as it is configured"
    return "the gate cannot be asked"


def _as_unavailable(error: GateError, reason: str | None) -> GateUnavailable:
    if isinstance(error, GateUnavailable) and reason is None:
        return error
    wrapped = GateUnavailable(
        f"{reason}: {error.message}" if reason else error.message,
        status=error.status,
        code=error.code,
        hints=error.hints,
        trace_id=error.trace_id,
        request_id=error.request_id,
        advice=error.advice,
        retryable=error.retryable,
        raw=error.raw,
        meta=error.meta,
    )
    wrapped.__cause__ = error
    return wrapped


def restated(denial: GateDenied) -> GateDenied:
    """The same denial as a fresh exception: no traceback, so that nothing of an earlier call is kept alive."""
    return GateDenied(
        denial.message,
        reason=denial.reason,
        status=denial.status,
        code=denial.code,
        hints=denial.hints,
        trace_id=denial.trace_id,
        request_id=denial.request_id,
        advice=denial.advice,
        raw=denial.raw,
        meta=denial.meta,
    )


class RecentDenials:
    """Remembers who was denied, for ``max_age`` seconds, for the time when the gate cannot be asked.

    Keys are the caller's, usually (principal, user, feature). Bounded: the oldest are forgotten beyond ``capacity``.
    Times are monotonic seconds, handed in.
    """

    def __init__(self, *, max_age: float = 300.0, capacity: int = 10_000) -> None:
        self._max_age = max_age
        self._capacity = capacity
        self._known: OrderedDict[Hashable, tuple[float, GateDenied]] = OrderedDict()

    def note(self, key: Hashable, denial: GateDenied, now: float) -> None:
        """This customer was denied now."""
        self._known.pop(key, None)
        self._known[key] = (now, restated(denial))
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def of(self, key: Hashable, now: float) -> GateDenied | None:
        """The denial of this customer, where it is recent."""
        found = self._known.get(key)
        if found is None:
            return None
        at, denial = found
        if now - at > self._max_age:
            self._known.pop(key, None)
            return None
        return denial

    def clear(self, key: Hashable) -> None:
        """This customer was allowed again."""
        self._known.pop(key, None)


class UngatedCap:
    """How much one customer may run while the gate cannot be asked: so many operations, for so many seconds.

    The count starts with the first ungated call and is forgotten by `reset`, when the gate answers for that customer. A
    customer who calls rarely may meet two short outages hours apart and nothing in between: what lies further back than
    ``max_age_seconds`` does not count where the gate has answered anybody since.

    Times are monotonic seconds, handed in. Threads that ask at the same instant may overshoot by their number.
    """

    def __init__(self, *, max_operations: int = 1000, max_age_seconds: float = 3600.0, capacity: int = 100_000) -> None:
        self.max_operations = max_operations
        self.max_age_seconds = max_age_seconds
        self._capacity = capacity
        self._used: OrderedDict[Hashable, tuple[int, float, float]] = OrderedDict()
        self._answered_at = float("-inf")

    def has_room(self, key: Hashable, now: float) -> bool:
        """Whether another call of this customer may run ungated."""
        count, since = self._counted(key, now)
        return count < self.max_operations and now - since <= self.max_age_seconds

    def count(self, key: Hashable, now: float) -> None:
        """A call of this customer runs ungated."""
        count, since = self._counted(key, now)
        self._used.pop(key, None)
        self._used[key] = (count + 1, since, now)
        while len(self._used) > self._capacity:
            self._used.popitem(last=False)

    def answered(self, now: float) -> None:
        """The gate answered, for whomever."""
        self._answered_at = now

    def _counted(self, key: Hashable, now: float) -> tuple[int, float]:
        count, since, last = self._used.get(key, (0, now, now))
        if now - last > self.max_age_seconds and self._answered_at > last:
            return 0, now
        return count, since

    def used(self, key: Hashable) -> int:
        """How many calls of this customer ran ungated since the gate last answered for it."""
        return self._used.get(key, (0, 0.0, 0.0))[0]

    def reset(self, key: Hashable) -> None:
        """The gate answered for this customer."""
        self._used.pop(key, None)


BreakerState = Literal["closed", "open", "half_open"]


class Breaker:
    """Stops asking a gate that does not answer, so that calls no longer wait for it (design rule 9).

    ``threshold`` failures in a row open it; while it is open nobody asks; after a cool-off one call at a time asks as a
    probe (``half_open``). A probe's success closes it, its failure opens it for ``growth`` times as long, up to
    ``max_cool_off`` seconds. A probe that never reports back is given up after ``probe_patience`` seconds.

    Times are monotonic seconds, handed in. Safe to share between threads without a lock, which a fork could leave held:
    the right to probe is one token that only one caller can take, and so is the right to tell of a change.

    Args:
        threshold: failures in a row that open it.
        cool_off: seconds until the first probe.
        max_cool_off: seconds between two probes at most: how long a gate that is back goes unnoticed.
        growth: factor from one cool-off to the next.
        probe_patience: seconds after which a probe that never reports back is given up.
        jitter: a number within 0 and 1.
        changed: told of every change of state, once.
    """

    def __init__(
        self,
        *,
        threshold: int = 5,
        cool_off: float = 1.0,
        max_cool_off: float = 5.0,
        growth: float = 2.0,
        probe_patience: float = 10.0,
        jitter: Callable[[], float] = random.random,
        changed: Callable[[BreakerState], None] = lambda state: None,
    ) -> None:
        self._threshold = threshold
        self._cool_off = cool_off
        self._max_cool_off = max_cool_off
        self._growth = growth
        self._probe_patience = probe_patience
        self._jitter = jitter
        self._failures = 0
        self._openings = 0
        self._retry_at: float | None = None
        self._probe: deque[None] = deque([None], maxlen=1)
        self._probing: deque[None] = deque(maxlen=1)  # there is one while a probe is on its way
        self._changed = changed
        self._may_open: deque[None] = deque([None], maxlen=1)
        self._may_close: deque[None] = deque(maxlen=1)

    def admit(self, now: float) -> bool:
        """Whether this call may ask the gate. Who is admitted reports back by `succeeded` or `failed`."""
        retry_at = self._retry_at
        if retry_at is None:
            return True
        if now < retry_at:
            return False
        try:
            self._probe.pop()
        except IndexError:
            return False
        if self._retry_at != retry_at:
            # Another thread took the token, and gave it back, since we looked: this is its probe.
            self._probe.append(None)
            return False
        self._probing.append(None)
        # Should this probe never report back, another may start then.
        self._retry_at = now + self._probe_patience
        self._probe.append(None)
        self._changed("half_open")
        return True

    def wait(self, now: float) -> float:
        """Seconds until the next call may ask; 0 where one may now."""
        return 0.0 if self._retry_at is None else max(0.0, self._retry_at - now)

    def probe_now(self, now: float) -> None:
        """The gate was heard of elsewhere: whoever comes next may ask."""
        if self._retry_at is not None and not self._probing:
            self._retry_at = now

    def unused(self, now: float) -> None:
        """Who was admitted has asked nothing: another may probe at once."""
        if _taken(self._probing):
            self._retry_at = now
            self._changed("open")

    def succeeded(self) -> None:
        """The gate answered, whatever it said."""
        self._failures = self._openings = 0
        self._probing.clear()
        self._retry_at = None
        if _taken(self._may_close):
            self._may_open.append(None)
            self._changed("closed")

    def failed(self, now: float) -> None:
        """The gate did not answer, or answered that it cannot."""
        self._failures += 1
        if self._retry_at is None:
            if self._failures >= self._threshold:
                self._open(now)
                if _taken(self._may_open):
                    self._may_close.append(None)
                    self._changed("open")
        elif _taken(self._probing):
            self._open(now)
            self._changed("open")
        # Else a call that was on its way when the breaker opened: it says nothing new.

    def _open(self, now: float) -> None:
        pause = min(self._max_cool_off, self._cool_off * self._growth**self._openings)
        self._openings = min(self._openings + 1, 64)
        self._retry_at = now + pause * (0.9 + 0.2 * self._jitter())

    def state(self, now: float) -> BreakerState:
        """``closed``, ``open`` (nobody asks) or ``half_open`` (the next call is a probe)."""
        if self._retry_at is None:
            return "closed"
        return "open" if now < self._retry_at else "half_open"


def _taken(token: deque[None]) -> bool:
    """Take the token; False where somebody else has it."""
    try:
        token.pop()
    except IndexError:
        return False
    return True


def counts_as_down(outcome: Lease | GateError) -> bool:
    """Whether an outcome of authorize is a failure for the breaker: no answer, or an answer that is a fault.

    A denial, a bad request, a refused key and a misconfigured feature came back quickly and from a living gate.
    """
    return isinstance(outcome, GateUnavailable) and outcome.retryable


def not_asked() -> GateUnavailable:
    """The outcome of a call that the breaker did not let ask."""
    return GateUnavailable(
        "the gate did not answer the last calls and is left alone for a moment",
        retryable=True,
        meta={"transport": "breaker"},
    )
