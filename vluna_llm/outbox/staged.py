"""Reading a living journal of one's own by stage; what is in a file, through a connection that no caller waits for."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from ..operation import Settlement
from . import forks
from .row import Stage

_PATIENCE = 0.25


def staged(
    path: Path, stage: Stage | None, settlements: Sequence[Settlement], *, after: int, limit: int
) -> list[tuple[int, str]]:
    """Place and id of the commits and ingests in this stage and one of these states, by place, behind ``after``.

    Raises:
        sqlite3.Error: the file cannot be read.
    """
    with forks.inside(), contextlib.closing(_connected(path)) as db:
        return staged_in(db, stage, settlements, after=after, limit=limit)


def staged_in(
    db: sqlite3.Connection, stage: Stage | None, settlements: Sequence[Settlement], *, after: int, limit: int
) -> list[tuple[int, str]]:
    """`staged`, by this connection."""
    marks = ", ".join("?" * len(settlements))
    found = db.execute(
        f"SELECT rowid, operation_id FROM operations WHERE rowid > ? AND stage IS ? AND arrived_from IS NULL "  # noqa: S608
        f"AND route IN ('commit', 'ingest') AND settlement IN ({marks}) ORDER BY rowid LIMIT ?",
        (after, stage, *settlements, limit),
    )
    return [(place, operation_id) for place, operation_id in found.fetchall()]


def _connected(path: Path) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None)
