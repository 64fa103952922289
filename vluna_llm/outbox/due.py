"""Which settlements have to be delivered from a journal, chosen so that no customer hides the others."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

Lane = tuple[str, str]
"""The (principal, user) whose settlements go one after another (design rule 16)."""

# Those that are due come first, in every lane, so that what waits for a later attempt hides nothing behind it.
_DUE = """
SELECT operation_id, principal_id, user_id, next_attempt_at, place FROM (
    SELECT operation_id, principal_id, user_id, next_attempt_at, created_at, rowid AS number,
           next_attempt_at > :now AS later,
           row_number() OVER (
               PARTITION BY principal_id, user_id
               ORDER BY next_attempt_at > :now, max(next_attempt_at, :now), created_at, rowid
           ) AS place
    FROM operations
    WHERE settlement IN ('pending', 'sent') AND arrived_from IS NULL AND stage IS NULL
        AND operation_id NOT IN (SELECT operation_id FROM orders WHERE what = 'drop' AND operation_id IS NOT NULL)
)
WHERE place <= :per_lane + 1 ORDER BY later, created_at, number LIMIT :limit + 1
"""


class DueRows(list[tuple[str, Lane, float]]):
    """Id, lane and time of the next attempt (seconds since the epoch) of settlements that have to be delivered."""

    def __init__(self, found: Sequence[tuple[str, Lane, float]], *, complete: bool) -> None:
        super().__init__(found)
        self.complete = complete
        """Whether there are no others."""


def due_rows(db: sqlite3.Connection, limit: int, per_lane: int, now: float) -> DueRows:
    """`vluna_llm.outbox.journal.Journal.due`, by this connection."""
    found = db.execute(_DUE, {"now": now, "per_lane": per_lane, "limit": limit}).fetchall()
    chosen = [(op, (principal, user), at) for op, principal, user, at, place in found[:limit] if place <= per_lane]
    return DueRows(chosen, complete=len(chosen) == len(found))
