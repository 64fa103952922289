"""The journal of one process: an SQLite file that nobody else writes, beside a lock that says whether it lives.

Because files are not shared, a write never queues behind another process. The lock goes when its process goes; whoever
then gets it may take the rows over. A write-ahead log with ``synchronous=NORMAL`` keeps what was written through a
``kill -9``; a loss of power may take the last moments with it, up to the last `Journal.sync`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import OutboxUnavailable
from ..operation import Settlement
from . import forks, schema
from .adoption import Adopter
from .due import DueRows, due_rows
from .lock import FileLock
from .row import Row, Stage, changed_values, from_values, insert_values
from .schema import Order, Total

_SELECT = "SELECT * FROM operations"
_HERE = "arrived_from IS NULL"
"""Not a copy whose original may still be in another journal: such a row is nobody's yet."""
_CHECKPOINT_EVERY = 500
"""Writes between checkpoints, which wait for the disk and are therefore not for the caller's thread."""

_AT_ONCE = 500
"""Rows that are dropped while callers wait for the journal."""
_PATIENCE = 0.25
"""Seconds that a caller, maybe an event loop, waits for somebody who opened this process's own file by hand."""
_PATIENCE_OF_A_READER = 5.0

PARKED_FOR = 30 * 86_400.0
"""Seconds for which a background response can be retrieved, and is waited for."""

Verb = Literal["INSERT", "INSERT OR IGNORE", "INSERT OR REPLACE"]


@functools.lru_cache(maxsize=256)
def _insert_sql(verb: Verb, columns: tuple[str, ...]) -> str:
    # The names come from COLUMNS, never from outside; values go as parameters.
    return f"{verb} INTO operations ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


@functools.lru_cache(maxsize=256)
def _update_sql(columns: tuple[str, ...]) -> str:
    assignments = ", ".join(f"{name} = ?" for name in columns)
    where = f"operation_id = ? AND settlement = ? AND route IS ? AND {_HERE}"
    return f"UPDATE operations SET {assignments} WHERE {where}"  # noqa: S608 - names come from COLUMNS


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
        self._adopter: Adopter | None = None
        self._closed = False
        self._writes = 0
        self._syncing = threading.Lock()
        self._written = self._synced = 0
        self._directory_synced = self._sync_failed = False
        try:
            with forks.inside():
                self._open(directory)
                forks.watch(self)
        except (OSError, sqlite3.Error) as error:
            self._release()
            raise OutboxUnavailable(f"cannot open the outbox in {directory}: {error}") from error

    def _open(self, directory: Path | None) -> None:
        if directory is None:
            self._db = schema.connect(":memory:", _PATIENCE)
        else:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path = directory / f"journal-{os.getpid()}-{uuid.uuid4().hex[:12]}.sqlite3"
            self._lock = FileLock(self.path.with_suffix(".lock"))
            if not self._lock.acquire():  # pragma: no cover - the name is new
                raise OutboxUnavailable(f"{self.path} is locked")
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = schema.connect(str(self.path), _PATIENCE)
            self._adopter = Adopter(self, self.path)
        schema.migrate(self._db)

    # -- writing ---------------------------------------------------------------------------------------------------

    def insert(self, row: Row) -> None:
        """Store a new operation. The row is on its way to disk before this returns."""
        self._insert("INSERT", row)

    def insert_new(self, row: Row) -> bool:
        """Store a new operation; False where there is one of this id."""
        return self._insert("INSERT OR IGNORE", row).rowcount == 1

    def update(self, old: Row, new: Row) -> bool:
        """Store what changed in an operation; False, and nothing stored, where it does not stand here as ``old`` says.

        It may be gone (somebody deleted it, or took the file for a dead process's), or have made way for a row of the
        same operation that was taken over and knows its usage.
        """
        changed = changed_values(old, new)
        if not changed:
            return True
        known = (new.operation_id, old.state.settlement, old.state.route)
        return self._execute(_update_sql(tuple(changed)), (*changed.values(), *known)).rowcount == 1

    def replace(self, row: Row) -> None:
        """Store an operation whose first write failed, or whose file was given up meanwhile."""
        self._insert("INSERT OR REPLACE", row)

    def _insert(self, verb: Verb, row: Row) -> sqlite3.Cursor:
        values = insert_values(row)
        return self._execute(_insert_sql(verb, tuple(values)), tuple(values.values()))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Several writes at once or not at all. Callers wait meanwhile: a few hundred rows at most."""
        with self._writing():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                schema.roll_back(self._db)
                raise
            self._writes += _AT_ONCE
            self._written += 1

    def sync(self) -> None:
        """Make everything written so far survive a loss of power, too; in memory there is nothing to do.

        A caller whose writes another one's sync has covered returns at once. Nobody who writes waits for it.
        """
        path, wanted = self.path, self._written
        if path is None:
            return
        with self._syncing:
            if wanted <= self._synced or self._closed:  # closing has moved everything into the file
                return
            covered = self._written
            try:
                self._flush(path)
            except (OSError, sqlite3.Error) as error:
                if self.closed:
                    return  # meanwhile
                self._sync_failed = True
                raise OutboxUnavailable(f"cannot make the outbox {path} survive a loss of power: {error}") from error
            self._synced = covered

    def _flush(self, path: Path) -> None:
        if not self._directory_synced:
            schema.flush(path.parent)
            schema.flush(path.parent.parent)
            self._directory_synced = True
        if self._sync_failed:
            # The system may have dropped what it could not write, and will not say so twice: it is written anew.
            with self._connected("rw", _PATIENCE_OF_A_READER) as db:
                (busy, *_) = db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            if busy:
                raise OSError("the log is in use, and what could not be written before is still in it alone")
            self._sync_failed = False
        schema.flush(Path(f"{path}-wal"))

    def checkpoint(self) -> None:
        """Move what was logged into the file, where enough of it waits: for the settler, off the caller's path."""
        if self.path is None or self._writes < _CHECKPOINT_EVERY:
            return
        self._writes = 0
        # A connection of its own: writers go on meanwhile.
        with contextlib.suppress(sqlite3.Error), self._connected("rw", 0.1) as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def prune(self, older_than: float) -> int:
        """Drop rows that are done and ended before ``older_than`` (seconds since the epoch); the refused calls too.

        Work in the background stays until its response cannot be retrieved any more; what was lost, refused or
        quarantined stays until an operator deals with it. A few hundred at a time, oldest first, so that no caller
        waits long for the journal.
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
                    "DELETE FROM operations WHERE rowid > :first AND rowid <= :last AND arrived_from IS NULL AND ("  # noqa: S608
                    f"({schema.DONE} AND coalesce(ended_at, created_at) < :older_than) OR (work = 'parked' AND "
                    "settlement = 'lapsed' AND coalesce(ended_at, created_at) < :parked))",
                    {"first": first, "last": after, "older_than": older_than, "parked": older_than - PARKED_FOR},
                ).rowcount
                self._written += 1
            if found[-1]["created_at"] >= older_than:
                return dropped

    # -- reading ---------------------------------------------------------------------------------------------------

    def get(self, operation_id: str) -> Row | None:
        """One operation."""
        rows = self._query(f"{_SELECT} WHERE operation_id = ? AND {_HERE}", (operation_id,))
        return rows[0] if rows else None

    def arrives(self, operation_id: str) -> bool:
        """Whether this operation is just being taken over from another journal: until that is done it is nobody's."""
        with self._writing():
            sql = f"SELECT 1 FROM operations WHERE operation_id = ? AND NOT {_HERE}"  # noqa: S608
            return self._db.execute(sql, (operation_id,)).fetchone() is not None

    def rows(self, *settlements: Settlement, limit: int = -1) -> list[Row]:
        """The operations in these settlement states (all where none is named), oldest first."""
        if not settlements:
            return self._query(f"{_SELECT} WHERE {_HERE} ORDER BY created_at, rowid LIMIT ?", (limit,))
        return self._query(
            f"{_SELECT} WHERE settlement IN ({schema.marks(settlements)}) AND {_HERE} "
            "ORDER BY created_at, rowid LIMIT ?",
            (*settlements, limit),
        )

    def parked(self, response_id: str) -> Row | None:
        """The operation that was parked under this response id, where this journal has it."""
        rows = self._query(f"{_SELECT} WHERE work = 'parked' AND response_id = ? AND {_HERE} LIMIT 1", (response_id,))
        return rows[0] if rows else None

    def counts(self) -> dict[str, int]:
        """How many operations are in each settlement state."""
        with self._reading() as db:
            found = db.execute(f"SELECT settlement, count(*) FROM operations WHERE {_HERE} GROUP BY 1").fetchall()  # noqa: S608
            return dict(map(tuple, found))

    def due(self, limit: int, per_lane: int, now: float) -> DueRows:
        """What has to be delivered from here: due at ``now`` first, then oldest first, at most ``per_lane`` of a lane.

        It looks through the whole file (100,000 rows: about 0.2 s), on another thread's time: callers do not wait.
        Rows that are delivered from the shared outbox are left out, and so are copies that are still being taken over
        and what an operator wants dropped.
        """
        with self._reading() as db:
            return due_rows(db, limit, per_lane, now)

    def staged(self, *stages: Stage, limit: int = -1) -> list[Row]:
        """The rows in these stages of the way to the shared outbox, oldest first."""
        return self._read(
            f"{_SELECT} WHERE stage IN ({schema.marks(stages)}) AND {_HERE} ORDER BY created_at, rowid LIMIT ?",
            (*stages, limit),
        )

    def totals(self) -> list[Total]:
        """How many operations stand alike and since when; calls that the gate refused are not counted."""
        with self._reading() as db:
            return schema.totals_of(db)

    def orders(self) -> list[Order]:
        """What operators want done with operations of this journal, in the order in which they said so."""
        with self._reading() as db:
            return schema.orders_of(db)

    def forget_orders(self, *ids: int) -> None:
        """Drop orders that were carried out, a few hundred at most."""
        self._execute(f"DELETE FROM orders WHERE id IN ({schema.marks(ids)})", ids)  # noqa: S608 - question marks

    # -- adoption --------------------------------------------------------------------------------------------------

    def adopt(self, base_url: str, realm_id: str, paths: Sequence[Path] | None = None) -> list[Row]:
        """All that `adopting` gives, at once."""
        return list(self.adopting(base_url, realm_id, paths))

    def adopting(self, base_url: str, realm_id: str, paths: Sequence[Path] | None = None) -> Iterator[Row]:
        """Take over the journals of dead processes in this directory (`vluna_llm.outbox.adoption.Adopter`)."""
        return self._adopter.adopting(base_url, realm_id, paths) if self._adopter is not None else iter(())

    # -- end -------------------------------------------------------------------------------------------------------

    @property
    def lock(self) -> object:
        """The lock of every method (`vluna_llm.reentry`)."""
        return self._guard

    def left_to_parent(self) -> None:
        """In a forked child: close the copy of the lock, which would outlive the parent; the parent's own stays."""
        if self._lock is not None:
            self._lock.forget()

    @property
    def closed(self) -> bool:
        """Whether the file was given up."""
        return self._closed

    def close(self) -> bool:
        """Give the file up: removed where it holds nothing that anybody has to look at, else free to be adopted.

        True where the file is kept.
        """
        with self._guard:
            keep = True
            self._closed = True
            with contextlib.suppress(sqlite3.Error):
                left = self._db.execute(
                    f"SELECT 1 FROM operations WHERE NOT {schema.DONE} OR arrived_from IS NOT NULL LIMIT 1"  # noqa: S608
                ).fetchone()
                keep = left is not None
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            if self.path is not None and not keep:
                schema.remove(self.path)
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
                cursor = self._db.execute(sql, values)
            except sqlite3.Error as error:
                raise self._unavailable(error) from error
            self._written += 1
            return cursor

    def _unavailable(self, error: Exception) -> OutboxUnavailable:
        return OutboxUnavailable(f"cannot use the outbox {self.path or 'in memory'}: {error}")

    def _query(self, sql: str, values: tuple[Any, ...]) -> list[Row]:
        """Rows by the journal's own connection: for what is looked up by its key, or for tests and small files."""
        with self._writing():
            return self._rows_of(self._db, sql, values)

    def _read(self, sql: str, values: tuple[Any, ...]) -> list[Row]:
        with self._reading() as db:
            return self._rows_of(db, sql, values)

    def _rows_of(self, db: sqlite3.Connection, sql: str, values: tuple[Any, ...]) -> list[Row]:
        found = db.execute(sql, values).fetchall()
        try:
            return [from_values(row) for row in found]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise self._unavailable(error) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with self._guard:
            try:
                yield
            except sqlite3.Error as error:
                raise self._unavailable(error) from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection of the reader's own: callers write on meanwhile. What is in memory has one connection only."""
        if self.path is None:
            with self._writing():
                yield self._db
            return
        try:
            if self._closed:
                raise sqlite3.ProgrammingError("it is closed")
            with self._connected("ro", _PATIENCE_OF_A_READER) as db:
                yield db
        except sqlite3.Error as error:
            raise self._unavailable(error) from error

    @contextlib.contextmanager
    def _connected(self, mode: str, patience: float) -> Iterator[sqlite3.Connection]:
        """Another connection to this file, used where no lock of ours is held."""
        assert self.path is not None
        with forks.inside(), contextlib.closing(schema.connect_existing(self.path, patience, mode=mode)) as db:
            yield db
