"""What becomes of a dead process's rows: which of them move, what they are where they go. Pure: no I/O, no locks."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from .row import COLUMNS, Row, changed_values, from_values, is_done

NAMES = tuple(COLUMNS)

Values = dict[str, Any]


class NotYet(Exception):
    """The file is left for later."""


class Batch:
    """Some rows of one file, in which each is followed by its columns as `NAMES` has them, after its number.

    Args:
        found: the rows.
        base_url: the gate to which rows may be delivered; others stay.
        realm_id: the realm.
    """

    def __init__(self, found: Sequence[sqlite3.Row], base_url: str, realm_id: str) -> None:
        self.numbers: list[int] = []
        """Those that leave the file: they are done, are moved, or are known better where they go."""
        self.ids: list[str] = []
        self.rows: dict[str, Row] = {}
        """Those that are copied, as they will be."""
        self.arrived: set[str] = set()
        """Those of them that are nobody else's any more."""
        self._values: dict[str, Values] = {}
        self._lost: set[str] = set()
        self.unread: str | None = None
        for number, *plain in found:
            values: Values = dict(zip(NAMES, plain, strict=True))
            if values["arrived_from"] or (values["base_url"], values["realm_id"]) != (base_url, realm_id):
                continue
            try:
                row = from_values(values)
            except (KeyError, TypeError, ValueError) as error:
                self.unread = f"{values['operation_id']}: {type(error).__name__}: {error}"
                continue
            self.numbers.append(number)
            self.ids.append(row.operation_id)
            if is_done(row):
                continue
            died = row.state.owner_died()
            if died is not row.state:
                self._lost.add(row.operation_id)
                row = row.evolve(state=died)
                values["settlement"] = died.settlement
            self.rows[row.operation_id], self._values[row.operation_id] = row, values

    def meets(self, found: sqlite3.Row) -> bool:
        """A row of the same operation is there already. True where it makes way for the one that comes.

        That is where the usage is known by the one that comes and not by the one that is there; a cancel that was sent
        by the latter is not forgotten. Else what is there is newer.
        """
        mine, theirs = from_values(dict(found)), self.rows[found["operation_id"]]
        if mine.arrived_from is not None:
            raise NotYet  # it is on its way from a third file as well: that one first
        if mine.state.usage is not None or theirs.state.usage is None or theirs.state.usage_source is None:
            del self.rows[theirs.operation_id]
            return False
        after_cancel = mine.state.completed(
            theirs.state.usage, theirs.state.usage_source, shared_lease=mine.derived, meters=theirs.state.meters
        )
        if mine.state.cancel_sent and after_cancel is not mine.state:
            merged = theirs.evolve(state=after_cancel, path=None, body=None, attempts=0, next_attempt_at=0.0)
            self.rows[theirs.operation_id] = merged
            self._values[theirs.operation_id].update(changed_values(theirs, merged))
        return True

    def copies(self, keys: Sequence[str], origin: str) -> list[Values]:
        """The values to store, as copies from this file."""
        mark = {"arrived_from": origin, "next_step": f"being taken over from {origin}"}
        return [{**self._values[key], **mark} for key in keys if key in self.rows]

    @property
    def need_care(self) -> list[Row]:
        """Those of the arrived that have to be delivered, or are lost since now."""
        care = (row for row in self.rows.values() if needs_delivery(row) or row.operation_id in self._lost)
        return [row for row in care if row.operation_id in self.arrived]


def needs_delivery(row: Row) -> bool:
    """Whether the row has to be delivered, and from here."""
    return row.state.settlement in ("pending", "sent") and row.stage is None
