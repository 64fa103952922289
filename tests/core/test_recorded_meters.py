"""Work that reports quantities on several meters: each is charged by its own price, once, whatever becomes of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from vluna_llm import Receipt, TokenUsage, Vluna, call_context
from vluna_llm.cli.export import record, text_of
from vluna_llm.cli.listing import as_json
from vluna_llm.cli.selection import Entry
from vluna_llm.errors import BudgetExceeded, ConfigurationError
from vluna_llm.manual import RecordedOperation
from vluna_llm.obey import carry_out
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Row
from vluna_llm.outbox.orders import place
from vluna_llm.outbox.row import COLUMNS, changed_values, from_values, insert_values, next_step, unbilled
from vluna_llm.sandbox import Sandbox
from vluna_llm.usage.meters import MeterLine

OCR = "tools.ocr"
PAGES, SECONDS = f"{OCR}.pages", f"{OCR}.seconds"
PRICES = {OCR: 1_000, PAGES: 100, SECONDS: 7}
USED = {PAGES: 12, SECONDS: 40}
COST = 12 * 100 + 40 * 7
LINES = (MeterLine(PAGES, 12), MeterLine(SECONDS, 40))


def sell(gate: Sandbox, *without: str) -> None:
    """The feature has these meters; those of ``without`` have no price yet."""
    gate.feature(OCR, meters=(PAGES, SECONDS))
    for meter, xusd in PRICES.items():
        gate.price(meter, xusd, feature=OCR)
    for meter in without:
        gate.unprice(meter)


def read(vluna: Vluna, principal: str = "ann", **recorded: Any) -> RecordedOperation:
    """One piece of work."""
    with call_context(principal_id=principal), vluna.operation(feature_code=OCR, estimate=1) as op:
        op.record(**recorded)
    return op


def receipt_of(op: RecordedOperation, seconds: float = 10.0) -> Receipt:
    receipt = op.wait(seconds)
    assert receipt is not None
    return receipt


def booked(gate: Sandbox, principal: str = "ann") -> list[tuple[str, int, dict[str, int], int]]:
    """Everything that took money: how, the total, the lines and the amount."""
    return [
        (entry.kind, entry.quantity, dict(entry.lines), entry.charged_xusd)
        for entry in gate.booked(principal).entries
        if entry.charged_xusd
    ]


def sent(gate: Sandbox, route: str) -> list[Any]:
    return [request.body for request in gate.requests if request.route == route]


def row_of(vluna: Vluna, op: RecordedOperation) -> Row:
    row = vluna._running().ledger.get(op.operation_id)
    assert row is not None
    return row


def until(true: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_each_meter_is_charged_by_its_own_price(vluna: Vluna, gate: Sandbox) -> None:
    sell(gate)
    with call_context(principal_id="ann") as scope:
        with vluna.operation(feature_code=OCR, estimate=1) as op:
            op.record(meters={SECONDS: 40, PAGES: 12})
        assert scope.wait(10)
    assert booked(gate) == [("commit", 52, USED, COST)]
    (body,) = sent(gate, "commits")
    assert [(line["meter_code"], line["quantity_minor"]) for line in body["meters"]] == [(PAGES, "12"), (SECONDS, "40")]
    assert scope.settled_xusd == COST
    receipt = receipt_of(op)
    assert (receipt.state, receipt.charged_xusd, receipt.quantity) == ("booked", COST, 52)
    assert receipt.meters == USED
    assert receipt.usage_source == "caller"


@pytest.mark.parametrize(("given", "counted"), [(1, 1), (200, 200), (0, 1)])
def test_a_quantity_beside_them_counts_against_quotas_and_prices_nothing(
    vluna: Vluna, gate: Sandbox, given: int, counted: int
) -> None:
    """The gate takes no commit of 0: so much was used on the meters that at least 1 counts."""
    sell(gate)
    gate.quota(1_000, feature=OCR)
    receipt = receipt_of(read(vluna, quantity=given, meters=USED))
    assert booked(gate) == [("commit", counted, USED, COST)]
    (limits,) = vluna.gate.limits(principal_id="ann", feature_code=OCR, expand=("quotas",))
    assert {quota.used_minor for quota in limits.quotas if quota.limit_minor == 1_000} == {counted}
    assert (receipt.quantity, receipt.charged_xusd) == (counted, COST)


@pytest.mark.parametrize(
    "recorded",
    [{"meters": {PAGES: 0, SECONDS: 0}}, {"meters": {}}, {"meters": {PAGES: 0}, "quantity": 5}, {"quantity": 0}],
    ids=str,
)
def test_where_all_are_zero_nothing_was_used(vluna: Vluna, gate: Sandbox, recorded: dict[str, Any]) -> None:
    """A total without lines would be charged by the primary meter, so it goes with them."""
    sell(gate)
    assert receipt_of(read(vluna, **recorded)).state == "cancelled"
    assert booked(gate) == []
    assert sent(gate, "commits") == []


def test_zeros_are_left_out_and_spellings_of_one_meter_are_one(vluna: Vluna, gate: Sandbox) -> None:
    sell(gate)
    receipt_of(read(vluna, meters={SECONDS: 0, PAGES: 2, PAGES.upper(): 3}))
    assert booked(gate) == [("commit", 5, {PAGES: 5}, 500)]


def test_the_primary_meter_may_stand_among_them(vluna: Vluna, gate: Sandbox) -> None:
    sell(gate)
    receipt_of(read(vluna, meters={OCR: 2, PAGES: 1}))
    assert booked(gate) == [("commit", 3, {OCR: 2, PAGES: 1}, 2_100)]


def test_the_last_one_counts(vluna: Vluna, gate: Sandbox) -> None:
    sell(gate)
    ways: list[dict[str, Any]] = [{"meters": USED}, {"quantity": 3}, {"usage": TokenUsage(4, 1)}]
    for last in range(3):
        with call_context(principal_id="ann"), vluna.operation(feature_code=OCR) as op:
            for recorded in (*ways[last + 1 :], *ways[: last + 1]):
                op.record(**recorded)
        receipt_of(op)
    assert booked(gate) == [
        ("commit", 52, USED, COST),
        ("commit", 3, {OCR: 3}, 3_000),
        ("commit", 5, {OCR: 5}, 5_000),
    ]


@pytest.mark.parametrize(
    ("recorded", "error", "says"),
    [
        ({}, ValueError, "TokenUsage, or quantity"),
        ({"usage": TokenUsage(1), "meters": USED}, ValueError, "TokenUsage, or quantity"),
        ({"usage": TokenUsage(1), "quantity": 1}, ValueError, "TokenUsage, or quantity"),
        ({"meters": {"ocr pages": 1}}, ConfigurationError, "meters key 'ocr pages' is no code; use 1 to 128"),
        ({"meters": {"": 1}}, ConfigurationError, "meters key '' is no code"),
        ({"meters": {7: 1}}, ConfigurationError, "meters key 7 is no code"),
        ({"meters": {PAGES: 1.5}}, ValueError, "must be an integer of at least 0, not 1.5"),
        ({"meters": {PAGES: -1}}, ValueError, "must be an integer of at least 0, not -1"),
        ({"meters": {PAGES: True}}, ValueError, "must be an integer of at least 0, not True"),
        ({"meters": {PAGES: 1}, "quantity": -1}, ValueError, "quantity must be an integer of at least 0"),
        ({"meters": [(PAGES, 1)]}, ValueError, "meters must be a mapping like {'ocr.pages': 12}, not list"),
    ],
    ids=str,
)
def test_what_cannot_be_booked_is_said_at_once(
    vluna: Vluna, gate: Sandbox, recorded: dict[str, Any], error: type[Exception], says: str
) -> None:
    sell(gate)
    with call_context(principal_id="ann"), vluna.operation(feature_code=OCR) as op:
        op.record(meters={PAGES: 1})
        with pytest.raises(error) as raised:
            op.record(**recorded)
        assert says in str(raised.value)
    receipt_of(op)
    assert booked(gate) == [("commit", 1, {PAGES: 1}, 100)], "what was recorded before stands"


def test_what_was_used_is_booked_also_where_the_work_raises(vluna: Vluna, gate: Sandbox) -> None:
    sell(gate)

    @vluna.operation(feature_code=OCR)
    def work(op: Any = None) -> None:
        op.record(meters=USED)
        raise LookupError

    with call_context(principal_id="ann"), pytest.raises(LookupError):
        work()
    assert vluna.flush(10)
    assert booked(gate) == [("commit", 52, USED, COST)]


def test_every_kind_of_decorated_function_records_on_meters(vluna: Vluna, gate: Sandbox) -> None:
    sell(gate)
    work = vluna.operation(feature_code=OCR, estimate=1)

    @work
    def plain(op: Any = None) -> None:
        op.record(meters={PAGES: 1})

    @work
    async def coroutine(op: Any = None) -> None:
        op.record(meters={PAGES: 2})

    @work
    def generator(op: Any = None) -> Iterator[int]:
        for page in (1, 2, 3):
            op.record(meters={PAGES: page, SECONDS: 1})
            yield page

    @work
    async def async_generator(op: Any = None) -> AsyncIterator[int]:
        op.record(meters={PAGES: 4}, quantity=1)
        yield 1

    async def main() -> None:
        await coroutine()
        assert [page async for page in async_generator()] == [1]

    with call_context(principal_id="ann"):
        plain()
        assert list(generator()) == [1, 2, 3]
        asyncio.run(main())
    assert vluna.flush(10)
    assert sorted(booked(gate), key=lambda one: one[3]) == [
        ("commit", 1, {PAGES: 1}, 100),
        ("commit", 2, {PAGES: 2}, 200),
        ("commit", 4, {PAGES: 3, SECONDS: 1}, 307),
        ("commit", 1, {PAGES: 4}, 400),
    ]


def test_nothing_is_metered_where_the_mode_is_off(vluna: Vluna, gate: Sandbox) -> None:
    vluna.mode = "off"
    assert read(vluna, meters=USED).wait(0.1) is None
    assert gate.requests == []


# -- the setting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("auto", ("commit", 9, USED, COST)),
        ("always", ("commit", 9, USED, COST)),
        ("never", ("commit", 9, {OCR: 9}, 9_000)),
    ],
)
def test_the_setting_says_whether_lines_are_sent(
    make_vluna: Callable[..., Vluna], gate: Sandbox, mode: str, expected: object
) -> None:
    sell(gate)
    receipt = receipt_of(read(make_vluna(meters=mode), quantity=9, meters=USED))
    assert booked(gate) == [expected]
    assert receipt.meters == USED


# -- a meter without a price -------------------------------------------------------------------------------------------


def order(vluna: Vluna, op: RecordedOperation, what: Any) -> None:
    runtime = vluna._running()
    path = runtime.ledger.journal.path
    assert path is not None
    place(path, [(op.operation_id, what)])
    carry_out(runtime.ledger, runtime.settler, runtime.telemetry)


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("missing", [(PAGES,), (SECONDS,), (PAGES, SECONDS)], ids=str)
def test_a_named_meter_without_a_price_is_told_and_repaired_once_with_all_lines(
    make_vluna: Callable[..., Vluna],
    gate: Sandbox,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    missing: tuple[str, ...],
    mode: str,
) -> None:
    """The lines go as they were given: nothing is known of a meter above them, whatever price the primary one has."""
    sell(gate, *missing)
    vluna = make_vluna(outbox=str(tmp_path), meters=mode)
    op = read(vluna, quantity=1, meters=USED)
    receipt = receipt_of(op)
    assert (receipt.state, receipt.charged_xusd) == ("quarantined", 0)
    assert booked(gate) == []
    assert all(meter in caplog.text for meter in missing)
    assert (unbilled(row_of(vluna, op)), row_of(vluna, op).state.meters) == (52, LINES)
    for meter in missing:
        gate.price(meter, PRICES[meter])
    order(vluna, op, "repair")
    until(lambda: bool(booked(gate)), "repaired")
    order(vluna, op, "repair")
    assert vluna.flush(10)
    assert booked(gate) == [("ingest", 1, USED, COST)]
    assert row_of(vluna, op).state.settlement == "rebooked"


@pytest.mark.parametrize("known", ["known to the feature", "of another feature"])
def test_a_meter_that_the_gate_does_not_have_charges_nothing_of_the_commit(
    make_vluna: Callable[..., Vluna], tmp_path: Path, known: str
) -> None:
    with Sandbox({"auto_registry": False}) as gate:
        sell(gate)
        foreign = "tools.scan.sheets"
        if known == "of another feature":
            gate.price(foreign, 5, feature="tools.scan")
        vluna = make_vluna(base_url=gate.base_url, key_id=gate.key_id, key_secret=gate.key_secret, outbox=str(tmp_path))
        op = read(vluna, meters={PAGES: 1, foreign: 2})
        assert receipt_of(op).state == "quarantined"
        gate.feature(OCR, meters=(PAGES, SECONDS, foreign))
        gate.price(foreign, 5)
        vluna._running().prices.forget(OCR)
        order(vluna, op, "repair")
        until(lambda: bool(booked(gate)), "repaired")
        assert booked(gate) == [("ingest", 3, {PAGES: 1, foreign: 2}, 110)]


# -- without a lease, or with one that is gone -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_work_without_a_lease_is_ingested_once_all_its_meters_have_a_price(
    make_vluna: Callable[..., Vluna], gate: Sandbox, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An ingest would book a line without a price as 0, without a word."""
    sell(gate, SECONDS)
    gate.faults.add("status", "authorize", times=None, status=503)
    vluna = make_vluna(authorize_deadline=0.1, meters=mode)
    op = read(vluna, meters=USED)
    until(lambda: row_of(vluna, op).held, "it waits")
    assert sent(gate, "ingest") == []
    assert SECONDS in caplog.text
    assert PAGES not in (row_of(vluna, op).last_error or "")
    gate.price(SECONDS, 7)
    vluna._running().prices.forget(OCR)
    vluna._running().settler.enqueue(row_of(vluna, op))
    assert receipt_of(op).state == "booked"
    assert booked(gate) == [("ingest", 52, USED, COST)]


def test_in_mode_never_an_ingest_waits_for_the_primary_price_alone(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    sell(gate, PAGES, SECONDS)
    gate.faults.add("status", "authorize", times=None, status=503)
    vluna = make_vluna(authorize_deadline=0.1, meters="never")
    receipt_of(read(vluna, meters=USED))
    assert booked(gate) == [("ingest", 52, {OCR: 52}, 52_000)]


def test_a_lease_that_ran_out_is_followed_by_an_ingest_of_the_same_lines(make_vluna: Callable[..., Vluna]) -> None:
    with Sandbox({"lease_ttl_seconds": 0.05, "grace_ms": 0}) as gate:
        sell(gate)
        vluna = make_vluna(base_url=gate.base_url, key_id=gate.key_id, key_secret=gate.key_secret)
        with call_context(principal_id="ann"), vluna.operation(feature_code=OCR) as op:
            time.sleep(0.3)
            op.record(quantity=2, meters=USED)
        assert receipt_of(op).state == "rebooked"
        assert booked(gate) == [("ingest", 2, USED, COST)]


def test_a_gate_of_the_other_dialect_gets_the_same_lines(make_vluna: Callable[..., Vluna]) -> None:
    with Sandbox(dialect="lease") as gate:
        sell(gate)
        vluna = make_vluna(base_url=gate.base_url, key_id=gate.key_id, key_secret=gate.key_secret)
        receipt_of(read(vluna, quantity=3, meters=USED))
        assert read(vluna, meters={PAGES: 0}).wait(10) is not None
        assert booked(gate) == [("commit", 3, USED, COST)]


@pytest.mark.parametrize("fault", ["drop_after", "error_before", "drop_before"])
def test_an_answer_that_is_lost_is_asked_for_again_with_the_same_bytes(vluna: Vluna, gate: Sandbox, fault: Any) -> None:
    sell(gate)
    gate.faults.add(fault, "commits", times=2)
    receipt_of(read(vluna, quantity=1, meters=USED))
    assert booked(gate) == [("commit", 1, USED, COST)]
    assert len({json.dumps(body) for body in sent(gate, "commits")}) == 1


def test_two_runs_of_a_job_are_charged_once_by_the_lines_of_the_first(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    sell(gate)
    states = []
    for pages in (12, 13):
        run = make_vluna().operation(feature_code=OCR)
        with call_context(principal_id="ann", idempotency_key="job-1"), run as op:
            op.record(meters={PAGES: pages, SECONDS: 40})
        states.append(receipt_of(op).state)
    assert states == ["booked", "lapsed"]
    assert booked(gate) == [("commit", 52, USED, COST)]


# -- what a task may cost ----------------------------------------------------------------------------------------------


def test_what_is_under_way_counts_by_the_prices_of_its_meters(vluna: Vluna, gate: Sandbox) -> None:
    sell(gate)
    gate.faults.add("status", "commits", times=None, status=503)
    with call_context(principal_id="ann", max_amount_xusd=COST + 1_500) as scope:
        with vluna.operation(feature_code=OCR, estimate=1) as op:
            assert scope.estimated_xusd == 1_000
            op.record(quantity=1, meters=USED)
        assert scope.estimated_xusd == COST
        with vluna.operation(feature_code=OCR, estimate=1) as second:
            pass
        assert scope.wait(0.2) is False
        with pytest.raises(BudgetExceeded):
            vluna.operation(feature_code=OCR, estimate=2).__enter__()
        gate.faults.clear()
        vluna._process.gate_is_back()
        assert scope.wait(30)
        assert (scope.settled_xusd, scope.estimated_xusd) == (COST, 0)
    assert second.wait(1) is not None


def test_in_mode_never_what_is_under_way_counts_by_the_primary_price(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    sell(gate)
    vluna = make_vluna(meters="never")
    vluna._running().prices.prices(OCR, "ann", "ann")
    gate.faults.add("status", "commits", times=None, status=503)
    with call_context(principal_id="ann") as scope:
        with vluna.operation(feature_code=OCR) as op:
            op.record(quantity=3, meters=USED)
        assert scope.estimated_xusd == 3_000


def test_a_limit_in_units_counts_the_total(vluna: Vluna, gate: Sandbox) -> None:
    sell(gate)
    with call_context(principal_id="ann", max_tokens=60) as scope:
        with vluna.operation(feature_code=OCR, estimate=1) as op:
            op.record(meters=USED)
        assert scope.usage.total_tokens == 52
        with pytest.raises(BudgetExceeded):
            vluna.operation(feature_code=OCR, estimate=9).__enter__()
        assert scope.wait(10)


# -- where it is kept --------------------------------------------------------------------------------------------------

STATE = OperationState().leased("lease_token").started().completed(TokenUsage(1), "caller", meters=LINES)


def made(state: OperationState = STATE, **changes: Any) -> Row:
    return Row("op-1", "http://g", "r", 1, "ann", "ann", OCR, 1.0, "k:auth", "k").evolve(
        **{"state": state, "unsplit": True, **changes}
    )


def test_the_meters_survive_the_journal_beside_the_total() -> None:
    before = made(OperationState().leased("lease_token").started())
    values: Mapping[str, Any] = {**dict.fromkeys(COLUMNS), **insert_values(before), **changed_values(before, made())}
    assert json.loads(values["meters"]) == USED
    assert from_values(values).state == STATE
    assert from_values({**values, "meters": None}).state.meters == ()
    older = {name: value for name, value in values.items() if name != "meters"}
    assert from_values(older).state.meters == ()


def test_usage_that_comes_second_changes_nothing() -> None:
    again = STATE.completed(TokenUsage(9), "caller", meters=(MeterLine(PAGES, 99),))
    assert again is STATE


def test_lists_and_exports_show_the_meters_and_what_of_them_is_unbilled() -> None:
    entry = Entry(made(), Path("journal"), "here")
    told = record(entry)
    assert (told["quantity"], told["meters"], told["unbilled_lines"], told["unbilled"]) == (1, USED, USED, 52)
    ingest = STATE.sent().quarantined().repair().sent().partly_booked((MeterLine(SECONDS, 40),))
    told = record(Entry(made(ingest), Path("journal"), "here"))
    assert (told["meters"], told["unbilled_lines"], told["unbilled"]) == (USED, {SECONDS: 40}, 40)
    assert "booked as 0" in next_step(made(ingest))
    assert "booked as 0" not in next_step(made(STATE.by_lines(LINES)))
    assert as_json(entry, 2.0)["meters"] == USED
    head, line = text_of([entry], "csv").splitlines()
    assert head.endswith(",meters")
    assert line.endswith('"{""tools.ocr.pages"": 12, ""tools.ocr.seconds"": 40}"')
