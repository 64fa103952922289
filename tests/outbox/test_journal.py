"""The journal: what was written is there after the process is gone, and only the dead are taken over."""

from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from outbox_rows import DONE, GATE, PARKED, REALM, RUNNING, row

from vluna_llm.errors import OutboxUnavailable
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Journal, schema
from vluna_llm.outbox.journal import PARKED_FOR


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    written = row(labels={"a": "b"}, budget_id="b-1", derived=True, unsplit=True, estimated_input=7)
    journal.insert(written)
    assert journal.get("op-1") == written
    changed = dataclasses.replace(
        written, state=DONE, lease_token="lease.x.y", body=b'{"a":1}', path="/gate/commits", attempts=3, ended_at=2.0
    )
    assert journal.update(written, changed)
    assert journal.update(changed, changed)
    assert journal.get("op-1") == changed
    assert journal.get("nobody") is None
    journal.close()


def test_a_row_that_does_not_stand_as_it_was_known_is_not_written(tmp_path: Path) -> None:
    """Another route, another settlement, a copy that is just being taken over, gone: each is told, and stays."""
    journal = Journal(tmp_path)
    known = row(state=RUNNING.aborted())
    further = dataclasses.replace(known, state=known.state.sent(), body=b"{}")
    for there in (row(state=DONE), further, dataclasses.replace(known, arrived_from="journal-9.sqlite3")):
        journal.replace(there)
        assert not journal.update(known, further)
        assert journal.arrives("op-1") == (there.arrived_from is not None)
        assert journal.get("op-1") == (None if there.arrived_from else there)
    with journal.transaction() as db:
        db.execute("DELETE FROM operations")
    assert not journal.update(known, further)
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
        from outbox_rows import row, DONE
        from vluna_llm.outbox import Journal, schema
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


def test_work_in_the_background_stays_until_its_response_cannot_be_retrieved_any_more(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    now = PARKED_FOR + 2_000.0
    for settled_at, name in ((now - PARKED_FOR - 1.0, "old"), (now - PARKED_FOR + 1.0, "young")):
        journal.insert(row(name, state=PARKED, ended_at=settled_at, response_id=name))
    assert journal.prune(now) == 1
    assert journal.parked("old") is None
    assert journal.parked("young") is not None
    assert journal.close(), "its file stays for whoever retrieves it"


def test_what_an_operator_has_to_deal_with_is_never_pruned(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    sent = DONE.sent()
    states = {"refused": sent.refused(), "quarantined": sent.quarantined(), "lost": RUNNING.owner_died()}
    for name, state in states.items():
        journal.insert(row(name, state=state, ended_at=10.0))
    assert journal.prune(1e12) == 0
    assert journal.counts() == dict.fromkeys(states, 1)
    assert journal.close()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"state": DONE}, "to be delivered"),
        ({"state": DONE, "held": True}, "kept and tried slowly: look at last_error"),
        ({"state": DONE.sent(), "held": True}, "kept and tried slowly: look at last_error"),
        ({"state": DONE, "stage": "sharing"}, "on its way to the shared outbox; whether it is there is not known yet"),
        ({"state": DONE, "stage": "shared", "held": True}, "in the shared outbox, and delivered from there"),
        ({"state": DONE.sent().booked(), "stage": "shared"}, "done: charged"),
        ({"state": PARKED}, "works in the background: booked when its response is retrieved"),
        ({"state": DONE, "arrived_from": "journal-1-a.sqlite3"}, "being taken over from journal-1-a.sqlite3"),
    ],
)
def test_what_happens_next_is_in_the_file_however_the_row_came_to_it(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    """Written whole, and changed into it."""
    journal = Journal(tmp_path)
    before, after = row("op-2", state=RUNNING), row("op-2", **changes)
    journal.insert(row("op-1", **changes))
    journal.insert(before)
    journal.update(before, after)
    assert journal.path is not None
    with sqlite3.connect(f"file:{journal.path}?mode=ro", uri=True) as db:
        found = db.execute("SELECT next_step FROM operations ORDER BY operation_id").fetchall()
    db.close()
    assert found == [(told,), (told,)]
    if "arrived_from" not in changes:
        assert journal.get("op-2") == after
        journal.update(after, row("op-2", **{**changes, "held": False, "stage": None}))
        assert journal.get("op-2") == row("op-2", state=changes["state"])
    journal.close()


def _ids(found: list[tuple[str, tuple[str, str], float]]) -> list[str]:
    return [operation_id for operation_id, _, _ in found]


@pytest.mark.parametrize("where", ["file", "memory"])
def test_what_is_due_comes_by_lanes_the_due_first_and_the_oldest_first(tmp_path: Path, where: str) -> None:
    journal = Journal(tmp_path if where == "file" else None)
    for n in range(6):
        journal.insert(row(f"ann-{n}", state=DONE, created_at=100.0 - n))
    for n in range(3):
        journal.insert(row(f"bob-{n}", principal_id="bob", user_id="x", state=DONE.sent(), created_at=50.0 + n))
    journal.insert(row("later", state=DONE, created_at=1.0, next_attempt_at=900.0))
    journal.insert(row("much-later", principal_id="cid", state=DONE, created_at=1.0, next_attempt_at=901.0))
    journal.insert(row("was-due", principal_id="cid", state=DONE, created_at=2.0, next_attempt_at=499.0))
    for settled in (DONE.sent().booked(), DONE.sent().refused(), RUNNING, RUNNING.owner_died(), PARKED):
        journal.insert(row(f"not-{settled.settlement}-{settled.work}", state=settled))
    journal.insert(row("not-shared", state=DONE, stage="shared"))
    journal.insert(row("not-sharing", state=DONE, stage="sharing"))

    everything = journal.due(100, 100, 500.0)
    assert everything.complete
    assert _ids(everything) == [
        "was-due",
        *("bob-0", "bob-1", "bob-2"),
        *(f"ann-{n}" for n in (5, 4, 3, 2, 1, 0)),
        *("later", "much-later"),
    ]
    assert everything[0] == ("was-due", ("cid", "ann"), 499.0)
    assert everything[1] == ("bob-0", ("bob", "x"), 0.0)

    two_of_each = journal.due(100, 2, 500.0)
    assert _ids(two_of_each) == ["was-due", "bob-0", "bob-1", "ann-5", "ann-4", "much-later"]
    assert not two_of_each.complete, "ann has more, and bob too"
    assert not journal.due(11, 100, 500.0).complete
    assert journal.due(12, 6, 500.0).complete is False
    assert journal.due(12, 7, 500.0).complete
    assert _ids(journal.due(3, 100, 500.0)) == ["was-due", "bob-0", "bob-1"]
    journal.close()
    with pytest.raises(OutboxUnavailable, match="closed"):
        journal.due(1, 1, 0.0)
    assert not [*tmp_path.glob("*-wal")]


@pytest.mark.parametrize("where", ["file", "memory"])
def test_totals_say_how_many_stand_alike_and_since_when(tmp_path: Path, where: str) -> None:
    journal = Journal(tmp_path if where == "file" else None)
    assert journal.totals() == []
    for n in range(3):
        journal.insert(row(f"p-{n}", state=DONE, created_at=30.0 - n, ended_at=40.0 + n))
    journal.insert(row("h", state=DONE, held=True, created_at=5.0))
    journal.insert(row("s", state=DONE, stage="shared", created_at=6.0))
    journal.insert(row("k", state=PARKED, created_at=7.0))
    journal.insert(row("l", state=RUNNING.aborted().sent().booked(), created_at=8.0))
    journal.insert(row("no", state=OperationState().denied()))
    found = {
        (t.settlement, t.held, t.parked, t.stage): (t.count, t.oldest_created_at, t.oldest_ended_at)
        for t in journal.totals()
    }
    assert found == {
        ("pending", False, False, None): (3, 28.0, 40.0),
        ("pending", True, False, None): (1, 5.0, None),
        ("pending", False, False, "shared"): (1, 6.0, None),
        ("lapsed", False, True, None): (1, 7.0, None),
        ("lapsed", False, False, None): (1, 8.0, None),
    }
    assert [found.operation_id for found in journal.staged("shared")] == ["s"]
    journal.close()


def test_readers_wait_for_nobody_and_keep_nobody_waiting(tmp_path: Path) -> None:
    """What is being written, by whoever, is not waited for: a reader sees what was there before."""
    journal = Journal(tmp_path)
    journal.insert(row("op-1", state=DONE))
    started, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with journal.transaction() as db:
            db.execute("DELETE FROM operations")
            started.set()
            go_on.wait(10.0)

    writer = threading.Thread(target=write)
    writer.start()
    started.wait(10.0)
    assert _ids(journal.due(10, 10, 1.0)) == ["op-1"]
    assert [total.count for total in journal.totals()] == [1]
    assert journal.orders() == []
    go_on.set()
    writer.join()
    assert journal.due(10, 10, 1.0) == []
    journal.close()


def test_sync_flushes_the_log_and_one_flush_serves_all_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten threads write and sync while one flush is under way: the next one covers them all."""
    journal = Journal(tmp_path)
    journal.insert(row("op-0"))
    journal.sync()
    flushed: list[Path] = []
    under_way, go_on = threading.Event(), threading.Event()
    really = schema.flush

    def slow(path: Path) -> None:
        flushed.append(path)
        if len(flushed) == 1:
            under_way.set()
            go_on.wait(10.0)
        really(path)

    monkeypatch.setattr(schema, "flush", slow)
    journal.sync()
    assert flushed == [], "nothing was written since"
    journal.insert(row("op-1"))
    first = threading.Thread(target=journal.sync)
    first.start()
    under_way.wait(10.0)
    written = threading.Barrier(11)

    def write(n: int) -> None:
        journal.insert(row(f"more-{n}"))
        written.wait(10.0)
        journal.sync()

    others = [threading.Thread(target=write, args=(n,)) for n in range(10)]
    for thread in others:
        thread.start()
    written.wait(10.0)
    assert len(flushed) == 1, "writers do not wait for a flush, and nobody flushes beside another one"
    go_on.set()
    for thread in (first, *others):
        thread.join()
    assert flushed == [Path(f"{journal.path}-wal")] * 2
    with journal.transaction() as db:
        db.execute("DELETE FROM operations")
    journal.prune(1.0)
    journal.sync()
    assert len(flushed) == 3
    journal.close()


def test_a_flush_that_failed_is_told_and_what_it_covered_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system drops what it could not write and says so once: a second flush alone would prove nothing."""
    journal = Journal(tmp_path)
    journal.insert(row("op-1"))
    assert journal.path is not None

    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as failing:
        failing.setattr(schema, "flush", broken)
        for _ in range(2):
            with pytest.raises(OutboxUnavailable, match=r"survive a loss of power.*Input/output error"):
                journal.sync()
    with sqlite3.connect(f"{journal.path.as_uri()}?immutable=1", uri=True) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,), "all is in the log so far"
    db.close()
    journal.sync()
    with sqlite3.connect(f"{journal.path.as_uri()}?immutable=1", uri=True) as db:
        assert db.execute("SELECT operation_id FROM operations").fetchall() == [("op-1",)]
    db.close()
    journal.close()


def test_files_that_somebody_removed_under_a_living_process_are_told(tmp_path: Path) -> None:
    """SQLite writes on, into files that nobody will find."""
    journal = Journal(tmp_path)
    journal.insert(row("op-1"))
    for path in tmp_path.glob("*.sqlite3*"):
        path.unlink()
    journal.insert(row("op-2"))
    with pytest.raises(OutboxUnavailable, match="No such file"):
        journal.sync()
    with pytest.raises(OutboxUnavailable):
        journal.totals()
    assert journal.get("op-2") is not None
    journal.close()


def test_in_memory_there_is_nothing_to_sync() -> None:
    journal = Journal(None)
    journal.insert(row())
    journal.sync()
    assert journal.adopt(GATE, REALM) == []
    journal.close()


def test_a_checkpoint_or_a_reader_after_close_brings_no_file_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for n in range(300):
        journal.insert(row(f"op-{n}"))
        journal.update(row(f"op-{n}"), row(f"op-{n}", state=OperationState().denied()))
    journal.close()
    journal.checkpoint()
    journal.sync()
    for read in (journal.totals, journal.orders):
        with pytest.raises(OutboxUnavailable):
            read()
    assert [*tmp_path.iterdir()] == []


def test_a_journal_that_is_removed_goes_before_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its log the file would be an older state of itself, which a death in between would bring back."""
    removed: list[str] = []
    really = os.unlink

    def unlink(path: str) -> None:
        removed.append(path.removeprefix(str(journal.path)))
        really(path)

    journal = Journal(tmp_path)
    monkeypatch.setattr(schema.os, "unlink", unlink)
    schema.remove(journal.path or tmp_path)
    assert removed == ["", "-wal", "-shm", "-journal"]
    monkeypatch.undo()
    journal.close()
