"""Reading journals that other processes own, without taking part: nothing is locked, adopted or written."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .row import Row, from_values

_MARK = "journal-*.sqlite3"


@dataclass(frozen=True, slots=True)
class JournalFile:
    """One journal as it was found: its rows, oldest first, or why it could not be read."""

    path: Path
    rows: tuple[Row, ...] = ()
    problem: str | None = None


def journals_below(directory: Path) -> list[Path]:
    """The journal files in this directory and in those below it, by name."""
    return sorted(directory.rglob(_MARK)) if directory.is_dir() else []


def read_journal(path: Path) -> JournalFile:
    """Read one journal, of a living process or a dead one. A file that cannot be read is told, never raised."""
    try:
        with _opened(path) as db:
            values = db.execute("SELECT * FROM operations ORDER BY created_at, rowid").fetchall()
        return JournalFile(path, tuple(from_values(row) for row in values))
    except (OSError, sqlite3.Error) as error:
        return JournalFile(path, problem=str(error))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        return JournalFile(path, problem=f"written by another version ({type(error).__name__}: {error})")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5.0)
    db.row_factory = sqlite3.Row
    try:
        yield db
    finally:
        db.close()
