"""Rows of dead processes are taken over by one living one: none is lost, none is ever deliverable from two files."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from outbox_rows import (
    DONE,
    GATE,
    PARKED,
    REALM,
    RUNNING,
    adopt_and_die_at,
    assert_each_is_somewhere,
    at_hit,
    dead_journal,
    die,
    fast_directory,
    killed,
    row,
    where_rows_are,
)

from vluna_llm import failpoints
from vluna_llm.operation import OperationState
from vluna_llm.outbox import Journal, Row, adoption, schema
from vluna_llm.outbox.lock import FileLock
from vluna_llm.usage import MeterLine, TokenUsage

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

MOMENTS = [
    "announced",
    *("copied", "deleted", "cleared") * 2,
    "emptied",
    "removed",
]
"""What is met while five rows move, three at a time."""


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adoption, "_BATCH", adoption._BATCH.replace(f"LIMIT {adoption.AT_ONCE}", "LIMIT 3"))
    monkeypatch.setattr(adoption, "_COPIES", adoption._COPIES.replace(f"LIMIT {adoption.AT_ONCE}", "LIMIT 2"))
    monkeypatch.setattr(adoption, "_SLICE", 2)
    yield
    failpoints.arm(None)


@pytest.fixture
def directory() -> Iterator[Path]:
    with fast_directory() as made:
        yield made


def five(prefix: str = "op") -> list[Row]:
    return [row(f"{prefix}-{n}", state=DONE, body=f"bytes of {prefix}-{n}".encode(), attempts=n) for n in range(5)]


def assert_taken_over(directory: Path, heir: Journal, expected: list[Row]) -> None:
    """All is in the heir's file, once, as it was, and may be delivered; no other file is left."""
    rows, copies = where_rows_are(directory)
    assert rows == {each.operation_id: 1 for each in expected}
    assert not copies
    assert {each.operation_id: each for each in heir.rows()} == {each.operation_id: each for each in expected}
    assert {found[0] for found in heir.due(100, 100, time.time())} == rows.keys()
    assert [*directory.glob("*.sqlite3")] == [heir.path]


def test_these_are_the_moments(directory: Path) -> None:
    dead_journal(directory, *five())
    met = at_hit(-1, die)
    heir = Journal(directory)
    heir.adopt(GATE, REALM)
    assert met == [f"adoption.{name}" for name in MOMENTS]
    assert {*met, "adoption.resolved"} == {name for name in failpoints.NAMES if name.startswith("adoption.")}
    heir.close()


@pytest.mark.parametrize("kept_log", [False, True], ids=["closed", "killed"])
@pytest.mark.parametrize("moment", range(len(MOMENTS)), ids=lambda n: f"{n}-{MOMENTS[n]}")
def test_an_adopter_that_is_killed_leaves_each_row_to_exactly_one_other(
    directory: Path, moment: int, kept_log: bool
) -> None:
    rows = five()
    ids = {each.operation_id for each in rows}
    dead_journal(directory, *rows, kept_log=kept_log)
    assert killed(lambda: adopt_and_die_at(directory, moment))
    assert_each_is_somewhere(directory, ids)
    heir = Journal(directory)
    given = heir.adopt(GATE, REALM)
    assert {each.operation_id for each in given} == ids
    assert len(given) == len(ids)
    assert_taken_over(directory, heir, rows)
    heir.close()


@pytest.mark.parametrize("second", range(7), ids=lambda n: f"then-{n}")
@pytest.mark.parametrize("first", [1, 2, 3, 5], ids=lambda n: f"{n}-{MOMENTS[n]}")
def test_a_second_adopter_that_is_killed_too_leaves_no_row_behind(directory: Path, first: int, second: int) -> None:
    """The third finds a chain: rows that were on their way from the first file, by the second, into the third."""
    rows = five()
    ids = {each.operation_id for each in rows}
    dead_journal(directory, *rows)
    assert killed(lambda: adopt_and_die_at(directory, first))
    assert killed(lambda: adopt_and_die_at(directory, second))
    assert_each_is_somewhere(directory, ids)
    assert killed(lambda: adopt_and_die_at(directory, 1))
    assert_each_is_somewhere(directory, ids)
    heir = Journal(directory)
    heir.adopt(GATE, REALM)
    heir.adopt(GATE, REALM)
    assert_taken_over(directory, heir, rows)
    heir.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_adopters_in_turn_killed_at_every_pair_of_moments() -> None:
    """Two files with rows, an adopter killed at each moment, a second one at each moment of what it finds."""
    pairs = 0
    for first in range(18):
        second = 0
        while True:
            with fast_directory() as directory:
                rows = [*five("a"), *five("b")]
                dead_journal(directory, *rows[:5])
                dead_journal(directory, *rows[5:], kept_log=True)
                ids = {each.operation_id for each in rows}
                assert killed(lambda first=first, to=directory: adopt_and_die_at(to, first))
                assert_each_is_somewhere(directory, ids)
                assert killed(lambda second=second, to=directory: adopt_and_die_at(to, second))
                assert_each_is_somewhere(directory, ids)
                heir = Journal(directory)
                met = at_hit(-1, die)
                heir.adopt(GATE, REALM)
                failpoints.arm(None)
                assert_taken_over(directory, heir, rows)
                heir.close()
            pairs += 1
            second += 1
            if second > 22:
                break
    assert pairs == 18 * 23
    assert met


def test_the_file_of_a_killed_adopter_is_left_alone_while_another_one_sorts_it_out(directory: Path) -> None:
    """Copies and originals are told apart under both locks, or not at all."""
    dead_journal(directory, *five())
    assert killed(lambda: adopt_and_die_at(directory, MOMENTS.index("copied")))
    (copies,) = [path for path in directory.glob("*.sqlite3") if _moving_to(path) is None]
    (originals,) = [path for path in directory.glob("*.sqlite3") if _moving_to(path) is not None]
    heir = Journal(directory)
    for locked in (copies, originals):
        lock = FileLock(locked.with_suffix(".lock"))
        assert lock.acquire()
        assert heir.adopt(GATE, REALM) == []
        assert_each_is_somewhere(directory, {f"op-{n}" for n in range(5)})
        lock.release()
    assert len(heir.adopt(GATE, REALM)) == 5
    heir.close()


def _moving_to(path: Path) -> str | None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        found = db.execute("SELECT value FROM about WHERE key = 'moving_to'").fetchone()
    return found and found[0]


@pytest.mark.parametrize("moment", range(len(MOMENTS) - 1), ids=lambda n: f"{n}-{MOMENTS[n]}")
def test_an_adopter_that_fails_in_the_middle_and_lives_on_finishes_it_later(
    directory: Path, moment: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, say: it is told once, others keep off, and nothing is given to the settler twice or not at all."""
    rows = five()
    dead_journal(directory, *rows)
    heir, other = Journal(directory), Journal(directory)

    def no_room(_: str) -> None:
        raise OSError(28, "No space left on device")

    at_hit(moment, no_room)
    given = heir.adopt(GATE, REALM)
    failpoints.arm(None)
    assert "cannot be taken over now: [Errno 28] No space left on device" in caplog.text
    assert_each_is_somewhere(directory, {each.operation_id for each in rows})
    limbo = {found[0] for found in heir.due(100, 100, time.time())} ^ {each.operation_id for each in heir.rows()}
    assert not limbo
    assert other.adopt(GATE, REALM) == [] or MOMENTS[moment] == "emptied", "the file is promised to one that lives"
    given += heir.adopt(GATE, REALM)
    waiting = {found[0] for found in heir.due(100, 100, time.time())}
    assert waiting == {each.operation_id for each in rows}
    at_most_once = [each.operation_id for each in given]
    assert len(at_most_once) == len({*at_most_once})
    assert len(given) == 5 or MOMENTS[moment] == "cleared", "what was cleared and not given is found by `due`"
    other.close()
    assert_taken_over(directory, heir, rows)
    heir.close()


def test_a_file_that_somebody_removed_by_hand_in_the_middle_leaves_the_copies_valid(directory: Path) -> None:
    path = dead_journal(directory, *five())
    assert killed(lambda: adopt_and_die_at(directory, MOMENTS.index("copied")))
    for left in directory.glob(f"{path.stem}*"):
        left.unlink()
    heir = Journal(directory)
    heir.adopt(GATE, REALM)
    assert_taken_over(directory, heir, five()[:3])
    heir.close()


def test_copies_that_could_not_be_cleared_become_rows_when_their_file_is_gone(directory: Path) -> None:
    path = dead_journal(directory, *five()[:3])
    heir = Journal(directory)

    def fail(_: str) -> None:
        raise OSError(28, "No space left on device")

    at_hit(MOMENTS.index("deleted"), fail)
    assert heir.adopt(GATE, REALM) == []
    failpoints.arm(None)
    assert heir.rows() == []
    for left in directory.glob(f"{path.stem}*"):
        left.unlink()
    assert len(heir.adopt(GATE, REALM)) == 3
    assert heir.adopt(GATE, REALM) == []
    assert_taken_over(directory, heir, five()[:3])
    heir.close()


def test_a_copy_is_nobodys_while_its_original_is_there(directory: Path) -> None:
    """It is not delivered, found, counted or pruned, and a journal that holds one is kept."""
    dead_journal(directory, row("op-1", state=DONE), row("op-2", state=PARKED, response_id="resp-1", ended_at=1.0))
    heir = Journal(directory)
    seen: list[object] = []

    def look(_: str) -> None:
        seen.extend([heir.get("op-1"), heir.parked("resp-1"), *heir.rows(), *heir.counts(), *heir.totals()])
        seen.extend(heir.due(10, 10, time.time()))
        seen.append(heir.prune(time.time()) or None)

    at_hit(MOMENTS.index("copied"), look)
    heir.adopt(GATE, REALM)
    failpoints.arm(None)
    assert seen == [None, None, None]
    assert heir.get("op-1") is not None
    assert heir.parked("resp-1") is not None
    heir.close()
    assert killed(lambda: adopt_and_die_at(directory, MOMENTS.index("deleted")))
    assert not where_rows_are(directory)[0]
    heir = Journal(directory)
    heir.adopt(GATE, REALM)
    assert len(heir.rows()) == 2
    heir.close()


def test_a_journal_that_is_closed_in_the_middle_of_a_takeover_leaves_the_rest_to_the_next(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is no trouble, and not told as such."""
    for moment in range(len(MOMENTS) - 2):
        with fast_directory() as here:
            dead_journal(here, *five())
            first = Journal(here)
            at_hit(moment, lambda _, first=first: first.close())
            with caplog.at_level(logging.ERROR):
                first.adopt(GATE, REALM)
            failpoints.arm(None)
            assert_each_is_somewhere(here, {each.operation_id for each in five()})
            heir = Journal(here)
            heir.adopt(GATE, REALM)
            heir.adopt(GATE, REALM)
            assert_taken_over(here, heir, five())
            heir.close()
    assert caplog.text == ""


def test_a_person_sees_where_a_copy_comes_from(directory: Path) -> None:
    path = dead_journal(directory, *five())
    assert killed(lambda: adopt_and_die_at(directory, MOMENTS.index("copied")))
    (copies,) = [file for file in directory.glob("*.sqlite3") if file != path]
    with contextlib.closing(sqlite3.connect(copies)) as db:
        (step,) = db.execute("SELECT DISTINCT next_step FROM operations").fetchone()
    assert step == f"being taken over from {path.name}"
    heir = Journal(directory)
    heir.adopt(GATE, REALM)
    assert heir.path is not None
    with contextlib.closing(sqlite3.connect(heir.path)) as db:
        assert db.execute("SELECT DISTINCT next_step FROM operations").fetchall() == [("to be delivered",)]
    heir.close()


def test_two_living_processes_share_what_the_dead_left_and_take_nothing_twice(directory: Path) -> None:
    rows = [each for n in range(6) for each in five(f"p{n}")]
    for n in range(6):
        dead_journal(directory, *rows[5 * n : 5 * n + 5])
    heirs = [Journal(directory), Journal(directory)]
    given: list[list[Row]] = [[], []]
    together = threading.Barrier(2)

    def take(n: int) -> None:
        together.wait()
        given[n] = heirs[n].adopt(GATE, REALM)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [each.operation_id for each in (*given[0], *given[1])]
    for heir in heirs:
        ids += [each.operation_id for each in heir.adopt(GATE, REALM)]
    assert sorted(ids) == sorted(each.operation_id for each in rows)
    assert_each_is_somewhere(directory, {*ids})
    assert len([*directory.glob("*.sqlite3")]) == 2
    for heir in heirs:
        heir.close()


def test_what_waits_for_somebody_moves_along_and_what_is_done_does_not(directory: Path) -> None:
    sent = DONE.sent()
    waiting = {
        "pending": row("pending", state=DONE),
        "sent": row("sent", state=sent, body=b"exact", path="/gate/commits"),
        "quarantined": row("quarantined", state=sent.quarantined()),
        "refused": row("refused", state=sent.refused(), last_error="422"),
        "lost": row("lost", state=RUNNING.owner_died()),
        "parked": row("parked", state=PARKED, response_id="resp-1"),
        "held": row("held", state=DONE, held=True, attempts=3, next_attempt_at=5.0, last_error="403"),
        "shared": row("shared", state=DONE, stage="shared"),
        "sharing": row("sharing", state=DONE, stage="sharing"),
    }
    done = [
        row("booked", state=sent.booked()),
        row("lapsed", state=RUNNING.aborted().sent().booked()),
        row("denied", state=OperationState().denied()),
    ]
    dead_journal(directory, *waiting.values(), *done, row("flying", state=RUNNING), row("new"))
    heir = Journal(directory)
    given = {each.operation_id: each.state.settlement for each in heir.adopt(GATE, REALM)}
    assert given == {"pending": "pending", "sent": "sent", "held": "pending", "flying": "lost", "new": "lost"}
    found = {each.operation_id: each for each in heir.rows()}
    assert {key: found[key] for key in waiting} == waiting
    assert found.keys() == {*waiting, "flying", "new"}
    assert {each.operation_id for each in heir.staged("shared", "sharing")} == {"shared", "sharing"}
    heir.close()


def test_each_of_the_three_writes_is_on_disk_before_the_next(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loss of power: the copies are flushed before the originals go, and these are gone for good before the
    copies count; what a dead process had not flushed is flushed before anybody acts on it."""
    events: list[str] = []
    really_open, really_flush = adoption._open, schema.flush
    dead_journal(directory, *five(), kept_log=True)
    heir = Journal(directory)

    def opened(path: Path, mode: str = "rw") -> sqlite3.Connection:
        db = really_open(path, mode)
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2, "each commit waits for the disk"
        events.append("opened")
        return db

    def flush(path: Path) -> None:
        events.append("flushed its own" if path == Path(f"{heir.path}-wal") else "flushed")
        really_flush(path)

    monkeypatch.setattr(adoption, "_open", opened)
    monkeypatch.setattr(schema, "flush", flush)
    failpoints.arm(lambda name: events.append(name.removeprefix("adoption.")))
    heir.adopt(GATE, REALM)
    relevant = [event for n, event in enumerate(events) if event != "flushed" or events[n + 1] == "opened"]
    once = ["flushed its own", "copied", "deleted", "cleared"]
    assert relevant[:4] == ["flushed", "opened"] * 2
    assert [event for event in relevant[4:] if event != "flushed"] == ["announced", *once, *once, "emptied", "removed"]
    heir.close()


def test_orders_travel_with_their_rows_through_every_crash(directory: Path) -> None:
    for moment in range(len(MOMENTS)):
        with fast_directory() as here:
            path = dead_journal(here, *five())
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                db.executemany(
                    "INSERT INTO orders (operation_id, what, at) VALUES (?, ?, ?)",
                    [("op-0", "retry", 1.0), ("op-4", "drop", 2.0), ("op-0", "drop", 3.0), ("gone", "drop", 4.0)],
                )
            assert killed(lambda moment=moment, here=here: adopt_and_die_at(here, moment))
            heir = Journal(here)
            heir.adopt(GATE, REALM)
            orders = sorted((order.operation_id, order.what, order.at) for order in heir.orders())
            kept = [("op-0", "drop", 3.0), ("op-0", "retry", 1.0), ("op-4", "drop", 2.0)]
            assert [order for order in orders if order[0] != "gone"] == kept
            heir.forget_orders(*(order.id for order in heir.orders()))
            assert heir.orders() == []
            heir.close()


def test_an_order_for_a_copy_waits_until_it_is_a_row(directory: Path) -> None:
    path = dead_journal(directory, *five())
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO orders (operation_id, what, at) VALUES ('op-0', 'retry', 1.0)")
    heir = Journal(directory)
    seen: list[object] = []
    at_hit(MOMENTS.index("deleted"), lambda _: seen.extend([heir.orders()]))
    heir.adopt(GATE, REALM)
    assert seen == [[]]
    assert [order.operation_id for order in heir.orders()] == ["op-0"]
    heir.close()


def test_a_row_that_is_known_here_already_is_not_taken_for_another(directory: Path) -> None:
    """Usage is never dropped for a row without it, and a cancel that was sent is not forgotten."""
    usage = TokenUsage(10, 5)
    booked = row("op-0", state=DONE.sent().booked(), receipt="{}")
    cancelled = row("op-2", state=RUNNING.aborted().sent(), body=b"cancel", path="/gate/leases/cancel")
    dead_journal(
        directory,
        row("op-0", state=DONE),
        row("op-1", state=DONE, body=b"exact"),
        row("op-2", state=DONE),
        row("op-3", state=RUNNING),
    )
    heir = Journal(directory)
    mine = [booked, row("op-1", state=OperationState().owner_died()), cancelled, row("op-3", state=DONE)]
    for each in mine:
        heir.insert(each)
    given = {each.operation_id: each for each in heir.adopt(GATE, REALM)}
    assert given.keys() == {"op-1", "op-2"}
    found = {each.operation_id: each for each in heir.rows()}
    assert found["op-0"] == booked
    assert found["op-1"] == row("op-1", state=DONE, body=b"exact"), "its usage is known now"
    assert found["op-2"].state.route == "ingest", "the lease may be gone"
    assert found["op-2"].state.usage == DONE.usage
    assert found["op-2"].body is None
    assert found["op-3"] == mine[3]
    assert usage.total_tokens == 15
    assert [*directory.glob("*.sqlite3")] == [heir.path]
    heir.close()


def test_usage_on_meters_that_meets_a_cancel_keeps_its_meters(directory: Path) -> None:
    meters = (MeterLine("ocr.pages", 3), MeterLine("ocr.seconds", 4))
    recorded = RUNNING.completed(TokenUsage(1), "caller", meters=meters)
    cancelled = RUNNING.aborted().sent()
    dead_journal(directory, *(row(key, state=recorded, unsplit=True) for key in ("op-1", "op-2")))
    heir = Journal(directory)
    heir.insert(row("op-2", state=cancelled, unsplit=True, body=b"cancel", path="/gate/leases/cancel"))
    for found in (heir.adopt(GATE, REALM), heir.rows()):
        assert {one.operation_id: one.state.route for one in found} == {"op-1": "commit", "op-2": "ingest"}
        assert [one.state.meters for one in found] == [meters, meters]
    heir.close()


def test_rows_of_another_gate_stay_in_their_file_and_the_others_move(directory: Path) -> None:
    dead_journal(directory, row("op-1", state=DONE), row("op-2", state=DONE, realm_id="other"))
    heir, other = Journal(directory), Journal(directory)
    assert [each.operation_id for each in heir.adopt(GATE, REALM)] == ["op-1"]
    assert [each.operation_id for each in other.adopt(GATE, "other")] == ["op-2"]
    assert len([*directory.glob("*.sqlite3")]) == 2
    heir.close()
    other.close()


def test_looking_again_costs_nothing_where_nothing_changed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another realm, an unreadable one and that of a living process are not opened every few seconds."""
    dead_journal(directory, row("op-1", state=DONE, realm_id="other"))
    broken = dead_journal(directory, row("op-2", state=DONE))
    broken.write_bytes(b"no database at all" * 1000)
    living, heir = Journal(directory), Journal(directory)
    living.insert(row("op-3", state=DONE))
    heir.adopt(GATE, REALM)
    opened: list[Path] = []
    really = adoption._open

    def counting(path: Path, mode: str = "rw") -> sqlite3.Connection:
        opened.append(path)
        return really(path, mode)

    monkeypatch.setattr(adoption, "_open", counting)
    for _ in range(3):
        assert heir.adopt(GATE, REALM) == []
    assert opened == []
    os.utime(broken, (1.0, 1.0))
    heir.adopt(GATE, REALM)
    assert opened == [broken]
    living.close()
    heir.close()


def test_what_is_left_of_a_journal_that_was_being_removed_goes(directory: Path) -> None:
    old = time.time() - 3600.0
    names = ("journal-1-a.lock", "journal-2-b.sqlite3-wal", "journal-3-c.lock", "journal-4-d.lock")
    for name in names:
        (directory / name).write_bytes(b"x")
        os.utime(directory / name, (old, old))
    os.utime(directory / "journal-3-c.lock")
    held = FileLock(directory / "journal-4-d.lock")
    assert held.acquire()
    os.utime(directory / "journal-4-d.lock", (old, old))
    heir = Journal(directory)
    heir.adopt(GATE, REALM)
    left = {path.name for path in directory.iterdir() if not path.name.startswith(str(heir.path and heir.path.stem))}
    assert left == {"journal-3-c.lock", "journal-4-d.lock"}, "one may just be being made, the other one is held"
    held.release()
    heir.close()


def test_a_journal_whose_process_died_at_its_first_breath_goes(directory: Path) -> None:
    (directory / "journal-1-a.sqlite3").touch()
    heir = Journal(directory)
    assert heir.adopt(GATE, REALM) == []
    assert [*directory.glob("*.sqlite3")] == [heir.path]
    heir.close()


def test_a_row_that_cannot_be_read_stays_and_the_others_move(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = dead_journal(directory, *five())
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE operations SET usage = 'no JSON' WHERE operation_id = 'op-2'")
    heir = Journal(directory)
    with caplog.at_level(logging.ERROR):
        assert len(heir.adopt(GATE, REALM)) == 4
        assert heir.adopt(GATE, REALM) == []
    assert caplog.text.count("op-2") == 1
    assert path.exists()
    assert _moving_to(path) is None, "another version may know better"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        assert db.execute("SELECT operation_id FROM operations").fetchall() == [("op-2",)]
        db.execute("""UPDATE operations SET usage = '{"input_tokens": 10, "output_tokens": 5, "cached_tokens": 4}'""")
    other = Journal(directory)
    assert len(other.adopt(GATE, REALM)) == 1
    heir.close()
    other.close()
