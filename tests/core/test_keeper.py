"""What a finalizer noted is done soon, whatever else the keeper is busy with, and before the journal is given up."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vluna_llm import TokenUsage, Vluna, call_context, failpoints
from vluna_llm.ending import Ending
from vluna_llm.errors import OutboxUnavailable
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Journal, Row
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm(None)


def begin(vluna: Vluna) -> Operation:
    with call_context(principal_id="ann"):
        operation = vluna.begin(CALL)
    assert operation is not None
    return operation


def leave_behind(directory: Path, gate: Sandbox, number: int) -> None:
    """The journal of a dead process, whose settlements are due later."""
    dead = Journal(directory)
    state = OperationState().leased("lease_token").started().completed(TokenUsage(1, 1), "provider")
    for n in range(number):
        dead.insert(
            Row(
                operation_id=f"dead-{n}",
                base_url=gate.base_url,
                realm_id=gate.realm_id,
                pid=1,
                principal_id="bob",
                user_id="bob",
                feature_code="openai.gpt-4o-mini",
                created_at=time.time(),
                authorize_key=f"key-{n}:auth",
                settle_key=f"key-{n}",
                state=state,
                lease_token=f"lease.{n}.0",
                next_attempt_at=time.time() + 3_600,
            )
        )
    assert dead.close()


def test_what_a_finalizer_noted_does_not_wait_for_the_backlog_of_a_dead_process(
    gate: Sandbox, make_vluna: Callable[..., Vluna], tmp_path: Path
) -> None:
    leave_behind(tmp_path, gate, 1_100)
    seen: list[bool] = []
    vluna = make_vluna(outbox=str(tmp_path))
    noted: list[Operation] = []
    ready = threading.Event()

    def between(name: str) -> None:
        if name == "adoption.copied":
            ready.wait(10)
            if not noted:
                noted.append(operation)
                operation.abandon(lambda: USED)
            else:
                row = vluna._running().ledger.get(operation.operation_id)
                seen.append(row is None or row.state.usage is not None)

    failpoints.arm(between)
    operation = begin(vluna)
    ready.set()
    until = time.monotonic() + 20
    while len(seen) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert seen == [True, True]


def test_what_a_finalizer_noted_is_stored_at_the_end_also_where_the_keeper_did_not_come_to_it(
    make_vluna: Callable[..., Vluna], tmp_path: Path
) -> None:
    vluna = make_vluna(outbox=str(tmp_path))
    operation = begin(vluna)
    runtime = vluna._running()
    path, busy = runtime.ledger.journal.path, threading.Event()
    assert path is not None
    runtime.settler.keeper.in_turn(lambda: (busy.wait(30), None)[1])
    operation.abandon(lambda: USED)
    assert not vluna.close(timeout=0.1)
    busy.set()
    with sqlite3.connect(path) as db:
        found = db.execute("SELECT settlement, usage IS NOT NULL FROM operations").fetchall()
    assert found == [("pending", 1)]


def test_what_could_be_written_nowhere_is_not_said_to_wait_on_disk(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk took the operation and not its usage, and the gate is away: nobody will ever charge it."""
    gate.faults.add("status", "commits", times=None, status=503)
    vluna = make_vluna(outbox=str(tmp_path))
    operation = begin(vluna)
    vluna._running().ledger.journal._db.execute("PRAGMA query_only = ON")
    operation.finish(USED)
    assert not vluna.close(timeout=0.3)
    assert "1 settlement(s) were in memory only, could not be delivered and are LOST" in caplog.text
    assert "go out with the next process" not in caplog.text


def test_a_journal_that_cannot_be_read_any_more_does_not_keep_anybody_from_closing(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be more in it than memory holds; how many cannot be told."""
    gate.faults.add("status", "commits", times=None, status=503)
    vluna = make_vluna(outbox=str(tmp_path))
    runtime = vluna._running()
    begin(vluna).finish(USED)
    runtime.settler.read_again()

    def totals() -> None:
        raise OutboxUnavailable("no descriptor is left")

    monkeypatch.setattr(runtime.ledger.journal, "totals", totals)
    monkeypatch.setattr(runtime.ledger.journal, "due", lambda *how: totals())
    assert not vluna.close(timeout=0.3)
    assert runtime.ledger.closed


def test_a_settlement_that_cannot_be_read_for_a_moment_is_not_forgotten(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of others came since, so that it is in the journal alone; a flush must not call it delivered."""
    vluna = make_vluna(outbox=str(tmp_path))
    ledger, read = vluna._running().ledger, vluna._running().ledger.journal.get
    first, second = begin(vluna), begin(vluna)
    gate.faults.add("latency", "commits", seconds=0.5)
    first.finish(USED)
    failures = [OutboxUnavailable("disk I/O error")]

    def get(operation_id: str) -> Row | None:
        if failures:
            raise failures.pop()
        return read(operation_id)

    second.finish(USED)
    ledger._rows.pop(second.operation_id)
    monkeypatch.setattr(ledger.journal, "get", get)
    assert not vluna.flush(3)
    assert vluna._running().settler.outstanding == 1
    assert not failures


def test_what_was_taken_over_is_delivered_also_where_the_orders_cannot_be_read(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has moved by then, and nobody else will bring it."""
    vluna = make_vluna(outbox=str(tmp_path))
    runtime = vluna._running()
    assert vluna.flush(5)
    leave_behind(tmp_path, gate, 3)

    def orders() -> None:
        raise OutboxUnavailable("no descriptor is left")

    with monkeypatch.context() as broken:
        broken.setattr(runtime.ledger.journal, "orders", orders)
        with pytest.raises(OutboxUnavailable):
            runtime._adopt()
    until = time.monotonic() + 10
    while len(runtime.settler._backlog) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(runtime.settler._backlog) == 3
