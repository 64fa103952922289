"""Delivery under every habit of the gate: known usage is charged exactly once, and what is not charged is told."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.alarm import Alarm
from vluna_llm.ending import Ending
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.sandbox import Sandbox
from vluna_llm.settlement import backoff, slow_backoff

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")
FEATURE = "openai.gpt-4o-mini"


def begin(vluna: Vluna, principal: str = "ann") -> Operation:
    with call_context(principal_id=principal):
        operation = vluna.begin(CALL)
    assert operation is not None
    return operation


def complete(vluna: Vluna, principal: str = "ann") -> Operation:
    operation = begin(vluna, principal)
    operation.finish(USED)
    return operation


def charged(gate: Sandbox, principal: str = "ann") -> list[int]:
    return [entry.quantity for entry in gate.booked(principal).entries if entry.charged_xusd > 0]


@pytest.mark.parametrize("fault", ["error_before", "error_after", "drop_before", "drop_after"])
@pytest.mark.parametrize("times", [1, 3])
def test_an_unknown_outcome_is_retried_under_the_same_key_with_the_same_bytes(
    vluna: Vluna, gate: Sandbox, fault: Any, times: int
) -> None:
    gate.faults.add(fault, "commits", times=times)
    complete(vluna)
    assert vluna.flush(20)
    assert charged(gate) == [120]
    sent = [request for request in gate.requests if request.route == "commits"]
    assert len({request.idempotency_key for request in sent}) == 1
    assert len(sent) >= times


def test_an_answer_that_cannot_be_read_is_asked_for_again_under_the_same_key(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("garbage", "commits", body="<html>ok</html>")
    operation = complete(vluna)
    assert vluna.flush(10)
    assert charged(gate) == [120]
    receipt = operation.wait(0)
    assert receipt is not None
    assert receipt.charged_xusd == gate.booked("ann").charged_xusd


def test_an_answer_that_can_never_be_read_is_looked_up_in_the_gates_own_books(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("garbage", "commits", times=None, body="<html>ok</html>")
    operation = complete(vluna)
    assert vluna.flush(10)
    assert charged(gate) == [120]
    receipt = operation.wait(0)
    assert receipt is not None
    assert (receipt.state, receipt.charged_xusd) == ("booked", gate.booked("ann").charged_xusd)
    assert len({r.idempotency_key for r in gate.requests if r.route == "commits"}) == 1


def test_a_commit_after_the_grace_is_repaired_by_ingest(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    gate.clock.advance(13 * 3600)
    operation.finish(USED)
    assert vluna.flush(10)
    entries = gate.booked("ann").entries
    assert [(entry.kind, entry.status, entry.charged_xusd > 0) for entry in entries] == [
        ("commit", "quarantined", False),
        ("ingest", "applied", True),
    ]
    receipt = operation.wait(0)
    assert receipt is not None
    assert receipt.state == "rebooked"
    assert entries[1].idempotency_key == entries[0].idempotency_key.replace(":commit", ":ingest")


def test_a_lease_that_was_cancelled_elsewhere_is_repaired_by_ingest(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    assert operation.lease is not None
    vluna.gate.cancel(lease=operation.lease, principal_id="ann")
    operation.finish(USED)
    assert vluna.flush(10)
    assert charged(gate) == [120]


def test_a_lease_that_was_committed_before_is_never_repaired(
    vluna: Vluna, gate: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the gate's own books could tell whether that commit was charged: it is held and told."""
    operation = begin(vluna)
    assert operation.lease is not None
    vluna.gate.commit(lease=operation.lease, principal_id="ann", quantity=7)
    with caplog.at_level(logging.ERROR, "vluna_llm"):
        operation.finish(USED)
        assert vluna.flush(10)
    assert charged(gate) == [7]
    receipt = operation.wait(0)
    assert receipt is not None
    assert (receipt.state, receipt.charged_xusd) == ("quarantined", 0)
    assert "NOT CHARGED" in caplog.text


def test_a_feature_without_any_price_is_quarantined_aloud_and_kept(
    vluna: Vluna, gate: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    operation = begin(vluna)
    for meter in (FEATURE, *(f"{FEATURE}.tokens.{part}" for part in ("input", "cached", "output"))):
        gate.unprice(meter)
    with caplog.at_level(logging.ERROR, "vluna_llm"):
        operation.finish(USED)
        assert vluna.flush(10)
    assert charged(gate) == []
    assert "NOT CHARGED" in caplog.text
    assert vluna.telemetry.counts["vluna.settlement.quarantined"] == 1
    (row,) = vluna._running().ledger.journal.rows("quarantined")
    assert row.operation_id == operation.operation_id


def test_a_category_without_a_price_folds_into_its_parent(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    gate.unprice(f"{FEATURE}.tokens.cached")
    operation.finish(Ending("complete", usage=TokenUsage(100, 20, cached_tokens=40), finished=True))
    assert vluna.flush(10)
    (entry,) = gate.booked("ann").entries
    assert entry.lines == {f"{FEATURE}.tokens.input": 100, f"{FEATURE}.tokens.output": 20}
    assert entry.charged_xusd > 0


def test_an_ingest_waits_for_a_price_instead_of_booking_nothing(
    make_vluna: Callable[..., Vluna], gate: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    vluna = make_vluna(mode="observe")
    gate.feature("new.model", meters=("new.model",))
    gate.unprice("new.model")
    gate.set_credit("ann", 0)
    gate.quota(0)
    with call_context(principal_id="ann", feature_code="new.model"):
        operation = vluna.begin(CALL)
    assert operation is not None
    assert operation.lease is None
    operation.finish(USED)
    assert not vluna.flush(1)
    assert gate.booked("ann").entries == ()
    assert "no price" in caplog.text
    assert "new.model" not in vluna._running().prices._known, "the next attempt sees what the operator mended"


def test_settlements_of_one_customer_go_one_after_another(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("latency", "commits", times=None, seconds=0.05)
    operations = [begin(vluna) for _ in range(5)] + [begin(vluna, "bob") for _ in range(5)]
    started = time.perf_counter()
    for operation in operations:
        operation.finish(USED)
    assert vluna.flush(10)
    assert time.perf_counter() - started >= 0.25, "five commits of one customer never overlap"
    order = [request.principal_id for request in gate.requests if request.route == "commits"]
    assert order.index("bob") < 3, "the other customer does not wait for the first one's lane"
    assert charged(gate) == [120] * 5


def test_a_settlement_that_waits_never_blocks_its_lane(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("rate_limited", "commits", times=1, seconds=3)
    first, second = complete(vluna), complete(vluna)
    started = time.monotonic()
    assert second.wait(2) is not None
    assert time.monotonic() - started < 2
    assert first.wait(10) is not None
    assert charged(gate) == [120, 120]


def test_a_refused_key_is_told_and_kept(vluna: Vluna, gate: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    operation = begin(vluna)
    gate.faults.add("status", "commits", times=1, status=401, body='{"ok":false,"code":"AUTH.INVALID","message":"no"}')
    operation.finish(USED)
    assert not vluna.flush(0.5)
    assert "vluna.settlement.retrying" in caplog.text
    (row,) = vluna._running().ledger.journal.rows("sent")
    assert row.operation_id == operation.operation_id


def test_work_that_the_gate_will_not_take_any_more_is_kept_for_the_operator(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    gate.feature(FEATURE, active=False)
    operation.finish(USED)
    assert vluna.flush(10)
    (row,) = vluna._running().ledger.journal.rows("refused")
    assert row.last_error is not None
    assert "feature inactive" in row.last_error
    receipt = operation.wait(0)
    assert receipt is not None
    assert receipt.state == "refused"


def test_usage_that_follows_a_cancel_is_booked_by_ingest(vluna: Vluna, gate: Sandbox) -> None:
    gate.faults.add("latency", "cancel", seconds=0.3)
    operation = begin(vluna)
    operation.finish(Ending("closed"))
    time.sleep(0.15)
    operation.finish(USED)
    assert vluna.flush(10)
    entries = gate.booked("ann").entries
    assert [(entry.kind, entry.charged_xusd > 0) for entry in entries] == [("ingest", True)]


def test_usage_that_turns_up_while_a_delivery_is_being_closed_is_not_overlooked(vluna: Vluna, gate: Sandbox) -> None:
    """The settler still counts the operation as its own at that moment: it has to look at it once more."""
    operation = begin(vluna)
    operation._watch.call_when_closed(lambda: operation.finish(USED))
    operation.fail()
    assert vluna.flush(10)
    assert charged(gate) == [120]


def test_the_other_dialect_never_cancels(make_vluna: Callable[..., Vluna]) -> None:
    with Sandbox(dialect="lease") as gate:
        vluna = Vluna(
            base_url=gate.base_url,
            realm_id=gate.realm_id,
            key_id=gate.key_id,
            key_secret=gate.key_secret,
            outbox="memory",
        )
        begin(vluna).fail()
        complete(vluna)
        assert vluna.flush(10)
        assert charged(gate) == [120]
        assert not [request for request in gate.requests if request.route == "cancel"]
        vluna.close()


def test_undelivered_settlements_survive_the_process_and_go_out_with_the_next(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Any
) -> None:
    first = make_vluna(outbox=str(tmp_path))
    complete(first)
    flying = begin(first)
    assert first.flush(10)
    gate.stop()
    pending = begin_offline(first)
    assert not first.close(timeout=0.3)
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix == ".sqlite3"] == [".sqlite3"]
    gate.start()
    second = make_vluna(outbox=str(tmp_path))
    complete(second, "bob")
    assert second.flush(15)
    assert charged(gate) == [120, 120]
    assert pending.operation_id in {entry.labels["operation_id"] for entry in gate.booked("ann").entries}
    lost = second._running().ledger.journal.rows("lost")
    assert [row.operation_id for row in lost] == [flying.operation_id]


def begin_offline(vluna: Vluna) -> Operation:
    operation = begin(vluna)
    operation.finish(USED)
    return operation


def test_the_outbox_holds_no_prompt_no_answer_and_no_key(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Any
) -> None:
    vluna = make_vluna(outbox=str(tmp_path))
    secret_call = ModelCall("chat.completions", "openai", "m", {"messages": [{"content": "the launch code is 1234"}]})
    with call_context(principal_id="ann"):
        operation = vluna.begin(secret_call)
    assert operation is not None
    operation.finish(USED)
    assert vluna.flush(10)
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"ann" in held
    assert b"launch code" not in held
    assert gate.key_secret.encode() not in held
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_the_schedule_grows_is_jittered_and_stays_within_five_minutes() -> None:
    assert [backoff(n, 1.0) for n in (1, 2, 3, 5, 7)] == [0.25, 0.5, 1.0, 4.0, 4.0]
    assert backoff(1, 0.0) == 0.125
    assert backoff(40, 1.0) == 300.0
    assert slow_backoff(1, 1.0) == 15.0
    assert slow_backoff(40, 1.0) == 300.0


def test_no_hint_and_no_jump_of_the_clock_keeps_a_settlement_waiting_for_longer_than_minutes(
    vluna: Vluna, gate: Sandbox
) -> None:
    """A stored time is an hour off after the clock was put back; a hint may name tomorrow."""
    operation = begin(vluna)
    gate.faults.add("rate_limited", "commits", times=1, seconds=86_400)
    operation.finish(USED)
    assert not vluna.flush(1)
    settler = vluna._running().settler
    (waiting,) = settler._backlog._timers
    assert waiting.at - time.monotonic() <= 300
    (row,) = vluna._running().ledger.journal.rows("sent")
    settler.enqueue(dataclasses.replace(row, operation_id="adopted"), due=time.time() + 86_400)
    assert max(timer.at for timer in settler._backlog._timers) - time.monotonic() <= 300


def test_what_was_composed_once_is_sent_again_though_prices_have_changed(vluna: Vluna, gate: Sandbox) -> None:
    """The gate compares the body under a key: other bytes would meet 409 and never be booked."""
    operation = begin(vluna)
    gate.faults.add("error_before", "commits", times=2)
    bodies: list[bytes] = []
    send = vluna.gate.send

    def sending(request: Any, **how: Any) -> Any:
        if request.kind == "commit":
            bodies.append(request.body)
            gate.unprice(f"{FEATURE}.tokens.cached")
            vluna._running().prices.forget(FEATURE)
        return send(request, **how)

    vluna.gate.send = sending  # type: ignore[method-assign]
    operation.finish(Ending("complete", usage=TokenUsage(100, 20, cached_tokens=40), finished=True))
    assert not vluna.flush(0.05)
    vluna.flush(10)
    assert len(bodies) == 3
    assert len(set(bodies)) == 1


def test_a_job_that_finds_its_lease_committed_was_settled_by_another_run(vluna: Vluna, gate: Sandbox) -> None:
    with call_context(principal_id="ann", idempotency_key="job-42"):
        operation = vluna.begin(CALL)
    assert operation is not None
    assert operation.lease is not None
    vluna.gate.commit(lease=operation.lease, principal_id="ann", quantity=7)
    operation.finish(USED)
    receipt = operation.wait(5)
    assert receipt is not None
    assert (receipt.state, receipt.charged_xusd) == ("lapsed", 0)
    assert charged(gate) == [7]


def test_a_lease_that_the_gate_does_not_know_any_more_is_repaired_by_ingest(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    answer = '{"ok":false,"code":"RESOURCE.NOT_FOUND","message":"lease not found","meta":{"status":422}}'
    gate.faults.add("status", "commits", times=1, status=422, body=answer)
    operation.finish(USED)
    receipt = operation.wait(10)
    assert receipt is not None
    assert receipt.state == "rebooked"
    assert [(entry.kind, entry.quantity) for entry in gate.booked("ann").entries] == [("ingest", 120)]


def test_a_page_in_the_place_of_the_prices_is_not_taken_for_no_prices(vluna: Vluna, gate: Sandbox) -> None:
    """A proxy's 200 on ``gate/meters`` must not lead to a split that the gate would quarantine."""
    gate.feature("plain.feature", meters=("plain.feature",))
    gate.price("plain.feature", 4)
    gate.faults.add("status", "meters", times=1, status=200, body="<html>welcome</html>")
    with call_context(principal_id="ann", feature_code="plain.feature"):
        operation = vluna.begin(CALL)
    assert operation is not None
    operation.finish(USED)
    assert vluna.flush(10)
    (entry,) = gate.booked("ann").entries
    assert (entry.status, entry.charged_xusd) == ("applied", 480)


def test_a_gate_that_is_back_is_noticed_by_calls_and_settlements_alike(make_vluna: Any, gate: Sandbox) -> None:
    """After a long outage each leaves the gate alone for half a minute; the first to hear of it tells the other."""
    vluna = make_vluna(authorize_deadline=0.2)
    gate.stop()
    for _ in range(12):
        complete(vluna)
    admissions, settler = vluna._admissions._breaker, vluna._running().settler._breaker
    in_a_while = time.monotonic() + 3600

    def left_alone() -> None:
        until = time.monotonic() + 10
        while settler.state(time.monotonic()) != "open" or settler._probing:
            assert time.monotonic() < until, "the settler does not give up"
            time.sleep(0.01)
        admissions._retry_at = settler._retry_at = in_a_while

    left_alone()
    gate.start()
    assert not vluna.flush(0.5), "nobody asks"
    admissions._retry_at = 0.0
    assert begin(vluna).lease is not None
    assert vluna.flush(10), "a call told the settlements"
    assert len(charged(gate)) == 12
    gate.stop()
    for _ in range(12):
        complete(vluna)
    left_alone()
    gate.start()
    settler._retry_at = 0.0
    with vluna._running().settler._changed:
        vluna._running().settler._changed.notify_all()
    assert vluna.flush(10)
    assert len(charged(gate)) == 24
    assert begin(vluna).lease is not None, "a settlement told the calls"


def test_the_alarm_is_raised_while_arrivals_outrun_the_drain_and_called_off_when_it_is_over(
    make_vluna: Any, gate: Sandbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A gate that takes half a second for each commit of one customer, who makes many calls (design rule 16)."""
    monkeypatch.setattr("vluna_llm.settler._WATCH_EVERY", 0.1)
    monkeypatch.setattr("vluna_llm.settler.Alarm", lambda: Alarm(floor=10, window=0.5))
    vluna = make_vluna()
    gate.faults.add("latency", "commits", times=None, seconds=0.2)
    until = time.monotonic() + 10
    with caplog.at_level(logging.ERROR, "vluna_llm"):
        while vluna.telemetry.counts["vluna.outbox.backlog"] == 0 and time.monotonic() < until:
            complete(vluna)
    assert vluna.telemetry.counts["vluna.outbox.backlog"] == 1

    def logged() -> list[str]:
        return [record.getMessage() for record in caplog.records if "vluna.outbox.backlog" in record.getMessage()]

    while not logged() and time.monotonic() < until:  # it is counted by another thread just before it is logged
        time.sleep(0.01)
    (told,) = logged()
    assert "settlements wait" in told
    gate.faults.clear()
    assert vluna.flush(30)
    until = time.monotonic() + 10
    while vluna.telemetry.counts["vluna.outbox.backlog"] == 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert vluna.telemetry.counts["vluna.outbox.backlog"] == 2, "and that it is over is told, too"


def test_what_comes_in_while_the_journal_is_read_back_and_finds_no_room_is_delivered_too(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer of the journal was whole when it was given, and does not hold it."""
    vluna = make_vluna(outbox=str(tmp_path))
    settler = vluna._running().settler
    monkeypatch.setattr(settler._backlog, "_window", 32)
    early, late = [begin(vluna, "bob") for _ in range(20)], [begin(vluna, "ann") for _ in range(20)]
    read = settler._ledger.journal.due

    def due(*how: Any) -> Any:
        found = read(*how)
        while found.complete and late:
            late.pop().finish(USED)
        return found

    monkeypatch.setattr(settler._ledger.journal, "due", due)
    with settler._changed:  # nothing goes out before all have come, so that they find no room
        for operation in early:
            operation.finish(USED)
    assert vluna.flush(30)
    assert (len(charged(gate, "bob")), len(late), len(charged(gate, "ann"))) == (20, 0, 20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_is_killed_takes_neither_its_lane_nor_its_place_with_it(
    vluna: Vluna, gate: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A greenlet that is killed and a library that panics end a thread by what is no `Exception`."""
    monkeypatch.setattr("vluna_llm.settler._AFTER_AN_ERROR", 0.1)

    class Panic(BaseException):
        pass

    delivery = vluna._running().settler.delivery
    deliver, left = delivery.deliver, [Panic()] * 20

    def panicking(*args: Any) -> Any:
        if left:
            raise left.pop()
        return deliver(*args)

    monkeypatch.setattr(delivery, "deliver", panicking)
    for _ in range(3):
        complete(vluna)
    assert vluna.flush(20)
    assert charged(gate) == [120, 120, 120]


def test_a_settlement_on_which_we_fail_ourselves_is_left_alone_in_the_journal_too(
    vluna: Vluna, gate: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be read back at once where very many wait, and tried in a loop."""

    def failing(*args: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(vluna._running().settler.delivery, "deliver", failing)
    complete(vluna)
    until = time.monotonic() + 10
    while vluna.telemetry.counts["vluna.internal_error"] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert not vluna.flush(0.5)
    (row,) = vluna._running().ledger.journal.rows("pending")
    assert row.next_attempt_at > time.time() + 30
    assert vluna.telemetry.counts["vluna.internal_error"] == 1
