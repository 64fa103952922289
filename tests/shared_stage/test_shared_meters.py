"""Work on several meters in the shared outbox: whichever host delivers it, of whatever version, charges its lines."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("psycopg", reason="psycopg (the extra 'postgres') is not installed")

from host import Host

import vluna_llm.outbox.postgres
from vluna_llm import Vluna, call_context
from vluna_llm.manual import RecordedOperation
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Row
from vluna_llm.outbox.row import from_values
from vluna_llm.sandbox import Sandbox
from vluna_llm.settlement import compose, with_bytes_of_rest, withdrawn
from vluna_llm.sharing.handing import handed, stays
from vluna_llm.usage import MeterLine, TokenUsage
from vluna_llm.usage.features import DEFAULT_NAMES

OCR = "tools.ocr"
PAGES, SECONDS = f"{OCR}.pages", f"{OCR}.seconds"
PRICES = {OCR: 1_000, PAGES: 100, SECONDS: 7}
USED = {PAGES: 12, SECONDS: 40}
LINES = (MeterLine(PAGES, 12), MeterLine(SECONDS, 40))
COST = 12 * 100 + 40 * 7


def sell(gate: Sandbox, *without: str) -> None:
    gate.feature(OCR, meters=(PAGES, SECONDS))
    for meter, xusd in PRICES.items():
        gate.price(meter, xusd, feature=OCR)
    for meter in without:
        gate.unprice(meter)


def until(true: Callable[[], Any], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def booked(gate: Sandbox, principal: str = "ann") -> list[tuple[str, int, dict[str, int], int]]:
    return [
        (entry.kind, entry.quantity, dict(entry.lines), entry.charged_xusd)
        for entry in gate.booked(principal).entries
        if entry.charged_xusd
    ]


def read(vluna: Vluna, **recorded: Any) -> RecordedOperation:
    with call_context(principal_id="ann"), vluna.operation(feature_code=OCR) as op:
        op.record(**recorded)
    return op


@pytest.fixture
def start(gate: Sandbox, database: str, tmp_path: Path) -> Iterator[Callable[..., Host]]:
    hosts: list[Host] = []

    def make(name: str, **options: Any) -> Host:
        hosts.append(Host(name, tmp_path, gate.env(), database, **options))
        return hosts[-1]

    yield make
    for host in hosts:
        host.end()


@pytest.fixture
def of_version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is delivered from PostgreSQL is read as by a host that does not know the column."""

    def read(values: Mapping[str, Any]) -> Row:
        return from_values({name: value for name, value in values.items() if name != "meters"})

    monkeypatch.setattr(vluna_llm.outbox.postgres, "from_values", read)


# -- from host to host -------------------------------------------------------------------------------------------------


def test_the_lines_are_charged_through_postgresql(
    make_vluna: Callable[..., Vluna], gate: Sandbox, database: str, psql: Any
) -> None:
    sell(gate)
    op = read(make_vluna(outbox_shared=database), quantity=3, meters=USED)
    receipt = op.wait(20)
    assert receipt is not None
    assert (receipt.state, receipt.charged_xusd, receipt.quantity, receipt.meters) == ("booked", COST, 3, USED)
    assert booked(gate) == [("commit", 3, USED, COST)]
    (found,) = psql.execute("SELECT meters, rest, settlement FROM vluna_llm_operations").fetchall()
    assert found == (json.dumps(USED), "{}", "booked")


def test_a_host_that_is_gone_leaves_its_lines_to_another_one(gate: Sandbox, start: Callable[..., Host]) -> None:
    sell(gate)
    gate.faults.add("status", "commits", times=None, status=503)
    first = start("a", kill_at="sharing.shared")
    with contextlib.suppress(AssertionError, BrokenPipeError):
        first.ask("record", customers=["ann", "bob"], meters=USED)
    first.process.wait(20)
    gate.faults.clear()
    start("b", ttl=1.0).ask("start")
    until(lambda: booked(gate), "delivered by the other one")
    assert booked(gate) == [("commit", 52, USED, COST)]
    start("a", ttl=1.0).ask("start")
    time.sleep(0.5)
    assert booked(gate) == [("commit", 52, USED, COST)]
    assert booked(gate, "bob") in ([], [("commit", 52, USED, COST)])


@pytest.mark.parametrize("moment", ["sharing.marked", "sharing.offered", "delivery.stored", "delivery.answered"])
def test_a_host_that_is_killed_anywhere_charges_its_lines_once(
    gate: Sandbox, start: Callable[..., Host], moment: str
) -> None:
    sell(gate)
    first = start("a", kill_at=moment)
    with contextlib.suppress(AssertionError, BrokenPipeError):
        first.ask("record", customers=["ann"], meters=USED)
    first.process.wait(20)
    after = start("a", ttl=1.0)
    after.ask("start")
    until(lambda: booked(gate), "delivered")
    until(lambda: after.ask("counts")["outstanding"] == 0, "told")
    assert booked(gate) == [("commit", 52, USED, COST)]
    assert {state for _, _, state in after.ask("stages")} <= {"booked"}


# -- an operator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delivered_by", ["this version", "version 2"])
def test_what_is_quarantined_there_is_repaired_with_all_its_lines(
    make_vluna: Callable[..., Vluna],
    gate: Sandbox,
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    delivered_by: str,
) -> None:
    pytest.importorskip("typer", reason="the command line needs the extra cli")
    from vluna_llm.cli import main

    sell(gate, SECONDS)
    vluna = make_vluna(outbox=str(tmp_path / "host"), outbox_shared=database)
    op = read(vluna, quantity=1, meters=USED)
    receipt = op.wait(20)
    assert receipt is not None
    assert receipt.state == "quarantined"
    assert booked(gate) == []
    if delivered_by == "version 2":
        request.getfixturevalue("of_version_2")
    gate.price(SECONDS, 7)
    for name, value in {**gate.env(), "VLUNA_LLM_OUTBOX_SHARED": database}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLUNA_LLM_OUTBOX", str(tmp_path / "operator"))
    (tmp_path / "operator").mkdir()
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["vluna-llm", "outbox", "repair", "--all", "--timeout", "10"])
        with pytest.raises(SystemExit):
            main()
    until(lambda: booked(gate), "repaired")
    ((kind, _, charged, xusd),) = booked(gate)
    assert (kind, charged, xusd) == ("ingest", USED, COST)


# -- hosts of version 2 ------------------------------------------------------------------------------------------------


def test_a_host_of_version_2_commits_the_lines(
    make_vluna: Callable[..., Vluna], gate: Sandbox, database: str, of_version_2: None
) -> None:
    sell(gate)
    op = read(make_vluna(outbox_shared=database), quantity=1, meters=USED)
    assert op.wait(20) is not None
    assert booked(gate) == [("commit", 1, USED, COST)]


def test_a_host_of_version_2_that_repairs_a_commit_by_itself_ingests_the_lines(
    make_vluna: Callable[..., Vluna], database: str, of_version_2: None
) -> None:
    """It withdraws the bytes of the commit, and composes the ingest from what it knows."""
    with Sandbox({"lease_ttl_seconds": 0.05, "grace_ms": 0}) as gate:
        sell(gate)
        vluna = make_vluna(
            outbox_shared=database, base_url=gate.base_url, key_id=gate.key_id, key_secret=gate.key_secret
        )
        with call_context(principal_id="ann"), vluna.operation(feature_code=OCR) as op:
            time.sleep(0.3)
            op.record(quantity=1, meters=USED)
        receipt = op.wait(20)
        assert receipt is not None
        assert (receipt.state, receipt.charged_xusd) == ("rebooked", COST)
        assert booked(gate) == [("ingest", 52, USED, COST)]


@pytest.mark.parametrize("missing", [(SECONDS,), (PAGES, SECONDS)], ids=str)
def test_a_host_of_version_2_sends_what_was_booked_as_0_alone(
    make_vluna: Callable[..., Vluna],
    gate: Sandbox,
    database: str,
    psql: Any,
    of_version_2: None,
    missing: tuple[str, ...],
) -> None:
    sell(gate)
    gate.faults.add("status", "authorize", times=None, status=503)
    vluna = make_vluna(outbox_shared=database, authorize_deadline=0.1)
    vluna._running().prices.prices(OCR, "ann", "ann")
    for meter in missing:
        gate.unprice(meter)
    op = read(vluna, quantity=40, meters=USED)
    left = {meter: USED[meter] for meter in missing}

    def kept() -> Any:
        there = psql.execute("SELECT to_regclass('vluna_llm_operations')").fetchone() != (None,)
        return there and psql.execute("SELECT used_up, rest FROM vluna_llm_operations").fetchone()

    until(lambda: kept() == (1, json.dumps(left)), "what is left is written")
    until(lambda: psql.execute("SELECT attempts FROM vluna_llm_operations").fetchone()[0] >= 2, "it waits for a price")
    until(lambda: len(vluna._running().settler._backlog) == 0, "nothing is left in memory")
    for meter in missing:
        gate.price(meter, PRICES[meter])
    vluna._running().prices.forget(OCR)
    psql.execute("UPDATE vluna_llm_operations SET next_attempt_at = 0")
    psql.execute("UPDATE vluna_llm_lanes SET due_at = now()")
    receipt = op.wait(20)
    assert receipt is not None
    assert receipt.charged_xusd == gate.booked("ann").charged_xusd == COST
    charged: dict[str, int] = {}
    for entry in gate.booked("ann").entries:
        for meter, quantity in entry.lines.items():
            if meter not in entry.unpriced:
                charged[meter] = charged.get(meter, 0) + quantity
    assert charged == USED


def test_a_job_without_its_lease_stays_here_until_it_has_one(
    make_vluna: Callable[..., Vluna], gate: Sandbox, database: str, psql: Any, tmp_path: Path
) -> None:
    """It has no bytes that an older host could not mistake: it is to be committed under the lease of all its runs."""
    sell(gate)
    gate.faults.add("status", "authorize", times=None, status=503)
    vluna = make_vluna(outbox=str(tmp_path), outbox_shared=database, authorize_deadline=0.1)
    with call_context(principal_id="ann", idempotency_key="job-1"), vluna.operation(feature_code=OCR) as op:
        op.record(meters=USED)
    row = vluna._running().ledger.get(op.operation_id)
    assert row is not None
    assert stays(row)
    until(lambda: psql.execute("SELECT to_regclass('vluna_llm_operations')").fetchone() != (None,), "connected")
    time.sleep(0.5)
    assert psql.execute("SELECT count(*) FROM vluna_llm_operations").fetchone() == (0,)
    assert booked(gate) == []
    gate.faults.clear()
    vluna._process.gate_is_back()
    assert op.wait(20) is not None
    assert booked(gate) == [("commit", 52, USED, COST)]


# -- pure --------------------------------------------------------------------------------------------------------------


def made(state: OperationState, **changes: Any) -> Row:
    base = Row("op-1", "http://g", "r", 1, "ann", "ann", OCR, 1.0, "k:auth", "k", lease_token="lease.x.y")
    return base.evolve(**{"state": state, "unsplit": True, "ended_at": 2.0, **changes})


LEASED = OperationState().leased("lease_token").started()
UNGATED = OperationState().ungated().started()


def lines(body: bytes | None) -> dict[str, int]:
    assert body is not None
    sent = json.loads(body)
    return {line["meter_code"]: int(line["quantity_minor"]) for line in sent.get("meters", ())} or {
        "": int(sent["quantity_minor"])
    }


@pytest.mark.parametrize(("mode", "expected"), [("auto", USED), ("always", USED), ("never", {"": 9})])
@pytest.mark.parametrize("began", [LEASED, UNGATED], ids=["leased", "ungated"])
def test_whatever_an_older_host_makes_of_it_asks_for_the_same(
    began: OperationState, mode: Any, expected: dict[str, int]
) -> None:
    row = handed(made(began.completed(TokenUsage(9), "caller", meters=LINES)), mode)
    assert lines(row.body) == expected
    assert handed(row, "auto") == row, "once"
    older = row.with_state(dataclasses.replace(row.state, meters=()))
    aside = older.state.sent().quarantined().repair() if began is LEASED else older.state
    for repaired in (withdrawn(older).with_state(aside), with_bytes_of_rest(withdrawn(older).with_state(aside))):
        request = compose(repaired, mode="auto", names=DEFAULT_NAMES, priced={OCR})
        assert request.kind == "ingest"
        assert lines(request.body) == expected
        assert repaired.body in (None, request.body)


def test_on_the_primary_meter_alone_no_other_total_is_ever_priced() -> None:
    """Without lines the gate prices the total: then it is that of the line."""
    state = LEASED.completed(TokenUsage(9), "caller", meters=(MeterLine(OCR, 2),))
    row = handed(made(state), "auto")
    assert lines(row.body) == {OCR: 2}
    for one in (row, made(state)):
        ingest = withdrawn(one).with_state(one.state.sent().quarantined().repair())
        assert lines(compose(ingest, mode="auto", names=DEFAULT_NAMES, priced={OCR}).body) in ({OCR: 2}, {"": 2})


def test_bytes_that_were_sent_already_are_the_ones_that_are_handed_over() -> None:
    row = made(LEASED.completed(TokenUsage(9), "caller", meters=LINES).sent())
    request = compose(row, mode="never", names=DEFAULT_NAMES, priced=None)
    sent = row.evolve(path=request.path, body=request.body)
    row = handed(sent, "auto")
    assert row.body == request.body
    assert row.state.rest == (MeterLine(OCR, 9),)


def test_other_rows_are_handed_over_as_they_are() -> None:
    for state in (LEASED.completed(TokenUsage(9), "caller"), LEASED.completed(TokenUsage(1, 2), "provider")):
        row = made(state)
        assert handed(row, "auto") is row
        assert not stays(row)
    assert stays(made(LEASED.aborted()))
