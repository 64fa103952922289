"""An ingest of which lines are booked as 0: they alone are sent again, once, whoever sends them and whatever dies."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import pytest

from vluna_llm import TokenUsage, Vluna, call_context, failpoints
from vluna_llm.books import Booking, Books, judge_books
from vluna_llm.delivery import Delivery
from vluna_llm.ending import Ending
from vluna_llm.ledger import Ledger
from vluna_llm.lifecycle import ModelCall
from vluna_llm.obey import carry_out
from vluna_llm.operation import OperationState, Part
from vluna_llm.outbox import Journal, Row
from vluna_llm.outbox.orders import What, ordered, place
from vluna_llm.outbox.row import COLUMNS, changed_values, from_values, insert_values, next_step
from vluna_llm.pricing import Price, PriceBook, Prices
from vluna_llm.runtime import _Courier
from vluna_llm.sandbox import Sandbox
from vluna_llm.settlement import FRUITLESS_ROUNDS, Verdict, receipt_of, unbilled, wants_lease
from vluna_llm.settler import Settler
from vluna_llm.telemetry import Telemetry
from vluna_llm.types import Receipt
from vluna_llm.usage.features import MeterNames
from vluna_llm.usage.meters import MeterLine

FEATURE = "openai.gpt-4o-mini"
INPUT, CACHED, OUTPUT = (f"{FEATURE}.tokens.{part}" for part in ("input", "cached", "output"))
PRICES = {FEATURE: 5, INPUT: 3, CACHED: 1, OUTPUT: 12}
USAGE = TokenUsage(100, 40, cached_tokens=30)
LINES = {CACHED: 30, INPUT: 70, OUTPUT: 40}
LEFT = (MeterLine(OUTPUT, 40),)
WHOLE = sum(quantity * PRICES[meter] for meter, quantity in LINES.items())
JOB = "vluna-llm:job:4711"


class Host:
    """One host: a journal of its own and what delivers from it, without threads; it can die and come back."""

    def __init__(self, gate: Sandbox, folder: Path, name: str) -> None:
        self.sandbox = gate
        self.vluna = Vluna(
            base_url=gate.base_url,
            realm_id=gate.realm_id,
            key_id=gate.key_id,
            key_secret=gate.key_secret,
            outbox="memory",
        )
        self.telemetry = Telemetry()
        self.folder = folder / name
        self.prices = PriceBook(self._fetch)
        self.receipts: list[Receipt] = []
        self.delivery = Delivery(
            _Courier(self.vluna.gate),
            self.prices,
            self.telemetry,
            meters="auto",
            names=lambda feature: MeterNames(),
        )
        self._open()

    def _open(self) -> None:
        self.ledger = Ledger(Journal(self.folder), self.telemetry)
        self.ledger.settled = self._settled  # type: ignore[method-assign]

    def _settled(self, row: Row, receipt: Receipt | None) -> None:
        assert receipt is not None
        self.receipts.append(receipt)

    def _fetch(self, feature_code: str, principal_id: str, user_id: str) -> Prices:
        meters = self.vluna.gate.meters(principal_id=principal_id, user_id=user_id, feature_code=feature_code)
        return {
            meter.meter_code: Price(meter.pricing.unit_price_xusd or 0)
            for meter in meters
            if meter.meter_code and meter.pricing is not None
        }

    def add(
        self,
        operation_id: str,
        *,
        job: bool = False,
        usage: TokenUsage = USAGE,
        meters: tuple[MeterLine, ...] = (),
        **changes: Any,
    ) -> str:
        state = OperationState().ungated().started().completed(usage, "provider", meters=meters)
        row = Row(
            operation_id=operation_id,
            base_url=self.sandbox.base_url,
            realm_id=self.sandbox.realm_id,
            pid=1,
            principal_id="ann",
            user_id="ann",
            feature_code=FEATURE,
            created_at=time.time(),
            ended_at=time.time(),
            authorize_key="",
            settle_key=JOB if job else f"vluna-llm:{operation_id}",
            derived=job,
            state=state,
            labels={"team": "blue"},
            response_id=f"resp-{operation_id}",
        )
        self.ledger.open(row.evolve(**changes), (), 0)
        return operation_id

    def deliver(self, operation_id: str, times: int = 1) -> Row:
        for _ in range(times):
            self.delivery.deliver(operation_id, self.ledger)
        return self.row(operation_id)

    def row(self, operation_id: str) -> Row:
        row = self.ledger.get(operation_id)
        assert row is not None
        return row

    def order(self, operation_id: str, what: What) -> Row:
        row = self.ledger.apply(operation_id, lambda now: ordered(now, what))
        assert row is not None
        return row

    def die(self) -> None:
        """Everything in memory is gone; the same host starts again with what is on disk."""
        self.ledger.journal.close()
        dead = self.folder.rename(self.folder.with_name(f"{self.folder.name}-dead"))
        journal = Journal(dead)
        journal.adopt(self.sandbox.base_url, self.sandbox.realm_id)
        journal.close()
        dead.rename(self.folder)
        self._open()
        self.ledger.journal.adopt(self.sandbox.base_url, self.sandbox.realm_id)
        self.prices = self.delivery._prices = PriceBook(self._fetch)


@pytest.fixture
def host(gate: Sandbox, tmp_path: Path) -> Iterator[Callable[[str], Host]]:
    made: list[Host] = []

    def make(name: str = "a") -> Host:
        made.append(Host(gate, tmp_path, name))
        return made[-1]

    for meter, price in PRICES.items():
        gate.price(meter, price)
    yield make
    for one in made:
        one.ledger.journal.close()
        one.vluna.close(timeout=1.0)


def price(gate: Sandbox, *meters: str) -> None:
    for meter in meters:
        gate.price(meter, PRICES[meter])


def unprice(gate: Sandbox, *meters: str) -> None:
    for meter in meters:
        gate.unprice(meter)


@contextmanager
def lost_in_between(host: Host, *meters: str, times: int = 1) -> Iterator[None]:
    """The meters lose their price when an ingest has been looked up and is on its way."""
    gate, send = host.vluna.gate, host.vluna.gate.send
    left = itertools.count(1)

    def sending(request: Any, **how: Any) -> Any:
        if request.kind == "ingest" and next(left) <= times:
            unprice(host.sandbox, *meters)
        return send(request, **how)

    gate.send = sending  # type: ignore[method-assign]
    try:
        yield
    finally:
        gate.send = send  # type: ignore[method-assign]


@contextmanager
def crash(name: str) -> Iterator[None]:
    def handler(hit: str) -> None:
        if hit == name:
            raise failpoints.Crash(name)

    failpoints.arm(handler)
    try:
        with pytest.raises(failpoints.Crash):
            yield
    finally:
        failpoints.arm(None)


def ingests(gate: Sandbox) -> list[tuple[str, dict[str, int]]]:
    """Each ingest in the gate's books by the end of its key, and what of it was charged."""
    return [
        (
            entry.idempotency_key.partition(":ingest")[2],
            {meter: quantity for meter, quantity in entry.lines.items() if meter not in entry.unpriced},
        )
        for entry in gate.booked("ann").entries
        if entry.kind == "ingest"
    ]


def charged(gate: Sandbox) -> dict[str, int]:
    """Tokens that were charged, by meter."""
    total: dict[str, int] = {}
    for _, lines in ingests(gate):
        for meter, quantity in lines.items():
            total[meter] = total.get(meter, 0) + quantity
    return dict(sorted(total.items()))


# -- one host ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [*((meter,) for meter in LINES), (INPUT, OUTPUT), (CACHED, INPUT)], ids=str)
def test_lines_that_were_booked_as_0_wait_for_their_price_and_go_out_alone(
    gate: Sandbox, host: Callable[[str], Host], missing: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    a = host("a")
    key = a.add("op-1")
    with lost_in_between(a, *missing):
        row = a.deliver(key)
    left = {meter: LINES[meter] for meter in missing}
    assert row.state.rest == tuple(MeterLine(meter, quantity) for meter, quantity in sorted(left.items()))
    assert (row.state.settlement, row.state.used_up, row.held) == ("pending", 1, True)
    assert sum(part.charged_xusd for part in row.state.parts) == gate.booked("ann").charged_xusd > 0
    assert "vluna.settlement.unpriced" in caplog.text
    assert "NOT CHARGED IN FULL" in caplog.text
    assert all(meter in (row.last_error or "") for meter in missing)
    body = row.body
    assert body is not None, "composed once and stored"
    row = a.deliver(key, 3)
    assert [suffix for suffix, _ in ingests(gate)] == [""], "nothing is sent before there is a price"
    assert (row.state.settlement, row.held, row.body) == ("pending", True, body)
    assert row.next_attempt_at > time.time() + 5
    assert a.receipts == []
    price(gate, *missing)
    assert a.deliver(key).state.settlement == "booked"
    assert ingests(gate) == [("", {m: q for m, q in LINES.items() if m not in missing}), (":1", left)]
    last = gate.booked("ann").entries[-1]
    assert (last.quantity, last.labels["operation_id"], last.labels["team"]) == (sum(left.values()), "op-1", "blue")
    assert gate.requests[-1].body == json.loads(body)
    (receipt,) = a.receipts
    assert receipt.state == "booked"
    assert receipt.charged_xusd == receipt.amount_xusd == gate.booked("ann").charged_xusd == WHOLE
    assert receipt.commit_id == last.commit_id
    assert gate.booked("ann").entries[0].commit_id in (receipt.detail or "")
    assert a.row(key).state.rest == ()


NAMED = tuple(MeterLine(meter, quantity) for meter, quantity in sorted(LINES.items()))


@pytest.mark.parametrize("answer", ["read", "unreadable: the books tell", "lost with the process", "the books alone"])
@pytest.mark.parametrize("total", [1, 30, 40, 70, 100, 140], ids=lambda total: f"total {total}")
@pytest.mark.parametrize("missing", [(INPUT,), (CACHED,), (INPUT, OUTPUT), tuple(LINES)], ids=str)
def test_of_meters_that_the_caller_named_what_was_booked_as_0_goes_out_alone(
    gate: Sandbox, host: Callable[[str], Host], missing: Sequence[str], total: int, answer: str
) -> None:
    """Whatever the total beside them is, also where it happens to be what is left."""
    a = host("a")
    key = a.add("op-1", usage=TokenUsage(total), meters=NAMED, unsplit=True)
    if "books" in answer:
        gate.faults.add("garbage", "ingest", times=3, body="<html>ok</html>")
    with lost_in_between(a, *missing):
        if answer in ("lost with the process", "the books alone"):
            with crash("delivery.answered"):
                a.deliver(key)
            a.die()
        row = a.deliver(key, 3)
    left = {meter: LINES[meter] for meter in missing}
    assert (row.state.settlement, row.state.used_up) == ("pending", 1)
    assert {line.meter_code: line.quantity for line in row.state.rest or row.state.meters} == left
    assert len(ingests(gate)) == 1
    gate.faults.clear()
    price(gate, *missing)
    assert a.deliver(key, 2).state.settlement == "booked"
    assert charged(gate) == LINES
    assert a.receipts[-1].charged_xusd == gate.booked("ann").charged_xusd == WHOLE
    assert a.receipts[-1].meters == LINES


def test_what_one_run_of_a_job_left_of_its_meters_is_sent_by_another_one(
    gate: Sandbox, host: Callable[[str], Host]
) -> None:
    a, b = host("a"), host("b")
    a.add("run-a", job=True, usage=TokenUsage(1), meters=NAMED, unsplit=True)
    with lost_in_between(a, OUTPUT):
        a.deliver("run-a")
    b.add("run-b", job=True, usage=TokenUsage(2), meters=(MeterLine(INPUT, 5),), unsplit=True)
    assert b.deliver("run-b").state.rest == LEFT
    price(gate, OUTPUT)
    assert b.deliver("run-b").state.settlement == "booked"
    a.deliver("run-a", 2)
    assert charged(gate) == LINES


def test_a_price_may_be_lost_in_any_number_of_rounds(gate: Sandbox, host: Callable[[str], Host]) -> None:
    a = host("a")
    key = a.add("op-1")
    for missing in (LINES, [INPUT, OUTPUT], [INPUT, OUTPUT], [OUTPUT], [OUTPUT]):
        with lost_in_between(a, *missing):
            a.deliver(key)
        price(gate, *missing)
    assert a.deliver(key).state.settlement == "booked"
    assert charged(gate) == LINES
    assert [suffix for suffix, _ in ingests(gate)] == ["", ":1", ":2", ":3", ":4", ":5"]
    (receipt,) = a.receipts
    assert receipt.charged_xusd == gate.booked("ann").charged_xusd == WHOLE


def test_the_price_of_a_plain_quantity_that_is_lost_is_waited_for_as_well(
    gate: Sandbox, host: Callable[[str], Host]
) -> None:
    a = host("a")
    unprice(gate, INPUT, CACHED, OUTPUT)
    key = a.add("op-1", unsplit=True, usage=TokenUsage(7, 0))
    with lost_in_between(a, FEATURE):
        row = a.deliver(key)
    assert (row.state.settlement, row.state.rest, row.body) == ("pending", None, None)
    a.deliver(key)
    assert [suffix for suffix, _ in ingests(gate)] == [""]
    price(gate, FEATURE)
    assert a.deliver(key).state.settlement == "booked"
    assert charged(gate) == {FEATURE: 7}


def test_a_gate_that_lists_a_price_and_never_charges_by_it_is_not_asked_for_ever(
    gate: Sandbox, host: Callable[[str], Host]
) -> None:
    """Each round leaves an entry of 0 in its books; the rounds are far apart, and then an operator has to look."""
    a = host("a")
    key = a.add("op-1")
    for number in range(FRUITLESS_ROUNDS + 1):
        assert a.row(key).state.settlement == "pending"
        with lost_in_between(a, OUTPUT):
            row = a.deliver(key)
        price(gate, OUTPUT)
        if 1 <= number < FRUITLESS_ROUNDS:
            assert row.next_attempt_at > time.time() + 5
    assert row.state.settlement == "quarantined"
    (receipt,) = a.receipts
    assert (receipt.state, receipt.charged_xusd) == ("quarantined", gate.booked("ann").charged_xusd)
    a.order(key, "repair")
    assert a.deliver(key).state.settlement == "booked"
    assert charged(gate) == LINES
    assert a.receipts[-1].charged_xusd == WHOLE


def test_what_is_left_is_refused_and_retried_without_what_was_charged(
    gate: Sandbox, host: Callable[[str], Host], caplog: pytest.LogCaptureFixture
) -> None:
    a = host("a")
    key = a.add("op-1")
    with lost_in_between(a, OUTPUT):
        a.deliver(key)
    first = gate.booked("ann").charged_xusd
    price(gate, OUTPUT)
    a.prices.prices(FEATURE, "ann", "ann")
    gate.feature(FEATURE, active=False)
    assert a.deliver(key).state.settlement == "refused"
    (receipt,) = a.receipts
    assert (receipt.state, receipt.charged, receipt.charged_xusd) == ("refused", False, first)
    gate.feature(FEATURE, active=True)
    for what in ("retry", "repair"):
        a.order(key, what)  # type: ignore[arg-type]
        a.deliver(key)
    assert charged(gate) == LINES
    assert a.receipts[-1].charged_xusd == WHOLE


class Idle:
    """A settler that delivers nothing."""

    def delivering(self, operation_id: str) -> bool:
        return False

    def enqueue(self, row: Row) -> None:
        pass


@pytest.mark.parametrize("refused", [False, True], ids=["put aside after many rounds", "refused"])
def test_a_repair_leaves_the_bytes_of_what_is_left(gate: Sandbox, host: Callable[[str], Host], refused: bool) -> None:
    """A host of an older version that delivers the row knows no other way to tell what is left from the whole."""
    a = host("a")
    key = a.add("op-1")
    with lost_in_between(a, OUTPUT):
        a.deliver(key)
    if refused:
        a.ledger.apply(key, lambda now: now.with_state(now.state.refused()))
    else:
        aside = a.row(key).state.sent().partly_booked(LEFT, wait=True)
        a.ledger.apply(key, lambda now: now.evolve(state=aside, path=None, body=None))
    path = a.ledger.journal.path
    assert path is not None
    place(path, [(key, "repair")])
    assert carry_out(a.ledger, cast(Settler, Idle()), a.telemetry) == 1
    row = a.row(key)
    assert (row.state.settlement, row.state.used_up) == ("pending", 1 if refused else 2)
    assert row.path is not None
    assert row.body is not None
    sent = json.loads(row.body)
    assert [(line["meter_code"], int(line["quantity_minor"])) for line in sent["meters"]] == [(OUTPUT, 40)]
    assert sent["labels"]["settlement_round"] == str(row.state.used_up)
    price(gate, OUTPUT)
    assert a.deliver(key).state.settlement == "booked"
    assert charged(gate) == LINES


def test_a_label_of_the_caller_is_not_taken_for_the_number_of_a_key(gate: Sandbox, host: Callable[[str], Host]) -> None:
    """By these labels the books are read: a caller's own of that name would make the first ingest a later one."""
    a = host("a")
    key = a.add("op-1", labels={"team": "blue", "settlement": "x", "settlement_round": "9" * 30})
    gate.faults.add("garbage", "ingest", times=3, body="<html>ok</html>")
    with lost_in_between(a, OUTPUT):
        row = a.deliver(key, 3)
    assert (row.state.settlement, row.state.used_up, row.state.rest) == ("pending", 1, LEFT)
    gate.faults.clear()
    price(gate, OUTPUT)
    assert a.deliver(key).state.settlement == "booked"
    assert charged(gate) == LINES
    assert [entry.labels["team"] for entry in gate.booked("ann").entries] == ["blue", "blue"]


def test_what_is_left_can_be_dropped_and_the_receipt_keeps_what_was_charged(
    gate: Sandbox, host: Callable[[str], Host]
) -> None:
    a = host("a")
    key = a.add("op-1")
    with lost_in_between(a, OUTPUT):
        a.deliver(key)
    first = gate.booked("ann").charged_xusd
    row = a.order(key, "drop")
    assert row.state.settlement == "lapsed"
    assert receipt_of(row, "lapsed", None, None).charged_xusd == first
    price(gate, OUTPUT)
    a.deliver(key)
    assert len(ingests(gate)) == 1


def test_an_operation_that_is_dropped_on_its_way_and_charged_in_part_is_told(
    gate: Sandbox, host: Callable[[str], Host], caplog: pytest.LogCaptureFixture
) -> None:
    a = host("a")
    key = a.add("op-1")
    send = a.vluna.gate.send

    def sending(request: Any, **how: Any) -> Any:
        answer = send(request, **how)
        if request.kind == "ingest":
            a.order(key, "drop")
        return answer

    a.vluna.gate.send = sending  # type: ignore[method-assign]
    a.prices.prices(FEATURE, "ann", "ann")
    unprice(gate, OUTPUT)
    row = a.deliver(key)
    assert row.state.settlement == "booked"
    assert json.loads(row.receipt or "")["charged_xusd"] == gate.booked("ann").charged_xusd > 0
    assert "CHARGED all the same" in caplog.text


# -- crashes, lost and unreadable answers ------------------------------------------------------------------------------


MOMENTS = ["delivery.composed", "delivery.stored", "delivery.answered", "delivery.rest"]


@pytest.mark.parametrize("restart", [False, True], ids=["same gate process", "gate restarted"])
@pytest.mark.parametrize(
    ("name", "nth"),
    # The bytes of what is left are composed with the answer, at no moment of their own.
    [*((name, 1) for name in MOMENTS), *((name, 2) for name in MOMENTS[1:])],
)
def test_a_crash_at_any_moment_leaves_the_same_lines_to_be_charged(
    gate: Sandbox, host: Callable[[str], Host], name: str, restart: bool, nth: int
) -> None:
    """Between the answer and what is written of it the gate is asked again, and shows the same lines."""
    a = host("a")
    key = a.add("op-1")
    if nth == 2:
        with lost_in_between(a, INPUT, OUTPUT):
            a.deliver(key)
        price(gate, INPUT, OUTPUT)
    with lost_in_between(a, OUTPUT), crash(name):
        a.deliver(key)
    a.die()
    if restart:
        gate.restart()
    with lost_in_between(a, OUTPUT):
        row = a.deliver(key)
    assert row.state.rest == (MeterLine(OUTPUT, 40),)
    price(gate, OUTPUT)
    a.die()
    assert a.deliver(key).state.settlement == "booked"
    assert charged(gate) == LINES
    assert a.receipts[-1].charged_xusd == gate.booked("ann").charged_xusd == WHOLE


@pytest.mark.parametrize("all_of_it", [False, True], ids=["in part", "nothing"])
def test_behind_an_answer_that_cannot_be_read_the_books_show_what_is_left(
    gate: Sandbox, host: Callable[[str], Host], all_of_it: bool
) -> None:
    a = host("a")
    key = a.add("op-1")
    gate.faults.add("garbage", "ingest", times=4, body="<html>ok</html>")
    missing = tuple(LINES) if all_of_it else (OUTPUT,)
    with lost_in_between(a, *missing):
        row = a.deliver(key, 3)
    assert (row.state.settlement, row.state.used_up) == ("pending", 1)
    assert row.state.rest == (None if all_of_it else (MeterLine(OUTPUT, 40),))
    gate.faults.clear()
    price(gate, *missing)
    assert a.deliver(key).state.settlement == "booked"
    assert charged(gate) == LINES
    assert a.receipts[-1].charged_xusd == WHOLE


def test_an_ingest_that_the_gate_took_with_other_bytes_leaves_what_that_one_left(
    gate: Sandbox, host: Callable[[str], Host]
) -> None:
    """A snapshot of the journal that was put back: composed anew by other prices, under the same key."""
    a, b = host("a"), host("b")
    key = a.add("op-1")
    moment = a.row(key).ended_at
    with lost_in_between(a, OUTPUT):
        a.deliver(key)
    unprice(gate, CACHED)
    price(gate, OUTPUT)
    b.add("op-1", ended_at=moment)
    row = b.deliver(key)
    assert row.state.rest == (MeterLine(OUTPUT, 40),), "409, and the books tell"
    for one in (b, a, b):
        one.deliver(key)
    assert charged(gate) == LINES
    assert {one.row(key).state.settlement for one in (a, b)} == {"booked"}
    assert [one.receipts[-1].charged_xusd for one in (a, b)] == [WHOLE, WHOLE]


# -- two hosts, one job ------------------------------------------------------------------------------------------------

OTHER = TokenUsage(55, 11, cached_tokens=5)


@pytest.mark.parametrize("restart", [False, True], ids=["same gate process", "gate restarted"])
@pytest.mark.parametrize("gone", [True, False], ids=["first host gone", "first host comes back"])
@pytest.mark.parametrize("stored", [True, False], ids=["answer stored", "died before it was"])
def test_what_one_run_of_a_job_left_is_sent_by_another_one_once(
    gate: Sandbox, host: Callable[[str], Host], stored: bool, gone: bool, restart: bool
) -> None:
    a, b = host("a"), host("b")
    a.add("run-a", job=True)
    with lost_in_between(a, OUTPUT):
        if stored:
            a.deliver("run-a")
        else:
            with crash("delivery.answered"):
                a.deliver("run-a")
    first = gate.booked("ann").charged_xusd
    if restart:
        gate.restart()
    b.add("run-b", job=True, usage=OTHER)
    row = b.deliver("run-b")
    assert (row.state.settlement, row.state.rest) == ("pending", (MeterLine(OUTPUT, 40),)), "listed, not lapsed"
    price(gate, OUTPUT)
    assert b.deliver("run-b").state.settlement == "booked"
    assert charged(gate) == LINES
    assert b.receipts[-1].charged_xusd == 40 * PRICES[OUTPUT]
    if not gone:
        a.die()
        row = a.deliver("run-a", 3)
        assert row.state.settlement == "booked"
        assert a.receipts[-1].charged_xusd == first
        assert charged(gate) == LINES
    c = host("c")
    c.add("run-c", job=True, usage=TokenUsage(9, 9))
    assert c.deliver("run-c", 2).state.settlement == "lapsed"
    assert charged(gate) == LINES


@pytest.mark.parametrize("order", list(itertools.permutations("aabb", 4))[::3], ids="".join)
def test_two_runs_that_both_send_what_is_left_charge_it_once(
    gate: Sandbox, host: Callable[[str], Host], order: Sequence[str]
) -> None:
    """Prices come and go meanwhile, and one of two requests under the same key is answered 409."""
    hosts = {"a": host("a"), "b": host("b")}
    hosts["a"].add("run-a", job=True)
    hosts["b"].add("run-b", job=True, usage=OTHER)
    with lost_in_between(hosts["a"], INPUT, OUTPUT):
        hosts["a"].deliver("run-a")
    hosts["b"].deliver("run-b")
    for number, name in enumerate(order):
        price(gate, INPUT, OUTPUT)
        missing = ((INPUT, OUTPUT), (OUTPUT,), (OUTPUT,), ())[number]
        with lost_in_between(hosts[name], *missing):
            hosts[name].prices.forget(FEATURE)
            hosts[name].deliver(f"run-{name}")
    price(gate, *LINES)
    for _ in range(4):
        for name, one in hosts.items():
            one.prices.forget(FEATURE)
            one.deliver(f"run-{name}")
    assert charged(gate) == LINES
    states = {name: one.row(f"run-{name}").state.settlement for name, one in hosts.items()}
    assert states["a"] == "booked"
    assert states["b"] in ("booked", "lapsed")
    told = sum(one.receipts[-1].charged_xusd or 0 for one in hosts.values())
    assert told == gate.booked("ann").charged_xusd == WHOLE


def test_a_run_whose_books_cannot_be_read_closes_as_before_and_sends_nothing(
    gate: Sandbox, host: Callable[[str], Host]
) -> None:
    a, b = host("a"), host("b")
    a.add("run-a", job=True)
    with lost_in_between(a, OUTPUT):
        a.deliver("run-a")
    price(gate, OUTPUT)
    forbidden = '{"ok":false,"code":"AUTH.INSUFFICIENT_SCOPE","message":"no admin here","meta":{"status":403}}'
    gate.faults.add("status", "ratings", times=None, status=403, body=forbidden)
    b.add("run-b", job=True, usage=OTHER)
    assert b.deliver("run-b").state.settlement == "lapsed"
    assert len(ingests(gate)) == 1
    assert a.deliver("run-a").state.settlement == "booked", "who knows what it left sends it"
    assert charged(gate) == LINES


@pytest.mark.parametrize(("others", "found"), [(205, True), (250, False)])
def test_the_ingests_of_a_customer_are_looked_through_so_far_and_no_further(
    gate: Sandbox, host: Callable[[str], Host], monkeypatch: pytest.MonkeyPatch, others: int, found: bool
) -> None:
    """Pages are turned by time. Where it is not among the newest, nothing is made of what is not known."""
    monkeypatch.setattr("vluna_llm.books._PAGE", 20)
    monkeypatch.setattr("vluna_llm.books.MOST_PAGES", 12)
    a, b = host("a"), host("b")
    long_ago = time.time() - 3600
    a.add("run-a", job=True, ended_at=long_ago)
    with lost_in_between(a, OUTPUT):
        a.deliver("run-a")
    for number in range(others):
        a.vluna.gate.ingest(
            principal_id="ann",
            feature_code=FEATURE,
            quantity=1,
            occurred_at=datetime.fromtimestamp(long_ago + 1 + number, timezone.utc),
        )
    b.add("run-b", job=True, usage=OTHER)
    row = b.deliver("run-b")
    assert row.state.settlement == ("pending" if found else "lapsed")
    assert row.state.rest == ((MeterLine(OUTPUT, 40),) if found else None)


def test_what_is_left_is_not_given_up_where_the_books_are_silent(gate: Sandbox, host: Callable[[str], Host]) -> None:
    """Another run sent it first, says the 409; whether it was charged nobody tells: it stays on the operator's list."""
    a, b = host("a"), host("b")
    a.add("run-a", job=True)
    with lost_in_between(a, OUTPUT):
        a.deliver("run-a")
    b.add("run-b", job=True, usage=OTHER)
    b.deliver("run-b")
    price(gate, OUTPUT)
    b.deliver("run-b")
    forbidden = '{"ok":false,"code":"AUTH.INSUFFICIENT_SCOPE","message":"no admin here","meta":{"status":403}}'
    script = gate.faults.add("status", "ratings", times=None, status=403, body=forbidden)
    assert a.deliver("run-a").state.settlement == "refused"
    gate.faults.remove(script)
    a.order("run-a", "retry")
    assert a.deliver("run-a").state.settlement == "booked"
    assert charged(gate) == LINES


# -- whole processes ---------------------------------------------------------------------------------------------------


def test_a_caller_is_told_the_sum_when_all_of_it_is_charged(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    vluna = make_vluna(authorize_deadline=0.2, outbox=str(tmp_path))
    for meter, xusd in PRICES.items():
        gate.price(meter, xusd)
    gate.faults.add("drop_before", "authorize", times=None)
    with call_context(principal_id="ann") as scope:
        operation = vluna.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []}))
    assert operation is not None
    gate.faults.clear()
    vluna._running().prices.prices(FEATURE, "ann", "ann")
    unprice(gate, OUTPUT)
    operation.finish(Ending("complete", usage=USAGE, finished=True))
    assert not vluna.flush(1)
    assert scope.settled_xusd == 0
    row = vluna._running().ledger.get(operation.operation_id)
    assert row is not None
    assert OUTPUT in next_step(row.evolve(held=False))
    price(gate, OUTPUT)
    vluna._running().settler.enqueue(row)
    assert scope.wait(10)
    assert scope.settled_xusd == gate.booked("ann").charged_xusd == WHOLE


# -- pure --------------------------------------------------------------------------------------------------------------

STATE = OperationState().ungated().started().completed(USAGE, "provider").sent()
REST = (MeterLine(OUTPUT, 40),)


def row_of(**changes: Any) -> Row:
    row = Row("op-1", "http://gate", "realm", 1, "ann", "ann", FEATURE, 1.0, "k:auth", "k")
    body = b'{"occurred_at": "2026-11-21T08:00:00.123Z"}'
    return row.evolve(**{"state": STATE, "body": body, **changes})


def test_what_is_left_survives_the_journal_and_is_told_again_the_same() -> None:
    left = row_of(state=STATE.partly_booked(REST, (Part("c-1", 400), Part("c-0", 0))))
    values = {**insert_values(row_of()), **changed_values(row_of(), left)}
    blank = dict.fromkeys(COLUMNS)
    assert from_values({**blank, **values}).state == left.state
    done = row_of(state=left.state.sent().booked())
    assert changed_values(left, done)["rest"] == "{}"
    receipt = receipt_of(left, "refused", None, "why")
    assert receipt_of(left, "refused", None, receipt.detail).detail == receipt.detail, "also where it is read back"
    assert (receipt.charged_xusd, receipt.amount_xusd) == (400, 400)


def test_what_is_left_is_never_committed() -> None:
    left = row_of(state=STATE.partly_booked(REST), body=None, derived=True, authorize_key="k:auth")
    assert not wants_lease(left)
    assert left.state.late_lease("lease_token") is left.state


def ingest(number: int, *, unpriced: Sequence[MeterLine] = (), xusd: int | None = 10, who: str = "op-1") -> Booking:
    return Booking(f"c-{number}", who, False, (), xusd or 0, xusd, number, unpriced=tuple(unpriced))


DOUBT = Verdict(
    "look_up",
    detail="in doubt",
    uncharged=Verdict("held", "refused", "kept"),
    unproven=Verdict("held", "refused", "kept"),
)


@pytest.mark.parametrize(
    ("bookings", "round_", "expected"),
    [
        ([ingest(0)], 0, ("done", "booked", (), 0)),
        ([ingest(0, unpriced=REST)], 0, ("rest", None, REST, 0)),
        ([ingest(0, unpriced=REST), ingest(1)], 0, ("done", "booked", (), 0)),
        ([ingest(0, unpriced=[MeterLine(INPUT, 70)]), ingest(1, unpriced=REST)], 0, ("rest", None, REST, 1)),
        ([ingest(0, unpriced=REST)], 1, ("held", "refused", (), 0)),
        ([ingest(0, unpriced=REST), ingest(1)], 1, ("done", "booked", (), 0)),
        ([ingest(0, xusd=None)], 0, ("held", "refused", (), 0)),
        ([Booking("c-0", "op-1", False, (), 10, 10, 0, untold=True)], 0, ("held", "refused", (), 0)),
        ([ingest(0, unpriced=(MeterLine(FEATURE, 140),), xusd=0)], 0, ("rest", None, (MeterLine(FEATURE, 140),), 0)),
    ],
)
def test_the_last_ingest_under_a_key_tells_what_is_left(
    bookings: list[Booking], round_: int, expected: tuple[Any, ...]
) -> None:
    state = STATE
    for _ in range(round_):
        state = state.partly_booked(REST, (Part("before", 1),)).sent()
    verdict = judge_books(row_of(state=state), Books(tuple(bookings), may_read=True), DOUBT)
    assert (verdict.outcome, verdict.state, verdict.rest, verdict.round_) == expected
    assert verdict.whole is (expected[2] == (MeterLine(FEATURE, 140),))


def test_a_round_that_charges_something_is_never_fruitless() -> None:
    assert unbilled(row_of(), REST, (Part("c", 1),), 99).outcome == "rest"
    assert unbilled(row_of(), REST, (), FRUITLESS_ROUNDS).outcome == "held"
