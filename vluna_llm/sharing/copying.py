"""Copies rows of this process to PostgreSQL: marked, offered, marked again, in batches and the oldest first."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..failpoints import hit
from ..ledger import Ledger
from ..outbox import Row
from ..usage.meters import MetersMode
from .handing import handed, stays
from .rows import UNDELIVERED, StagedRows, with_stage
from .workers import Workers

if TYPE_CHECKING:
    from ..outbox.postgres import SharedOutbox

_BATCH = 200
_HELD_IN_MEMORY = 10_000


class Copying:
    """The rows that have to be copied. Every method but `step` may be called from any thread.

    Args:
        shared: the shared outbox.
        ledger: the rows of this process.
        staged: reads them from the journal.
        guard: the lock of the shared stage.
        origin: who offers the rows, for a person who reads the table.
        copied: told of each row that PostgreSQL has; called with the lock held.
        meters: the setting ``VLUNA_LLM_METERS``.
    """

    def __init__(
        self,
        shared: SharedOutbox,
        ledger: Ledger,
        staged: StagedRows,
        guard: threading.RLock,
        origin: str,
        copied: Callable[[str], None],
        meters: MetersMode = "auto",
    ) -> None:
        self._shared = shared
        self._ledger = ledger
        self._staged = staged
        self._guard = guard
        self._origin = origin
        self._copied = copied
        self._meters = meters
        self._new: deque[str] = deque()  # never offered
        self._unsure: deque[str] = deque()  # offered, perhaps
        self._in_batch = 0  # taken from these two, and being copied at this moment
        self._unstorable: set[str] = set()
        self._more = True  # the journal may hold rows that were never offered
        self._unread = False  # and some of them could not be read
        self._unread_unsure = False  # nor some that were offered, perhaps

    def __len__(self) -> int:
        with self._guard:
            return len(self._new) + len(self._unsure) + self._in_batch

    def add(self, operation_id: str) -> None:
        """Copy this row, which was never offered."""
        with self._guard:
            if len(self._new) < _HELD_IN_MEMORY:
                self._new.append(operation_id)
            else:
                self._more = True

    def add_unsure(self, operation_id: str) -> None:
        """Copy this row, of which it is not known whether PostgreSQL has it."""
        with self._guard:
            self._unsure.append(operation_id)

    def recall(self) -> None:
        """Read the rows of which it is not known from the journal, where they came with that of a dead process."""
        for page in self._staged.pages("sharing", UNDELIVERED):
            with self._guard:
                self._unread_unsure = self._unread_unsure or not page.read
                there = set(self._unsure)
                self._unsure.extend(key for key in page.keys if key not in there)

    def never_offered(self) -> list[Row]:
        """The rows in memory that were never offered."""
        with self._guard:
            return self.to_deliver_here(self._new)

    def give_up(self) -> tuple[list[str], bool]:
        """Let go of the rows that were never offered; gives them, and whether the journal may hold more.

        They are looked for there when there is something to copy to again.
        """
        with self._guard:
            new = list(self._new)
            self._new.clear()
            more, self._more = self._more, True
        return new, more

    def to_deliver_here(self, keys: Iterable[str]) -> list[Row]:
        """The rows among these that are not on their way to PostgreSQL."""
        return [row for key in keys if (row := self._ledger.known(key)) is not None and row.stage is None]

    def look_again(self) -> None:
        """Look through the journal once more, where something in it could not be read."""
        if self._unread:
            self._unread, self._more = False, True
        if self._unread_unsure:
            self._unread_unsure = False
            self.recall()

    def step(self, workers: Workers) -> bool:
        """Copy one batch to PostgreSQL; whether there may be more.

        Raises:
            OutboxUnavailable: PostgreSQL is away. How far the batch came is written in its rows.
        """
        self._read_more()
        with self._guard:
            unsure = [self._unsure.popleft() for _ in range(min(_BATCH, len(self._unsure)))]
            new = [self._new.popleft() for _ in range(min(_BATCH, len(self._new)))]
            self._in_batch = len(unsure) + len(new)
        try:
            return self._copy(unsure, new, workers)
        except BaseException:
            with self._guard:
                self._unsure.extend((*unsure, *new))
            raise
        finally:
            self._in_batch = 0

    def _copy(self, unsure: Sequence[str], new: Sequence[str], workers: Workers) -> bool:
        if not unsure and not new:
            return False
        rows = [row for key in (*unsure, *new) if (row := self._marked(key, workers)) is not None]
        offered: list[Row] = []
        if rows:
            self._ledger.sync()
            hit("sharing.marked")
            offered = self._offered(rows, workers)
            hit("sharing.offered")
        for row in offered:
            self._ledger.apply(row.operation_id, with_stage("shared"))
            with self._guard:
                self._copied(row.operation_id)
        if offered:
            hit("sharing.shared")
        return True

    def _offered(self, rows: Sequence[Row], workers: Workers) -> list[Row]:
        from ..outbox.postgres import Unstorable

        plain = [row.evolve(stage=None, arrived_from=None) for row in rows]
        try:
            self._shared.offer(plain, self._origin)
            return list(rows)
        except Unstorable:
            if len(rows) == 1:
                self._never(rows[0], workers)
                return []
        return [row for one in rows for row in self._offered([one], workers)]

    def _never(self, row: Row, workers: Workers) -> None:
        """PostgreSQL cannot hold this row, and has not: it is delivered from here."""
        self._unstorable.add(row.operation_id)
        here = self._ledger.apply(row.operation_id, with_stage(None))
        if here is not None:
            workers.deliver_here([here])

    def _marked(self, operation_id: str, workers: Workers) -> Row | None:
        """The row, marked as being copied; None where it is not to be, or is being delivered from here."""

        def mark(now: Row) -> Row:
            ours = now.stage is None and now.arrived_from is None and not stays(now)
            ours = ours and operation_id not in self._unstorable
            if not ours or now.state.settlement not in UNDELIVERED:
                return now
            return handed(now, self._meters).evolve(stage="sharing")

        before = self._ledger.known(operation_id)
        if before is None:
            self._unread = True  # settled and pruned since, or it cannot be read now: then it is looked for again
        try:
            row = None if before is None else self._ledger.apply(operation_id, mark)
        except ConfigurationError:
            assert before is not None
            self._unstorable.add(operation_id)
            workers.deliver_here([before])  # where it is found out, too, and kept for a person
            return None
        if row is None or row.stage != "sharing" or row.state.settlement not in UNDELIVERED:
            return None
        if before is not None and before.stage is None:
            # A worker that had stored "sent" before the mark may be sending; one that comes later sees the mark.
            busy = workers.delivering(operation_id)
            row = self._ledger.known(operation_id)
            if row is not None and (busy or row.state.settlement not in UNDELIVERED):
                here = self._ledger.apply(operation_id, with_stage(None))
                if here is not None and here.state.settlement in UNDELIVERED:
                    # The worker may have seen the mark and given the row up.
                    workers.deliver_here([here])
                return None
        return row

    def _read_more(self) -> None:
        """Look through the journal for rows that were never offered, where there may be some beside those in memory."""
        with self._guard:
            if not self._more or self._new:
                return
            self._more = False
        for page in self._staged.pages(None, UNDELIVERED):
            self._unread = self._unread or not page.read
            with self._guard:
                self._new.extend(page.keys)
                if page.after and len(self._new) >= _HELD_IN_MEMORY:
                    self._more = True
                    return
