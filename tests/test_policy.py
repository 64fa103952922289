"""What the gate's answer means for the call, row by row, and the two guards for a gate that is away."""

from __future__ import annotations

import threading
from collections import deque
from typing import Literal

import pytest

from vluna_llm.errors import (
    DenialReason,
    GateAuthError,
    GateDenied,
    GateError,
    GateRateLimited,
    GateUnavailable,
    IdempotencyConflict,
    InvalidGateRequest,
)
from vluna_llm.policy import Breaker, RecentDenials, UngatedCap, counts_as_down, decide, not_asked
from vluna_llm.types import Lease

LEASE = Lease("lease.x.y", "openai.gpt-4o")
AWAY = GateUnavailable("no answer", retryable=True)
MISCONFIGURED = GateUnavailable("value exceeds numeric range", status=500, code="SERVER.CONFIG")
NO_CREDIT = GateDenied("grant balance exhausted", reason="insufficient_credit", status=402)


@pytest.mark.parametrize("mode", ["enforce", "observe"])
def test_a_lease_allows(mode: Literal["enforce", "observe"]) -> None:
    """A lease runs the call, quietly, in either mode."""
    decision = decide(LEASE, mode=mode)
    assert (decision.action, decision.severity, decision.error) == ("allow", "quiet", None)
    assert decision.runs


@pytest.mark.parametrize("reason", ["insufficient_credit", "quota", "budget", "entitlement", "disabled"])
def test_a_denial_refuses_with_its_own_error(reason: DenialReason) -> None:
    """Enforcing, a denial is raised as it came, is told quietly and is handed back to be remembered."""
    error = GateDenied("no", reason=reason)
    decision = decide(error, mode="enforce")
    assert decision.action == "refuse"
    assert decision.error is error
    assert decision.severity == "quiet"
    assert decision.denial is error


@pytest.mark.parametrize(
    ("reason", "bookable"),
    [("insufficient_credit", True), ("quota", True), ("budget", True), ("entitlement", False), ("disabled", False)],
)
def test_observing_runs_what_was_denied(reason: DenialReason, bookable: bool) -> None:
    """Observing, a denied call runs; where ingest would be refused as well the loss is told loudly, now."""
    decision = decide(GateDenied("no", reason=reason), mode="observe")
    assert decision.action == "ungated"
    assert decision.bookable is bookable
    assert decision.severity == ("warn" if bookable else "loud")


def test_rate_limit() -> None:
    """429 refuses when enforcing and runs, bookable, when observing."""
    error = GateRateLimited("rate limit exceeded", retry_after=3.0)
    assert decide(error, mode="enforce").error is error
    observed = decide(error, mode="observe")
    assert observed.action == "ungated"
    assert observed.bookable


def test_an_unbookable_request_refuses_before_money_is_spent() -> None:
    """422 can never be booked: refused when enforcing, run and told when observing; loud in both."""
    error = InvalidGateRequest("feature not found", status=422)
    enforced, observed = decide(error, mode="enforce"), decide(error, mode="observe")
    assert (enforced.action, enforced.error, enforced.severity) == ("refuse", error, "loud")
    assert (observed.action, observed.bookable, observed.severity) == ("ungated", False, "loud")


@pytest.mark.parametrize(
    ("error", "severity"),
    [
        (AWAY, "warn"),
        (MISCONFIGURED, "loud"),
        (GateAuthError("Signature mismatch", status=401), "loud"),
        (IdempotencyConflict("idempotency_conflict", status=409), "loud"),
        (GateError("something new", status=418), "loud"),
    ],
)
def test_a_gate_that_cannot_be_asked(error: GateError, severity: str) -> None:
    """Silence and faults of ours: the product goes on by default, and what an operator has to mend is loud."""
    decision = decide(error, mode="enforce", on_gate_unavailable="allow")
    assert (decision.action, decision.severity, decision.bookable) == ("ungated", severity, True)
    refused = decide(error, mode="enforce", on_gate_unavailable="deny")
    assert refused.action == "refuse"
    assert isinstance(refused.error, GateUnavailable)
    assert refused.error is error or refused.error.__cause__ is error
    assert decide(error, mode="observe", on_gate_unavailable="deny").action == "ungated"


def test_a_denial_stands_while_the_gate_is_away() -> None:
    """A customer who was just denied is denied again, with a fresh exception, and not when the gate answers."""
    decision = decide(AWAY, mode="enforce", recent_denial=NO_CREDIT)
    assert decision.action == "refuse"
    assert isinstance(decision.error, GateDenied)
    assert decision.error is not NO_CREDIT
    assert decision.error.reason == "insufficient_credit"
    assert decision.error.__cause__ is AWAY
    assert decide(LEASE, mode="enforce", recent_denial=NO_CREDIT).action == "allow"
    assert decide(AWAY, mode="observe", recent_denial=NO_CREDIT).action == "ungated"


def test_a_full_cap_refuses() -> None:
    """Beyond the cap an ungated call is refused, loudly, and only when enforcing."""
    decision = decide(AWAY, mode="enforce", ungated_room=False)
    assert (decision.action, decision.severity) == ("refuse", "loud")
    assert isinstance(decision.error, GateUnavailable)
    assert decision.error.__cause__ is AWAY
    assert decide(AWAY, mode="observe", ungated_room=False).action == "ungated"


def test_which_outcomes_count_for_the_breaker() -> None:
    """Only silence and faults count as down; an answer, even a refusal, is a living gate."""
    assert counts_as_down(AWAY)
    assert counts_as_down(not_asked())
    for outcome in (LEASE, NO_CREDIT, MISCONFIGURED, GateAuthError("x"), InvalidGateRequest("x")):
        assert not counts_as_down(outcome)


def opened(**settings: float) -> Breaker:
    breaker = Breaker(threshold=3, cool_off=1.0, max_cool_off=4.0, jitter=lambda: 0.5, **settings)
    for _ in range(3):
        assert breaker.admit(0.0)
        breaker.failed(0.0)
    return breaker


def test_breaker_opens_after_failures_in_a_row() -> None:
    """Two failures and a success keep it closed; three in a row open it."""
    breaker = Breaker(threshold=3)
    for _ in range(5):
        breaker.failed(0.0)
        breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.state(0.0) == "closed"
    assert opened().state(0.0) == "open"
    assert not opened().admit(0.5)


def test_breaker_lets_one_probe_through_and_closes() -> None:
    """After the cool-off one call asks, the others do not; its success closes the breaker."""
    breaker = opened()
    assert breaker.state(1.1) == "half_open"
    assert breaker.admit(1.1)
    assert not breaker.admit(1.2)
    breaker.succeeded()
    assert breaker.state(1.3) == "closed"
    assert breaker.admit(1.3)


def test_breaker_cools_off_longer_each_time_up_to_its_limit() -> None:
    """Failing probes double the pause: 1, 2, 4 and then 4 seconds."""
    breaker = opened()
    now = 0.0
    for pause in (1.0, 2.0, 4.0, 4.0):
        assert not breaker.admit(now + pause * 0.99)
        now += pause * 1.01
        assert breaker.admit(now)
        breaker.failed(now)


def test_calls_on_their_way_do_not_lengthen_the_pause() -> None:
    """A hundred calls that were under way when it opened report their failure: the pause stays the first one."""
    breaker = opened()
    for _ in range(100):
        breaker.failed(0.2)
    assert breaker.admit(1.1)


def test_a_lost_probe_is_given_up() -> None:
    """A probe whose caller vanished does not keep the breaker open for ever."""
    breaker = opened(probe_patience=5.0)
    assert breaker.admit(1.1)
    assert not breaker.admit(5.0)
    assert breaker.admit(6.2)


def test_only_one_thread_gets_the_probe() -> None:
    """Many threads at the same instant: exactly one is admitted, every time."""
    for _ in range(200):
        breaker = opened()
        start = threading.Barrier(8)
        admitted: list[bool] = []

        def ask(breaker: Breaker = breaker, start: threading.Barrier = start, got: list[bool] = admitted) -> None:
            start.wait()
            got.append(breaker.admit(1.5))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert admitted.count(True) == 1


def test_a_token_taken_in_between_is_given_back() -> None:
    """The worst interleaving of two threads: both saw the cool-off end, the second takes the token after the first."""
    breaker = opened()
    others: list[bool] = []

    class Interrupted(deque[None]):
        def pop(self) -> None:  # type: ignore[override]
            if not others:
                others.append(False)
                others[0] = breaker.admit(1.5)
            return super().pop()

    breaker._probe = Interrupted(breaker._probe, maxlen=1)
    assert breaker.admit(1.5) is False
    assert others == [True]
    breaker.failed(1.6)
    assert breaker.admit(4.0)


def test_cap_counts_operations_and_age_for_each_customer() -> None:
    """So many operations, for so long; another customer has its own count, and the gate's answer resets it."""
    cap = UngatedCap(max_operations=2, max_age_seconds=60.0)
    for now in (0.0, 1.0):
        assert cap.has_room("a", now)
        cap.count("a", now)
    assert not cap.has_room("a", 2.0)
    assert cap.has_room("b", 2.0)
    cap.count("b", 2.0)
    assert not cap.has_room("b", 62.1)
    assert cap.used("a") == 2
    cap.reset("a")
    assert cap.has_room("a", 100.0)


def test_cap_and_denials_are_bounded() -> None:
    """A flood of customers does not grow memory without end."""
    cap, denials = UngatedCap(capacity=10), RecentDenials(capacity=10)
    for number in range(1000):
        cap.count(number, 0.0)
        denials.note(number, NO_CREDIT, 0.0)
    assert sum(1 for number in range(1000) if cap.used(number)) == 10
    assert sum(1 for number in range(1000) if denials.of(number, 0.0)) == 10


def test_denials_are_recent_and_can_be_lifted() -> None:
    """A denial is remembered for a while, without the exception that carried it, and lifted by an allowance."""
    denials = RecentDenials(max_age=60.0)
    try:
        raise NO_CREDIT
    except GateDenied as error:
        denials.note(("c", "u", "f"), error, 0.0)
    known = denials.of(("c", "u", "f"), 59.0)
    assert known is not None
    assert known.__traceback__ is None
    assert denials.of(("c", "u", "f"), 61.0) is None
    denials.note("k", NO_CREDIT, 0.0)
    denials.clear("k")
    assert denials.of("k", 0.0) is None
