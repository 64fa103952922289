"""Admission when something is wrong with us: the product's call goes on, nobody waits for ever, and it is told."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.errors import ConfigurationError, OutboxUnavailable
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")


def begin(vluna: Vluna, call: ModelCall = CALL) -> Operation:
    with call_context(principal_id="ann"):
        operation = vluna.begin(call)
    assert operation is not None
    return operation


def charged(gate: Sandbox, principal: str = "ann") -> list[int]:
    return [entry.quantity for entry in gate.booked(principal).entries if entry.charged_xusd > 0]


def either(vluna: Vluna, colour: str) -> Operation | None:
    return vluna.begin(CALL) if colour == "sync" else asyncio.run(vluna.abegin(CALL))


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_what_cannot_be_asked_is_refused_and_leaves_nothing_pending(vluna: Vluna, colour: str) -> None:
    """A budget that is no uuid is told when the request is composed, after the row was written."""
    with call_context(principal_id="ann"):
        operation = either(vluna, colour)  # the client learns the gate's dialect
        assert operation is not None
        operation.fail()
        assert vluna.flush(5)
    with (
        call_context(principal_id="ann", budget_id="no-uuid") as scope,
        pytest.raises(ConfigurationError, match="uuid"),
    ):
        either(vluna, colour)
    assert scope.pending == 0
    assert vluna._running().ledger._watches == {}


@pytest.mark.parametrize("colour", ["sync", "async"])
@pytest.mark.parametrize("wrong", [{"budget_id": "no-uuid"}, {"feature_code": "retired.thing"}])
def test_observe_lets_a_call_run_that_could_not_even_be_asked_for(
    make_vluna: Callable[..., Vluna],
    gate: Sandbox,
    colour: str,
    wrong: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    vluna = make_vluna(mode="observe")
    gate.feature("retired.thing", active=False)
    with call_context(principal_id="ann", **wrong) as scope:  # type: ignore[arg-type]
        operation = either(vluna, colour)
        if operation is not None:
            operation.fail()
        assert scope.wait(5)
    assert "observe" in caplog.text


def test_observe_runs_though_the_outbox_is_gone_and_the_setting_says_deny(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    vluna = make_vluna(outbox="/dev/null/outbox", on_outbox_unavailable="deny")
    with pytest.raises(OutboxUnavailable, match="deny"):
        begin(vluna)
    vluna.mode = "observe"
    begin(vluna).finish(USED)
    assert vluna.flush(5)
    assert charged(gate) == [120]


@pytest.mark.parametrize("colour", ["sync", "async"])
@pytest.mark.parametrize("part", ["running", "store", "decide"])
def test_an_error_of_ours_never_reaches_the_product(
    vluna: Vluna, monkeypatch: pytest.MonkeyPatch, colour: str, part: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(vluna._process if part == "running" else vluna._admissions, part, broken)
    with call_context(principal_id="ann"):
        operation = either(vluna, colour)
    monkeypatch.undo()
    assert vluna.telemetry.counts["vluna.internal_error"] >= 1
    if operation is not None:
        operation.finish(USED)
        assert operation.wait(5) is not None


@pytest.mark.parametrize("part", ["running", "write"])
def test_ending_an_operation_never_raises(vluna: Vluna, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    operation = begin(vluna)
    monkeypatch.setattr(vluna._process, part, broken)
    operation.finish(USED)
    operation.park("resp_1")
    operation.fail()
    operation.abandon(lambda: USED)
    assert vluna.telemetry.counts["vluna.internal_error"] >= 3


@pytest.mark.parametrize(
    "body", [None, {"messages": 3}, {"messages": [{"content": "\ud800"}]}, {1: 2, "a": 3}, ["no", "object"], "text"]
)
@pytest.mark.parametrize("model", ["m\ud800", "m\x00", "x" * 10_000, ""])
def test_an_odd_request_is_billed_all_the_same(vluna: Vluna, gate: Sandbox, body: Any, model: str) -> None:
    with call_context(principal_id="ann", idempotency_key="job", feature_code="chat.basic"):
        operation = vluna.begin(ModelCall("chat.completions", "openai", model, body))
    assert operation is not None
    operation.finish(Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="r\ud800\x00"))
    assert vluna.flush(5)
    assert charged(gate) == [120]


def test_a_body_that_cannot_be_measured_is_billed_by_what_was_used(
    vluna: Vluna, gate: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(vluna._estimator), "predict", broken)
    begin(vluna).finish(USED)
    assert vluna.flush(5)
    assert charged(gate) == [120]


@pytest.mark.parametrize("label", ["a\x00b", "\ud800"])
def test_a_label_that_cannot_be_stored_is_refused_where_it_is_given(label: str) -> None:
    with pytest.raises(ConfigurationError, match=r"labels\['note'\] has a character that cannot be stored"):
        call_context(principal_id="ann", labels={"note": label})


def test_an_estimate_beyond_what_the_gate_can_count_is_refused(vluna: Vluna) -> None:
    with pytest.raises(ConfigurationError, match="counts up to 9007199254740991"):
        vluna.operation(feature_code="tools.search", estimate=2**70)


def test_a_damaged_journal_of_a_dead_process_stops_neither_the_call_nor_the_others(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from vluna_llm.operation import OperationState
    from vluna_llm.outbox import Journal, Row

    done = OperationState().ungated().started().completed(TokenUsage(100, 20), "provider")
    for n in range(3):
        dead = Journal(tmp_path)
        row = Row(f"op-{n}", gate.base_url, gate.realm_id, 1, "ann", "ann", "chat.basic", 1.0, f"{n}:auth", f"k{n}")
        dead.insert(row.with_state(done))
        dead.close()
    first, second, _ = sorted(tmp_path.glob("*.sqlite3"))
    first.write_bytes(b"this is no database" * 100)
    with sqlite3.connect(second) as db:
        db.execute("UPDATE operations SET usage = '{\"a\": '")
    db.close()
    vluna = make_vluna(outbox=str(tmp_path))
    begin(vluna).finish(USED)
    assert vluna.flush(10)
    assert charged(gate) == [120, 120]
    assert caplog.text.count("cannot be taken over") == 2
    assert first.exists()
    assert second.exists()


def test_the_first_call_does_not_wait_for_the_backlog_of_the_dead(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vluna_llm.outbox import Journal

    adopting, leave = Journal.adopting, threading.Event()

    def slow(*args: Any) -> Any:
        leave.wait(10)
        yield from adopting(*args)

    monkeypatch.setattr(Journal, "adopting", slow)
    vluna = make_vluna(outbox=str(tmp_path))
    operation = begin(vluna)
    operation.finish(USED)
    assert operation.wait(5) is not None
    leave.set()
    assert vluna.flush(5)


def test_a_full_disk_is_survived_and_leaves_no_trace_in_memory(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vluna = make_vluna(outbox=str(tmp_path))
    begin(vluna).finish(USED)
    assert vluna.flush(5)
    runtime = vluna._running()
    journal = runtime.ledger.journal

    def full(*_: Any) -> Any:
        raise journal._unavailable(sqlite3.OperationalError("database or disk is full"))

    with monkeypatch.context() as broken:
        broken.setattr(journal, "_execute", full)
        for _ in range(3):
            begin(vluna).finish(USED)
        begin(vluna).fail()
        assert vluna.flush(5)
    assert charged(gate) == [120] * 4
    assert runtime.ledger._unwritten == {}
    assert runtime.ledger._watches == {}


def test_background_usage_that_two_threads_bring_at_once_counts_once(
    vluna: Vluna, gate: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with call_context(principal_id="ann") as scope:
        ledger = vluna._running().ledger
        find = ledger._find
        again = [True]

        def finding(operation_id: str) -> Any:
            found = find(operation_id)
            if again:
                again.clear()
                vluna.book_background("resp_bg", TokenUsage(10, 5), CALL)
            return found

        monkeypatch.setattr(ledger, "_find", finding)
        vluna.book_background("resp_bg", TokenUsage(10, 5), CALL)
    assert scope.wait(5)
    assert charged(gate) == [15]
    assert scope.usage.total_tokens == 15
    assert ledger._unwritten == {}


def test_background_usage_for_nobody_is_told(vluna: Vluna, gate: Sandbox) -> None:
    vluna.book_background("resp_bg", TokenUsage(10, 5), CALL)
    assert vluna.telemetry.counts["vluna.endpoint.unmetered"] == 1


def test_a_repair_is_known_as_one_whatever_its_last_error_says(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    gate.clock.advance(13 * 3600)
    gate.faults.add("error_before", "ingest", times=2)
    operation.finish(USED)
    receipt = operation.wait(10)
    assert receipt is not None
    assert receipt.state == "rebooked"
    (row,) = vluna._running().ledger.journal.rows("rebooked")
    assert json.loads(row.receipt or "")["state"] == "rebooked"


def test_prices_from_before_serve_while_the_gate_cannot_be_asked() -> None:
    from vluna_llm.errors import GateUnavailable
    from vluna_llm.pricing import TTL_SECONDS, Price, PriceBook

    now, answers = [0.0], [{"m": Price(3)}]

    def fetch(*_: str) -> Any:
        if not answers:
            raise GateUnavailable("away", retryable=True)
        return answers.pop()

    book = PriceBook(fetch, clock=lambda: now[0])
    assert book.prices("m", "a", "a") == {"m": Price(3)}
    now[0] += TTL_SECONDS + 1
    assert book.prices("m", "a", "a") == {"m": Price(3)}
    book.forget("m")
    with pytest.raises(GateUnavailable):
        book.prices("m", "a", "a")


@pytest.mark.parametrize("runs", ["ungated gated", "gated ungated", "ungated ungated"])
def test_a_job_that_ran_without_the_gate_once_is_charged_once_over_all_its_runs(
    make_vluna: Callable[..., Vluna], gate: Sandbox, runs: str
) -> None:
    """A commit and an ingest know nothing of each other: a job settles by its lease, if need be one asked for late."""
    for run in runs.split():
        vluna = make_vluna(authorize_deadline=0.2)
        if run == "ungated":
            gate.faults.add("drop_before", "authorize", times=None)
        with call_context(principal_id="ann", idempotency_key="job-42") as scope:
            operation = vluna.begin(CALL)
        gate.faults.clear()
        assert operation is not None
        assert (operation.lease is None) == (run == "ungated")
        operation.finish(USED)
        assert scope.wait(10)
    assert charged(gate) == [120]


def test_a_job_whose_customer_is_denied_is_booked_by_ingest_in_observe_mode(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    gate.set_credit("ann", 0)
    for _ in range(2):
        vluna = make_vluna(mode="observe")
        with call_context(principal_id="ann", idempotency_key="job-42") as scope:
            operation = vluna.begin(CALL)
        assert operation is not None
        operation.finish(USED)
        assert scope.wait(10)
    assert [(entry.kind, entry.quantity) for entry in gate.booked("ann").entries] == [("ingest", 120)]


def test_a_job_whose_lease_belongs_to_another_request_is_held_and_never_charged_twice(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    first = make_vluna()
    with call_context(principal_id="ann", idempotency_key="job-42", feature_family_code="one") as scope:
        operation = first.begin(CALL)
    assert operation is not None
    operation.finish(USED)
    assert scope.wait(5)
    second = make_vluna()
    with call_context(principal_id="ann", idempotency_key="job-42", feature_family_code="two") as scope:
        operation = second.begin(CALL)
    assert operation is not None
    assert operation.lease is None, "the gate answers 409"
    operation.finish(USED)
    assert scope.wait(5)
    assert charged(gate) == [120]
    assert scope.receipts[0].state == "refused"
    assert "may have been charged" in (scope.receipts[0].detail or "")


def test_a_call_that_was_cancelled_while_the_gate_was_asked_is_over(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("hang", "authorize")

    async def main() -> None:
        with call_context(principal_id="ann") as scope:
            task = asyncio.ensure_future(vluna.abegin(CALL))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert scope.pending == 0

    asyncio.run(main())
    gate.faults.clear()
    assert vluna._running().ledger.journal.counts() == {"lapsed": 1}, "and is never listed as lost"


def test_what_ran_without_the_gate_counts_until_the_gate_answers(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    vluna = make_vluna(authorize_deadline=0.2)
    gate.faults.add("drop_before", "authorize", times=None)
    for n in range(2):
        begin(vluna).fail()
        assert vluna._admissions._cap.used("ann") == n + 1
    gate.faults.clear()
    begin(vluna).fail()
    assert vluna._admissions._cap.used("ann") == 0


def test_two_customers_with_a_user_and_a_job_of_one_name_are_both_charged(vluna: Vluna, gate: Sandbox) -> None:
    """The gate's keys know no customer: ours have to."""
    for principal in ("ann", "bob"):
        with call_context(principal_id=principal, user_id="admin", idempotency_key="job-1") as scope:
            operation = vluna.begin(CALL)
        assert operation is not None
        operation.finish(USED)
        assert scope.wait(5)
    assert charged(gate, "ann") == charged(gate, "bob") == [120]


def test_a_job_that_takes_up_where_it_failed_is_charged_for_the_request_that_was_missing(
    make_vluna: Callable[..., Vluna], gate: Sandbox
) -> None:
    first, second = (ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": [n]}) for n in "ab")
    for calls, charges in (([first], 1), ([second], 2), ([second, first], 2)):
        vluna = make_vluna()
        with call_context(principal_id="ann", idempotency_key="job-1") as scope:
            for call in calls:
                operation = vluna.begin(call)
                assert operation is not None
                operation.finish(USED)
        assert scope.wait(5)
        assert charged(gate) == [120] * charges
