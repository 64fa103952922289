"""The journal: what was written is there after the process is gone, and only the dead are taken over."""

from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vluna_llm.errors import OutboxUnavailable
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Journal, Row
from vluna_llm.usage import TokenUsage

DONE = OperationState().leased("lease_token").started().completed(TokenUsage(10, 5, cached_tokens=4), "provider")


def row(operation_id: str = "op-1", **changes: object) -> Row:
    base = Row(
        operation_id=operation_id,
        base_url="https://gate/mgt/v1",
        realm_id="realm",
        pid=os.getpid(),
        principal_id="ann",
        user_id="ann",
        feature_code="openai.gpt-4o",
        created_at=1000.0,
        authorize_key=f"{operation_id}:auth",
        settle_key=operation_id,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    written = row(labels={"a": "b"}, budget_id="b-1", derived=True, unsplit=True, estimated_input=7)
    journal.insert(written)
    assert journal.get("op-1") == written
    changed = dataclasses.replace(
        written, state=DONE, lease_token="lease.x.y", body=b'{"a":1}', path="/gate/commits", attempts=3, ended_at=2.0
    )
    journal.update(written, changed)
    assert journal.get("op-1") == changed
    assert journal.get("nobody") is None
    journal.close()


def test_the_same_operation_is_written_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.insert(row())
    with pytest.raises(OutboxUnavailable, match="UNIQUE"):
        journal.insert(row())
    journal.close()


def test_a_person_can_read_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.insert(row(state=DONE))
    assert journal.path is not None
    with sqlite3.connect(f"file:{journal.path}?mode=ro", uri=True) as db:
        found = db.execute("SELECT principal_id, settlement, next_step, usage FROM operations").fetchone()
    assert found == (
        "ann",
        "pending",
        "to be delivered",
        '{"input_tokens": 10, "output_tokens": 5, "cached_tokens": 4}',
    )
    journal.close()


def test_files_are_private(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outbox")
    journal.insert(row())
    assert (tmp_path / "outbox").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "outbox").iterdir()} == {0o600}
    journal.close()


def test_a_journal_without_open_rows_leaves_no_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.insert(row(state=DONE.sent().booked()))
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_a_living_owner_is_left_alone_and_a_gone_one_is_adopted(tmp_path: Path) -> None:
    owner, other = Journal(tmp_path), Journal(tmp_path)
    owner.insert(row("op-1", state=DONE, body=b"exact bytes"))
    owner.insert(row("op-2", state=OperationState().leased("lease_token").started()))
    owner.insert(row("op-3", state=DONE.sent().booked()))
    assert other.adopt("https://gate/mgt/v1", "realm") == []
    owner.close()
    adopted = other.adopt("https://gate/mgt/v1", "realm")
    assert {(found.operation_id, found.state.settlement) for found in adopted} == {
        ("op-1", "pending"),
        ("op-2", "lost"),
    }
    kept = other.get("op-1")
    assert kept is not None
    assert kept.body == b"exact bytes"
    assert other.adopt("https://gate/mgt/v1", "realm") == []
    assert len(list(tmp_path.glob("*.sqlite3"))) == 1
    other.close()


def test_rows_of_another_gate_or_realm_are_delivered_nowhere_else(tmp_path: Path) -> None:
    owner = Journal(tmp_path)
    owner.insert(row(state=DONE))
    owner.close()
    other = Journal(tmp_path)
    assert other.adopt("https://elsewhere/mgt/v1", "realm") == []
    assert other.adopt("https://gate/mgt/v1", "other") == []
    assert len(other.adopt("https://gate/mgt/v1", "realm")) == 1
    other.close()


def test_what_was_written_survives_kill_9(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys, pathlib, os, signal
        sys.path.insert(0, sys.argv[2])
        from test_journal import row, DONE
        from vluna_llm.outbox import Journal
        journal = Journal(pathlib.Path(sys.argv[1]))
        for n in range(50):
            journal.insert(row(f"op-{n}"))
            journal.update(row(f"op-{n}"), row(f"op-{n}", state=DONE))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)], check=False)
    assert killed.returncode == -signal.SIGKILL
    heir = Journal(tmp_path)
    adopted = heir.adopt("https://gate/mgt/v1", "realm")
    assert len(adopted) == 50
    assert {found.state.settlement for found in adopted} == {"pending"}
    heir.close()


def test_settled_rows_are_pruned_and_open_ones_never(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.insert(row("done", state=DONE.sent().booked(), ended_at=10.0))
    journal.insert(row("young", state=DONE.sent().booked(), ended_at=99.0))
    journal.insert(row("open", state=DONE, ended_at=10.0))
    journal.insert(row("held", state=DONE.sent().quarantined(), ended_at=10.0))
    assert journal.prune(50.0) == 1
    assert journal.get("done") is None
    assert journal.counts() == {"booked": 1, "pending": 1, "quarantined": 1}
    journal.close()


def test_a_directory_that_cannot_be_written_is_told() -> None:
    with pytest.raises(OutboxUnavailable, match="cannot open the outbox"):
        Journal(Path("/dev/null/outbox"))


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    owner = Journal(tmp_path)
    owner.insert(row(state=DONE))
    owner.close()
    (path,) = tmp_path.glob("*.sqlite3")
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    heir = Journal(tmp_path)
    assert heir.adopt("https://gate/mgt/v1", "realm") == []
    assert path.exists()
    heir.close()


def test_a_refused_call_is_pruned_like_a_settled_one_and_says_what_it_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for n in range(1_200):
        journal.insert(row(f"no-{n}", state=OperationState().denied(), ended_at=10.0))
    journal.insert(row("flying", ended_at=None))
    assert journal.path is not None
    with sqlite3.connect(f"file:{journal.path}?mode=ro", uri=True) as db:
        assert db.execute("SELECT DISTINCT next_step FROM operations WHERE admission = 'denied'").fetchall() == [
            ("done: the gate refused the call",)
        ]
    assert journal.prune(2_000.0) == 1_200
    assert [found.operation_id for found in journal.rows()] == ["flying"]
    journal.close()


def test_a_long_backlog_is_taken_over_piece_by_piece(tmp_path: Path) -> None:
    owner = Journal(tmp_path)
    for n in range(1_300):
        owner.insert(row(f"op-{n}", state=DONE))
    owner.close()
    heir = Journal(tmp_path)
    taking = heir.adopting("https://gate/mgt/v1", "realm")
    next(taking)
    heir.insert(row("mine"))
    assert 1 < heir.counts()["pending"] < 1_300
    assert len(list(taking)) == 1_299
    assert heir.counts() == {"pending": 1_300, "none": 1}
    assert len(list(tmp_path.glob("*.sqlite3"))) == 1
    heir.close()


def test_a_takeover_that_was_interrupted_is_finished_by_the_next_and_doubles_nothing(tmp_path: Path) -> None:
    owner = Journal(tmp_path)
    for n in range(600):
        owner.insert(row(f"op-{n}", state=DONE))
    owner.close()
    interrupted = Journal(tmp_path)
    taking = interrupted.adopting("https://gate/mgt/v1", "realm")
    next(taking)
    taking.close()
    interrupted.update(row("op-0", state=DONE), row("op-0", state=DONE.sent().booked()))
    assert len(interrupted.adopt("https://gate/mgt/v1", "realm")) == 100
    found = interrupted.get("op-0")
    assert found is not None
    assert found.state.settlement == "booked", "what is known here is newer than what the file says"
    assert sum(interrupted.counts().values()) == 600
    interrupted.close()


def test_a_file_of_the_first_version_is_read_and_taken_over(tmp_path: Path) -> None:
    from vluna_llm.outbox.reading import read_journal

    owner = Journal(tmp_path)
    owner.insert(row(state=DONE))
    owner.close()
    (path,) = tmp_path.glob("*.sqlite3")
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE operations DROP COLUMN trace_flags")
        db.execute("PRAGMA user_version = 1")
    db.close()
    assert [found.operation_id for found in read_journal(path).rows] == ["op-1"]
    heir = Journal(tmp_path)
    assert [found.operation_id for found in heir.adopt("https://gate/mgt/v1", "realm")] == ["op-1"]
    heir.close()


def test_somebody_who_opened_the_file_by_hand_holds_a_caller_up_for_a_moment_only(tmp_path: Path) -> None:
    import time

    journal = Journal(tmp_path)
    assert journal.path is not None
    with sqlite3.connect(journal.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        with pytest.raises(OutboxUnavailable, match="locked"):
            journal.insert(row())
        assert time.monotonic() - started < 1.5
    other.close()
    journal.insert(row())
    journal.close()


def test_work_in_the_background_stays_listed(tmp_path: Path) -> None:
    """Its usage is not known before somebody retrieves the response."""
    journal = Journal(tmp_path)
    journal.insert(row(state=OperationState().leased("lease_token").started().parked(), ended_at=10.0))
    assert journal.prune(2_000.0) == 0
    journal.close()
