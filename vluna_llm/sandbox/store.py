"""The gate's memory: tables of frozen records, transactions, and an optional SQLite file behind them.

The file holds one JSON row per record and is written in one SQLite transaction per request, before the answer goes
out, so that whatever was acknowledged survives the process (WAL, ``synchronous=NORMAL``).
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from .records import (
    Account,
    Booking,
    Budget,
    Feature,
    Lease,
    Meter,
    Price,
    Purse,
    Rating,
    Realm,
    ServiceKey,
    User,
)

T = TypeVar("T")
Key = tuple[str, ...]

_FORMAT = 1


class Table(Generic[T]):
    """Records of one kind by key. Every change is noted for undo and for the file."""

    def __init__(self, name: str, kind: Any, journal: list[tuple[Table[Any], Key, Any]]) -> None:
        self.name = name
        self.adapter: TypeAdapter[T] = TypeAdapter(kind)
        self.rows: dict[Key, T] = {}
        self._journal = journal

    def get(self, *key: str) -> T | None:
        """The record of this key, or None."""
        return self.rows.get(key)

    def put(self, *key_and_value: Any) -> None:
        """Set a record: the parts of its key, then the record."""
        *parts, value = key_and_value
        key = tuple(parts)
        self._journal.append((self, key, self.rows.get(key)))
        self.rows[key] = value

    def delete(self, *key: str) -> None:
        """Take a record away, if there is one."""
        if key in self.rows:
            self._journal.append((self, key, self.rows.pop(key)))

    def __len__(self) -> int:
        return len(self.rows)


class Store:
    """Everything that the processes of one gate share.

    Args:
        path: an SQLite file, created with mode 0600 where absent; None keeps everything in memory.

    Raises:
        ValueError: the file is not a sandbox state file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.lock = threading.RLock()
        self._journal: list[tuple[Table[Any], Key, Any]] = []
        self._depth = 0
        self._lock_file: int | None = None
        self._tables: list[Table[Any]] = []
        self.realms: Table[Realm] = self._table("realms", Realm)
        self.keys: Table[ServiceKey] = self._table("keys", ServiceKey)
        self.features: Table[Feature] = self._table("features", Feature)
        self.meters: Table[Meter] = self._table("meters", Meter)
        self.prices: Table[Price] = self._table("prices", Price)
        self.accounts: Table[Account] = self._table("accounts", Account)
        self.users: Table[User] = self._table("users", User)
        self.purses: Table[Purse] = self._table("purses", Purse)
        self.budgets: Table[Budget] = self._table("budgets", Budget)
        self.leases: Table[Lease] = self._table("leases", Lease)
        self.lease_keys: Table[str] = self._table("lease_keys", str)
        self.lease_tokens: Table[str] = self._table("lease_tokens", str)
        self.ratings: Table[Rating] = self._table("ratings", Rating)
        self.bookings: Table[Booking] = self._table("bookings", Booking)
        self.counters: Table[int] = self._table("counters", int)
        self.carries: Table[int] = self._table("carries", int)
        self.secrets: Table[str] = self._table("secrets", str)
        self._file = None if path is None else self._open(path)

    def _table(self, name: str, kind: Any) -> Table[Any]:
        table: Table[Any] = Table(name, kind, self._journal)
        self._tables.append(table)
        return table

    def _open(self, path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock_file = _lock(path)
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            file = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=5)
        except BaseException:
            self._unlock()
            raise
        try:
            self._load(file, path)
        except sqlite3.DatabaseError as error:
            raise self._unusable(file, f"{path} cannot be used as sandbox state: {error}") from error
        except (ValidationError, KeyError) as error:
            text = f"{path} was written by another version of this sandbox; remove it or give another path"
            raise self._unusable(file, text) from error
        except ValueError as error:
            raise self._unusable(file, str(error)) from None
        return file

    def _load(self, file: sqlite3.Connection, path: Path) -> None:
        version = file.execute("PRAGMA user_version").fetchone()[0]
        names = [row[0] for row in file.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        if (names and "sandbox_rows" not in names) or version not in (0, _FORMAT):
            raise ValueError(f"{path} is not a state file of this sandbox; give another path or remove the file")
        file.execute("PRAGMA journal_mode=WAL")
        file.execute("PRAGMA synchronous=NORMAL")
        file.execute(
            "CREATE TABLE IF NOT EXISTS sandbox_rows "
            "(seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, id TEXT NOT NULL, body TEXT NOT NULL, UNIQUE (kind, id))"
        )
        file.execute(f"PRAGMA user_version={_FORMAT}")
        tables = {table.name: table for table in self._tables}
        for kind, ident, body in file.execute("SELECT kind, id, body FROM sandbox_rows ORDER BY seq"):
            table = tables[kind]
            table.rows[tuple(json.loads(ident))] = table.adapter.validate_json(body)

    def _unusable(self, file: sqlite3.Connection, text: str) -> ValueError:
        file.close()
        self._unlock()
        return ValueError(text)

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep every change of the block, or none of them when it raises. The outermost block writes the file."""
        with self.lock:
            mark = len(self._journal)
            self._depth += 1
            try:
                yield
                if self._depth == 1 and self._file is not None and self._journal:
                    self._write(self._file)
            except BaseException:
                self._undo(mark)
                raise
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._journal.clear()

    def rollback(self) -> None:
        """Undo what the running transaction did so far, and let it go on (a poisoned batch)."""
        self._undo(0)

    def _undo(self, mark: int) -> None:
        while len(self._journal) > mark:
            table, key, before = self._journal.pop()
            if before is None:
                table.rows.pop(key, None)
            else:
                table.rows[key] = before

    def _write(self, file: sqlite3.Connection) -> None:
        changed = {(table.name, key): table for table, key, _ in self._journal}
        file.execute("BEGIN IMMEDIATE")
        try:
            for (name, key), table in changed.items():
                if key not in table.rows:
                    file.execute("DELETE FROM sandbox_rows WHERE kind = ? AND id = ?", (name, json.dumps(key)))
                    continue
                file.execute(
                    "INSERT INTO sandbox_rows (kind, id, body) VALUES (?, ?, ?) "
                    "ON CONFLICT (kind, id) DO UPDATE SET body = excluded.body",
                    (name, json.dumps(key), table.adapter.dump_json(table.rows[key]).decode()),
                )
            file.execute("COMMIT")
        except BaseException:
            file.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close the file; the memory stays readable."""
        with self.lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            self._unlock()


def _lock(path: Path) -> int | None:
    """Hold a lock beside the file for life: two gates on one file would each overwrite the other's books."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - Windows has no such lock; one gate per file is up to the user there
        return None
    handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ValueError(f"{path} is in use by another sandbox gate; stop it or give another path") from None
    return handle
