"""Learns what became of the rows of this process that are in PostgreSQL, and settles them in the journal."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..failpoints import hit
from ..ledger import Ledger
from ..operation import Settlement
from ..outbox import Row
from ..settlement import receipt_of
from ..types import Hint, Receipt, ReceiptState
from .rows import PUT_ASIDE, UNDELIVERED, StagedRows, with_stage

if TYPE_CHECKING:
    from ..outbox.postgres import SharedOutbox

_ASKED_AT_ONCE = 1_000
_HELD_IN_MEMORY = 10_000
_LOOK_EVERY = (0.25, 5.0)


class Following:
    """The rows that wait for whoever delivers them. `look` and `follow` are the thread's, the others anybody's.

    Args:
        shared: the shared outbox.
        ledger: the rows of this process.
        staged: reads them from the journal.
        guard: the lock of the shared stage.
        missing: told of each row that PostgreSQL has lost; called with the lock held.
        told: called when a row was settled and who waits for it was told.
    """

    def __init__(
        self,
        shared: SharedOutbox,
        ledger: Ledger,
        staged: StagedRows,
        guard: threading.RLock,
        missing: Callable[[str], None],
        told: Callable[[], None],
    ) -> None:
        self._shared = shared
        self._ledger = ledger
        self._staged = staged
        self._guard = guard
        self._missing = missing
        self._told = told
        self._waiting: OrderedDict[str, float] = OrderedDict()  # and when the next attempt is due
        self._more = False  # the journal holds others that wait
        self._pause = _LOOK_EVERY[0]
        self._look_at = 0.0
        self._followed = 0

    def __len__(self) -> int:
        """How many rows wait; one more where the journal holds others."""
        with self._guard:
            return len(self._waiting) + self._more

    @property
    def next_at(self) -> float | None:
        """When it is to be asked again; None where nothing waits."""
        return self._look_at if self._waiting or self._more else None

    def add(self, operation_id: str) -> None:
        """PostgreSQL has this row: find out what becomes of it."""
        with self._guard:
            if len(self._waiting) >= _HELD_IN_MEMORY and operation_id not in self._waiting:
                self._more = True
                return
            self._waiting[operation_id] = 0.0
            self._pause = _LOOK_EVERY[0]

    def attempted(self, operation_id: str, delay: float) -> None:
        """The next attempt of this row, if it is one of ours, is due in so many seconds."""
        with self._guard:
            if operation_id in self._waiting:
                self._waiting[operation_id] = time.monotonic() + delay

    def later_than(self, seconds: float) -> bool:
        """Whether all that waits is tried again later than that."""
        with self._guard:
            until = time.monotonic() + seconds
            return not self._more and all(due > until for due in self._waiting.values())

    def soon(self) -> None:
        """Something may have become of them."""
        self._look_at = 0.0

    def recall(self) -> None:
        """Read the rows that wait from the journal, as many as memory holds."""
        self._more = False
        for page in self._staged.pages("shared", UNDELIVERED):
            with self._guard:
                self._waiting.update((key, 0.0) for key in page.keys if key not in self._waiting)
                if not page.read or (page.after and len(self._waiting) >= _HELD_IN_MEMORY):
                    self._more = True
                    return

    def look(self, stopping: Callable[[], bool]) -> None:
        """Ask what became of them, where that is due.

        Raises:
            OutboxUnavailable: PostgreSQL is away.
        """
        if self._look_at > time.monotonic():
            return
        if self._more and len(self._waiting) < _HELD_IN_MEMORY // 2:
            self.recall()
        with self._guard:
            keys = list(self._waiting)
        if not keys and not self._more:
            return
        settled = 0
        for first in range(0, len(keys), _ASKED_AT_ONCE):
            if stopping():
                return
            ended = self._shared.ended(keys[first : first + _ASKED_AT_ONCE])
            settled += sum(self.close(row, receipt_from(row)) for row in ended.rows)
            with self._guard:
                for key in ended.missing:  # the database was lost or set back: the keys are the same
                    self._waiting.pop(key, None)
                    self._missing(key)
            for key in ended.missing:
                self._ledger.apply(key, with_stage("sharing"))
        shortest, longest = _LOOK_EVERY
        self._pause = shortest if settled else min(longest, 1.5 * self._pause)
        self._look_at = time.monotonic() + self._pause

    def follow(self) -> None:
        """See whether an operator had rows repaired that had been put aside: a page of them each time.

        Raises:
            OutboxUnavailable: PostgreSQL is away.
        """
        if self._ledger.journal.path is None:
            return  # callers would wait while it is looked through, and it ends with the process
        page = self._staged.page("shared", PUT_ASIDE, self._followed)
        self._followed = page.after
        for ended in self._shared.ended(page.keys).rows:
            here = self._ledger.known(ended.operation_id)
            if here is not None and here.state.settlement != ended.state.settlement:
                self.close(ended, receipt_from(ended))

    def close(self, ended: Row, receipt: Receipt) -> bool:
        """A row has ended in PostgreSQL: settle it here; False where it is settled already, or not ours."""
        found = False

        def follow(now: Row) -> Row:
            nonlocal found
            found = False
            if now.stage is None or now.state.settlement not in (*UNDELIVERED, *PUT_ASIDE):
                return now
            found = True
            return now.evolve(
                state=ended.state,
                receipt=ended.receipt,
                last_error=ended.last_error,
                attempts=ended.attempts,
                held=False,
            )

        row = self._ledger.apply(ended.operation_id, follow)
        with self._guard:
            self._waiting.pop(ended.operation_id, None)
        if row is None or not found:
            return False
        hit("sharing.settled")
        self._ledger.settled(row, receipt)
        self._told()
        return True


def receipt_from(row: Row) -> Receipt:
    """The receipt of a row that another process settled, from what it stored of it."""
    told = json.loads(row.receipt or "{}")
    plain = receipt_of(row, told.get("state", _TOLD_AS.get(row.state.settlement, "held")), None, told.get("detail"))
    hints = tuple(
        Hint(hint["type"], {name: value for name, value in hint.items() if name != "type"})
        for hint in told.get("hints", ())
    )
    return replace(
        plain,
        amount_xusd=told.get("amount_xusd"),
        charged_xusd=told.get("charged_xusd"),
        commit_id=told.get("commit_id"),
        hints=hints,
    )


_TOLD_AS: dict[Settlement, ReceiptState] = {
    "booked": "booked",
    "rebooked": "rebooked",
    "quarantined": "quarantined",
    "refused": "refused",
    "lapsed": "lapsed",
}
