"""A sound journal in the place of a damaged one, with every row that can still be read.

A damaged file is not trusted with another write, so nothing is moved out of it. What is readable is copied into a new
file, which then takes its place; the damaged one is kept beside it under another name, for a person.

The new file becomes the journal by one renaming, so that there is one journal of that name at every moment. Until it is
on disk as a whole its name says that it is unfinished, and it is begun anew; a finished one is put into its place by
whoever finds it. All this happens under the journal's lock.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import schema
from .row import COLUMNS, from_values

_DAMAGED, _UNFINISHED, _FINISHED = ".damaged", ".salvaging", ".salvaged"
_BESIDE = ("-wal", "-shm", "-journal")
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What became of a damaged journal: how many rows it gave, which it did not, as far as that is known."""

    rows: int
    unreadable: tuple[str, ...]
    kept: Path

    def __str__(self) -> str:
        lost = f"; not these operations: {', '.join(self.unreadable)}" if self.unreadable else ""
        return f"{self.rows} row(s) of it could be read and are used{lost}. The damaged file is kept as {self.kept}"


def is_damage(error: Exception) -> bool:
    """Whether SQLite says that what it read makes no sense; any other trouble may pass, or is no damage."""
    return type(error) is sqlite3.DatabaseError


def salvage(path: Path) -> Salvaged | None:
    """Put a sound journal in the place of a damaged one; None where nothing can be read of it, or not what counts.

    Raises:
        sqlite3.OperationalError: there is no room, or no right.
        OSError: likewise.
    """
    unfinished, finished = Path(f"{path}{_UNFINISHED}"), Path(f"{path}{_FINISHED}")
    for suffix in ("", *_BESIDE):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{unfinished}{suffix}")
    try:
        with contextlib.closing(schema.connect_existing(path, _PATIENCE, mode="ro")) as damaged:
            damaged.execute("PRAGMA writable_schema = ON")  # nothing is written: a file cut short is read all the same
            version = schema.version_of(damaged)
            needed = {"operations", "about"} if version >= 3 else {"operations"}
            tables = {name for (name,) in damaged.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not version or not needed <= tables:
                return None
            os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            with contextlib.closing(schema.connect_existing(unfinished, _PATIENCE)) as sound:
                result = _copy(damaged, sound, Path(f"{path}{_DAMAGED}"))
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            return None
        raise
    schema.flush(unfinished)
    os.replace(unfinished, finished)
    schema.flush(path.parent)
    finish(path)
    return result


def finish(path: Path) -> None:
    """Put a finished journal into its place, where there is one. Nobody may have the damaged one open."""
    finished, damaged = Path(f"{path}{_FINISHED}"), Path(f"{path}{_DAMAGED}")
    if not finished.exists():
        return
    if not damaged.exists() and path.exists():
        try:
            os.link(path, damaged)
        except OSError:  # the file system knows no links
            shutil.copy2(path, damaged)
    for suffix in _BESIDE:  # the log before the file: it would be taken for that of the new one
        with contextlib.suppress(FileNotFoundError):
            if Path(f"{damaged}{suffix}").exists():
                os.unlink(f"{path}{suffix}")
            else:
                os.replace(f"{path}{suffix}", f"{damaged}{suffix}")
    schema.flush(path.parent)
    os.replace(finished, path)
    schema.flush(path.parent)


def _copy(damaged: sqlite3.Connection, sound: sqlite3.Connection, kept: Path) -> Salvaged:
    sound.execute("PRAGMA synchronous = FULL")
    sound.execute("BEGIN IMMEDIATE")
    schema.create(sound)
    there = [found["name"] for found in damaged.execute("PRAGMA table_info(operations)")]
    names = [name for name in COLUMNS if name in there]
    put = f"INSERT OR IGNORE INTO operations ({', '.join(names)}) VALUES ({schema.marks(names)})"  # noqa: S608
    if schema.version_of(damaged) >= 3:
        # Where its rows were moving to has to be known: else there may be copies of them that nobody would look for.
        sound.executemany("INSERT INTO about VALUES (?, ?)", damaged.execute("SELECT key, value FROM about").fetchall())
        with contextlib.suppress(sqlite3.DatabaseError):
            orders = damaged.execute("SELECT operation_id, what, at FROM orders").fetchall()
            sound.executemany("INSERT INTO orders (operation_id, what, at) VALUES (?, ?, ?)", orders)
    known, highest = _known(damaged)
    read: set[str] = set()
    for found in _readable(damaged, ", ".join(names), highest):
        with contextlib.suppress(IndexError, KeyError, TypeError, ValueError, sqlite3.IntegrityError):
            values = dict(found)
            from_values({"next_step": "", **values})
            sound.execute(put, [values[name] for name in names])
            read.add(values["operation_id"])
    sound.execute("COMMIT")
    sound.execute("PRAGMA journal_mode = WAL")
    return Salvaged(len(read), tuple(sorted(known - read)), kept)


def _known(damaged: sqlite3.Connection) -> tuple[set[str], int]:
    """The operations that the index knows, as far as it can be read, and the highest number of a row."""
    known: set[str] = set()
    highest = 0
    with contextlib.suppress(sqlite3.DatabaseError):
        for operation_id, number in damaged.execute("SELECT operation_id, rowid FROM operations ORDER BY operation_id"):
            known.add(str(operation_id))
            highest = max(highest, number)
    with contextlib.suppress(sqlite3.DatabaseError):
        highest = max(highest, damaged.execute("SELECT max(rowid) FROM operations").fetchone()[0] or 0)
    return known, highest


def _readable(damaged: sqlite3.Connection, names: str, highest: int) -> Iterator[sqlite3.Row]:
    """The rows in their order; where one cannot be read, the next ones are tried one by one until one can be."""
    number = 0
    while number < highest:
        try:
            for found in damaged.execute(f"SELECT rowid AS number, {names} FROM operations WHERE rowid > ?", (number,)):  # noqa: S608
                number = found["number"]
                yield found
            return
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
        while number < highest:
            number += 1
            with contextlib.suppress(sqlite3.DatabaseError):
                one = damaged.execute(f"SELECT rowid AS number, {names} FROM operations WHERE rowid = ?", (number,))  # noqa: S608
                if (found := one.fetchone()) is not None:
                    yield found
                    break
