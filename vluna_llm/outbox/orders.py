"""An operator's orders: put into the journal that holds the operation, carried out by the process that owns it.

A journal has one writer, and what it wants to do next is in its memory, too. So nobody changes a row from outside; the
wish is stored beside it, and the owner looks for wishes every few seconds. Where the owner is dead, they travel with
the rows to whoever takes these over.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from ..errors import OutboxUnavailable
from ..operation import OperationState
from .lock import FileLock
from .row import Row, from_values
from .schema import Order, connect_existing, orders_of, version_of
from .waiting import waiting_as

What = Literal["retry", "repair", "drop"]
"""``retry``: due now; what was refused goes out as it was. ``repair``: what was not charged is booked by ingest.
``drop``: nothing more is sent."""

_AT_ONCE = 500
_PATIENCE = 5.0


def place(path: Path, wishes: Sequence[tuple[str, What]]) -> None:
    """Put wishes (operation id, what) into a journal, of a living process or a dead one.

    Raises:
        OutboxUnavailable: it cannot be written, or is of a version that takes no orders.
    """
    now = time.time()
    try:
        with contextlib.closing(connect_existing(path, _PATIENCE)) as db:
            if version_of(db) < 3:
                raise OutboxUnavailable(
                    f"{path} is of a version that takes no orders; they can be given once its process has ended and "
                    "one of this version has taken it over"
                )
            db.execute("PRAGMA synchronous = NORMAL")  # no caller of the owner waits for the disk meanwhile
            for first in range(0, len(wishes), _AT_ONCE):
                _insert(db, [(operation_id, what, now) for operation_id, what in wishes[first : first + _AT_ONCE]])
    except (OSError, sqlite3.Error) as error:
        raise OutboxUnavailable(f"cannot put orders into {path}: {error}") from error


def waiting_in(path: Path) -> list[Order]:
    """The orders that a journal holds and nobody has carried out yet; none where it is not there any more.

    Raises:
        OutboxUnavailable: it cannot be read.
    """
    if not path.exists():
        return []
    try:
        with contextlib.closing(connect_existing(path, _PATIENCE, mode="ro")) as db:
            return orders_of(db)
    except (OSError, sqlite3.Error) as error:
        if not path.exists():
            return []
        raise OutboxUnavailable(f"cannot read the orders in {path}: {error}") from error


def find(paths: Iterable[Path], operation_ids: Sequence[str]) -> dict[str, Row]:
    """These operations in these journals, each as it is where it is delivered from; unreadable ones are skipped."""
    found: dict[str, Row] = {}
    for path in paths:
        with (
            contextlib.suppress(OSError, sqlite3.Error),
            contextlib.closing(connect_existing(path, _PATIENCE, mode="ro")) as db,
        ):
            for first in range(0, len(operation_ids), _AT_ONCE):
                asked = operation_ids[first : first + _AT_ONCE]
                marks = ", ".join("?" * len(asked))
                sql = f"SELECT * FROM operations WHERE operation_id IN ({marks})"  # noqa: S608 - question marks
                for row in map(from_values, db.execute(sql, asked)):
                    if row.arrived_from is None or row.operation_id not in found:
                        found[row.operation_id] = row
    return found


def owner_lives(path: Path) -> bool:
    """Whether the process that owns this journal is alive; taken for alive where that cannot be found out."""
    place = path.with_suffix(".lock")
    if not place.exists():
        return False
    lock = FileLock(place)
    try:
        if not lock.acquire():
            return True
    except OSError:
        return True
    lock.release(remove=not path.exists())
    return False


def what_of(order: Order) -> What | None:
    """What is wanted; None where another version wanted something that this one does not know."""
    return cast(What, order.what) if order.what in get_args(What) else None


def ordered(row: Row, what: What) -> Row:
    """The row as the operator wants it; the same row where that means nothing for it."""
    state = row.state
    if row.stage is not None:
        return row
    if what == "drop":
        dropped = state.dropped()
        if dropped is state:
            return row
        said = f": {row.last_error}" if row.last_error else ""
        detail = f"dropped by an operator; it was {waiting_as(row)}{said}"
        return row.evolve(state=dropped, held=False, next_attempt_at=0.0, last_error=detail)
    if what == "retry":
        if state.settlement not in ("pending", "sent", "refused"):
            return row
        return row.evolve(state=state.retry(), attempts=0, next_attempt_at=0.0)
    if state.settlement in ("pending", "sent") and state.route == "ingest":
        return row.evolve(attempts=0, next_attempt_at=0.0)  # its repair waits for a price, say
    repaired = state.repair(look_first=not tells_uncharged(row))
    if repaired is state:
        return row
    fresh = row.evolve(state=repaired, attempts=0, next_attempt_at=0.0, held=False)
    # A commit that has to be looked up keeps its bytes: should nobody show the books, it can still be retried.
    return fresh if repaired.look_first else fresh.evolve(path=None, body=None)


def why_not(row: Row, what: What) -> str | None:
    """Why an order means nothing for this row, in a sentence; None where it does."""
    if ordered(row, what) is not row:
        return None
    state: OperationState = row.state
    if waiting_as(row) is None:
        flying = state.settlement == "none" and state.admission != "denied"
        return "it is in flight in its process" if flying else "it is settled"
    if row.stage is not None:
        return "it is in the shared outbox, or on its way: order it there, with VLUNA_LLM_OUTBOX_SHARED set"
    if state.settlement == "lost":
        return "its usage is not known: settle it by hand, then drop it"
    if what == "retry":
        return "the same bytes would be answered as before: repair it"
    if state.settlement in ("pending", "sent"):
        return "it is still being delivered: retry it"
    return "it carries no usage: drop it"


def tells_uncharged(row: Row) -> bool:
    """Whether the gate's answer itself tells that nothing was charged: it names a reason, and that is not a lease found
    closed, which an earlier commit may have closed by being charged."""
    try:
        hints = json.loads(row.receipt or "{}").get("hints", [])
        kinds = {hint["type"] for hint in hints}
    except (ValueError, AttributeError, KeyError, TypeError):
        return False
    return bool(kinds) and "lease.closed_at_commit" not in kinds


def _insert(db: sqlite3.Connection, wishes: Sequence[tuple[str, What, float]]) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        db.executemany("INSERT INTO orders (operation_id, what, at) VALUES (?, ?, ?)", wishes)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
