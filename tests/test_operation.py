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


class Books(GateModel):
    """A gate that is mended and broken meanwhile, and whose answers are lost now and then (contract 7.5, 7.8, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self.priced = True
        self.commits: dict[str, bool] = {}
        self.ingests: dict[str, bool] = {}

    def take(self, state: OperationState) -> OperationState:
        """What the operation becomes once the gate has answered; what it booked stays where the answer is lost."""
        if not self.active:
            return state.refused()
        if state.route == "commit":
            if "commit" not in self.commits:
                self.commits["commit"] = self.lease == "active" and self.priced
                self.charges += self.commits["commit"]
                self.lease = "closed"
            return state.booked() if self.commits["commit"] else state.quarantined()
        key = f"ingest:{state.used_up}"
        if key not in self.ingests:
            self.ingests[key] = self.priced
            self.charges += self.priced
        return state.booked() if self.ingests[key] else state.quarantined()


ORDERS = (
    "deliver",
    "lose_the_answer",
    "send",
    "look",
    "look_in_vain",
    "retry",
    "repair",
    "switch_off",
    "mend",
    "unprice",
    "cancel_elsewhere",
    "die",
)


@settings(max_examples=1500, deadline=None)
@given(admission=st.sampled_from(["lease_token", "lease", "ungated"]), orders=st.lists(st.sampled_from(ORDERS)))
def test_orders_of_an_operator_charge_known_usage_once(admission: str, orders: list[str]) -> None:
    """Retries and repairs in any order, with lost answers in between: at most one charge, and one in the end."""
    gate = Books()
    state = OperationState().ungated() if admission == "ungated" else OperationState().leased("lease_token")
    state = state.started().completed(USAGE, "provider")

    def step(order: str, state: OperationState) -> OperationState:
        if order == "retry":
            return state.retry()
        if order == "repair":
            return state.repair()
        if order == "die":
            return state.owner_died()
        if order == "send":
            return state.sent()
        if order in ("deliver", "lose_the_answer"):
            sent = state.sent()
            answered = gate.take(sent) if sent.settlement == "sent" else sent
            return answered if order == "deliver" else sent
        if order == "look" and state.look_first:
            return state.found_booked() if any(gate.commits.values()) else state.found_unbooked()
        if order == "look_in_vain" and state.look_first:
            return state.refused()
        if order == "cancel_elsewhere":
            gate.lease = "canceled" if gate.lease == "active" else gate.lease
        if order == "unprice":
            gate.priced = False
        if order == "switch_off":
            gate.active = False
        if order == "mend":
            gate.active = gate.priced = True
        return state

    for order in orders:
        before, state = state, step(order, state)
        assert gate.charges <= 1, order
        assert state.usage == before.usage
        if state.look_first:
            assert state.sent() == state
    for order in ("mend", "deliver", "repair", "look", "deliver", "repair", "look", "deliver"):
        state = step(order, state)
    assert gate.charges == 1
    assert state.settlement == "booked"


def quarantined(route: str = "commit") -> OperationState:
    started = OperationState().leased("lease_token") if route == "commit" else OperationState().ungated()
    return started.started().completed(USAGE, "provider").sent().quarantined()


def test_a_refused_settlement_is_retried_as_it_was() -> None:
    refused = OperationState().leased("lease_token").started().completed(USAGE, "provider").sent().refused()
    again = refused.retry()
    assert (again.settlement, again.route, again.look_first) == ("pending", "commit", False)
    assert again.retry() is again
    assert quarantined().retry() == quarantined()


def test_a_refused_commit_is_never_repaired_unless_the_books_were_looked_at() -> None:
    refused = OperationState().leased("lease_token").started().completed(USAGE, "provider").sent().refused()
    looking = refused.repair()
    assert (looking.settlement, looking.route, looking.look_first) == ("pending", "commit", True)
    assert looking.sent() is looking
    assert looking.repair() is looking
    booked, unbooked = looking.found_booked(), looking.found_unbooked()
    assert (booked.settlement, booked.route, booked.look_first) == ("booked", "commit", False)
    assert (unbooked.settlement, unbooked.route, unbooked.look_first) == ("pending", "ingest", False)
    assert unbooked.is_repair
    in_vain = looking.refused()
    assert in_vain.retry() == refused.retry()


def test_a_commit_found_quarantined_is_looked_up_only_where_its_answer_does_not_tell() -> None:
    told, untold = quarantined().repair(), quarantined().repair(look_first=True)
    assert (told.route, told.look_first) == ("ingest", False)
    assert (untold.route, untold.look_first) == ("commit", True)


def test_an_ingest_that_was_booked_as_nothing_is_repaired_under_the_next_key() -> None:
    again = quarantined("ingest").repair(look_first=True)
    assert (again.settlement, again.route, again.look_first, again.used_up) == ("pending", "ingest", False, 1)
    refused = again.sent().refused()
    assert refused.repair().used_up == 1
    assert again.sent().quarantined().repair().used_up == 2


def test_there_is_nothing_to_repair_without_usage() -> None:
    cancelled = OperationState().leased("lease_token").started().failed().refused()
    lost = OperationState().leased("lease_token").started().owner_died()
    for state in (OperationState(), cancelled, lost, quarantined().repair(), lost.dropped()):
        assert state.repair() is state


@pytest.mark.parametrize("waiting", ["pending", "sent", "refused", "quarantined", "lost"])
def test_what_an_operator_dropped_is_never_charged(waiting: str) -> None:
    """Also where its usage turns up only afterwards, or an order was on its way."""
    running = OperationState().leased("lease_token").started()
    pending = running.completed(USAGE, "provider")
    state = {
        "pending": pending,
        "sent": pending.sent(),
        "refused": pending.sent().refused(),
        "quarantined": pending.sent().quarantined(),
        "lost": running.owner_died(),
    }[waiting]
    dropped = state.dropped()
    assert (dropped.settlement, dropped.is_settled) == ("lapsed", True)
    for event in (
        dropped.completed(USAGE, "provider"),
        dropped.retry(),
        dropped.repair(),
        dropped.sent(),
        dropped.failed(),
        dropped.owner_died(),
        dropped.dropped(),
    ):
        assert event is dropped


def test_nothing_is_dropped_that_does_not_wait() -> None:
    running = OperationState().leased("lease_token").started()
    booked = running.completed(USAGE, "provider").sent().booked()
    for state in (OperationState(), running, booked, running.parked()):
        assert state.dropped() is state


@pytest.mark.parametrize("end", ["failed", "aborted", "parked"])
def test_an_estimate_never_outranks_how_the_work_was_seen_to_end(end: str) -> None:
    """The answer broke, and then its consumer closed what was left of it, with ``on_abort="estimate"``."""
    ended = getattr(OperationState().leased("lease_token").started(), end)()
    assert ended.completed(USAGE, "estimated") == ended
    assert ended.completed(USAGE, "provider") != ended, "what the provider reports does"
