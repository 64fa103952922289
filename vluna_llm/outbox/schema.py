"""The journal's file: how it is opened, what is in it, how it came there, and how it goes away.

A file of an older version is brought up to date where it is opened for writing; columns and tables are only ever added.
Nothing but SQLite may open and close a database file or its ``-shm`` in a process that uses it: closing any descriptor
of such a file drops the record locks that SQLite holds on it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..operation import Settlement
from .row import COLUMNS, Stage

SCHEMA_VERSION = 5

MARK = "journal-*.sqlite3"
"""How the journal files of a directory are named."""

_CHECKPOINT_AT_LAST = 20_000
"""Pages of write-ahead log after which the caller's thread checkpoints: nobody else did."""

_TABLES = (
    "CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT)",
    "CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, operation_id TEXT, what TEXT, at REAL)",
    "CREATE INDEX IF NOT EXISTS orders_of_operations ON orders (operation_id)",
)
"""``about`` holds what is true of the file, as ``moving_to``; ``orders`` what an operator wants done with a row."""

DONE = "((settlement IN ('booked', 'rebooked', 'lapsed') AND work != 'parked') OR admission = 'denied')"
"""Rows that nobody has to look at any more; parked ones wait for their response."""

_flush_to_disk = getattr(os, "fdatasync", os.fsync)


class Order(NamedTuple):
    """What an operator wants done with one operation."""

    id: int
    operation_id: str
    what: str
    at: float


@dataclass(frozen=True, slots=True)
class Total:
    """How many operations stand alike, and since when (seconds since the epoch)."""

    settlement: Settlement
    held: bool
    parked: bool
    stage: Stage | None
    count: int
    oldest_created_at: float
    oldest_ended_at: float | None


def connect(target: str, patience: float) -> sqlite3.Connection:
    """A connection that writes; ``patience`` is how many seconds it waits for another one to finish its write."""
    db = sqlite3.connect(target, check_same_thread=False, isolation_level=None, timeout=patience, cached_statements=64)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_AT_LAST}")
    return db


def connect_existing(path: Path, patience: float, *, mode: str = "rw") -> sqlite3.Connection:
    """A plain connection to a file that is there; never makes one, nor changes it by being opened."""
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None, timeout=patience)
    db.row_factory = sqlite3.Row
    return db


class NewerVersion(sqlite3.NotSupportedError):
    """The file was written by a newer version."""


def version_of(db: sqlite3.Connection) -> int:
    """The file's schema version, 0 where it is empty; raises `NewerVersion` (an `sqlite3.Error`)."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise NewerVersion(f"written by a newer version (schema {version}, this one knows {SCHEMA_VERSION})")
    return int(version)


def migrate(db: sqlite3.Connection) -> None:
    """Bring a file up to date, at once or not at all."""
    if version_of(db) == SCHEMA_VERSION:
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        create(db)
        db.execute("COMMIT")
    except BaseException:
        roll_back(db)
        raise


def create(db: sqlite3.Connection) -> None:
    """Make, within a transaction, what a file of this version has and this one lacks."""
    columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    db.execute(f"CREATE TABLE IF NOT EXISTS operations ({columns})")
    there = {column["name"] for column in db.execute("PRAGMA table_info(operations)")}
    for name, kind in COLUMNS.items():
        if name not in there:
            db.execute(f"ALTER TABLE operations ADD COLUMN {name} {kind}")
    for table in _TABLES:
        db.execute(table)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def roll_back(db: sqlite3.Connection) -> None:
    """Undo an open transaction; a write that failed for good has done so itself."""
    with contextlib.suppress(sqlite3.Error):
        if db.in_transaction:
            db.execute("ROLLBACK")


def flush_log(path: Path) -> None:
    """Make what was written to the log of the journal at ``path`` survive a loss of power. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):  # no log: everything is in the file, where a checkpoint flushed it
        flush(Path(f"{path}-wal"))


def flush(path: Path) -> None:
    """Make a file, or the entries of a directory, survive a loss of power. Raises OSError."""
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        _flush_to_disk(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a journal for good.

    The file goes first: without its log it would be an older state of itself, and rows that were taken from it would be
    back. A log without its file is nothing.
    """
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(OSError):
            os.unlink(f"{path}{suffix}")
            if not suffix:
                flush(path.parent)


def orders_of(db: sqlite3.Connection) -> list[Order]:
    """The orders that wait in a file, in the order in which they were given; not those for copies that are nobody's."""
    if version_of(db) < 3:
        return []
    found = db.execute(
        "SELECT id, operation_id, what, at FROM orders WHERE NOT EXISTS (SELECT 1 FROM operations WHERE "
        "operations.operation_id = orders.operation_id AND arrived_from IS NOT NULL) ORDER BY id"
    )
    return [Order(*order) for order in found.fetchall()]


def totals_of(db: sqlite3.Connection) -> list[Total]:
    """The totals of a file of any version that can be read. Calls that the gate refused are not counted."""
    version = version_of(db)
    if not version:
        return []
    held, stage, where = ("held", "stage", "arrived_from IS NULL") if version >= 3 else ("0", "NULL", "1")
    found = db.execute(
        f"SELECT settlement, {held} AS held, work = 'parked' AS parked, {stage} AS stage, count(*), min(created_at), "  # noqa: S608
        f"min(ended_at) FROM operations WHERE admission != 'denied' AND {where} GROUP BY 1, 2, 3, 4"
    )
    return [
        Total(settlement, bool(held), bool(parked), stage, count, created, ended)
        for settlement, held, parked, stage, count, created, ended in found.fetchall()
    ]


def marks(names: Sequence[object]) -> str:
    """As many question marks as there are names."""
    return ", ".join("?" * len(names))
