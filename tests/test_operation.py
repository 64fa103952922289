"""The three machines: whatever the order of events, known usage ends in exactly one charge and nothing else does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vluna_llm.operation import OperationState
from vluna_llm.usage import TokenUsage

USAGE = TokenUsage(input_tokens=10, output_tokens=5)
ZERO = TokenUsage()


class GateModel:
    """What a gate does with one lease, by its contract: one charged commit, cancel quarantines, ingest always books."""

    def __init__(self) -> None:
        self.lease = "active"
        self.charges = 0

    def answer(self, state: OperationState) -> OperationState:
        assert state.settlement == "sent"
        if state.route == "cancel":
            if self.lease == "active":
                self.lease = "canceled"
            return state.booked()
        if state.route == "commit":
            charged, self.lease = self.lease == "active", "closed" if self.lease == "active" else self.lease
            if not charged:
                return state.quarantined().repair()
            self.charges += 1
            return state.booked()
        self.charges += 1
        return state.booked()


EVENTS = ("start", "complete", "complete_zero", "fail", "abort", "park", "send", "answer", "die")


@settings(max_examples=1500, deadline=None)
@given(
    admission=st.sampled_from(["lease_token", "lease", "ungated", "late_lease"]),
    events=st.lists(st.sampled_from(EVENTS), max_size=14),
)
def test_known_usage_is_charged_exactly_once_in_every_interleaving(admission: str, events: list[str]) -> None:
    """However completion, failure, abort, delivery and death interleave, a usage that was accepted is charged once."""
    gate = GateModel()
    state = OperationState()
    if admission == "late_lease":
        state = state.outcome_unknown().ungated().leased("lease_token")
        assert state.admission == "ungated"
    elif admission == "ungated":
        state = state.ungated()
    else:
        state = state.leased("lease" if admission == "lease" else "lease_token")

    def step(name: str, state: OperationState) -> OperationState:
        if name == "start":
            return state.started()
        if name == "complete":
            return state.completed(USAGE, "provider")
        if name == "complete_zero":
            return state.completed(ZERO, "provider")
        if name == "fail":
            return state.failed()
        if name == "abort":
            return state.aborted()
        if name == "park":
            return state.parked()
        if name == "die":
            return state.owner_died()
        if name == "send":
            return state.sent()
        return gate.answer(state) if state.settlement == "sent" else state

    for name in ("start", *events):
        before = state
        state = step(name, state)
        if before.work == "completed":
            assert state.work == "completed"
            assert state.usage == before.usage
        if state.cancel_sent:
            assert state.route != "commit" or state.work == "completed"
    for _ in range(6):
        state = step("answer", state.sent())
    known = state.usage is not None and state.usage.total_tokens > 0
    assert gate.charges == (1 if known else 0)
    if known:
        assert state.settlement == "booked"


@pytest.mark.parametrize("end", ["failed", "aborted"])
def test_a_call_without_usage_is_cancelled_where_the_dialect_can(end: str) -> None:
    running = OperationState().leased("lease_token").started()
    ended = getattr(running, end)()
    assert (ended.settlement, ended.route) == ("pending", "cancel")
    other = getattr(OperationState().leased("lease").started(), end)()
    assert (other.settlement, other.route) == ("lapsed", None)


def test_usage_withdraws_a_cancel_that_was_not_sent() -> None:
    state = OperationState().leased("lease_token").started().aborted().completed(USAGE, "provider")
    assert (state.settlement, state.route) == ("pending", "commit")


def test_usage_after_a_cancel_was_sent_is_booked_by_ingest() -> None:
    state = OperationState().leased("lease_token").started().aborted().sent().completed(USAGE, "provider")
    assert (state.settlement, state.route) == ("pending", "ingest")


def test_the_first_usage_stays() -> None:
    state = OperationState().leased("lease_token").started().completed(USAGE, "provider")
    assert state.completed(TokenUsage(1, 1), "provider") == state


def test_a_denied_call_never_runs_and_never_settles() -> None:
    state = OperationState().denied()
    assert state.started() == state
    assert state.completed(USAGE, "provider") == state
    assert state.is_settled


def test_a_lost_operation_whose_owner_was_only_asleep_still_books() -> None:
    state = OperationState().leased("lease_token").started().owner_died()
    assert state.settlement == "lost"
    assert state.completed(USAGE, "provider").route == "commit"


def test_a_parked_operation_sends_nothing() -> None:
    state = OperationState().leased("lease_token").started().parked()
    assert (state.work, state.settlement) == ("parked", "lapsed")


def test_an_ingest_is_a_repair_only_where_a_commit_went_before_it() -> None:
    leased = OperationState().leased("lease_token").started()
    after_cancel = leased.aborted().sent().completed(USAGE, "provider")
    ungated = OperationState().ungated().started().completed(USAGE, "provider")
    repaired = leased.completed(USAGE, "provider").sent().quarantined().repair()
    assert [state.route for state in (after_cancel, ungated, repaired)] == ["ingest"] * 3
    assert [state.is_repair for state in (after_cancel, ungated, repaired)] == [False, False, True]


def test_a_late_lease_is_taken_only_for_usage_that_waits_to_be_ingested() -> None:
    ungated = OperationState().ungated().started()
    waiting = ungated.completed(USAGE, "provider")
    late = waiting.late_lease("lease_token")
    assert (late.admission, late.route, late.settlement, late.usage) == ("leased", "commit", "pending", USAGE)
    for state in (OperationState(), ungated, waiting.sent(), waiting.sent().booked(), ungated.failed()):
        assert state.late_lease("lease_token") is state
