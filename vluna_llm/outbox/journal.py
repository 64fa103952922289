"""The journal of one process: an SQLite file that nobody else writes, beside a lock that says whether it lives.

Because files are not shared, a write never queues behind another process. The lock goes when its process goes; whoever
then gets it may take the rows over. A write-ahead log with ``synchronous=NORMAL`` keeps what was written through a
``kill -9``; a loss of power may take the last moments with it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import OutboxUnavailable
from ..operation import Settlement
from .lock import FileLock
from .row import COLUMNS, Row, changed_values, from_values, insert_values

SCHEMA_VERSION = 2

log = logging.getLogger("vluna_llm")

_SELECT = "SELECT * FROM operations"
_CHECKPOINT_EVERY = 500
"""Writes between checkpoints, which wait for the disk and are therefore not for the caller's thread."""
_CHECKPOINT_AT_LAST = 20_000
"""Pages of write-ahead log after which the caller's thread does it all the same: nobody else did."""

_AT_ONCE = 500
"""Rows that are moved or dropped while callers wait for the journal."""
_PATIENCE = 0.25
"""Seconds that a caller, maybe an event loop, waits for somebody who opened this process's own file by hand."""
_PATIENCE_WITH_OTHERS = 5.0

Verb = Literal["INSERT", "INSERT OR IGNORE", "INSERT OR REPLACE"]


@functools.lru_cache(maxsize=256)
def _insert_sql(verb: Verb, columns: tuple[str, ...]) -> str:
    # The names come from COLUMNS, never from outside; values go as parameters.
    return f"{verb} INTO operations ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


@functools.lru_cache(maxsize=256)
def _update_sql(columns: tuple[str, ...]) -> str:
    assignments = ", ".join(f"{name} = ?" for name in columns)
    return f"UPDATE operations SET {assignments} WHERE operation_id = ?"  # noqa: S608 - names come from COLUMNS


class Journal:
    """The durable store of this process's operations. Every method may be called from any thread.

    Args:
        directory: where the file goes (made with mode 0700); None keeps everything in memory.

    Raises:
        OutboxUnavailable: from every method, where the file cannot be made, read or written.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.path: Path | None = None
        self._guard = threading.RLock()
        self._lock: FileLock | None = None
        self._writes = 0
        try:
            if directory is None:
                self._db = _connect(":memory:")
            else:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.path = directory / f"journal-{os.getpid()}-{uuid.uuid4().hex[:12]}.sqlite3"
                self._lock = FileLock(self.path.with_suffix(".lock"))
                if not self._lock.acquire():  # pragma: no cover - the name is new
                    raise OutboxUnavailable(f"{self.path} is locked")
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
                self._db = _connect(str(self.path))
            _migrate(self._db)
        except (OSError, sqlite3.Error) as error:
            self._release()
            raise OutboxUnavailable(f"cannot open the outbox in {directory}: {error}") from error

    # -- writing ---------------------------------------------------------------------------------------------------

    def insert(self, row: Row) -> None:
        """Store a new operation. The row is on its way to disk before this returns."""
        self._insert("INSERT", row)

    def insert_new(self, row: Row) -> bool:
        """Store a new operation; False where there is one of this id."""
        return self._insert("INSERT OR IGNORE", row).rowcount == 1

    def update(self, old: Row, new: Row) -> None:
        """Store what changed in an operation."""
        changed = changed_values(old, new)
        if changed:
            self._execute(_update_sql(tuple(changed)), (*changed.values(), new.operation_id))

    def replace(self, row: Row) -> None:
        """Store an operation whose first write failed, or whose file was given up meanwhile."""
        self._insert("INSERT OR REPLACE", row)

    def _insert(self, verb: Verb, row: Row) -> sqlite3.Cursor:
        values = insert_values(row)
        return self._execute(_insert_sql(verb, tuple(values)), tuple(values.values()))

    def checkpoint(self) -> None:
        """Move what was logged into the file, where enough of it waits: for the settler, off the caller's path."""
        if self.path is None or self._writes < _CHECKPOINT_EVERY:
            return
        self._writes = 0
        # A connection of its own: writers go on meanwhile.
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(self.path, timeout=0.1)) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def prune(self, older_than: float) -> int:
        """Drop rows that are done and ended before ``older_than`` (seconds since the epoch); the refused calls too.

        A few hundred at a time, oldest first, so that no caller waits long for the journal.
        """
        dropped, after = 0, 0
        while True:
            with self._writing():
                found = self._db.execute(
                    "SELECT rowid, created_at FROM operations WHERE rowid > ? ORDER BY rowid LIMIT ?", (after, _AT_ONCE)
                ).fetchall()
                if not found:
                    return dropped
                first, after = after, found[-1]["rowid"]
                dropped += self._db.execute(
                    "DELETE FROM operations WHERE rowid > ? AND rowid <= ? AND work != 'parked' AND "
                    "(settlement IN ('booked', 'rebooked', 'lapsed') OR admission = 'denied') "
                    "AND coalesce(ended_at, created_at) < ?",
                    (first, after, older_than),
                ).rowcount
            if found[-1]["created_at"] >= older_than:
                return dropped

    # -- reading ---------------------------------------------------------------------------------------------------

    def get(self, operation_id: str) -> Row | None:
        """One operation."""
        rows = self._query(f"{_SELECT} WHERE operation_id = ?", (operation_id,))
        return rows[0] if rows else None

    def rows(self, *settlements: Settlement, limit: int = -1) -> list[Row]:
        """The operations in these settlement states (all where none is named), oldest first."""
        if not settlements:
            return self._query(f"{_SELECT} ORDER BY created_at, rowid LIMIT ?", (limit,))
        marks = ", ".join("?" * len(settlements))
        return self._query(
            f"{_SELECT} WHERE settlement IN ({marks}) ORDER BY created_at, rowid LIMIT ?", (*settlements, limit)
        )

    def undelivered(self) -> list[tuple[str, tuple[str, str], float]]:
        """Id, lane and due time of every settlement that still has to be delivered, oldest first."""
        with self._reading():
            cursor = self._db.execute(
                "SELECT operation_id, principal_id, user_id, next_attempt_at FROM operations "
                "WHERE settlement IN ('pending', 'sent') ORDER BY created_at, rowid"
            )
            return [(op, (principal, user), due) for op, principal, user, due in cursor.fetchall()]

    def parked(self, response_id: str) -> Row | None:
        """The operation that was parked under this response id, where this journal has it."""
        rows = self._query(f"{_SELECT} WHERE work = 'parked' AND response_id = ? LIMIT 1", (response_id,))
        return rows[0] if rows else None

    def counts(self) -> dict[str, int]:
        """How many operations are in each settlement state."""
        with self._reading():
            return dict(self._db.execute("SELECT settlement, count(*) FROM operations GROUP BY settlement").fetchall())

    # -- adoption --------------------------------------------------------------------------------------------------

    def adopt(self, base_url: str, realm_id: str, paths: Sequence[Path] | None = None) -> list[Row]:
        """All that `adopting` gives, at once."""
        return list(self.adopting(base_url, realm_id, paths))

    def adopting(self, base_url: str, realm_id: str, paths: Sequence[Path] | None = None) -> Iterator[Row]:
        """Take over the journals of dead processes in this directory; gives the rows that need care, one by one.

        Settlements on their way keep their keys and bytes. Operations that were in flight become ``lost``: nobody
        will ever know their usage, nothing is cancelled and nothing is charged. Files that hold rows of another gate
        or realm are left alone, and so is one that cannot be read: it is told, and never keeps the others waiting.

        Args:
            base_url: the gate to which rows may be delivered.
            realm_id: the realm.
            paths: only these files, instead of all in the directory.
        """
        if self.directory is None or self.path is None:
            return
        for path in sorted(self.directory.glob("journal-*.sqlite3")) if paths is None else paths:
            if path == self.path:
                continue
            try:
                yield from self._adopt_file(path, base_url, realm_id)
            except Exception as error:  # a damaged file, a full disk, a row of another version
                log.error("The journal %s of a process that ended cannot be taken over: %s", path, error)

    def _adopt_file(self, path: Path, base_url: str, realm_id: str) -> Iterator[Row]:
        lock = FileLock(path.with_suffix(".lock"))
        if not path.exists() or not lock.acquire():
            return
        try:
            if not path.exists():
                return
            with contextlib.closing(_connect(str(path), _PATIENCE_WITH_OTHERS)) as db:
                _migrate(db)
                (foreign,) = db.execute(
                    "SELECT count(*) FROM operations WHERE base_url != ? OR realm_id != ?", (base_url, realm_id)
                ).fetchone()
                if foreign:
                    return
                rows = db.execute(_SELECT + " ORDER BY rowid")
                while found := rows.fetchmany(_AT_ONCE):
                    read = [from_values(values) for values in found]
                    kept = [row.with_state(row.state.owner_died()) for row in read if not row.state.is_settled]
                    yield from self._take_over(kept)
            _remove(path)
        finally:
            lock.release(remove=not path.exists())

    def _take_over(self, rows: Sequence[Row]) -> list[Row]:
        """Store the rows of another journal that are not here already; gives those that were new.

        A file is removed only when all of it is stored. What a crash in between leaves in two places carries the same
        keys in both, so that it is booked once.
        """
        new: list[Row] = []
        with self._writing():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for row in rows:
                    if self._insert("INSERT OR IGNORE", row).rowcount == 1:
                        new.append(row)
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
        return new

    # -- end -------------------------------------------------------------------------------------------------------

    @property
    def lock(self) -> object:
        """The lock of every method (`vluna_llm.reentry`)."""
        return self._guard

    def left_to_parent(self) -> None:
        """In a forked child: close the copy of the lock, which would outlive the parent; the parent's own stays."""
        if self._lock is not None:
            self._lock.forget()

    def close(self) -> bool:
        """Give the file up: removed where it holds nothing that anybody has to look at, else free to be adopted.

        True where the file is kept.
        """
        with self._guard:
            keep = True
            try:
                (left,) = self._db.execute(
                    "SELECT count(*) FROM operations WHERE settlement NOT IN ('booked', 'rebooked', 'lapsed') "
                    "AND NOT (admission = 'denied')"
                ).fetchone()
                keep = left > 0
                self._db.close()
            except sqlite3.Error:
                pass
            if self.path is not None and not keep:
                _remove(self.path)
            self._release(remove=not keep)
        return keep and self.path is not None

    def _release(self, *, remove: bool = False) -> None:
        if self._lock is not None:
            self._lock.release(remove=remove)

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _execute(self, sql: str, values: tuple[Any, ...]) -> sqlite3.Cursor:
        with self._guard:
            try:
                self._writes += 1
                return self._db.execute(sql, values)
            except sqlite3.Error as error:
                raise self._unavailable(error) from error

    def _unavailable(self, error: sqlite3.Error) -> OutboxUnavailable:
        return OutboxUnavailable(f"cannot use the outbox {self.path or 'in memory'}: {error}")

    def _query(self, sql: str, values: tuple[Any, ...]) -> list[Row]:
        with self._reading():
            return [from_values(found) for found in self._db.execute(sql, values).fetchall()]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._guard:
            try:
                yield
            except sqlite3.Error as error:
                raise self._unavailable(error) from error

    _reading = _writing


def _connect(target: str, patience: float = _PATIENCE) -> sqlite3.Connection:
    db = sqlite3.connect(target, check_same_thread=False, isolation_level=None, timeout=patience, cached_statements=64)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_AT_LAST}")
    return db


def _migrate(db: sqlite3.Connection) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"written by a newer version (schema {version}, this one knows {SCHEMA_VERSION})")
    if version == SCHEMA_VERSION:
        return
    columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    db.execute(f"CREATE TABLE IF NOT EXISTS operations ({columns})")
    there = {column["name"] for column in db.execute("PRAGMA table_info(operations)")}
    for name, kind in COLUMNS.items():
        if name not in there:
            db.execute(f"ALTER TABLE operations ADD COLUMN {name} {kind}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _remove(path: Path) -> None:
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(OSError):
            os.unlink(f"{path}{suffix}")
