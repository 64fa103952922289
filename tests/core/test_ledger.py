"""Rows that are not where they were: the ledger notices, sends nothing of them, and loses no news of their work."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vluna_llm import TokenUsage
from vluna_llm.ledger import Ledger, Watch
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Journal, Row
from vluna_llm.settlement import withdrawn
from vluna_llm.telemetry import Telemetry

GATE, REALM = "https://gate/mgt/v1", "realm"
RUNNING = OperationState().leased("lease_token").started()
USED = RUNNING.completed(TokenUsage(10, 5), "provider")
ABORTED = RUNNING.aborted()


def row(state: OperationState = RUNNING) -> Row:
    return Row("op-1", GATE, REALM, 1, "ann", "ann", "openai.gpt-4o", 1000.0, "op-1:auth", "op-1", state=state)


def to(state: OperationState, **fields: object) -> Callable[[Row], Row]:
    return lambda now: now if now.state == state and not fields else now.evolve(state=state, **fields)


def composed(now: Row) -> Row:
    return now.evolve(state=now.state.sent(), path="gate/commits", body=b"{}")


def used(now: Row) -> Row:
    """What an operation's ending does."""
    state = now.state.completed(TokenUsage(10, 5), "provider")
    return now if state == now.state else withdrawn(now).evolve(state=state)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger(Journal(tmp_path), Telemetry())
    yield made
    if not made.closed:
        made.close()


def deleted_by_hand(ledger: Ledger) -> None:
    assert ledger.journal.path is not None
    with sqlite3.connect(ledger.journal.path) as db:
        db.execute("DELETE FROM operations")
    db.close()


def taken_though_its_owner_lives(ledger: Ledger) -> None:
    """Somebody removed the lock's file: whoever comes next takes the journal for a dead process's."""
    journal = ledger.journal
    assert journal.path is not None
    journal.path.with_suffix(".lock").unlink()
    other = Journal(journal.directory)
    other.adopt(GATE, REALM)
    assert [found.operation_id for found in other.rows()] == ["op-1"]
    other.close()


gone = pytest.mark.parametrize("go", [deleted_by_hand, taken_though_its_owner_lives])


@gone
def test_what_is_not_in_the_journal_any_more_is_not_sent(ledger: Ledger, go: Callable[[Ledger], None]) -> None:
    """Its bytes could not be stored, and somebody else may have composed others."""
    ledger.open(row(), (), 0)
    ledger.apply("op-1", to(USED))
    go(ledger)
    assert ledger.apply("op-1", composed) is None
    assert ledger.get("op-1") is None
    assert ledger._telemetry.counts["vluna.internal_error"] == 1
    assert ledger.apply("op-1", composed) is None


@gone
def test_what_becomes_known_of_work_whose_row_is_gone_is_kept(ledger: Ledger, go: Callable[[Ledger], None]) -> None:
    watch = ledger.open(row(), (), 0)
    go(ledger)
    kept = ledger.apply("op-1", used, fallback=row(), watch=watch)
    assert kept is not None
    assert (kept.state, kept.body) == (USED, None)
    assert ledger.get("op-1") == kept


@gone
@pytest.mark.parametrize("ending", [used, to(ABORTED)])
def test_an_ending_that_says_nothing_new_brings_nothing_back(
    ledger: Ledger, go: Callable[[Ledger], None], ending: Callable[[Row], Row]
) -> None:
    """Not even where the row as its owner knows it would end anew."""
    watch = ledger.open(row(), (), 0)
    ledger.apply("op-1", used, fallback=row(), watch=watch)
    ledger.apply("op-1", composed)
    go(ledger)

    def again(now: Row) -> Row:
        return now if now.state.work != "running" else ending(now)

    found = ledger.apply("op-1", again, fallback=row(), watch=watch)
    assert found is not None
    assert found.body == b"{}"
    assert ledger.journal.rows() == []
    assert ledger.is_stored("op-1")


def test_what_was_pruned_is_remembered_by_who_waits_for_it(ledger: Ledger) -> None:
    watch = ledger.open(row(), (), 0)
    ledger.apply("op-1", used, fallback=row(), watch=watch)
    ledger.apply("op-1", composed)
    settled = ledger.apply("op-1", lambda now: now.evolve(state=now.state.booked()))
    assert settled is not None
    ledger.settled(settled, None)
    assert ledger.journal.prune(2_000.0) == 1
    assert ledger.apply("op-1", used, fallback=row(), watch=watch) == settled
    assert ledger.journal.rows() == []


def test_the_runtime_after_the_one_that_was_closed_knows_what_was_sent(tmp_path: Path) -> None:
    """A cancel was: usage that comes then is booked by ingest."""
    first = Ledger(Journal(tmp_path), Telemetry())
    watch = first.open(row(), (), 0)
    first.apply("op-1", to(ABORTED), fallback=row(), watch=watch)
    first.apply("op-1", composed)
    assert first.close()
    other = Journal(tmp_path)
    assert [found.operation_id for found in other.adopt(GATE, REALM)] == ["op-1"]
    second = Ledger(Journal(tmp_path), Telemetry())
    kept = second.apply("op-1", used, fallback=row(), watch=watch)
    assert kept is not None
    assert (kept.state.route, kept.state.cancel_sent, kept.body) == ("ingest", True, None)
    second.close()
    other.close()


def test_the_answer_to_a_cancel_is_not_written_into_usage_that_took_its_place(ledger: Ledger) -> None:
    """The adoption brought it while the cancel was on its way; half of either would be the loss of both."""
    ledger.open(row(), (), 0)
    ledger.apply("op-1", to(ABORTED))
    sent = ledger.apply("op-1", composed)
    assert sent is not None
    directory = ledger.journal.directory
    dead = Journal(directory)
    dead.insert(row(USED))
    assert dead.close()
    (arrived,) = ledger.adopt(GATE, REALM, None)
    assert (arrived.state.route, arrived.state.settlement) == ("ingest", "pending")

    def answered(now: Row) -> Row:
        return now if now.state.route != "cancel" else now.evolve(state=now.state.booked(), receipt="{}")

    assert ledger.apply("op-1", answered) == arrived
    assert ledger.journal.get("op-1") == arrived
    assert ledger._telemetry.counts["vluna.internal_error"] == 0


def test_a_row_that_is_just_arriving_is_nobodys_and_no_alarm(ledger: Ledger) -> None:
    ledger.open(row(), (), 0)
    ledger.apply("op-1", to(ABORTED))
    with ledger.journal.transaction() as db:
        db.execute("UPDATE operations SET arrived_from = 'journal-9.sqlite3'")
    assert ledger.journal.arrives("op-1")
    assert ledger.apply("op-1", composed) is None
    assert ledger._telemetry.counts["vluna.internal_error"] == 0


def test_a_watch_keeps_what_was_stored_last(ledger: Ledger) -> None:
    watch = ledger.open(row(), (), 0)
    assert isinstance(watch, Watch)
    assert watch.last is None
    ledger.apply("op-1", used)
    sent = ledger.apply("op-1", composed)
    assert watch.last == sent
