"""Claims lanes of PostgreSQL and feeds their rows to the workers, whichever host they come from."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .claims import Claims
from .workers import Workers

if TYPE_CHECKING:
    from ..outbox.postgres import Claim, SharedOutbox

_ROWS_OF_A_LANE = 20
_LANES = 16
_CLAIM_EVERY = 1.0


class Claiming:
    """Decides which lanes this host takes, keeps and gives back. Used by the thread of the shared stage.

    Args:
        shared: the shared outbox.
        claims: the lanes that are held.
        owner: the name under which they are.
        ttl: seconds for which a lane is claimed; renewed at a third of it.
    """

    def __init__(self, shared: SharedOutbox, claims: Claims, owner: str, ttl: float) -> None:
        self._shared = shared
        self._claims = claims
        self._owner = owner
        self._ttl = ttl
        self._claim_at = 0.0
        self._renew_at = 0.0
        self._forgotten = True  # PostgreSQL may think that we hold lanes of which we do not know

    @property
    def next_at(self) -> float:
        """When something is to be done again."""
        return min(self._claim_at, self._renew_at) if len(self._claims) else self._claim_at

    def soon(self) -> None:
        """There may be a lane to take."""
        self._claim_at = 0.0

    def away(self) -> None:
        """PostgreSQL cannot be asked: what is not being delivered is held no longer."""
        self._claims.drop(self._claims.idle())

    def back(self) -> None:
        """PostgreSQL answers again, and may hold lanes for us of which we do not know."""
        self._claim_at = 0.0
        self._forgotten = True

    def end(self) -> None:
        """Give the lanes back of which nothing is being delivered."""
        self._shared.release(self._claims.idle())

    def step(self, workers: Workers) -> None:
        """Keep the lanes that are being worked on, read more of them, give back the empty ones, take new ones.

        Raises:
            OutboxUnavailable: PostgreSQL is away.
        """
        now = time.monotonic()
        if self._forgotten or (len(self._claims) and self._renew_at <= now):
            self._claims.renewed(self._shared.renew(self._owner, self._claims.all(), self._ttl))
            self._renew_at = now + self._ttl / 3
            self._forgotten = False
        away = workers.gate_away_for()
        if away:
            self._give_back(self._claims.idle())  # a host that reaches the gate may take them
        elif away is None:
            self._read(self._claims.empty(), _ROWS_OF_A_LANE, workers)
        probe = away is not None
        room = (1 if probe else _LANES) - len(self._claims)
        if room <= 0 or self._claim_at > now or (away or 0.0) > 0.0:
            if self._claim_at <= now:
                self._claim_at = now + _CLAIM_EVERY * random.uniform(0.8, 1.2)
            return
        first = not len(self._claims)
        claims = self._shared.claim(self._owner, room, self._ttl)
        if first:
            self._renew_at = now + self._ttl / 3
        self._claim_at = now + _CLAIM_EVERY * random.uniform(0.8, 1.2)
        self._claims.take(claims)
        self._read(claims, 1 if probe else _ROWS_OF_A_LANE, workers)

    def _read(self, claims: Sequence[Claim], limit: int, workers: Workers) -> None:
        if not claims:
            return
        rows = self._shared.rows_of(claims, limit)
        workers.feed(self._claims.in_hand(rows))
        lanes = {row.lane for row in rows}
        empty = [claim for claim in claims if claim.lane not in lanes]
        if empty:
            self._give_back(empty)
            self._claim_at = 0.0

    def _give_back(self, claims: Sequence[Claim]) -> None:
        if claims:
            self._claims.drop(claims)
            self._shared.release(claims)
