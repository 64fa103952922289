"""An operator's orders: carried out by the process that owns the operation, once, and never against its usage."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vluna_llm import TokenUsage, Vluna, call_context, failpoints
from vluna_llm.ending import Ending
from vluna_llm.errors import OutboxUnavailable
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.obey import carry_out
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Journal, Row
from vluna_llm.outbox.orders import find, ordered, owner_lives, place, tells_uncharged, waiting_in, why_not
from vluna_llm.outbox.schema import Total
from vluna_llm.outbox.waiting import depths, needs_person, waiting_as
from vluna_llm.runtime import Runtime
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")
FEATURE = "openai.gpt-4o-mini"
METERS = (FEATURE, *(f"{FEATURE}.tokens.{part}" for part in ("input", "cached", "output")))


@pytest.fixture
def vluna(make_vluna: Callable[..., Vluna], tmp_path: Path) -> Vluna:
    """One with its outbox on disk."""
    return make_vluna(outbox=str(tmp_path / "outbox"))


def runtime_of(vluna: Vluna) -> Runtime:
    return vluna._process.running()


def journal_of(vluna: Vluna) -> Path:
    path = runtime_of(vluna).ledger.journal.path
    assert path is not None
    return path


def order(vluna: Vluna, operation: Operation, what: Any) -> None:
    """Give an order as an operator does, and have it carried out."""
    place(journal_of(vluna), [(operation.operation_id, what)])
    runtime = runtime_of(vluna)
    assert carry_out(runtime.ledger, runtime.settler, runtime.telemetry) >= 0
    assert waiting_in(journal_of(vluna)) == []


def begin(vluna: Vluna, principal: str = "ann") -> Operation:
    with call_context(principal_id=principal):
        operation = vluna.begin(CALL)
    assert operation is not None
    return operation


def row_of(vluna: Vluna, operation: Operation) -> Row:
    row = runtime_of(vluna).ledger.get(operation.operation_id)
    assert row is not None
    return row


def eventually(true: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def charged(gate: Sandbox, principal: str = "ann") -> list[tuple[str, int]]:
    return [(entry.kind, entry.quantity) for entry in gate.booked(principal).entries if entry.charged_xusd > 0]


def refused_commit(vluna: Vluna, gate: Sandbox) -> Operation:
    """An operation whose feature was switched off before its commit."""
    operation = begin(vluna)
    gate.feature(FEATURE, active=False)
    operation.finish(USED)
    assert operation.wait(10) is not None
    gate.feature(FEATURE, active=True)
    assert waiting_as(row_of(vluna, operation)) == "dead"
    return operation


# -- what becomes of it ------------------------------------------------------------------------------------------------


def test_a_refused_commit_is_retried_with_the_bytes_it_had(vluna: Vluna, gate: Sandbox) -> None:
    operation = refused_commit(vluna, gate)
    before = row_of(vluna, operation)
    order(vluna, operation, "retry")
    assert vluna.flush(10)
    assert charged(gate) == [("commit", 120)]
    after = row_of(vluna, operation)
    assert (after.state.settlement, after.body) == ("booked", before.body)


def test_a_refused_commit_is_repaired_once_the_books_show_that_it_was_not_charged(vluna: Vluna, gate: Sandbox) -> None:
    """The bytes of the commit are kept until that is known, and never sent as an ingest."""
    operation = refused_commit(vluna, gate)
    vluna.gate.ingest(principal_id="ann", feature_code=FEATURE, quantity=1)  # the books are not empty
    order(vluna, operation, "repair")
    assert vluna.flush(10)
    after = row_of(vluna, operation)
    assert after.state.settlement == "rebooked", after.last_error
    assert charged(gate) == [("ingest", 1), ("ingest", 120)]
    assert after.path is not None
    assert after.path.endswith("/ingest")


def test_a_refused_commit_that_was_charged_after_all_is_not_repaired_but_found(vluna: Vluna, gate: Sandbox) -> None:
    """Its first answer was lost, the gate restarted, and the feature switched off before it was asked again."""
    operation = begin(vluna)
    gate.faults.add("status", "ratings", times=1, status=403, body='{"ok":false,"code":"X","message":"no"}')
    gate.faults.add("drop_after", "commits", times=1)
    send = vluna.gate.send

    def sending(request: Any, **how: Any) -> Any:
        if request.kind == "commit" and gate.booked("ann").entries:
            gate.restart()  # whose cache of answers is gone: it looks at the feature first
            gate.feature(FEATURE, active=False)
        return send(request, **how)

    vluna.gate.send = sending  # type: ignore[method-assign]
    operation.finish(USED)
    receipt = operation.wait(10)
    assert receipt is not None
    assert receipt.state == "refused"
    order(vluna, operation, "repair")
    assert vluna.flush(10)
    assert charged(gate) == [("commit", 120)]
    assert row_of(vluna, operation).state.settlement == "booked"


def test_a_repair_that_cannot_look_leaves_the_commit_to_be_retried(vluna: Vluna, gate: Sandbox) -> None:
    """Nobody shows the books: it says so, and the same bytes can still go out under their key."""
    operation = refused_commit(vluna, gate)
    before = row_of(vluna, operation).body
    hidden = gate.faults.add("status", "ratings", times=None, status=403, body='{"ok":false,"code":"X","message":"no"}')
    order(vluna, operation, "repair")
    assert vluna.flush(10)
    held = row_of(vluna, operation)
    assert (waiting_as(held), held.body) == ("dead", before)
    assert "may have been charged" in (held.last_error or "")
    assert charged(gate) == []
    gate.faults.remove(hidden)
    order(vluna, operation, "retry")
    assert vluna.flush(10)
    assert charged(gate) == [("commit", 120)]


def test_what_was_quarantined_for_want_of_a_price_is_repaired_when_the_price_is_there(
    vluna: Vluna, gate: Sandbox
) -> None:
    """Repaired too early it waits, held, and is charged once the price is there and it is ordered again."""
    operation = begin(vluna)
    for meter in METERS:
        gate.unprice(meter)
    operation.finish(USED)
    assert operation.wait(10) is not None
    assert waiting_as(row_of(vluna, operation)) == "quarantined"
    order(vluna, operation, "repair")
    eventually(lambda: waiting_as(row_of(vluna, operation)) == "held")
    assert "no price" in (row_of(vluna, operation).last_error or "")
    for meter in METERS:
        gate.price(meter, 5)
    order(vluna, operation, "repair")
    assert vluna.flush(10)
    assert charged(gate) == [("ingest", 120)]
    assert row_of(vluna, operation).state.settlement == "rebooked"


def test_what_waits_for_its_next_attempt_is_delivered_now(vluna: Vluna, gate: Sandbox) -> None:
    operation = begin(vluna)
    limited = gate.faults.add("rate_limited", "commits", times=None, seconds=250)
    operation.finish(USED)
    eventually(lambda: row_of(vluna, operation).attempts > 0)
    gate.faults.remove(limited)
    assert not vluna.flush(0.5)
    order(vluna, operation, "retry")
    assert vluna.flush(5)
    assert charged(gate) == [("commit", 120)]


def test_what_was_dropped_is_never_sent_again(vluna: Vluna, gate: Sandbox) -> None:
    """Not by this process, and not by the one that takes over; why it waited is kept."""
    operation = refused_commit(vluna, gate)
    order(vluna, operation, "drop")
    row = row_of(vluna, operation)
    assert row.state.settlement == "lapsed"
    assert "dropped by an operator; it was dead: 422" in (row.last_error or "")
    for what in ("retry", "repair", "drop"):
        order(vluna, operation, what)
    assert vluna.flush(5)
    assert charged(gate) == []


def test_an_order_is_carried_out_by_itself_within_seconds(vluna: Vluna, gate: Sandbox) -> None:
    operation = refused_commit(vluna, gate)
    place(journal_of(vluna), [(operation.operation_id, "retry")])
    eventually(lambda: charged(gate) == [("commit", 120)])


def test_orders_travel_with_the_rows_of_a_dead_process(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path
) -> None:
    """Placed while nobody is there, carried out by whoever takes over; a drop is not outrun by the delivery."""
    first = make_vluna(outbox=str(tmp_path))
    retried, dropped = refused_commit(first, gate), refused_commit(first, gate)
    path = journal_of(first)
    first.close(timeout=0.1)
    assert not owner_lives(path)
    place(path, [(retried.operation_id, "retry"), (dropped.operation_id, "drop")])
    assert len(waiting_in(path)) == 2
    second = make_vluna(outbox=str(tmp_path))
    assert owner_lives(journal_of(second))
    eventually(lambda: charged(gate) == [("commit", 120)])
    eventually(lambda: row_of(second, dropped).state.settlement == "lapsed")
    assert waiting_in(journal_of(second)) == []


def test_dying_between_the_row_and_the_order_carries_it_out_again_without_harm(vluna: Vluna, gate: Sandbox) -> None:
    operation = refused_commit(vluna, gate)
    place(journal_of(vluna), [(operation.operation_id, "retry")])
    runtime = runtime_of(vluna)

    def die(name: str) -> None:
        if name == "orders.carried_out":
            raise failpoints.Crash

    failpoints.arm(die)
    try:
        with pytest.raises(failpoints.Crash):
            carry_out(runtime.ledger, runtime.settler, runtime.telemetry)
    finally:
        failpoints.arm(None)
    assert [one.what for one in waiting_in(journal_of(vluna))] == ["retry"]
    assert vluna.flush(10)
    eventually(lambda: waiting_in(journal_of(vluna)) == [])
    assert vluna.flush(10)
    assert charged(gate) == [("commit", 120)]


def test_an_order_that_means_nothing_is_forgotten(vluna: Vluna, gate: Sandbox) -> None:
    """Of an operation that is settled, unknown, or of another version's kind; the owner goes on."""
    operation = begin(vluna)
    operation.finish(USED)
    assert vluna.flush(10)
    place(journal_of(vluna), [("nobody", "retry")])
    order(vluna, operation, "repair")
    order(vluna, operation, "teleport")
    assert charged(gate) == [("commit", 120)]


def test_the_owner_is_told_in_its_telemetry(vluna: Vluna, gate: Sandbox) -> None:
    operation = refused_commit(vluna, gate)
    before = vluna.telemetry.counts["vluna.settlement.ordered"]
    order(vluna, operation, "drop")
    assert vluna.telemetry.counts["vluna.settlement.ordered"] == before + 1


def test_nobody_is_told_that_something_was_dropped_while_it_is_on_its_way(vluna: Vluna, gate: Sandbox) -> None:
    """The gate charges it a moment later: the order waits for the answer, and then says so."""
    operation = begin(vluna)
    gate.faults.add("latency", "commits", seconds=1.0)
    operation.finish(USED)
    runtime = runtime_of(vluna)
    eventually(lambda: runtime.settler.delivering(operation.operation_id))
    place(journal_of(vluna), [(operation.operation_id, "drop")])
    assert carry_out(runtime.ledger, runtime.settler, runtime.telemetry) == 0
    assert waiting_in(journal_of(vluna)) != []
    assert vluna.flush(10)
    carry_out(runtime.ledger, runtime.settler, runtime.telemetry)
    assert waiting_in(journal_of(vluna)) == []
    assert charged(gate) == [("commit", 120)]
    assert row_of(vluna, operation).state.settlement == "booked"


def test_what_was_charged_although_it_was_dropped_is_told_as_charged(
    vluna: Vluna, gate: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """The drop came between the look and the sending of the bytes."""
    operation = begin(vluna)
    gate.faults.add("latency", "commits", seconds=0.5)
    operation.finish(USED)
    runtime = runtime_of(vluna)
    eventually(lambda: row_of(vluna, operation).state.settlement == "sent")
    runtime.ledger.apply(operation.operation_id, lambda now: ordered(now, "drop"))
    assert vluna.flush(10)
    receipt = operation.wait(10)
    assert receipt is not None
    assert (receipt.state, receipt.charged_xusd) == ("booked", gate.booked("ann").charged_xusd)
    assert row_of(vluna, operation).state.settlement == "booked"
    assert "CHARGED all the same" in caplog.text


def test_what_is_to_be_dropped_is_not_due_any_more(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path
) -> None:
    """From the moment of the order, before it is carried out; other orders keep nothing from going out."""
    vluna = make_vluna(outbox=str(tmp_path))
    gate.faults.add("status", "commits", times=None, status=503)
    dropped, retried = begin(vluna), begin(vluna)
    dropped.finish(USED)
    retried.finish(USED)
    journal = runtime_of(vluna).ledger.journal
    place(journal_of(vluna), [(dropped.operation_id, "drop"), (retried.operation_id, "retry")])
    assert [operation_id for operation_id, _, _ in journal.due(10, 10, 9e9)] == [retried.operation_id]


# -- placing -----------------------------------------------------------------------------------------------------------


def test_placing_orders_keeps_no_caller_waiting(vluna: Vluna, gate: Sandbox) -> None:
    """Thousands at once; the owner writes meanwhile, patient for a quarter of a second at most."""
    journal = runtime_of(vluna).ledger.journal
    stop, longest = threading.Event(), 0.0

    def placing() -> None:
        while not stop.is_set():
            place(journal_of(vluna), [(f"nobody-{n}", "retry") for n in range(5_000)])

    thread = threading.Thread(target=placing)
    thread.start()
    try:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            began = time.perf_counter()
            begin(vluna)
            longest = max(longest, time.perf_counter() - began)
    finally:
        stop.set()
        thread.join(10)
    assert journal.path is not None
    assert longest < 1.0


def test_a_journal_of_an_older_version_takes_no_orders(tmp_path: Path) -> None:
    path = tmp_path / "journal-1-old.sqlite3"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE operations (operation_id TEXT)")
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(OutboxUnavailable, match="takes no orders"):
        place(path, [("one", "retry")])
    assert waiting_in(path) == []


def test_what_cannot_be_written_or_read_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "journal-1-broken.sqlite3"
    broken.write_bytes(b"no database" * 100)
    with pytest.raises(OutboxUnavailable, match="cannot put orders"):
        place(broken, [("one", "retry")])
    with pytest.raises(OutboxUnavailable, match="cannot read"):
        waiting_in(broken)
    with pytest.raises(OutboxUnavailable):
        place(tmp_path / "journal-1-none.sqlite3", [("one", "retry")])
    assert not (tmp_path / "journal-1-none.sqlite3").exists()
    assert waiting_in(tmp_path / "journal-1-none.sqlite3") == []
    assert find([broken, tmp_path / "journal-1-none.sqlite3"], ["one"]) == {}


def test_an_owner_is_looked_for_without_leaving_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "journal-1-x.sqlite3"
    path.touch()
    assert not owner_lives(path)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    journal = Journal(tmp_path)
    assert journal.path is not None
    assert owner_lives(journal.path)
    journal.close()


# -- the row, without a process ----------------------------------------------------------------------------------------


USAGE = TokenUsage(100, 20)


def row(state: OperationState, **fields: Any) -> Row:
    return Row(
        operation_id="one",
        base_url="http://gate",
        realm_id="realm",
        pid=1,
        principal_id="ann",
        user_id="ann",
        feature_code=FEATURE,
        created_at=1_000.0,
        authorize_key="a",
        settle_key="s",
        state=state,
        **fields,
    )


RUNNING = OperationState().leased("lease_token").started()
PENDING = RUNNING.completed(USAGE, "provider")
QUARANTINED = PENDING.sent().quarantined()


@pytest.mark.parametrize(
    ("hints", "told"),
    [
        ('[{"type": "pricing.not_configured"}]', True),
        ('[{"type": "feature.meter_not_allowed"}, {"type": "quota.remaining"}]', True),
        ('[{"type": "pricing.not_configured"}, {"type": "lease.closed_at_commit", "state": "closed"}]', False),
        ("[]", False),
        ("[1]", False),
        ('{"a": 1}', False),
    ],
)
def test_only_an_answer_with_a_reason_tells_that_nothing_was_charged(hints: str, told: bool) -> None:
    """For everything else the books are looked at before a repair, as where there is no receipt at all."""
    quarantined = row(QUARANTINED, receipt=f'{{"state": "quarantined", "hints": {hints}}}', body=b"{}", path="/x")
    assert tells_uncharged(quarantined) is told
    repaired = ordered(quarantined, "repair")
    assert repaired.state.look_first is not told
    assert (repaired.body is None) is told
    assert not tells_uncharged(row(QUARANTINED))
    assert not tells_uncharged(row(QUARANTINED, receipt="no json"))


@pytest.mark.parametrize(
    ("state", "what", "reason"),
    [
        (RUNNING, "drop", "in flight"),
        (PENDING.sent().booked(), "retry", "settled"),
        (OperationState().denied(), "drop", "settled"),
        (RUNNING.owner_died(), "repair", "not known"),
        (RUNNING.owner_died(), "retry", "not known"),
        (QUARANTINED, "retry", "repair it"),
        (PENDING, "repair", "retry it"),
        (RUNNING.failed().refused(), "repair", "no usage"),
        (PENDING, "retry", None),
        (PENDING, "drop", None),
        (QUARANTINED, "repair", None),
        (RUNNING.owner_died(), "drop", None),
    ],
)
def test_an_order_that_means_nothing_says_why(state: OperationState, what: Any, reason: str | None) -> None:
    found = why_not(row(state), what)
    assert (found is None) == (reason is None)
    assert reason is None or reason in (found or "")


@pytest.mark.parametrize("what", ["retry", "repair", "drop"])
def test_a_copy_of_what_is_in_the_shared_outbox_is_not_ordered_about(what: Any) -> None:
    """Any host may be delivering it: the order belongs where the row is."""
    for stage in ("sharing", "shared"):
        copy = row(PENDING.sent().refused(), stage=stage)
        assert ordered(copy, what) is copy
        assert "VLUNA_LLM_OUTBOX_SHARED" in (why_not(copy, what) or "")


def test_a_retry_is_due_at_once_and_keeps_the_bytes() -> None:
    waiting = row(PENDING.sent(), body=b"{}", path="/x", attempts=7, next_attempt_at=9e9, held=True)
    now = ordered(waiting, "retry")
    assert (now.body, now.attempts, now.next_attempt_at, now.state) == (b"{}", 0, 0.0, waiting.state)


def test_states_have_words_for_people() -> None:
    words: dict[str | None, Row] = {
        "pending": row(PENDING.sent()),
        "held": row(PENDING.sent(), held=True),
        "dead": row(PENDING.sent().refused(), held=True),
        "quarantined": row(QUARANTINED),
        "lost": row(RUNNING.owner_died()),
        None: row(RUNNING),
    }
    assert {word: waiting_as(one) for word, one in words.items()} == {word: word for word in words}
    assert not needs_person(words["pending"], 1_000.0 + 3_600, 3_600)
    assert needs_person(words["pending"], 1_000.0 + 3_601, 3_600)
    assert all(needs_person(one, 1_000.0, 3_600) for word, one in words.items() if word not in ("pending", None))
    assert not needs_person(words[None], 9e9, 0)


def test_depths_are_counted_by_these_words() -> None:
    totals = [
        Total("pending", False, False, None, 2, 100.0, 110.0),
        Total("sent", False, False, None, 1, 90.0, 95.0),
        Total("sent", True, False, None, 4, 80.0, 85.0),
        Total("lost", False, False, None, 1, 70.0, None),
        Total("booked", False, False, None, 9, 1.0, 2.0),
        Total("none", False, False, None, 9, 1.0, None),
    ]
    assert depths(totals) == {"pending": (3, 95.0), "held": (4, 85.0), "lost": (1, 70.0)}


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm(None)
