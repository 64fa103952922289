"""The rows of this process's journal, by how far they have come on their way to PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..errors import OutboxUnavailable
from ..ledger import Ledger
from ..operation import Settlement
from ..outbox import Row
from ..outbox.row import Stage
from ..outbox.staged import staged, staged_in
from ..telemetry import Telemetry

UNDELIVERED: tuple[Settlement, ...] = ("pending", "sent")
PUT_ASIDE: tuple[Settlement, ...] = ("quarantined", "refused")

PAGE = 200
"""Rows that are read at once."""


class Page(NamedTuple):
    """Ids of rows, oldest first, and the place behind which the next page begins; 0 where there is none.

    ``read`` is False where the journal could not be read, so that there may be others.
    """

    keys: list[str]
    after: int
    read: bool = True


class StagedRows:
    """Reads them from the journal, a page at a time. What cannot be read is told, and left for later.

    Args:
        ledger: the rows of this process.
        telemetry: where a journal that cannot be read is told.
    """

    def __init__(self, ledger: Ledger, telemetry: Telemetry) -> None:
        self._ledger = ledger
        self._telemetry = telemetry

    def page(self, stage: Stage | None, settlements: Sequence[Settlement], after: int = 0) -> Page:
        """The commits and ingests in this stage and one of these states, behind this place."""
        journal = self._ledger.journal
        try:
            if journal.path is not None:
                found = staged(journal.path, stage, settlements, after=after, limit=PAGE)
            else:  # it has one connection, for which callers wait meanwhile
                with journal.transaction() as db:
                    found = staged_in(db, stage, settlements, after=after, limit=PAGE)
        except (OSError, sqlite3.Error, OutboxUnavailable):
            self._telemetry.internal_error("sharing.staged")
            return Page([], 0, read=False)
        return Page([key for _, key in found], found[-1][0] if len(found) == PAGE else 0)

    def pages(self, stage: Stage | None, settlements: Sequence[Settlement]) -> Iterator[Page]:
        """All pages of them, each read when it is asked for."""
        page = self.page(stage, settlements)
        yield page
        while page.after:
            page = self.page(stage, settlements, page.after)
            yield page


def with_stage(stage: Stage | None) -> Callable[[Row], Row]:
    """Moves a row to this stage."""
    return lambda row: row.evolve(stage=stage)
