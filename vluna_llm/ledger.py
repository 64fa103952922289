"""The open operations of this process: every change of state goes through here, to the journal and to who waits.

One lock makes each transition atomic against the settler's, so that usage which turns up while a cancel is being
composed either withdraws it or follows it, and never slips between.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .context import Scope
from .errors import OutboxUnavailable
from .outbox import Journal, Row
from .settlement import receipt_of
from .telemetry import Telemetry
from .types import Receipt

_CACHED_ROWS = 5_000

Guard = contextlib.AbstractContextManager[bool]


class LedgerClosed(Exception):
    """The runtime was closed while an operation was about to be written: it belongs into the next one."""


class Watch:
    """How one operation ends, for whoever wants to know: its scopes, and callers that wait for the receipt.

    It is kept by those alone (by a scope while it is pending, by the `Operation` itself) and keeps none of them: of a
    backlog whose callers have gone, nothing stays in memory.
    """

    __slots__ = ("__weakref__", "_callbacks", "_guard", "_scopes", "closed", "last", "receipt")

    def __init__(self, scopes: tuple[Scope, ...], guard: Guard) -> None:
        self._scopes = tuple(map(weakref.ref, scopes))
        self.closed = False
        self.receipt: Receipt | None = None
        self.last: Row | None = None
        """The operation as a ledger stored it last, for its next ending: a journal may be given up in between."""
        self._guard = guard
        self._callbacks: list[Callable[[], None]] = []

    @property
    def scopes(self) -> list[Scope]:
        """The scopes that somebody still holds."""
        return [scope for found in self._scopes if (scope := found()) is not None]

    def call_when_closed(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the operation is settled; at once where it already is."""
        with self._guard:
            if not self.closed:
                self._callbacks.append(callback)
                return
        callback()

    def wait(self, timeout: float | None) -> bool:
        """Wait at most ``timeout`` seconds until the operation is settled."""
        if self.closed:
            return True
        done = threading.Event()
        self.call_when_closed(done.set)
        return done.wait(timeout)

    def close(self, operation_id: str, receipt: Receipt | None) -> None:
        """The operation is settled."""
        with self._guard:
            if self.closed:
                return
            self.closed, self.receipt = True, receipt
            callbacks, self._callbacks = self._callbacks, []
        for scope in self.scopes:
            scope.closed(operation_id, receipt)
        for callback in callbacks:
            callback()


class Ledger:
    """Applies state changes to rows, durably, and tells scopes and waiters when an operation is settled.

    Rows are cached, at most a few thousand; the journal holds them all. A row whose write failed stays in memory and is
    settled from there (``on_outbox_unavailable="allow"``).
    """

    def __init__(self, journal: Journal, telemetry: Telemetry) -> None:
        self.journal = journal
        self._telemetry = telemetry
        self._guard = threading.RLock()
        self._watching = threading.RLock()
        self.closed = False
        self.forgotten = 0
        """Settlements that could be written nowhere when the journal was given up."""
        self._rows: OrderedDict[str, Row] = OrderedDict()
        self._unwritten: dict[str, Row] = {}
        self._watches: weakref.WeakValueDictionary[str, Watch] = weakref.WeakValueDictionary()

    def open(self, row: Row, scopes: tuple[Scope, ...], estimated_xusd: int) -> Watch:
        """Store a new operation, before authorize is sent.

        Raises:
            OutboxUnavailable: the journal cannot be written; nothing was kept.
        """
        with self._guard:
            self._refuse_if_closed()
            self.journal.insert(row)
            self._remember(row)
        return self._watch(row.operation_id, scopes, estimated_xusd)

    def keep_in_memory(self, row: Row, scopes: tuple[Scope, ...], estimated_xusd: int) -> Watch:
        """Take an operation whose row could not be written."""
        with self._guard:
            self._refuse_if_closed()
            self._unwritten[row.operation_id] = row
        return self._watch(row.operation_id, scopes, estimated_xusd)

    def open_once(self, row: Row, scopes: tuple[Scope, ...], estimated_xusd: int) -> bool:
        """`open` for an operation whose id several callers arrive at; False where it is known already."""
        with self._guard:
            self._refuse_if_closed()
            if self._find(row.operation_id) is not None:
                return False
            try:
                if not self.journal.insert_new(row):
                    return False
                self._remember(row)
            except OutboxUnavailable as error:
                self._unwritten[row.operation_id] = row
                self._tell_unwritten(row.operation_id, error)
        self._watch(row.operation_id, scopes, estimated_xusd)
        return True

    def _watch(self, operation_id: str, scopes: tuple[Scope, ...], estimated_xusd: int) -> Watch:
        watch = Watch(scopes, self._watching)
        self._watches[operation_id] = watch
        for scope in scopes:
            scope.opened(operation_id, estimated_xusd, kept=watch)
        return watch

    def get(self, operation_id: str) -> Row | None:
        """The row as it stands; None where there is none.

        Raises:
            OutboxUnavailable: the journal cannot be read at this moment: there may be one.
        """
        with self._guard:
            return self._in_memory(operation_id) or self.journal.get(operation_id)

    def known(self, operation_id: str) -> Row | None:
        """The row as it stands; None where there is none, or the journal cannot be read at this moment."""
        with self._guard:
            return self._find(operation_id)

    def is_stored(self, operation_id: str) -> bool:
        """Whether the row is in the journal as it stands; False where it could not be written."""
        return operation_id not in self._unwritten

    def sync(self) -> None:
        """Make what was written survive a loss of power, too; told where that cannot be."""
        try:
            self.journal.sync()
        except OutboxUnavailable as error:
            self._telemetry.emit(
                "vluna.internal_error", "error", {"error.type": "OutboxUnavailable"}, message=str(error)
            )

    def apply(
        self,
        operation_id: str,
        change: Callable[[Row], Row],
        *,
        fallback: Row | None = None,
        watch: Watch | None = None,
    ) -> Row | None:
        """Replace a row by ``change(row)`` and store it where it differs; gives the row as it now stands.

        ``fallback`` is the operation as its owner knows it, and ``watch`` is who waits for it. Where the row is not in
        this journal any more (pruned since it was settled, or in that of a runtime that was closed, which somebody else
        took over), the change is made to what ``watch`` saw of it last, else to ``fallback``, and is stored only where
        it is another state: an ending that says nothing new must not have it composed and sent anew. Without a
        ``fallback`` what is gone is left to whoever has it now. ``change`` is called again where the row turned out to
        be another one: what it tells its caller is to be of the last time.

        Raises:
            LedgerClosed: nothing was changed; the next runtime has to be asked.
        """
        with self._guard:
            self._refuse_if_closed()
            if watch is not None and not watch.closed:
                self._watches.setdefault(operation_id, watch)
            lost_sight = False
            while (row := self._find(operation_id)) is not None:
                changed = change(row)
                if changed is row or self._store(row, changed, watch):
                    return changed
                # It is not as we knew it: the adoption has put a better one in its place, or somebody took it away.
                self._rows.pop(operation_id, None)
                lost_sight = True
            if lost_sight and not self._arrives(operation_id):
                self._tell_gone(operation_id)
            if fallback is None:
                return None
            row = fallback if watch is None or watch.last is None else watch.last
            changed = change(row)
            if changed.state == row.state:
                return row
            self._unwritten[operation_id] = row
            self._store(row, changed, watch)
            return changed

    def settled(self, row: Row, receipt: Receipt | None) -> None:
        """Nothing more will be sent for this operation by itself: tell who waits."""
        with self._guard:
            self._rows.pop(row.operation_id, None)
            if row.state.is_settled:
                self._unwritten.pop(row.operation_id, None)
            watch = self._watches.pop(row.operation_id, None)
        if watch is not None:
            watch.close(row.operation_id, receipt)

    def adopt(self, base_url: str, realm_id: str, paths: Sequence[Path] | None) -> Iterator[Row]:
        """The rows of dead processes that need care, taken over one after another (`Journal.adopting`)."""
        return self.journal.adopting(base_url, realm_id, paths)

    @property
    def locks(self) -> tuple[object, ...]:
        """The locks of the ledger and its journal (`vluna_llm.reentry`)."""
        return self._guard, self._watching, self.journal.lock

    def close(self) -> bool:
        """Give up the journal; True where its file is kept. Who waits for a settlement is told that it is held.

        Operations that are still in flight go on: they end in the runtime that comes next.
        """
        with self._guard:
            self.closed = True
            for key, unwritten in list(self._unwritten.items()):
                with contextlib.suppress(OutboxUnavailable):
                    self.journal.replace(unwritten)
                    del self._unwritten[key]
            unwritten_rows = self._unwritten.values()
            self.forgotten = sum(row.state.settlement in ("pending", "sent") for row in unwritten_rows)
            waiting = [(row, watch) for key, watch in self._watches.items() if (row := self._find(key)) is not None]
            kept = self.journal.close()
        for row, watch in waiting:
            if row.state.settlement in ("pending", "sent"):
                watch.close(row.operation_id, receipt_of(row, "held", None, "not delivered before close"))
        return kept

    # -- plumbing --------------------------------------------------------------------------------------------------

    def _refuse_if_closed(self) -> None:
        if self.closed:
            raise LedgerClosed

    def _find(self, operation_id: str) -> Row | None:
        try:
            return self._in_memory(operation_id) or self.journal.get(operation_id)
        except OutboxUnavailable:
            return None

    def _in_memory(self, operation_id: str) -> Row | None:
        return self._rows.get(operation_id) or self._unwritten.get(operation_id)

    def _store(self, old: Row, row: Row, watch: Watch | None) -> bool:
        """Store a row; False where it is not in the journal as ``old`` any more, and nothing was stored."""
        key = row.operation_id
        try:
            if key in self._unwritten:
                self.journal.replace(row)
                del self._unwritten[key]
            elif not self.journal.update(old, row):
                return False
        except OutboxUnavailable as error:
            self._unwritten[key] = row
            self._rows.pop(key, None)
            self._tell_unwritten(key, error)
        else:
            self._remember(row)
        if (watch := watch or self._watches.get(key)) is not None:
            watch.last = row
        return True

    def _arrives(self, operation_id: str) -> bool:
        try:
            return self.journal.arrives(operation_id)
        except OutboxUnavailable:
            return False

    def _tell_gone(self, operation_id: str) -> None:
        self._telemetry.emit(
            "vluna.internal_error",
            "error",
            {"vluna.operation.id": operation_id, "error.type": "RowGone"},
            message="the operation is no longer in this process's journal, where nobody else may write: was the row "
            "deleted, or the journal's lock removed? What is told of its work from now on is kept, and nothing else",
        )

    def _tell_unwritten(self, operation_id: str, error: OutboxUnavailable) -> None:
        self._telemetry.emit(
            "vluna.internal_error",
            "error",
            {"vluna.operation.id": operation_id, "error.type": "OutboxUnavailable"},
            message=f"{error}; the operation is kept in memory only",
        )

    def _remember(self, row: Row) -> None:
        self._rows[row.operation_id] = row
        if len(self._rows) > _CACHED_ROWS:
            self._rows.popitem(last=False)


def ended(row: Row) -> Row:
    """The row with the time at which its work ended."""
    return row if row.ended_at is not None else row.evolve(ended_at=time.time())
