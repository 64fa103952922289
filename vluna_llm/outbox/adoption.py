"""Taking over the journals of dead processes, so that a row is never deliverable from two files.

A row cannot be moved between two files in one write, so a batch of rows moves in three, each on disk before the next:
it is copied with ``arrived_from`` set to the name of the file it comes from, which makes the copy nobody's; it is
deleted there; ``arrived_from`` is cleared. Before all that, the file says (``about``) where its rows are ``moving_to``.

Whatever dies in between leaves a state that says what happened. A copy whose original is still there is deleted, one
whose original is gone is the row. Telling them apart needs the locks of both files, so nobody resolves what somebody
alive is about to resolve; and a file that is moving to another one goes nowhere else before that is done. Copies never
move on: what arrives in a third file was resolved in the second.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutboxUnavailable
from ..failpoints import hit
from . import forks, schema
from .batch import NAMES, Batch, NotYet, needs_delivery
from .lock import FileLock
from .row import Row, from_values, next_step
from .salvage import finish, is_damage, salvage

if TYPE_CHECKING:
    from .journal import Journal

log = logging.getLogger("vluna_llm")

AT_ONCE = 500
"""Rows that are moved together; what they cost is three waits for the disk."""
_SLICE = 100
"""Rows that are written while callers wait for the journal: about 2 ms."""
_PATIENCE = 5.0
_LEFTOVER_AGE = 60.0
"""Seconds after which a lock without its journal is a leftover, and not that of a journal that is just being made."""

_COLUMNS = ", ".join(NAMES)
_COPY = f"INSERT INTO operations ({_COLUMNS}) VALUES ({', '.join(f':{name}' for name in NAMES)})"  # noqa: S608
_COPY_ORDER = "INSERT INTO orders (operation_id, what, at) VALUES (?, ?, ?)"
_CLEAR = "UPDATE operations SET arrived_from = NULL, next_step = ? WHERE operation_id = ? AND arrived_from = ?"
_BATCH = f"SELECT rowid, {_COLUMNS} FROM operations WHERE rowid > ? ORDER BY rowid LIMIT {AT_ONCE}"  # noqa: S608
_COPIES = f"SELECT * FROM operations WHERE arrived_from = ? LIMIT {AT_ONCE}"  # noqa: S608

Begin = Callable[[], AbstractContextManager[sqlite3.Connection]]
"""Begins a transaction in the file that copies are in."""


class _NothingForUs(Exception):
    """The file holds rows of another gate or realm, or such as cannot be read: nothing to do before it changes."""


class Adopter:
    """Moves the rows of dead processes into one journal. For one thread at a time.

    Args:
        journal: where the rows go.
        path: its file.
    """

    def __init__(self, journal: Journal, path: Path) -> None:
        self._journal = journal
        self._path = path
        self._left_alone: dict[Path, object] = {}
        self._told: dict[Path, str] = {}
        self._interrupted: set[str] = set()

    def adopting(self, base_url: str, realm_id: str, paths: Sequence[Path] | None = None) -> Iterator[Row]:
        """Take over the journals of dead processes in this directory; gives the rows that need care, one by one.

        These are the settlements that have to be delivered from here, which keep their keys and bytes, and the
        operations that were in flight: they become ``lost``. Nobody will ever know their usage, nothing is cancelled
        and nothing is charged. What waits for an operator, for its response in the background or in the shared outbox
        moves along unmentioned, and so do the operators' orders.

        Rows of another gate or realm stay where they are. A file that cannot be read stays as it is: it is told, and
        never keeps the others waiting. This may be called again and again: a file that was of no use is not opened
        before it changes.

        Args:
            base_url: the gate to which rows may be delivered.
            realm_id: the realm.
            paths: only these files, instead of all in the directory.
        """
        yield from self._without_originals()
        for path in sorted(self._path.parent.glob(schema.MARK)) if paths is None else paths:
            stamp = (base_url, realm_id, *_stamp(path))
            if path == self._path or self._left_alone.get(path) == stamp:
                continue
            try:
                yield from self._adopt_file(path, base_url, realm_id)
            except NotYet:
                continue
            except _NothingForUs:
                self._left_alone[path] = (base_url, realm_id, *_stamp(path))
            except (OutboxUnavailable, sqlite3.OperationalError, OSError) as error:
                if self._journal.closed:
                    return  # the rest is for another process
                self._tell(path, f"cannot be taken over now: {error}")  # no room, no right, somebody reads by hand
            except Exception as error:  # damaged, or of another version
                self._tell(path, f"cannot be taken over: {error}")
                self._left_alone[path] = (base_url, realm_id, *_stamp(path))
        if paths is None:
            _sweep(self._path)

    def _tell(self, path: Path, problem: str) -> None:
        if self._told.get(path) != problem:
            self._told[path] = problem
            log.error("The journal %s of a process that ended %s", path, problem)

    # -- one file --------------------------------------------------------------------------------------------------

    def _adopt_file(self, path: Path, base_url: str, realm_id: str) -> Iterator[Row]:
        with _locked(path) as free:
            if not free:
                return
            finish(path)
            try:
                yield from self._empty(path, base_url, realm_id)
            except sqlite3.DatabaseError as error:
                if not is_damage(error):
                    raise
                with forks.inside():
                    salvaged = salvage(path)
                if salvaged is None:
                    raise
                self._tell(path, f"is damaged ({error}): {salvaged}")
                yield from self._empty(path, base_url, realm_id)
            hit("adoption.emptied")
            schema.remove(path)
            hit("adoption.removed")

    def _empty(self, path: Path, base_url: str, realm_id: str) -> Iterator[Row]:
        # Looked at first, without a write: closing the other kind of connection writes the log into the file.
        half_made = Path(f"{path}-journal").exists()
        with _opened(path, "rw" if half_made else "ro") as db, forks.inside():
            _check(db, base_url, realm_id)
        with _opened(path) as db:
            with forks.inside():
                schema.migrate(db)
                arrived = self._finish_former_move(path, db)
                self._settle_copies(path, db)
                _say_moving_to(db, self._path.name)
            yield from arrived
            hit("adoption.announced")
            yield from self._move(path, db, base_url, realm_id)

    def _move(self, path: Path, db: sqlite3.Connection, base_url: str, realm_id: str) -> Iterator[Row]:
        after = staying = 0
        unread: str | None = None
        while True:
            with forks.inside():
                found = db.execute(_BATCH, (after,)).fetchall()
                if not found:
                    break
                after = found[-1]["rowid"]
                batch = Batch(found, base_url, realm_id)
                staying, unread = staying + len(found) - len(batch.numbers), unread or batch.unread
                failure = self._move_batch(path, db, batch) if batch.numbers else None
            self._journal.checkpoint()
            yield from batch.need_care
            if failure is not None:
                raise failure
        with forks.inside():
            if staying:
                _say_moving_to(db, None)  # whoever can do more with it may
            else:
                with self._journal.transaction() as own:  # of rows that were not there, or given at the last moment
                    own.executemany(_COPY_ORDER, db.execute("SELECT operation_id, what, at FROM orders").fetchall())
        if unread:
            raise ValueError(f"in part, which stays there: {unread}")
        if staying:
            raise _NothingForUs

    def _move_batch(self, path: Path, db: sqlite3.Connection, batch: Batch) -> OutboxUnavailable | None:
        """The three writes. What comes in the way of the last one is given back: some rows may have arrived by then."""
        self._interrupted.add(path.name)
        for keys in _slices(list(batch.rows)):
            with self._journal.transaction() as own:
                for found in _of_these(own, "operations", keys):
                    if batch.meets(found):
                        own.execute("DELETE FROM operations WHERE operation_id = ?", (found["operation_id"],))
                own.executemany(_COPY, batch.copies(keys, path.name))
                for order in _of_these(db, "orders", keys):
                    own.execute(_COPY_ORDER, (order["operation_id"], order["what"], order["at"]))
        self._journal.sync()
        hit("adoption.copied")
        with _transaction(db):
            gone = db.executemany("DELETE FROM operations WHERE rowid = ?", [(n,) for n in batch.numbers]).rowcount
            if gone != len(batch.numbers):
                raise sqlite3.DatabaseError(f"{len(batch.numbers)} rows were to be deleted, and {gone} were")
            db.executemany("DELETE FROM orders WHERE operation_id = ?", [(op,) for op in batch.ids])
        hit("adoption.deleted")
        try:
            for keys in _slices(list(batch.rows)):
                with self._journal.transaction() as own:
                    own.executemany(_CLEAR, [(next_step(batch.rows[key]), key, path.name) for key in keys])
                batch.arrived.update(keys)
        except OutboxUnavailable as error:
            return error
        self._interrupted.discard(path.name)
        hit("adoption.cleared")
        return None

    # -- what was interrupted --------------------------------------------------------------------------------------

    def _finish_former_move(self, path: Path, db: sqlite3.Connection) -> list[Row]:
        """Resolve what an adopter of this file left behind in the middle; gives the rows that are here for good now."""
        found = db.execute("SELECT value FROM about WHERE key = 'moving_to'").fetchone()
        name = found["value"] if found is not None else None
        if name is None:
            return []
        if name == self._path.name:
            rows = _resolve(self._journal.transaction, db, path.name)
            self._interrupted.discard(path.name)
            hit("adoption.resolved")
            return [row for row in rows if needs_delivery(row)]
        other = path.with_name(Path(name).name)
        with self._other(path, other) as copies:
            if copies is not None:
                _resolve(functools.partial(_transaction, copies), db, path.name)
                hit("adoption.resolved")
        return []

    def _settle_copies(self, path: Path, db: sqlite3.Connection) -> None:
        """Resolve the copies in this file; those whose original cannot be looked at now stay, and are not moved."""
        names = [name for (name,) in db.execute("SELECT DISTINCT arrived_from FROM operations").fetchall() if name]
        for name in names:
            with contextlib.suppress(NotYet), self._other(path, path.with_name(Path(name).name)) as originals:
                _resolve(functools.partial(_transaction, db), originals, name)
                hit("adoption.resolved")

    def _without_originals(self) -> Iterator[Row]:
        """Copies that this process could not clear, and whose file somebody has removed by hand meanwhile."""
        for name in sorted(self._interrupted):
            if not self._path.with_name(name).exists():
                with contextlib.suppress(OutboxUnavailable):
                    rows = _resolve(self._journal.transaction, None, name)
                    self._interrupted.discard(name)
                    yield from filter(needs_delivery, rows)

    @contextlib.contextmanager
    def _other(self, path: Path, other: Path) -> Iterator[sqlite3.Connection | None]:
        """The second file that has to be held to tell copies from originals; None where it is gone, or is nothing."""
        if not other.exists():
            yield None
            return
        with _locked(other) as free:
            if not free and other.exists():
                raise NotYet
            if not free:
                yield None
                return
            try:
                db = _open(other)
                version = schema.version_of(db)
            except (sqlite3.Error, OSError) as error:
                self._tell(path, f"waits for {other}, which cannot be read ({error}). Move it away to go on without it")
                raise NotYet from error
            with contextlib.closing(db):
                if version:
                    schema.migrate(db)
                yield db if version else None


def _slices(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(keys), _SLICE):
        yield keys[first : first + _SLICE]
        time.sleep(0)  # whoever waits for the journal goes first


def _resolve(begin: Begin, originals: sqlite3.Connection | None, name: str) -> list[Row]:
    """Delete the copies from the file ``name`` that are still there, and make rows of the others: these are given."""
    rows: list[Row] = []
    while True:
        with begin() as db:
            found = db.execute(_COPIES, (name,)).fetchall()
            if not found:
                return rows
            copies = {values["operation_id"]: from_values(values) for values in found}
            there = [] if originals is None else _of_these(originals, "operations", list(copies))
            still = [(values["operation_id"],) for values in there]
            for table in ("operations", "orders"):
                db.executemany(f"DELETE FROM {table} WHERE operation_id = ?", still)  # noqa: S608
            for (operation_id,) in still:
                del copies[operation_id]
            resolved = [copy.evolve(arrived_from=None) for copy in copies.values()]
            db.executemany(_CLEAR, [(next_step(row), row.operation_id, name) for row in resolved])
        rows += resolved


def _check(db: sqlite3.Connection, base_url: str, realm_id: str) -> None:
    """Whether the file is whole and holds anything for us."""
    if schema.version_of(db):
        ours = "SELECT 1 FROM operations WHERE base_url = ? AND realm_id = ? LIMIT 1"
        some = "SELECT 1 FROM operations LIMIT 1"
        if not db.execute(ours, (base_url, realm_id)).fetchone() and db.execute(some).fetchone():
            raise _NothingForUs
        (problem,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if problem != "ok":
            raise sqlite3.DatabaseError(" ".join(problem.split()))


def _say_moving_to(db: sqlite3.Connection, name: str | None) -> None:
    if name is None:
        db.execute("DELETE FROM about WHERE key = 'moving_to'")
    else:
        db.execute("INSERT OR REPLACE INTO about (key, value) VALUES ('moving_to', ?)", (name,))


def _of_these(db: sqlite3.Connection, table: str, ids: Sequence[str]) -> list[sqlite3.Row]:
    sql = f"SELECT * FROM {table} WHERE operation_id IN ({schema.marks(ids)})"  # noqa: S608
    return db.execute(sql, ids).fetchall()


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing; on disk when it ends."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        schema.roll_back(db)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether the file is there and its process is not; nobody else takes it meanwhile."""
    lock = FileLock(path.with_suffix(".lock"))
    if not path.exists() or not lock.acquire():
        yield False
        return
    try:
        yield path.exists()
    finally:
        lock.release(remove=not path.exists())


def _open(path: Path, mode: str = "rw") -> sqlite3.Connection:
    log_file = Path(f"{path}-wal")
    if not path.stat().st_size and log_file.exists() and log_file.stat().st_size:
        # SQLite would throw the log away.
        raise sqlite3.InternalError("the file is empty and its log is not")
    schema.flush_log(path)  # what is about to be seen, and acted on, is there after a loss of power, too
    db = schema.connect_existing(path, _PATIENCE, mode=mode)
    db.execute("PRAGMA synchronous = FULL")
    return db


@contextlib.contextmanager
def _opened(path: Path, mode: str = "rw") -> Iterator[sqlite3.Connection]:
    with forks.inside():
        db = _open(path, mode)
    try:
        yield db
    finally:
        with forks.inside(), contextlib.suppress(sqlite3.Error):
            db.close()


def _stamp(path: Path) -> tuple[object, ...]:
    """Differs when the file or its log was written."""
    stamp: list[object] = []
    for name in (path, Path(f"{path}-wal")):
        with contextlib.suppress(OSError):
            found = name.stat()
            stamp.append((name.name, found.st_mtime_ns, found.st_size))
    return tuple(stamp)


def _sweep(own: Path) -> None:
    """Remove what a process that died while it removed a journal left of it."""
    for found in [*own.parent.glob("journal-*.lock"), *own.parent.glob(f"{schema.MARK}-wal")]:
        path = found.with_suffix(".sqlite3") if found.suffix == ".lock" else Path(str(found)[: -len("-wal")])
        with contextlib.suppress(OSError):
            if path == own or path.exists() or found.stat().st_mtime > time.time() - _LEFTOVER_AGE:
                continue
            lock = FileLock(path.with_suffix(".lock"))
            if lock.acquire():
                if not path.exists():
                    schema.remove(path)
                lock.release(remove=not path.exists())
