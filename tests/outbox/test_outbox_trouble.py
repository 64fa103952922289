"""A full disk, a directory without rights, damaged files: told, survived, and nothing that was readable is lost."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import resource
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from outbox_rows import (
    DONE,
    GATE,
    REALM,
    RUNNING,
    adopt_and_die_at,
    assert_each_is_somewhere,
    dead_journal,
    die,
    fast_directory,
    in_child,
    killed,
    row,
    where_rows_are,
)

from vluna_llm.errors import OutboxUnavailable
from vluna_llm.outbox import Journal, Row, schema
from vluna_llm.outbox.row import insert_values

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits and rights of a process of its own")

NOBODY = 65_534


@pytest.fixture
def directory() -> Iterator[Path]:
    with fast_directory() as made:
        yield made


def many(number: int, prefix: str = "op") -> list[Row]:
    return [row(f"{prefix}-{n:04d}", state=DONE, body=bytes([n % 251]) * 700) for n in range(number)]


# -- a full disk -------------------------------------------------------------------------------------------------------


Room = Callable[[int | None], None]
"""Leaves this many bytes of room, or all of it."""


@contextlib.contextmanager
def _limited(directory: Path) -> Iterator[tuple[Path, Room]]:
    """No file of this process may grow: SQLite meets it as an error of the disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def room(left: int | None) -> None:
        largest = max((path.stat().st_size for path in directory.iterdir()), default=0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if left is None else largest + left, hard))

    yield directory, room


@contextlib.contextmanager
def _small_disk(directory: Path) -> Iterator[tuple[Path, Room]]:
    """A file system of its own, which is really full."""
    disk = directory / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    filler = disk / "filler"

    def room(left: int | None) -> None:
        filler.unlink(missing_ok=True)
        if left is not None:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(b"\0" * max(0, free - left))

    try:
        yield disk, room
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("disk", [_limited, _small_disk], ids=["limit", "disk"])
def test_a_full_disk_is_told_and_what_was_stored_before_is_kept(
    directory: Path, disk: Callable[[Path], contextlib.AbstractContextManager[tuple[Path, Room]]]
) -> None:
    """Every write that was not refused is there, and as soon as there is room the next one is stored again."""
    with disk(directory) as (here, room):

        def fill() -> None:
            journal = Journal(here)
            journal.insert(row("first", state=RUNNING))
            room(64 * 1024)
            stored: list[str] = ["first"]

            def write_on() -> None:
                for each in many(5_000):
                    journal.insert(each)
                    stored.append(each.operation_id)

            with pytest.raises(OutboxUnavailable, match="cannot use the outbox"):
                write_on()
            assert 5 < len(stored) < 500
            with pytest.raises(OutboxUnavailable), journal.transaction() as db:
                db.execute("UPDATE operations SET body = zeroblob(900)")
            assert [each.operation_id for each in journal.rows()] == sorted(stored)
            assert len(journal.due(10_000, 10_000, 1.0)) == len(stored) - 1
            with contextlib.suppress(OutboxUnavailable):
                journal.sync()
            room(None)
            journal.update(row("first", state=RUNNING), row("first", state=DONE))
            journal.insert(row("last", state=DONE))
            journal.sync()
            assert journal.get("first") == row("first", state=DONE)
            (here / "stored").write_text("\n".join([*stored, "last"]))
            os._exit(0)

        in_child(fill)
        heir = Journal(here)
        given = heir.adopt(GATE, REALM)
        assert sorted(each.operation_id for each in given) == sorted((here / "stored").read_text().split())
        heir.close()


@pytest.mark.parametrize("disk", [_limited, _small_disk], ids=["limit", "disk"])
@pytest.mark.parametrize("left", [0, 4, 64, 300, 600, 900, 1_400], ids=lambda kilobytes: f"{kilobytes}k")
def test_a_disk_that_fills_up_in_a_takeover_loses_nothing_and_doubles_nothing(
    directory: Path, disk: Callable[[Path], contextlib.AbstractContextManager[tuple[Path, Room]]], left: int
) -> None:
    """Wherever the room ends: what moved has moved, the rest follows when there is room, and it was told."""
    with disk(directory) as (here, room):
        rows = many(700)
        dead_journal(here, *rows)

        def take_over() -> None:
            heir = Journal(here)
            room(left * 1024)
            given = heir.adopt(GATE, REALM)
            room(None)
            assert_each_is_somewhere(here, {each.operation_id for each in rows})
            given += heir.adopt(GATE, REALM)
            assert sorted(each.operation_id for each in given) == [each.operation_id for each in rows]
            assert heir.rows() == rows
            assert [*here.glob("*.sqlite3")] == [heir.path]
            os._exit(0)

        in_child(take_over)


# -- rights ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _as_nobody(directory: Path) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Runs something in a process that rights hold for: they do not for root."""
    if os.geteuid() == 0:
        for path in (directory, *directory.rglob("*")):
            os.chown(path, NOBODY, NOBODY)

    def run(act: Callable[[], object]) -> None:
        def unprivileged() -> None:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            act()

        in_child(unprivileged)

    yield run
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o700)


def test_a_directory_that_is_read_only_is_told(directory: Path) -> None:
    with _as_nobody(directory) as run:
        directory.chmod(0o500)

        def act() -> None:
            with pytest.raises(OutboxUnavailable, match="cannot open the outbox in"):
                Journal(directory)

        run(act)
    assert [*directory.iterdir()] == []


def test_a_directory_that_becomes_read_only_keeps_what_is_written(directory: Path) -> None:
    with _as_nobody(directory) as run:

        def act() -> None:
            dead_journal(directory, row("old", state=DONE))
            journal = Journal(directory)
            directory.chmod(0o500)
            journal.insert(row("op-1", state=DONE))
            journal.sync()
            assert [found[0] for found in journal.due(10, 10, 1.0)] == ["op-1"]
            assert [each.operation_id for each in journal.adopt(GATE, REALM)] in ([], ["old"])
            journal.close()

        run(act)
        directory.chmod(0o700)

        def again() -> None:
            heir = Journal(directory)
            heir.adopt(GATE, REALM)
            assert sorted(each.operation_id for each in heir.rows()) == ["old", "op-1"]

        run(again)


def test_a_journal_of_somebody_else_is_told_and_the_others_are_taken_over(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    closed = dead_journal(directory, row("closed", state=DONE))
    dead_journal(directory, row("open", state=DONE))
    with _as_nobody(directory) as run:

        def act() -> None:
            closed.chmod(0)
            heir = Journal(directory)
            with caplog.at_level(logging.ERROR):
                for _ in range(3):
                    heir.adopt(GATE, REALM)
            assert [each.operation_id for each in heir.rows()] == ["open"]
            assert caplog.text.count(closed.name) == 1
            closed.chmod(0o600)
            assert [each.operation_id for each in heir.adopt(GATE, REALM)] == ["closed"]

        run(act)


def test_files_are_private_whatever_the_process_lets_others_do(directory: Path) -> None:
    def act() -> None:
        os.umask(0)
        here = directory / "new" / "outbox"
        dead = dead_journal(here, *many(3))
        journal = Journal(here)
        journal.insert(row())
        journal.due(1, 1, 0.0)
        seen = {path.name.removeprefix(journal.path.stem): path.stat().st_mode for path in here.iterdir()}  # type: ignore[union-attr]
        assert {".lock", ".sqlite3", ".sqlite3-wal", ".sqlite3-shm"} <= seen.keys()
        assert {stat.S_IMODE(mode) for mode in seen.values()} == {0o600}
        assert stat.S_IMODE(here.stat().st_mode) == 0o700
        assert dead.exists()

    in_child(act)


# -- damaged files -----------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    """The second half is gone."""
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def _scribbled(*pages: int) -> Callable[[Path], None]:
    """Pages hold something else. In a small file: 2 and 3 begin the table and its index, 4 begins ``about``."""

    def scribble(path: Path) -> None:
        noise = random.Random(7)
        with path.open("r+b") as file:
            for page in pages:
                file.seek((page - 1) * 4096)
                file.write(noise.randbytes(4096))

    return scribble


def _no_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"something else altogether")


def _newer(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def _cut_short(path: Path) -> None:
    os.truncate(path, 1_000)


def _three_journals(directory: Path) -> Path:
    """Three dead journals, of which the second one holds 200 rows."""
    dead_journal(directory, row("before", state=DONE)).rename(directory / "journal-0-a.sqlite3")
    path = dead_journal(directory, *many(200)).rename(directory / "journal-5-b.sqlite3")
    dead_journal(directory, row("after", state=DONE)).rename(directory / "journal-9-c.sqlite3")
    for lock in directory.glob("*.lock"):
        lock.unlink()
    return path


@pytest.mark.parametrize(
    ("damage", "logged", "told"),
    [
        (_no_header, 0, "not a database"),
        (_cut_short, 0, "malformed"),
        (_scribbled(4), 3, "Page 4"),
        (_newer, 0, "newer version"),
    ],
    ids=["header", "cut short", "about", "newer"],
)
def test_a_file_that_cannot_be_read_is_told_and_left_as_it_is(
    directory: Path, damage: Callable[[Path], None], logged: int, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The files before and after it in the directory are taken over all the same; it is told once, not every time."""
    path = _three_journals(directory)
    if logged:
        assert killed(lambda: _append(path, many(logged, "more")))
    damage(path)
    before = {name: Path(name).read_bytes() for name in (str(path), f"{path}-wal") if Path(name).exists()}
    assert len(before) == (2 if logged else 1)
    heir = Journal(directory)
    with caplog.at_level(logging.ERROR):
        given = [heir.adopt(GATE, REALM) for _ in range(3)]
    assert [[each.operation_id for each in one] for one in given] == [["before", "after"], [], []]
    assert {name: Path(name).read_bytes() for name in before} == before
    (record,) = caplog.records
    assert path.name in record.getMessage()
    assert told in record.getMessage()
    heir.insert(row("goes-on"))
    heir.close()


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        (_cut, 80),
        (_scribbled(10), 190),
        (_scribbled(9, 20, 21, 22, 40), 160),
        (_scribbled(3), 200),
    ],
    ids=["cut in two", "one page", "some pages", "index"],
)
def test_what_can_be_read_of_a_damaged_file_is_taken_over(
    directory: Path, damage: Callable[[Path], None], least: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As it was, to the byte; what is gone is named as far as that is known, and the damaged file is kept."""
    path = _three_journals(directory)
    damage(path)
    damaged = path.read_bytes()
    heir = Journal(directory)
    with caplog.at_level(logging.ERROR):
        given = heir.adopt(GATE, REALM)
        assert heir.adopt(GATE, REALM) == []
    rows = {each.operation_id: each for each in many(200)}
    taken = {each.operation_id: each for each in given if each.operation_id.startswith("op-")}
    assert least <= len(taken) <= 200
    assert taken == {key: rows[key] for key in taken}
    assert {"before", "after"} == {each.operation_id for each in given} - taken.keys()
    kept = Path(f"{path}.damaged")
    assert kept.read_bytes() == damaged
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert not path.exists()
    (record,) = caplog.records
    assert f"{len(taken)} row(s) of it could be read" in record.getMessage()
    if "index" not in str(damage) and least not in (80, 200):
        missing = rows.keys() - taken.keys()
        assert missing
        assert all(key in record.getMessage() for key in missing)
    heir.close()


def test_salvage_reads_the_log_too_and_keeps_where_rows_were_moving_to(directory: Path) -> None:
    """A damaged file whose adopter was killed in the middle: copies are still told from originals."""
    path = dead_journal(directory, *many(1_200))
    assert killed(lambda: adopt_and_die_at(directory, 1))  # 500 are copied and not deleted yet
    _scribbled(30)(path)
    heir = Journal(directory)
    given = heir.adopt(GATE, REALM) + heir.adopt(GATE, REALM)
    ids = [each.operation_id for each in given]
    assert len(ids) == len({*ids})
    rows, copies = where_rows_are(directory)
    assert not copies
    assert max(rows.values()) == 1
    assert len(rows) >= 1_190
    assert {each.operation_id: each for each in heir.rows()} == {
        each.operation_id: each for each in many(1_200) if each.operation_id in rows
    }
    heir.close()


@pytest.mark.parametrize("kept_log", [False, True], ids=["closed", "killed"])
def test_a_process_that_dies_while_it_salvages_leaves_all_to_the_next(
    directory: Path, kept_log: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each renaming, linking and flushing, one after another."""
    deaths = 0
    for number in range(40):
        with fast_directory() as here:
            rows = many(120)
            path = dead_journal(here, *rows[:100])
            if kept_log:  # rows that are in the log only
                assert killed(lambda path=path, more=rows[100:]: _append(path, more))
            _scribbled(12)(path)

            def salvage_and_die(here: Path = here, number: int = number) -> None:
                left = [number]
                for module, name in ((os, "replace"), (os, "link"), (os, "unlink"), (schema, "flush")):
                    monkeypatch.setattr(module, name, _dying(getattr(module, name), left))
                Journal(here).adopt(GATE, REALM)
                (here / "done").touch()

            assert killed(salvage_and_die)
            deaths += not (here / "done").exists()
            heir = Journal(here)
            heir.adopt(GATE, REALM)
            heir.adopt(GATE, REALM)
            found = {each.operation_id: each for each in heir.rows()}
            assert len(found) >= (115 if kept_log else 95)
            assert found == {each.operation_id: each for each in rows if each.operation_id in found}
            assert [*here.glob("*.sqlite3")] == [heir.path]
            heir.close()
            if (here / "done").exists():
                break
    else:
        pytest.fail("it never came to an end")
    assert deaths >= 8


def _dying(really: Callable[..., object], left: list[int]) -> Callable[..., object]:
    def act(*args: object, **kwargs: object) -> object:
        if not left[0]:
            die()
        left[0] -= 1
        return really(*args, **kwargs)

    return act


def _append(path: Path, rows: list[Row]) -> None:
    """Write into an existing journal as its process would have, and leave it in the log."""
    db = schema.connect(str(path), 1.0)
    for each in rows:
        values = insert_values(each)
        db.execute(
            f"INSERT INTO operations ({', '.join(values)}) VALUES ({schema.marks([*values])})", [*values.values()]
        )
    die()


def test_a_log_that_was_cut_in_the_middle_of_a_write_gives_all_that_was_written_before(directory: Path) -> None:
    path = dead_journal(directory, *many(20), kept_log=True)
    log = Path(f"{path}-wal")
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 2_000)
    heir = Journal(directory)
    assert [each.operation_id for each in heir.adopt(GATE, REALM)] == [each.operation_id for each in many(19)]
    heir.close()


def test_a_log_with_noise_in_the_middle_gives_all_that_was_written_before_it(directory: Path) -> None:
    path = dead_journal(directory, *many(20), kept_log=True)
    log = Path(f"{path}-wal")
    with log.open("r+b") as file:
        file.seek(log.stat().st_size // 2)
        file.write(random.Random(7).randbytes(5_000))
    heir = Journal(directory)
    given = heir.adopt(GATE, REALM)
    assert 5 < len(given) < 20
    assert given == many(len(given))
    heir.close()


def test_a_log_whose_file_is_empty_is_not_thrown_away(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite would do so: it takes the log for that of a file of the same name that is gone."""
    path = dead_journal(directory, *many(20), kept_log=True)
    log = Path(f"{path}-wal")
    was, logged = path.read_bytes(), log.read_bytes()
    os.truncate(path, 0)
    heir = Journal(directory)
    assert heir.adopt(GATE, REALM) == []
    assert "the file is empty and its log is not" in caplog.text
    assert log.read_bytes() == logged
    path.write_bytes(was)
    assert len(heir.adopt(GATE, REALM)) == 20
    heir.close()


def test_a_second_file_that_cannot_be_read_keeps_its_rows_where_they_are_until_somebody_moves_it_away(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adopter died in the middle, and its own file is damaged: whether it has copies nobody can tell."""
    path = dead_journal(directory, *many(3))
    gone = directory / "journal-1-gone.sqlite3"
    gone.write_bytes(b"no database at all " * 500)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO about VALUES ('moving_to', ?)", (gone.name,))
    heir = Journal(directory)
    with caplog.at_level(logging.ERROR):
        assert heir.adopt(GATE, REALM) == []
        assert heir.adopt(GATE, REALM) == []
    assert caplog.text.count(f"waits for {gone}") == 1
    gone.rename(directory / "put-aside")
    assert len(heir.adopt(GATE, REALM)) == 3
    heir.close()


def test_a_row_of_ones_own_that_cannot_be_read_is_told(directory: Path) -> None:
    journal = Journal(directory)
    journal.insert(row(state=DONE))
    with journal.transaction() as db:
        db.execute("UPDATE operations SET usage = 'no JSON'")
    with pytest.raises(OutboxUnavailable, match="cannot use the outbox"):
        journal.get("op-1")
    journal.close()
