"""The lanes of the shared outbox that this process holds at this moment, and the rows of them that are in hand.

A claimed row is delivered like any other; what is written goes to PostgreSQL under the claim. Where the claim was lost
meanwhile, nothing is written: the lane belongs to another host, which sends the same stored bytes under the same key.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ..delivery import Elsewhere
from ..errors import OutboxUnavailable
from ..outbox import Row
from ..types import Receipt

if TYPE_CHECKING:
    from ..outbox.postgres import Claim, SharedOutbox

Lane = tuple[str, str]
Settled = Callable[[Row, Receipt], None]


class _Held:
    """One claimed lane and its rows in hand."""

    __slots__ = ("claim", "rows")

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.rows: dict[str, Row] = {}


class Claims:
    """Which lanes are held. Every method may be called from any thread.

    Args:
        shared: the shared outbox.
        margin: seconds that a claim must still be good for when a delivery begins.
        settled: told of each row that is settled here.
        lost: told of each claim that was found lost while its row was being delivered.
    """

    def __init__(
        self, shared: SharedOutbox, margin: float, *, settled: Settled, lost: Callable[[Row, Claim], None]
    ) -> None:
        self._shared = shared
        self._margin = margin
        self._settled = settled
        self._lost = lost
        self._guard = threading.RLock()
        self._lanes: dict[Lane, _Held] = {}
        self._delivering: set[Lane] = set()

    @property
    def lock(self) -> object:
        """The lock of every method (`vluna_llm.reentry`)."""
        return self._guard

    def __len__(self) -> int:
        return len(self._lanes)

    def all(self) -> list[Claim]:
        """The claims that are held."""
        with self._guard:
            return [held.claim for held in self._lanes.values()]

    def take(self, claims: Iterable[Claim]) -> None:
        """These lanes were claimed."""
        with self._guard:
            for claim in claims:
                self._lanes[claim.lane] = _Held(claim)

    def renewed(self, claims: Iterable[Claim]) -> None:
        """Only these are still held."""
        kept = {claim.epoch: claim for claim in claims}
        with self._guard:
            for lane, held in list(self._lanes.items()):
                claim = kept.get(held.claim.epoch)
                if claim is None:
                    del self._lanes[lane]
                else:
                    held.claim = claim

    def in_hand(self, rows: Sequence[Row]) -> list[Row]:
        """Take rows of claimed lanes in hand; gives those that were not."""
        new = []
        with self._guard:
            for row in rows:
                held = self._lanes.get(row.lane)
                if held is not None and row.operation_id not in held.rows:
                    held.rows[row.operation_id] = row
                    new.append(row)
        return new

    def empty(self) -> list[Claim]:
        """The claims without a row in hand: more is to be read, or they are to be given back."""
        with self._guard:
            return [held.claim for lane, held in self._lanes.items() if not held.rows and lane not in self._delivering]

    def drop(self, claims: Iterable[Claim]) -> None:
        """These are held no longer."""
        with self._guard:
            for claim in claims:
                held = self._lanes.get(claim.lane)
                if held is not None and held.claim.epoch == claim.epoch:
                    del self._lanes[claim.lane]

    def idle(self) -> list[Claim]:
        """The claims of which nothing is being delivered at this moment."""
        with self._guard:
            return [held.claim for lane, held in self._lanes.items() if lane not in self._delivering]

    # -- for the workers -------------------------------------------------------------------------------------------

    def store_of(self, operation_id: str, lane: Lane) -> ClaimedStore | None:
        """Where a row in hand is kept while it is delivered; None where it is not in hand. `attempted` must follow."""
        with self._guard:
            held = self._lanes.get(lane)
            row = None if held is None else held.rows.get(operation_id)
            if held is None or row is None:
                return None
            self._delivering.add(lane)
            return ClaimedStore(self, held, row)

    def attempted(self, operation_id: str, lane: Lane) -> None:
        """The delivery ended, however it did: its row is read again where it is due again."""
        with self._guard:
            self._delivering.discard(lane)
            held = self._lanes.get(lane)
            if held is not None:
                held.rows.pop(operation_id, None)

    def check(self, held: _Held) -> None:
        """Raises `Elsewhere` where the claim is not good for a delivery that begins now."""
        if held.claim.until - time.monotonic() < self._margin:
            raise Elsewhere

    def update(self, held: _Held, old: Row, new: Row) -> None:
        """Write under the claim. Raises `Elsewhere` where that cannot be: what was to be written is forgotten."""
        from ..outbox.postgres import ClaimLost

        claim = held.claim
        try:
            self._shared.update(claim, old, new)
        except ClaimLost:
            self.drop([claim])
            self._lost(old, claim)
            raise Elsewhere from None
        except OutboxUnavailable:
            raise Elsewhere from None  # whether it was written is not known: the row is read again

    def settled(self, row: Row, receipt: Receipt) -> None:
        """A row was settled under its claim."""
        self._settled(row, receipt)


class ClaimedStore:
    """One row while it is delivered under a claim (`vluna_llm.delivery.Store`)."""

    def __init__(self, claims: Claims, held: _Held, row: Row) -> None:
        self._claims = claims
        self._held = held
        self._row = row

    def get(self, operation_id: str) -> Row | None:
        """The row as it was read under the claim: nobody else changes it."""
        self._claims.check(self._held)
        return self._row

    def apply(self, operation_id: str, change: Callable[[Row], Row]) -> Row | None:
        """Change the row in PostgreSQL; raises `Elsewhere` where that is not known to have happened."""
        changed = change(self._row)
        self._claims.update(self._held, self._row, changed)
        self._row = changed
        return changed

    def postpone(self, delay: float) -> None:
        """An error of ours struck: have the row left alone for so many seconds, where that can be written."""
        with contextlib.suppress(Exception):
            self.apply(self._row.operation_id, lambda now: now.evolve(next_attempt_at=time.time() + delay))

    def sync(self) -> None:
        """PostgreSQL has made it durable already."""

    def settled(self, row: Row, receipt: Receipt) -> None:
        """Nothing more will be sent for this row by itself."""
        self._claims.settled(row, receipt)
