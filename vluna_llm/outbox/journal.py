"""This process's own journal: one SQLite file, one writer, an OS lock held for life.

No writer ever waits for another process: each has its own file. A file whose lock is free belongs to a process that is
dead, and may be adopted. Writes on the caller's thread use ``synchronous=NORMAL`` on a write-ahead log, which survives
``kill -9`` (a loss of power may take the last moments with it).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..errors import OutboxUnavailable
from ..operation import Settlement
from .lock import FileLock
from .row import COLUMNS, Row, changed_values, from_values, insert_values

SCHEMA_VERSION = 1

_SELECT = "SELECT * FROM operations"
_CHECKPOINT_EVERY = 500
"""Writes between checkpoints, which wait for the disk and are therefore not for the caller's thread."""
_CHECKPOINT_AT_LAST = 20_000
"""Pages of write-ahead log after which the caller's thread does it all the same: nobody else did."""

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
        self._guard = threading.Lock()
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

    def update(self, old: Row, new: Row) -> None:
        """Store what changed in an operation."""
        changed = changed_values(old, new)
        if changed:
            self._execute(_update_sql(tuple(changed)), (*changed.values(), new.operation_id))

    def replace(self, row: Row) -> None:
        """Store an operation whose first write failed, or whose file was given up meanwhile."""
        self._insert("INSERT OR REPLACE", row)

    def _insert(self, verb: Verb, row: Row) -> None:
        values = insert_values(row)
        self._execute(_insert_sql(verb, tuple(values)), tuple(values.values()))

    def checkpoint(self) -> None:
        """Move what was logged into the file, where enough of it waits: for the settler, off the caller's path."""
        if self.path is None or self._writes < _CHECKPOINT_EVERY:
            return
        self._writes = 0
        # A connection of its own: writers go on meanwhile.
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(self.path, timeout=0.1)) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def prune(self, older_than: float) -> int:
        """Drop rows that are settled for good and ended before ``older_than`` (seconds since the epoch)."""
        cursor = self._execute(
            "DELETE FROM operations WHERE settlement IN ('booked', 'rebooked', 'lapsed') "
            "AND work != 'parked' AND coalesce(ended_at, created_at) < ?",
            (older_than,),
        )
        return cursor.rowcount

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

    def counts(self) -> dict[str, int]:
        """How many operations are in each settlement state."""
        with self._reading():
            return dict(self._db.execute("SELECT settlement, count(*) FROM operations GROUP BY settlement").fetchall())

    # -- adoption --------------------------------------------------------------------------------------------------

    def adopt(self, base_url: str, realm_id: str) -> list[Row]:
        """Take over the journals of dead processes in this directory; gives the rows that need care.

        Settlements on their way keep their keys and bytes. Operations that were in flight become ``lost``: nobody
        will ever know their usage, nothing is cancelled and nothing is charged. Files that hold rows of another gate
        or realm are left alone.
        """
        if self.directory is None or self.path is None:
            return []
        taken: list[Row] = []
        for path in sorted(self.directory.glob("journal-*.sqlite3")):
            if path != self.path:
                with contextlib.suppress(OSError, sqlite3.Error):
                    taken += self._adopt_file(path, base_url, realm_id)
        return taken

    def _adopt_file(self, path: Path, base_url: str, realm_id: str) -> list[Row]:
        lock = FileLock(path.with_suffix(".lock"))
        if not lock.acquire():
            return []
        try:
            if not path.exists():
                return []
            db = _connect(str(path))
            try:
                _migrate(db)
                rows = [from_values(values) for values in db.execute(_SELECT).fetchall()]
            finally:
                db.close()
            if any(row.base_url != base_url or row.realm_id != realm_id for row in rows):
                return []
            kept = [row.with_state(row.state.owner_died()) for row in rows if not row.state.is_settled]
            with self._writing():
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    for row in kept:
                        values = insert_values(row)
                        self._db.execute(_insert_sql("INSERT OR IGNORE", tuple(values)), tuple(values.values()))
                    self._db.execute("COMMIT")
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
            _remove(path)
            return kept
        finally:
            lock.release(remove=not path.exists())

    # -- end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the file up: removed where it holds nothing that anybody has to look at, else free to be adopted."""
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


def _connect(target: str) -> sqlite3.Connection:
    db = sqlite3.connect(target, check_same_thread=False, isolation_level=None, timeout=5.0, cached_statements=64)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_AT_LAST}")
    return db


def _migrate(db: sqlite3.Connection) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"written by a newer version (schema {version}, this one knows {SCHEMA_VERSION})")
    if version == 0:
        columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
        db.execute(f"CREATE TABLE IF NOT EXISTS operations ({columns})")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _remove(path: Path) -> None:
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(OSError):
            os.unlink(f"{path}{suffix}")
