"""Endings in the wrong moment: inside our own locks, while closing, after closing, in a fork, without threads."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vluna_llm import TokenUsage, Vluna, call_context
from vluna_llm.ending import Ending
from vluna_llm.lifecycle import ModelCall, Operation
from vluna_llm.outbox import Journal
from vluna_llm.outbox.lock import FileLock
from vluna_llm.sandbox import Sandbox

CALL = ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []})
USED = Ending("complete", usage=TokenUsage(100, 20), finished=True, response_id="resp_1")


def begin(vluna: Vluna, principal: str = "ann") -> Operation:
    with call_context(principal_id=principal):
        operation = vluna.begin(CALL)
    assert operation is not None
    return operation


def in_time(act: Callable[[], object], seconds: float = 10) -> None:
    """Run on a thread that may hang: a deadlock is a failed test and not a hanging one."""
    done = threading.Event()

    def run() -> None:
        act()
        done.set()

    threading.Thread(target=run, daemon=True).start()
    assert done.wait(seconds), "it hangs"


def charged(gate: Sandbox, principal: str = "ann") -> list[int]:
    return [entry.quantity for entry in gate.booked(principal).entries if entry.charged_xusd > 0]


@pytest.mark.parametrize("where", ["journal.update", "ledger._remember", "backlog.offer", "journal._execute"])
def test_a_collector_that_ends_another_call_inside_our_locks_neither_hangs_nor_loses_it(
    vluna: Vluna, gate: Sandbox, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A generator that is collected in there runs its ``finally`` and closes the stream it was reading."""
    forgotten, other = begin(vluna), begin(vluna)
    runtime = vluna._running()
    places: dict[str, Any] = {
        "journal": runtime.ledger.journal,
        "ledger": runtime.ledger,
        "backlog": runtime.settler._backlog,
    }
    part, name = where.split(".")
    inside = getattr(places[part], name)
    collected: list[Operation] = [forgotten]

    def collecting(*args: Any, **kwargs: Any) -> Any:
        result = inside(*args, **kwargs)
        if collected:
            collected.pop().finish(USED)
        return result

    monkeypatch.setattr(places[part], name, collecting)
    in_time(lambda: other.finish(USED))
    assert vluna.flush(10)
    assert charged(gate) == [120, 120]


def test_a_collector_that_ends_a_call_while_its_scope_adds_up_loses_no_figure(
    vluna: Vluna, gate: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with call_context(principal_id="ann") as scope:
        first, second = vluna.begin(CALL), vluna.begin(CALL)
    assert first is not None
    assert second is not None
    add = TokenUsage.__add__
    collected = [second]

    def adding(self: TokenUsage, other: TokenUsage) -> TokenUsage:
        total = add(self, other)
        if collected:
            collected.pop().finish(USED)
        return total

    monkeypatch.setattr(TokenUsage, "__add__", adding)
    in_time(lambda: first.finish(USED))
    assert scope.wait(10)
    assert scope.usage.total_tokens == 240


@pytest.mark.parametrize("how", ["flush", "close"])
def test_an_answer_that_is_forgotten_after_close_is_booked_by_the_next_flush_or_at_exit(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, how: str
) -> None:
    """The finalizer itself starts nothing: it may run inside any lock, or while the interpreter ends."""
    vluna = make_vluna(outbox=str(tmp_path))
    operation = begin(vluna)
    vluna.close()
    before = threading.active_count()
    operation.abandon(lambda: USED)
    assert threading.active_count() == before
    assert vluna.flush(10) if how == "flush" else vluna.close(10)
    assert charged(gate) == [120]


@pytest.mark.parametrize("outbox", ["memory", "directory"])
def test_who_waits_for_a_call_that_ends_after_close_is_told(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, outbox: str
) -> None:
    vluna = make_vluna(outbox="memory" if outbox == "memory" else str(tmp_path))
    with call_context(principal_id="ann") as scope:
        operation = vluna.begin(CALL)
    assert operation is not None
    vluna.close()
    operation.finish(USED)
    assert scope.wait(10)
    assert [receipt.state for receipt in scope.receipts] == ["booked"]
    assert charged(gate) == [120]


def test_nobody_waits_for_ever_for_a_settlement_that_close_left_behind(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path
) -> None:
    vluna = make_vluna(outbox=str(tmp_path))
    with call_context(principal_id="ann") as scope:
        operation = vluna.begin(CALL)
    assert operation is not None
    gate.stop()
    operation.finish(USED)
    assert not vluna.close(0.3)
    assert scope.wait(1)
    (receipt,) = scope.receipts
    assert (receipt.state, receipt.charged, receipt.charged_xusd) == ("held", False, None)
    gate.start()
    vluna._running()
    assert vluna.flush(10)
    assert charged(gate) == [120]


@pytest.mark.parametrize("outbox", ["memory", "directory"])
def test_a_close_in_the_middle_of_an_admission_costs_nothing(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outbox: str
) -> None:
    vluna = make_vluna(outbox="memory" if outbox == "memory" else str(tmp_path))
    authorize = vluna.gate.authorize

    def closing(**asked: Any) -> Any:
        lease = authorize(**asked)
        vluna.close()
        return lease

    monkeypatch.setattr(vluna.gate, "authorize", closing)
    operation = begin(vluna)
    operation.finish(USED)
    assert vluna.flush(10)
    assert charged(gate) == [120]
    assert vluna._running().ledger.journal.rows("lost") == []


@pytest.mark.parametrize("outbox", ["memory", "directory"])
def test_a_write_that_meets_a_ledger_just_closed_goes_to_the_next_one(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outbox: str
) -> None:
    vluna = make_vluna(outbox="memory" if outbox == "memory" else str(tmp_path))
    operation = begin(vluna)
    stale, running = [vluna._running()], vluna._process.running
    vluna.close()
    monkeypatch.setattr(vluna._process, "running", lambda: stale.pop() if stale else running())
    operation.finish(USED)
    assert not stale
    assert vluna.flush(10)
    assert charged(gate) == [120]


def test_a_call_that_ends_while_another_thread_closes_is_not_listed_as_lost(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path
) -> None:
    vluna = make_vluna(outbox=str(tmp_path))
    slow, operation = begin(vluna, "bob"), begin(vluna)
    gate.faults.add("latency", "commits", seconds=0.6)
    slow.finish(USED)
    closing = threading.Thread(target=vluna.close)
    closing.start()
    operation.finish(USED)
    closing.join()
    assert vluna.flush(10)
    vluna._running()
    assert vluna.flush(10)
    assert charged(gate) == [120]
    assert vluna._running().ledger.journal.rows("lost") == []


def test_a_call_whose_admission_could_not_be_written_is_booked_after_a_restart_of_the_instance(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal says less than the operation itself: what the operation knows counts."""
    import sqlite3

    vluna = make_vluna(outbox=str(tmp_path))
    journal = vluna._running().ledger.journal

    def full(*_: Any) -> Any:
        raise journal._unavailable(sqlite3.OperationalError("database or disk is full"))

    with monkeypatch.context() as broken:
        broken.setattr(journal, "update", full)
        broken.setattr(journal, "replace", full)
        operation = begin(vluna)
        vluna.close()
    operation.finish(USED)
    assert vluna.flush(10)
    assert charged(gate) == [120]


def test_a_thread_that_cannot_be_started_delays_and_loses_nothing(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of threads, and while the interpreter ends, ``Thread.start`` raises."""

    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    vluna = make_vluna(outbox=str(tmp_path))
    with monkeypatch.context() as exhausted:
        exhausted.setattr(threading.Thread, "start", no_more)
        for _ in range(10):
            begin(vluna).finish(USED)
    assert vluna.telemetry.counts["vluna.internal_error"] == 0
    assert vluna.flush(10)
    assert charged(gate) == [120] * 10


def test_an_error_in_learning_never_delays_a_settlement(
    vluna: Vluna, gate: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ArithmeticError

    monkeypatch.setattr(type(vluna._estimator), "update", broken)
    begin(vluna).finish(USED)
    assert vluna.flush(5)
    assert charged(gate) == [120]


def test_an_instance_that_nobody_holds_any_more_has_paid_when_the_script_ends(gate: Sandbox, tmp_path: Path) -> None:
    """Made in a function, as scripts do: it is gone long before the interpreter ends."""
    program = textwrap.dedent(
        """
        import gc
        from vluna_llm import TokenUsage, Vluna, call_context
        from vluna_llm.ending import Ending
        from vluna_llm.lifecycle import ModelCall

        def main():
            vluna = Vluna()
            with call_context(principal_id="ann"):
                operation = vluna.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []}))
            operation.finish(Ending("complete", usage=TokenUsage(100, 20), finished=True))

        main()
        gc.collect()
        """
    )
    gate.faults.add("latency", "commits", seconds=0.5)
    environment = {**gate.env(), "VLUNA_LLM_OUTBOX": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert charged(gate) == [120]
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_early_where_only_later_attempts_are_left(vluna: Vluna, gate: Sandbox) -> None:
    import time

    gate.faults.add("status", "commits", times=1, status=401, body='{"ok":false,"code":"AUTH.INVALID","message":"no"}')
    begin(vluna).finish(USED)
    started = time.monotonic()
    assert not vluna.close(5)
    assert time.monotonic() - started < 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_that_lives_on_does_not_keep_its_dead_parents_journal_from_being_adopted(
    gate: Sandbox, make_vluna: Callable[..., Vluna], tmp_path: Path
) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys, time
        from vluna_llm import TokenUsage, Vluna, call_context
        from vluna_llm.ending import Ending
        from vluna_llm.lifecycle import ModelCall

        vluna = Vluna()
        with call_context(principal_id="ann"):
            operation = vluna.begin(ModelCall("chat.completions", "openai", "gpt-4o-mini", {"messages": []}))
        operation.finish(Ending("complete", usage=TokenUsage(100, 20), finished=True))
        child = os.fork()
        if child == 0:
            os.close(1)
            time.sleep(30)
            os._exit(0)
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    gate.faults.add("hang", "meters", times=None)
    environment = {**gate.env(), "VLUNA_LLM_OUTBOX": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    killed = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=60,
        check=False,
    )
    child = int(killed.stdout)
    try:
        os.kill(child, 0)
        gate.faults.clear()
        heir = make_vluna(outbox=str(tmp_path))
        heir._running()
        assert heir.flush(10)
        assert charged(gate) == [120]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_of_a_thread_that_was_adding_up_a_scope_can_use_it(vluna: Vluna) -> None:
    """The lock of an inherited scope may have been held at the fork, by a thread that the child does not have."""
    with call_context(principal_id="ann") as scope:
        inherited = vluna.begin(CALL)
        assert inherited is not None
        entered, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with scope._changed:
                entered.set()
                leave.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait()
        pid = os.fork()
        if pid == 0:
            done: list[int] = []
            worker = threading.Thread(target=lambda: done.append(scope.pending), daemon=True)
            worker.start()
            worker.join(3)
            os._exit(0 if done == [0] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        leave.set()
        thread.join()
        inherited.fail()


def test_two_instances_on_one_directory_leave_each_other_alone(
    make_vluna: Callable[..., Vluna], gate: Sandbox, tmp_path: Path
) -> None:
    one, two = make_vluna(outbox=str(tmp_path)), make_vluna(outbox=str(tmp_path))
    first, second = begin(one), begin(two)
    assert one.flush(5)
    assert two.flush(5)
    first.finish(USED)
    second.finish(USED)
    assert one.flush(5)
    assert two.flush(5)
    assert charged(gate) == [120, 120]
    assert not one._running().ledger.journal.rows("lost")
    assert not two._running().ledger.journal.rows("lost")


def test_a_lock_is_not_had_twice_in_one_process(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.path is not None
    assert not FileLock(journal.path.with_suffix(".lock")).acquire()
    journal.close()


def test_usage_that_turns_up_while_a_cancel_is_being_composed_takes_its_place(
    vluna: Vluna, gate: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = vluna._running().settler.delivery
    priced, late = delivery._priced, [begin(vluna)]
    operation = late[0]

    def usage_comes(row: Any) -> Any:
        if late:
            late.pop().finish(USED)
        return priced(row)

    monkeypatch.setattr(delivery, "_priced", usage_comes)
    operation.finish(Ending("closed"))
    assert vluna.flush(10)
    assert charged(gate) == [120]
    assert "cancel" not in {request.route for request in gate.requests}
    assert vluna.telemetry.counts["vluna.internal_error"] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_note_of_the_parent_is_not_acted_on_by_its_child(vluna: Vluna) -> None:
    acted: list[int] = []
    vluna._process.later(lambda: acted.append(os.getpid()))
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(Exception):
            begin(vluna, "child").fail()
            code = 0 if vluna.close(5) and not acted else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert vluna.flush(5)
    assert acted == [os.getpid()]


def test_what_close_left_behind_is_there_before_anything_else_happens(
    make_vluna: Callable[..., Vluna], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation that ends after close must meet its own row, and not a second one."""
    adopting = Journal.adopting

    def only_named(journal: Journal, base_url: str, realm_id: str, paths: Any = None) -> Any:
        return adopting(journal, base_url, realm_id, paths) if paths is not None else iter(())

    monkeypatch.setattr(Journal, "adopting", only_named)
    vluna = make_vluna(outbox=str(tmp_path))
    operation = begin(vluna)
    vluna.close()
    row = vluna._running().ledger.get(operation.operation_id)
    assert row is not None
    assert row.state.settlement == "lost"
    operation.finish(USED)
    assert vluna.flush(5)
    assert vluna._running().ledger.journal.counts() == {"booked": 1}
