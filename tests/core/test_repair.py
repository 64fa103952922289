"""What is in doubt is looked up, what is proven uncharged is repaired once, and nothing else is ever booked again."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.books import Booking, Books, judge_books, read_books
from vluna_llm.ending import Ending
from vluna_llm.errors import GateAuthError, GateError, GateUnavailable
from vluna_llm.gate import answers
from vluna_llm.gate.wire import Answer
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.operation import OperationState, Route
from vluna_llm.outbox import Row
from vluna_llm.sandbox import Sandbox
from vluna_llm.settlement import Verdict, before_repair, judge_error, pause, settle_key
from vluna_llm.types import Receipt

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")
FEATURE = "openai.gpt-4o-mini"
METERS = (FEATURE, *(f"{FEATURE}.tokens.{part}" for part in ("input", "cached", "output")))
NO_RATINGS = '{"ok":true,"code":"OK","data":[],"meta":{"next_cursor":null,"has_more":false,"limit":200}}'
FORBIDDEN = '{"ok":false,"code":"AUTH.INSUFFICIENT_SCOPE","message":"no admin here","meta":{"status":403}}'


def begin(vluna: Vluna, principal: str = "ann", **context: Any) -> Operation:
    with call_context(principal_id=principal, **context):
        operation = vluna.begin(CALL)
    assert operation is not None
    return operation


def receipt_of(operation: Operation, seconds: float = 10) -> Receipt:
    receipt = operation.wait(seconds)
    assert receipt is not None
    return receipt


def charged(gate: Sandbox, principal: str = "ann") -> list[tuple[str, int]]:
    return [(entry.kind, entry.quantity) for entry in gate.booked(principal).entries if entry.charged_xusd > 0]


def use_up_the_lease(vluna: Vluna, operation: Operation, *, uncharged: bool, gate: Sandbox) -> None:
    """Commit something on the operation's lease behind its back; ``uncharged``: the gate quarantines it."""
    assert operation.lease is not None
    if uncharged:
        for meter in METERS:
            gate.unprice(meter)
    vluna.gate.commit(lease=operation.lease, principal_id="ann", quantity=7)
    if uncharged:
        for meter in METERS:
            gate.price(meter, 5)


# -- a lease that was found closed ---------------------------------------------------------------------------------


def test_a_closed_lease_that_was_never_charged_is_repaired(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    use_up_the_lease(vluna, operation, uncharged=True, gate=gate)
    operation.finish(USED)
    assert receipt_of(operation).state == "rebooked"
    assert charged(gate) == [("ingest", 120)]
    keys = {entry.idempotency_key for entry in gate.booked("ann").entries}
    assert keys >= {f"vluna-llm:{operation.operation_id}:{route}" for route in ("commit", "ingest")}


@pytest.mark.parametrize("why", ["empty", "refused"])
def test_without_the_right_to_look_a_closed_lease_is_held_and_says_what_to_do(
    vluna: Vluna, gate: Sandbox, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty list is what a gate shows to those who may not read: it proves nothing."""
    status, body = (200, NO_RATINGS) if why == "empty" else (403, FORBIDDEN)
    gate.faults.add("status", "ratings", times=None, status=status, body=body)
    operation = begin(vluna)
    use_up_the_lease(vluna, operation, uncharged=True, gate=gate)
    operation.finish(USED)
    receipt = receipt_of(operation)
    assert (receipt.state, receipt.charged_xusd) == ("quarantined", 0)
    assert charged(gate) == []
    assert "X-Realm-Admin" in caplog.text or "no admin here" in caplog.text


def test_a_lease_charged_for_somebody_else_is_held_with_what_was_found(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    use_up_the_lease(vluna, operation, uncharged=False, gate=gate)
    operation.finish(USED)
    receipt = receipt_of(operation)
    assert receipt.state == "quarantined"
    (other,) = [entry for entry in gate.booked("ann").entries if entry.charged_xusd]
    assert other.commit_id in (receipt.detail or "")
    assert charged(gate) == [("commit", 7)]


@pytest.mark.parametrize(
    "fault", [("drop_before", {}), ("error_before", {}), ("status", {"status": 200, "body": "<html>hello</html>"})]
)
@pytest.mark.parametrize("route", ["ratings", "allocations"])
def test_nothing_is_decided_from_books_that_could_not_be_read(
    vluna: Vluna, gate: Sandbox, fault: tuple[Any, dict[str, Any]], route: str
) -> None:
    kind, options = fault
    script = gate.faults.add(kind, route, times=2, **options)
    operation = begin(vluna)
    use_up_the_lease(vluna, operation, uncharged=True, gate=gate)
    operation.finish(USED)
    assert receipt_of(operation).state == "rebooked"
    assert script.hits == 2, "it was asked until it answered"
    assert charged(gate) == [("ingest", 120)]


# -- 409 ------------------------------------------------------------------------------------------------------------


def conflict(vluna: Vluna, gate: Sandbox, operation: Operation, quantity: int, labels: Any = None) -> None:
    """Another commit under the operation's own key, as a snapshot that was put back would have sent it."""
    assert operation.lease is not None
    vluna.gate.commit(
        lease=operation.lease,
        principal_id="ann",
        quantity=quantity,
        labels=labels,
        idempotency_key=f"vluna-llm:{operation.operation_id}:commit",
    )


@pytest.mark.parametrize("restart", [False, True], ids=["process_cache", "database"])
def test_a_commit_of_ours_that_was_charged_with_other_bytes_is_booked_as_it_was(
    vluna: Vluna, gate: Sandbox, restart: bool
) -> None:
    operation = begin(vluna)
    conflict(vluna, gate, operation, 99, {"operation_id": operation.operation_id})
    if restart:
        gate.restart()
    operation.finish(USED)
    receipt = receipt_of(operation)
    assert (receipt.state, receipt.charged_xusd) == ("booked", gate.booked("ann").charged_xusd)
    assert receipt.charged_xusd
    assert charged(gate) == [("commit", 99)]


def test_a_commit_of_ours_that_was_quarantined_with_other_bytes_is_repaired(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    for meter in METERS:
        gate.unprice(meter)
    conflict(vluna, gate, operation, 99, {"operation_id": operation.operation_id})
    for meter in METERS:
        gate.price(meter, 5)
    operation.finish(USED)
    assert receipt_of(operation).state == "rebooked"
    assert charged(gate) == [("ingest", 120)]


def test_a_conflict_that_the_books_do_not_explain_is_a_dead_letter_with_its_reason(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("status", "ratings", times=None, status=200, body=NO_RATINGS)
    operation = begin(vluna)
    conflict(vluna, gate, operation, 99, {"operation_id": operation.operation_id})
    operation.finish(USED)
    receipt = receipt_of(operation)
    assert receipt.state == "refused"
    assert "409" in (receipt.detail or "")
    assert charged(gate) == [("commit", 99)]


def test_an_ingest_that_was_taken_with_other_bytes_is_found_by_its_time_and_label(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    """An ingest has no lease by which it could be found; other customers' ingests of the same moment are not ours."""
    vluna = make_vluna(authorize_deadline=0.2)
    gate.faults.add("drop_before", "authorize", times=None)
    operation = begin(vluna)
    gate.faults.clear()
    send = vluna.gate.send
    first = True

    def sending(request: Any, **how: Any) -> Any:
        nonlocal first
        if request.kind == "ingest" and first:
            first = False
            sent = json.loads(request.body)
            for principal, key in (("eve", "another"), ("ann", request.idempotency_key)):
                body = {**sent, "quantity_minor": "77", "meters": [], "labels": {"operation_id": "x"}}
                if principal == "ann":
                    body["labels"] = {"operation_id": operation.operation_id}
                made = type(request).stored(
                    "ingest", json.dumps(body).encode(), idempotency_key=key, principal_id=principal, user_id=principal
                )
                assert send(made, **how).status in (200, 500)
                assert send(made, **how).status == 200
        return send(request, **how)

    vluna.gate.send = sending  # type: ignore[method-assign]
    operation.finish(USED)
    receipt = receipt_of(operation)
    assert (receipt.state, receipt.charged_xusd) == ("booked", gate.booked("ann").charged_xusd)
    assert charged(gate) == [("ingest", 77)]


# -- an answer that was lost, and then a refusal ---------------------------------------------------------------------


def switch_off(gate: Sandbox) -> None:
    gate.feature(FEATURE, active=False)


def withdraw(gate: Sandbox) -> None:
    gate.feature(FEATURE, entitlement=True)


@pytest.mark.parametrize("meanwhile", [switch_off, withdraw], ids=lambda act: act.__name__)
def test_a_charge_whose_answer_was_lost_is_found_behind_a_later_refusal(
    vluna: Vluna, gate: Sandbox, meanwhile: Callable[[Sandbox], None]
) -> None:
    """A gate that was restarted looks at feature and entitlement before it remembers what it booked (contract 7.5)."""
    operation = begin(vluna)
    gate.faults.add("drop_after", "commits", times=1)
    send = vluna.gate.send
    refused = False

    def sending(request: Any, **how: Any) -> Any:
        nonlocal refused
        if request.kind == "commit" and gate.booked("ann").entries and not refused:
            refused = True
            gate.restart()
            meanwhile(gate)
        return send(request, **how)

    vluna.gate.send = sending  # type: ignore[method-assign]
    operation.finish(USED)
    receipt = receipt_of(operation)
    assert refused
    assert (receipt.state, receipt.charged_xusd) == ("booked", gate.booked("ann").charged_xusd)
    assert charged(gate) == [("commit", 120)]


def nothing(gate: Sandbox) -> None:
    pass


def disable(gate: Sandbox) -> None:
    gate.disable_user("ann")


REFUSALS: dict[str, tuple[Callable[[Sandbox], None], Callable[[Sandbox], None], str]] = {
    "feature switched off": (switch_off, lambda gate: gate.feature(FEATURE, active=True), "feature inactive"),
    "entitlement withdrawn": (withdraw, lambda gate: gate.customer("ann", grant=(FEATURE,)), "entitlement"),
    "user disabled": (disable, lambda gate: gate.disable_user("ann", active=True), "not active"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_work_that_happened_before_the_gate_changed_its_mind_is_kept_and_goes_out_once_when_retried(
    vluna: Vluna, gate: Sandbox, what: str, tmp_path: Path
) -> None:
    break_it, mend_it, reason = REFUSALS[what]
    operation = begin(vluna)
    break_it(gate)
    operation.finish(USED)
    receipt = receipt_of(operation)
    assert (receipt.state, receipt.charged_xusd) == ("refused", 0)
    assert reason in (receipt.detail or "")
    mend_it(gate)
    runtime = vluna._running()
    for _ in range(2):
        row = runtime.ledger.apply(operation.operation_id, lambda now: now.with_state(now.state.retry()))
        assert row is not None
        if row.state.settlement == "pending":
            runtime.settler.enqueue(row)
        assert vluna.flush(10)
    assert charged(gate) == [("commit", 120)]


def test_work_on_a_budget_that_was_closed_is_kept_and_can_be_repaired_by_ingest(vluna: Vluna, gate: Sandbox) -> None:
    budget = gate.budget("ann", 10_000_000)
    shown = begin(vluna, "bob")  # something that the gate can show
    shown.finish(USED)
    assert receipt_of(shown).state == "booked"
    operation = begin(vluna, budget_id=budget)
    gate.close_budget(budget)
    operation.finish(USED)
    assert receipt_of(operation).state == "refused"
    repair(vluna, operation)
    assert vluna.flush(10)
    assert charged(gate) == [("ingest", 120)]


# -- an operator's repair --------------------------------------------------------------------------------------------


def repair(vluna: Vluna, operation: Operation, *, look_first: bool = False) -> None:
    """What an operator's order does to the row (design rule 6)."""
    runtime = vluna._running()
    row = runtime.ledger.apply(
        operation.operation_id,
        lambda now: now.evolve(
            state=now.state.repair(look_first=look_first), path=None, body=None, attempts=0, next_attempt_at=0.0
        ),
    )
    assert row is not None
    assert row.state.settlement == "pending"
    runtime.settler.enqueue(row)


def test_an_operators_repair_of_what_was_charged_after_all_books_nothing(vluna: Vluna, gate: Sandbox) -> None:
    """The first answer was lost, the feature switched off, and the look into the books failed for want of a right."""
    unreadable = gate.faults.add("status", "ratings", times=None, status=200, body=NO_RATINGS)
    operation = begin(vluna)
    gate.faults.add("drop_after", "commits", times=1)
    send = vluna.gate.send

    def sending(request: Any, **how: Any) -> Any:
        if request.kind == "commit" and gate.booked("ann").entries:
            gate.restart()
            switch_off(gate)
        return send(request, **how)

    vluna.gate.send = sending  # type: ignore[method-assign]
    operation.finish(USED)
    assert receipt_of(operation).state == "refused"
    gate.feature(FEATURE, active=True)
    repair(vluna, operation)
    assert vluna.flush(10)
    assert charged(gate) == [("commit", 120)], "not proven: not repaired"
    (row,) = vluna._running().ledger.journal.rows("refused")
    assert "may have been charged" in (row.last_error or "")
    gate.faults.remove(unreadable)
    repair(vluna, operation)
    assert vluna.flush(10)
    assert charged(gate) == [("commit", 120)]
    (row,) = vluna._running().ledger.journal.rows("booked")
    assert json.loads(row.receipt or "")["charged_xusd"] == gate.booked("ann").charged_xusd


@pytest.mark.parametrize("meters", ["auto", "always", "never"])
def test_a_repair_waits_for_the_price_in_every_mode_of_splitting(
    make_vluna: Callable[..., Vluna], gate: Sandbox, meters: str
) -> None:
    """An ingest without a price is booked as 0 for ever, without any hint (gate contract 7.8)."""
    vluna = make_vluna(meters=meters)
    operation = begin(vluna)
    for meter in METERS:
        gate.unprice(meter)
    operation.finish(USED)
    assert receipt_of(operation).state == "quarantined"
    repair(vluna, operation)
    assert not vluna.flush(0.5)
    assert [entry.kind for entry in gate.booked("ann").entries] == ["commit"]
    for meter in METERS:
        gate.price(meter, 5)
    runtime = vluna._running()
    runtime.prices.forget(FEATURE)
    row = runtime.ledger.get(operation.operation_id)
    assert row is not None
    runtime.settler.enqueue(row)
    assert vluna.flush(10)
    assert charged(gate) == [("ingest", 120)]


def test_an_ingest_that_was_booked_as_0_goes_out_by_itself_under_the_next_key_when_there_is_a_price(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    """Its first key is used up: under it the gate would answer the same 0 for ever."""
    vluna = make_vluna(authorize_deadline=0.2)
    begin(vluna).fail()  # the feature exists, with prices
    assert vluna.flush(5)
    vluna._running().prices.prices(FEATURE, "ann", "ann")
    gate.faults.add("drop_before", "authorize", times=None)
    operation = begin(vluna)
    gate.faults.clear()
    for meter in METERS:
        gate.unprice(meter)
    operation.finish(USED)
    assert not vluna.flush(1)
    row = vluna._running().ledger.get(operation.operation_id)
    assert row is not None
    assert (row.state.settlement, row.held, row.state.used_up) == ("pending", True, 1)
    gate.price(FEATURE, 5)
    vluna._running().settler.enqueue(row)
    assert receipt_of(operation).state == "booked"
    assert charged(gate) == [("ingest", 120)]
    last = gate.booked("ann").entries[-1]
    assert last.idempotency_key.endswith(":ingest:1")
    assert last.lines == {FEATURE: 120}, "nothing of it was charged: it is split by the prices of now"


# -- what is not the gate's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["commits", "ingest"])
def test_a_page_that_answers_200_in_the_gates_place_is_never_taken_for_a_booking(
    make_vluna: Callable[..., Vluna], gate: Sandbox, route: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy's maintenance page. The settlement is kept, aloud, and charged once when the gate is back."""
    vluna = make_vluna(authorize_deadline=0.2)
    if route == "ingest":
        gate.faults.add("drop_before", "authorize", times=None)
    operation = begin(vluna)
    gate.faults.clear()
    for name in (route, "ratings"):
        gate.faults.add("status", name, times=None, status=200, body="<html>back soon</html>")
    operation.finish(USED)
    assert not vluna.flush(3)
    assert operation.wait(0) is None
    assert charged(gate) == []
    gate.faults.clear()
    runtime = vluna._running()
    row = runtime.ledger.get(operation.operation_id)
    assert row is not None
    assert row.state.settlement == "sent"
    runtime.settler.enqueue(row)
    assert receipt_of(operation).state == "booked"
    assert len(charged(gate)) == 1


def test_a_page_in_the_gates_place_is_asked_by_one_settlement_at_a_time(vluna: Vluna, gate: Sandbox) -> None:
    """As with any gate that is away, a backlog neither spends its attempts on it nor storms it (design rule 9)."""
    begin(vluna).finish(USED)
    assert vluna.flush(10)  # the prices are known
    operations = [begin(vluna, f"cust-{n}") for n in range(60)]
    for route in ("commits", "ratings"):
        gate.faults.add("status", route, times=None, status=200, body="<html>back soon</html>")
    before = len(gate.requests)
    for operation in operations:
        operation.finish(USED)
    assert not vluna.flush(3)
    assert len(gate.requests) - before < 60
    gate.faults.clear()
    vluna._running().settler.gate_is_back()
    assert vluna.flush(30)
    assert len(gate.booked().entries) == 61


def test_a_quarantine_behind_an_unreadable_answer_is_found_in_the_books(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    for meter in METERS:
        gate.unprice(meter)
    gate.faults.add("garbage", "commits", times=None, body="<html>ok</html>")
    operation.finish(USED)
    receipt = receipt_of(operation)
    assert (receipt.state, receipt.charged_xusd) == ("quarantined", 0)
    assert "pricing_not_configured" in (receipt.detail or "")


# -- judging: pure ---------------------------------------------------------------------------------------------------


def row_of(route: Route = "commit", *, derived: bool = False) -> Row:
    state = OperationState().leased("lease_token").started().completed(TokenUsage(100, 20), "provider").sent()
    if route == "ingest":
        state = OperationState().ungated().started().completed(TokenUsage(100, 20), "provider").sent()
    if route == "cancel":
        state = OperationState().leased("lease_token").started().failed().sent()
    row = Row("op-1", "http://gate", "realm", 1, "ann", "ann", FEATURE, 1.0, "k:auth", "k", derived=derived)
    return row.evolve(state=state, lease_id="lease-1", lease_token="lease.1.ab")


DOUBT = Verdict(
    "look_up",
    detail="in doubt",
    uncharged=Verdict("repair", detail="nothing was charged"),
    unproven=Verdict("held", "quarantined", "in doubt"),
)


def booking(
    operation_id: str | None = "op-1", *, shown: int = 5, charged: int | None = None, quarantined: bool = False
) -> Booking:
    return Booking("rating-1", operation_id, quarantined, (), shown, charged if charged is not None else 0)


CONTRADICTION = Booking("rating-1", "op-1", False, (), 5, None)


@pytest.mark.parametrize(
    ("bookings", "derived", "gap", "outcome", "state"),
    [
        ([booking(charged=5)], False, None, "done", "booked"),
        ([booking(charged=5)], True, None, "done", "booked"),
        ([booking(charged=3), booking(charged=4)], False, None, "done", "booked"),
        ([booking(shown=0)], False, None, "done", "booked"),
        ([booking(charged=5)], False, "not all", "done", "booked"),
        ([booking("op-2", charged=5)], False, None, "held", "quarantined"),
        ([booking(None, charged=5), booking(quarantined=True)], False, None, "held", "quarantined"),
        ([booking("op-2", charged=5)], True, None, "done", "lapsed"),
        ([booking("op-2", charged=5), booking(quarantined=True)], True, None, "done", "lapsed"),
        ([booking(quarantined=True)], False, None, "repair", None),
        ([booking("op-2", quarantined=True), booking(quarantined=True)], False, None, "repair", None),
        ([booking("op-2", quarantined=True)], True, None, "repair", None),
        ([booking("op-2", quarantined=True)], False, None, "held", "quarantined"),
        ([], False, None, "held", "quarantined"),
        ([], True, None, "held", "quarantined"),
        ([booking(quarantined=True)], False, "not all", "held", "quarantined"),
        ([booking(quarantined=True, charged=5)], False, None, "done", "booked"),
        ([CONTRADICTION], False, None, "held", "quarantined"),
        ([CONTRADICTION], True, None, "held", "quarantined"),
        ([CONTRADICTION, booking(charged=5)], False, None, "held", "quarantined"),
    ],
)
def test_what_the_books_show_decides(
    bookings: list[Booking], derived: bool, gap: str | None, outcome: str, state: str | None
) -> None:
    verdict = judge_books(row_of(derived=derived), Books(tuple(bookings), gap), DOUBT)
    assert (verdict.outcome, verdict.state) == (outcome, state)
    if outcome == "done" and state == "booked":
        assert verdict.shown is not None
        assert verdict.shown.amount_xusd == sum(found.charged_xusd or 0 for found in bookings)


def test_a_charge_found_twice_is_told_as_something_to_refund() -> None:
    verdict = judge_books(row_of(), Books((booking(charged=3), booking(charged=4))), DOUBT)
    assert "refund" in (verdict.detail or "")


def test_a_lease_with_too_many_ratings_is_for_a_person(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    assert operation.lease is not None
    for n in range(22):
        vluna.gate.commit(lease=operation.lease, principal_id="ann", quantity=n + 1)
    row = row_of().evolve(lease_id=operation.lease.lease_id)
    assert read_books(vluna.gate, row).gap == "there are 22 ratings"


@pytest.mark.parametrize(
    ("route", "status", "body", "raised"),
    [
        ("ratings", 401, '{"ok":false,"code":"AUTH.SERVICE_KEY_NOT_FOUND","message":"who?"}', GateAuthError),
        ("ratings", 404, "<html>nothing here</html>", GateUnavailable),
        ("ratings", 200, "<html>hello</html>", GateUnavailable),
        ("allocations", 200, "<html>hello</html>", GateUnavailable),
        ("allocations", 502, "", GateUnavailable),
    ],
)
def test_books_that_cannot_be_read_now_are_no_books(
    vluna: Vluna, gate: Sandbox, route: Any, status: int, body: str, raised: type[Exception]
) -> None:
    operation = begin(vluna)
    use_up_the_lease(vluna, operation, uncharged=False, gate=gate)
    assert operation.lease is not None
    row = row_of().evolve(lease_id=operation.lease.lease_id)
    assert [found.charged_xusd for found in read_books(vluna.gate, row).bookings] == [gate.booked("ann").charged_xusd]
    gate.faults.add("status", route, status=status, body=body)
    with pytest.raises(raised):
        read_books(vluna.gate, row)


def test_an_ingest_of_somebody_else_at_the_same_moment_is_none_of_ours(vluna: Vluna, gate: Sandbox) -> None:
    begin(vluna, "eve").fail()
    moment = datetime(2026, 11, 21, 8, 0, 0, 123_000, timezone.utc)
    for principal, operation_id in (("eve", "op-2"), ("ann", "op-1")):
        row = row_of("ingest").evolve(body=b'{"occurred_at": "2026-11-21T08:00:00.123Z"}', lease_id=None)
        found = read_books(vluna.gate, row)
        assert (found.bookings, found.may_read) == ((), principal == "ann")
        vluna.gate.ingest(
            principal_id=principal,
            feature_code=FEATURE,
            quantity=9,
            occurred_at=moment,
            labels={"operation_id": operation_id},
        )
    assert [(one.operation_id, one.charged) for one in read_books(vluna.gate, row).bookings] == [("op-1", True)]


def test_what_others_were_charged_is_none_of_ours_also_where_a_filter_is_not_known(vluna: Vluna, gate: Sandbox) -> None:
    """A gate, or what stands before it, that passes over what it does not know gives the whole list."""
    operation, other = begin(vluna), begin(vluna)
    assert operation.lease is not None
    other.finish(USED)
    assert vluna.flush(10)
    gate.unprice(FEATURE)
    vluna.gate.commit(lease=operation.lease, principal_id="ann", quantity=7)  # quarantined
    ratings, allocations = vluna.gate.ratings, vluna.gate.allocations
    vluna.gate.ratings = lambda **how: ratings(**{**how, "source_ref": None})  # type: ignore[method-assign]
    vluna.gate.allocations = lambda **how: allocations(**{**how, "rating_id": None})  # type: ignore[method-assign]
    (found,) = read_books(vluna.gate, row_of().evolve(lease_id=operation.lease.lease_id)).bookings
    assert (found.quarantined, found.charged) == (True, False)


def test_a_gate_whose_leases_have_no_id_is_asked_by_the_commit(make_vluna: Callable[..., Vluna]) -> None:
    with Sandbox(dialect="lease") as gate:
        vluna = Vluna(
            base_url=gate.base_url,
            realm_id=gate.realm_id,
            key_id=gate.key_id,
            key_secret=gate.key_secret,
            outbox="memory",
        )
        operation = begin(vluna)
        assert operation.lease is not None
        assert operation.lease.lease_id is None
        use_up_the_lease(vluna, operation, uncharged=True, gate=gate)
        operation.finish(USED)
        assert receipt_of(operation).state == "rebooked"
        assert charged(gate) == [("ingest", 120)]
        vluna.close()


# -- refusals and no answers: the table ------------------------------------------------------------------------------


def answered(status: int, code: str | None, message: str, **more: Any) -> Answer:
    body: dict[str, Any] = {"ok": False, "message": message, "meta": {"status": status}, **more}
    if code is not None:
        body["code"] = code
    return Answer(status, {"content-type": "application/json"}, json.dumps(body).encode(), "req-1")


def page(status: int) -> Answer:
    return Answer(status, {"content-type": "text/html"}, b"<html>no gate</html>", "req-1")


def error_of(answer: Answer, route: Route) -> GateError:
    parse = {"commit": answers.parse_commit, "ingest": answers.parse_ingest, "cancel": answers.parse_cancel}[route]
    try:
        parse(answer, now=0.0)
    except GateError as error:
        return error
    raise AssertionError("it was taken")


UNEXPECTED = "Unexpected server error. Please try again later."
KEPT = ("look_up", "held", "refused")
CLASSES: list[tuple[Answer, str | tuple[str, str, str | None]]] = [
    (answered(500, "SERVER.UNEXPECTED", UNEXPECTED), "retry"),
    (answered(500, None, "Internal server error"), "retry"),
    (page(500), "retry"),
    (page(502), "retry"),
    (page(503), "retry"),
    (page(504), "retry"),
    (answered(503, "SERVER.UNEXPECTED", "draining"), "retry"),
    (page(408), "retry"),
    (page(425), "retry"),
    (page(429), "retry"),
    (answered(429, "LIMIT.RATE_EXCEEDED", "rate limit exceeded"), "retry"),
    (answered(401, "AUTH.INVALID_SERVICE_SIGNATURE", "Signature mismatch"), "retry_slowly"),
    (answered(401, "AUTH.SERVICE_KEY_NOT_FOUND", "Service API key not recognized"), "retry_slowly"),
    (answered(403, "AUTH.SERVICE_KEY_EXPIRED", "Service API key has expired"), "retry_slowly"),
    (answered(403, "AUTH.SERVICE_KEY_ACCOUNT_FORBIDDEN", "not authorized for billing account"), "retry_slowly"),
    (answered(403, "AUTH.INSUFFICIENT_SCOPE", "realm_inactive"), "retry_slowly"),
    (answered(404, "AUTH.UNKNOWN_REALM", "unknown_realm"), "retry_slowly"),
    (answered(404, "RESOURCE.NOT_FOUND", "Cannot POST /mgt/v1/gate/commits"), "retry_slowly"),
    (page(301), "retry_slowly"),
    (page(403), "retry_slowly"),
    (page(404), "retry_slowly"),
    (answered(400, "VALIDATION.INVALID_INPUT", "missing_idempotency_key"), "retry_slowly"),
    (answered(400, "VALIDATION.INVALID_INPUT", "missing_realm"), "retry_slowly"),
    (answered(415, "SERVER.UNEXPECTED", "Unsupported Media Type: undefined"), "retry_slowly"),
    (answered(402, "SERVER.CONFIG", "grant balance exhausted"), KEPT),
    (answered(403, "ENTITLEMENT.REQUIRED", "entitlement required"), KEPT),
    (answered(403, "AUTH.BILLING_USER_DISABLED", "billing user is not active"), KEPT),
    (answered(413, "SERVER.UNEXPECTED", "Request body is too large"), KEPT),
    (answered(422, "RESOURCE.NOT_FOUND", "feature inactive"), KEPT),
    (answered(422, "RESOURCE.NOT_FOUND", "feature not found"), KEPT),
    (answered(422, "RESOURCE.NOT_FOUND", "budget not found or inactive"), KEPT),
    (answered(422, "WRITE.INVALID_PAYLOAD", "feature mismatch for lease"), KEPT),
    (answered(422, "VALIDATION.INVALID_INPUT", "quantity_minor must be greater than 0"), KEPT),
    (answered(500, "SERVER.CONFIG", "value exceeds numeric range"), KEPT),
    (answered(409, "WRITE.INVALID_PAYLOAD", "idempotency_conflict"), KEPT),
    (answered(409, "WRITE.INVALID_PAYLOAD", "idempotency conflict"), KEPT),
]
# What can be refused of a cancel leaves nothing to do: it moves no money.
LEASE_UNKNOWN = ["lease not found", "invalid lease token", "invalid lease token format"]


def shape(verdict: Verdict) -> Any:
    if verdict.outcome != "look_up":
        return verdict.outcome if verdict.state is None else (verdict.outcome, verdict.state)
    assert verdict.unproven is not None
    return verdict.outcome, verdict.unproven.outcome, verdict.unproven.state


@pytest.mark.parametrize("route", ["commit", "ingest", "cancel"])
@pytest.mark.parametrize(
    ("answer", "expected"), CLASSES, ids=[f"{answer.status}-{answer.body[:60].decode()}" for answer, _ in CLASSES]
)
def test_every_refusal_has_its_class(answer: Answer, expected: Any, route: Route) -> None:
    if route == "cancel" and answer.status == 404 and b"Cannot POST" in answer.body:
        pytest.skip("a gate without cancel: the lease lapses (design rule 10)")
    verdict = judge_error(error_of(answer, route), row_of(route))
    if route == "cancel" and (expected == KEPT or answer.status in (400, 415)):
        expected = ("done", "lapsed")  # it moves no money
    assert shape(verdict) == expected
    assert verdict.detail, "the reason is kept"


@pytest.mark.parametrize("message", LEASE_UNKNOWN)
def test_a_lease_that_the_gate_does_not_know_is_repaired_unless_the_books_say_otherwise(message: str) -> None:
    error = error_of(answered(422, "RESOURCE.NOT_FOUND", message), "commit")
    assert shape(judge_error(error, row_of())) == ("look_up", "repair", None)


@pytest.mark.parametrize("route", ["commit", "ingest"])
def test_no_answer_is_never_a_verdict(route: Route) -> None:
    for meta in ({"transport": "connect"}, {"transport": "timeout"}, {"transport": "broken"}):
        assert shape(judge_error(GateUnavailable("away", retryable=True, meta=meta), row_of(route))) == "retry"


@pytest.mark.parametrize("route", ["commit", "ingest"])
def test_a_conflict_under_a_jobs_key_is_another_run_of_it(route: Route) -> None:
    error = error_of(answered(409, "WRITE.INVALID_PAYLOAD", "idempotency conflict"), route)
    verdict = judge_error(error, row_of(route, derived=True))
    expected = ("look_up", "done", "lapsed")
    assert shape(verdict) == expected


def test_the_wait_of_a_429_is_the_gates_own_whatever_the_number_of_attempts() -> None:
    def at(seconds: float, attempts: int, jitter: float = 0.0) -> float:
        return pause(Verdict("retry", delay=seconds), attempts, jitter)

    assert at(7.0, 1) == at(7.0, 30) == 7.0
    assert at(7.0, 1, 1.0) == pytest.approx(7.7)
    assert at(86_400.0, 1) == 300.0
    assert 0.1 < at(0.0, 1) < at(0.0, 50) <= 1.0, "a time that has passed is no invitation to ask without end"


def test_an_operators_repair_asks_the_books_first_and_stays_where_they_are_silent() -> None:
    doubt = before_repair(row_of().evolve(last_error="422: feature inactive"))
    assert judge_books(row_of(), Books((booking(quarantined=True),)), doubt).outcome == "repair"
    assert judge_books(row_of(), Books(may_read=True), doubt).outcome == "repair", "what was refused is not on record"
    recorded = before_repair(row_of().evolve(receipt='{"state": "quarantined"}'))
    assert judge_books(row_of(), Books(may_read=True), recorded).outcome == "held", "what was quarantined is"
    silent = judge_books(row_of(), Books(), doubt)
    assert (silent.outcome, silent.state) == ("held", "refused")
    assert "feature inactive" in (silent.detail or "")
    assert judge_books(row_of(), Books((booking(charged=5),)), doubt).state == "booked"


def test_the_keys_of_one_operation() -> None:
    row = row_of()
    assert settle_key(row) == "k:commit"
    repaired = row.with_state(row.state.quarantined().repair())
    assert settle_key(repaired) == "k:ingest"
    zero = repaired.with_state(repaired.state.sent().quarantined().repair())
    assert settle_key(zero) == "k:ingest:1"


EXCHANGES = Path(__file__).resolve().parents[3] / "shared" / "contract" / "exchanges"


def captured_refusals() -> list[Any]:
    found = []
    for file in sorted(EXCHANGES.glob("*.json")) if EXCHANGES.is_dir() else []:
        case = json.loads(file.read_text(encoding="utf-8"))
        path = case.get("request", {}).get("path", "").split("?")[0]
        route = {"commits": "commit", "ingest": "ingest"}.get(path.rpartition("/gate/")[2])
        status = case.get("response", {}).get("status")
        if route and isinstance(status, int) and status >= 300:
            found.append(pytest.param(route, case, id=file.stem))
    return found


@pytest.mark.skipif(not EXCHANGES.is_dir(), reason="../shared (the gate's contract) is not beside this checkout")
@pytest.mark.parametrize(("route", "case"), captured_refusals())
def test_what_a_real_gate_refused_is_never_called_booked_and_never_given_up(route: Route, case: Any) -> None:
    """Each refusal of a commit or ingest that was captured from a real server."""
    status, body = case["response"]["status"], case["response"]["body"]
    answer = Answer(status, {}, json.dumps(body).encode(), "req-1")
    verdict = judge_error(error_of(answer, route), row_of(route))
    if status == 500 and body.get("code") != "SERVER.CONFIG":
        assert verdict.outcome == "retry"
    elif body["message"] in LEASE_UNKNOWN:
        assert shape(verdict) == ("look_up", "repair", None)
    else:
        assert shape(verdict) == KEPT
        assert body["message"] in (verdict.detail or "")
